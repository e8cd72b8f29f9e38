"""Features: their values, and the cache that keeps them."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _train import data, tiny
from torch import nn

from fastres import transfer
from fastres.errors import UserError
from fastres.train.datasets import ArrayImages, Data
from fastres.train.folder import ImageFolder
from fastres.transfer import features as features_module


@pytest.fixture
def backbone() -> nn.Module:
    return transfer.feature_extractor(tiny(3))


@pytest.fixture
def images() -> Data:
    return data(37, 5, augment="none")


def get(folder: Path, backbone: nn.Module, images: Data) -> tuple[transfer.Features, str]:
    return transfer.cached(folder, backbone, images.train, images.mean, images.std)


def test_values(backbone: nn.Module, images: Data) -> None:
    """Those of the network in float64 on images that are normalised by hand, in the order of the data set."""
    found = transfer.extract(backbone, images.train, images.mean, images.std)
    assert isinstance(images.train, ArrayImages) and found.seconds > 0
    assert torch.equal(found.labels, images.train.labels)
    assert found.values.shape == (37, 64) and not found.values.requires_grad
    x = (images.train.images.double() / 255 - 0.5) / 0.25
    model = transfer.feature_extractor(backbone_with_head(backbone), fuse=False).double()
    with torch.no_grad():
        torch.testing.assert_close(found.values.double(), model(x), rtol=1e-4, atol=1e-5)


def backbone_with_head(backbone: nn.Module) -> nn.Module:
    model = tiny(3)
    model.load_state_dict(backbone.state_dict(), strict=False)
    return model


def test_computed_once(backbone: nn.Module, images: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, notice = get(tmp_path / "a" / "b", backbone, images)
    assert notice.startswith("written to")
    monkeypatch.setattr(features_module, "extract", None)  # not called again
    again, notice = get(tmp_path / "a" / "b", backbone, images)
    assert notice.startswith("read from") and again.seconds == 0.0
    assert torch.equal(first.values, again.values) and torch.equal(first.labels, again.labels)


def test_the_file_holds_no_pickle(backbone: nn.Module, images: Data, tmp_path: Path) -> None:
    get(tmp_path, backbone, images)
    (path,) = tmp_path.iterdir()
    with np.load(path, allow_pickle=False) as file:
        assert sorted(file.files) == ["features", "key", "labels"] and file["features"].dtype == np.float32


def test_other_inputs_have_other_keys(backbone: nn.Module, images: Data) -> None:
    def key(network: nn.Module = backbone, train: Any = images.train, mean: Any = images.mean) -> str:
        return features_module.key(network, train, mean, images.std)

    keys = [key(), key(mean=(0.5, 0.5, 0.4)), key(transfer.feature_extractor(backbone_with_head(backbone), fuse=False))]
    with torch.no_grad():
        for tensor in (backbone.bn1.running_var, backbone.layer3[0].conv2.weight):
            old = tensor.clone()
            tensor[-1:] += 1e-6
            keys.append(key())
            tensor.copy_(old)
    assert isinstance(images.train, ArrayImages)
    flipped = images.train.images.clone()
    flipped[-1, -1, -1, -1] ^= 1
    keys.append(key(train=ArrayImages(flipped, images.train.labels)))
    keys.append(key(train=ArrayImages(images.train.images, images.train.labels.roll(1))))
    strided = transfer.feature_extractor(backbone_with_head(backbone))
    strided.layer2[0].conv1.stride = (1, 1)  # other features of the same weights
    keys.append(key(strided))
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]  # nothing else is in it


def test_keys_of_folders(backbone: nn.Module, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        image.new("RGB", (9, 9), "red").save(tmp_path / "train" / name / "a.png")

    def key(size: int = 8) -> str:
        return features_module.key(backbone, ImageFolder(tmp_path, ("train",), size), (0.5,) * 3, (0.5,) * 3)

    keys = [key(), key(9)]
    assert key() == keys[0]
    os.utime(tmp_path / "train" / "cat" / "a.png", (1, 1))
    keys.append(key())
    (tmp_path / "train" / "cat" / "a.png").rename(tmp_path / "train" / "dog" / "b.png")
    image.new("RGB", (9, 9), "red").save(tmp_path / "train" / "cat" / "c.png")
    keys.append(key())
    assert len(set(keys)) == 4


def _archive(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "damage", ["cut", "bit", "empty", "pickle", "other key", "short", "not finite", "dtype", "missing"]
)
def test_a_damaged_cache_is_made_anew(damage: str, backbone: nn.Module, images: Data, tmp_path: Path) -> None:
    first, _ = get(tmp_path, backbone, images)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    middle = len(good) // 2
    path.write_bytes(
        {
            "cut": lambda: good[:middle],
            "bit": lambda: good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
            "empty": lambda: b"",
            "pickle": lambda: _archive(**{**arrays, "features": np.array([print], dtype=object)}),
            "other key": lambda: _archive(**{**arrays, "key": np.array("0" * 64)}),
            "short": lambda: _archive(**{**arrays, "features": arrays["features"][:-1]}),
            "not finite": lambda: _archive(**{**arrays, "features": np.full_like(arrays["features"], np.nan)}),
            "dtype": lambda: _archive(**{**arrays, "features": arrays["features"].astype(np.float64)}),
            "missing": lambda: _archive(key=arrays["key"], features=arrays["features"]),
        }[damage]()
    )
    again, notice = get(tmp_path, backbone, images)
    assert "is unusable" in notice and "made anew" in notice and "\n" not in notice
    assert torch.equal(first.values, again.values)
    assert get(tmp_path, backbone, images)[1].startswith("read from")


def test_a_cache_that_cannot_be_written(backbone: nn.Module, images: Data, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found, notice = get(tmp_path / "file", backbone, images)
    assert len(found.values) == 37 and notice.startswith("not cached: cannot write")


def test_what_gives_no_features(images: Data) -> None:
    maps = nn.Sequential(nn.Conv2d(3, 2, 3))
    with pytest.raises(UserError, match=r"gives \(16, 2, 6, 6\), not a vector"):
        transfer.extract(maps, images.train, images.mean, images.std)
    broken = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    with torch.no_grad():
        broken[1].bias[0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        transfer.extract(broken, images.train, images.mean, images.std)
