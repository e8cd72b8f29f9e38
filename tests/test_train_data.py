"""What is trained on: digits, CIFAR's archives, folders; and what is wrong with them."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from _train import cifar_files, images_and_labels, names_pickle, options, python2_pickle, trainer, write_archive

from fastres.errors import UserError
from fastres.train import Options, cifar, datasets
from fastres.train.folder import ImageFolder


def test_digits_are_split_the_same_way_always() -> None:
    pytest.importorskip("sklearn")
    data = datasets.digits()
    assert (len(data.train), len(data.test), len(data.classes)) == (1400, 397, 10)
    x, y = data.test.__getitems__([0, 1, 2])  # type: ignore[misc]
    assert x.shape == (3, 3, 32, 32) and x.dtype == torch.uint8 and y.dtype == torch.int64
    assert torch.equal(x[:, 0], x[:, 1]) and y.tolist() == [2, 8, 2]
    whole = torch.cat([data.train.images, data.test.images])  # type: ignore[attr-defined]
    assert len(whole.flatten(1).unique(dim=0)) == 1797  # no image is on both sides


def test_synthetic_images_are_seeded_and_can_be_told_apart() -> None:
    data = datasets.synthetic(16, seed=1)
    again, other = datasets.synthetic(16, seed=1), datasets.synthetic(16, seed=2)
    x, y = data.train.images.float(), data.train.labels  # type: ignore[attr-defined]
    assert torch.equal(data.train.images, again.train.images)  # type: ignore[attr-defined]
    assert not torch.equal(data.train.images, other.train.images)  # type: ignore[attr-defined]
    means = torch.stack([x[y == label].mean(0) for label in range(10)])
    test = data.test.images.float()  # type: ignore[attr-defined]
    nearest = (test.unsqueeze(1) - means).flatten(2).norm(dim=2).argmin(1)
    assert (nearest == data.test.labels).float().mean() > 0.95  # type: ignore[attr-defined]


@pytest.mark.parametrize("form", ["python", "binary"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("place", ["archive", "folder", "inside"])
def test_cifar_in_every_form(name: str, form: str, place: str, tmp_path: Path) -> None:
    kind = cifar.KINDS[name]
    folder = getattr(kind, form)
    files = cifar_files(kind, form)
    root = tmp_path
    if place == "archive":
        write_archive(tmp_path / f"{kind.name}-{form}.tar.gz", folder, files)
    else:
        (tmp_path / folder).mkdir()
        for file, content in files.items():
            (tmp_path / folder / file).write_bytes(content)
        root = tmp_path if place == "folder" else tmp_path / folder
    data = datasets.load(Options.of(data=name, root=str(root), augment="none"))
    assert (len(data.train), len(data.test)) == (3 * len(kind.train), 3)
    assert data.classes == [f"class {i}" for i in range(kind.classes)]
    x, y = data.train.__getitems__(range(len(data.train)))  # type: ignore[misc]
    expected = [images_and_labels(3, kind, seed) for seed in range(len(kind.train))]
    assert torch.equal(x, torch.from_numpy(np.concatenate([e[0] for e in expected])).view(-1, 3, 32, 32))
    assert y.tolist() == np.concatenate([e[1] for e in expected]).tolist()


def test_cifar_written_by_python_3_reads_too(tmp_path: Path) -> None:
    kind = cifar.KINDS["cifar100"]
    files = cifar_files(kind, "python")
    images, labels = images_and_labels(3, kind, 0)
    files["train"] = pickle.dumps({"data": images, "fine_labels": labels.tolist()}, protocol=4)
    write_archive(tmp_path / "cifar-100-python.tar.gz", kind.python, files)
    (x, y), _, _ = cifar.read(tmp_path, kind)
    assert np.array_equal(x.view(3, -1).numpy(), images) and y.tolist() == labels.tolist()


class Evil:
    """Its pickle creates a file."""

    def __reduce__(self) -> tuple:
        return (open, ("evil", "w"))


def ten(n: int = 3) -> tuple[np.ndarray, np.ndarray]:
    return images_and_labels(n, cifar.KINDS["cifar10"], 0)


BAD_PICKLES = {
    "asks for io.open": lambda: pickle.dumps(Evil()),
    "an array of 'O8', not of bytes": lambda: python2_pickle(*ten(), "labels", dtype=b"O8"),
    "corrupt": lambda: python2_pickle(*ten(), "labels")[:-4000],
    "no dict": lambda: pickle.dumps([1, 2]),
    "no 'labels'": lambda: python2_pickle(*ten(), "fine_labels"),
    "2 images with 3 labels|14 images with 15 labels": lambda: python2_pickle(ten()[0][:2], ten()[1], "labels"),
    "an array of": lambda: python2_pickle(ten()[0][:, :100], ten()[1], "labels"),
    "a label is not in 0..9": lambda: python2_pickle(ten()[0], ten()[1] + 10, "labels"),
    "not an array": lambda: pickle.dumps({"data": b"abc", "labels": [1]}, protocol=4),
    "not a list of numbers": lambda: pickle.dumps({"data": ten()[0], "labels": ["x"] * 3}, protocol=4),
    "persistent": lambda: b"\x80\x02U\x01xQ.",
    "damaged pickle": lambda: b"\x80\x02}(]K\x01u.",  # a list as a key
}


@pytest.mark.parametrize("says", BAD_PICKLES)
def test_corrupt_or_hostile_pickles_are_refused(says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kind = cifar.KINDS["cifar10"]
    files = cifar_files(kind, "python")
    files["data_batch_3"] = BAD_PICKLES[says]()
    write_archive(tmp_path / "cifar-10-python.tar.gz", kind.python, files)
    with pytest.raises(UserError, match="cifar-10-python.tar.gz: corrupt or incomplete") as error:
        cifar.read(tmp_path, kind)
    assert any(text in str(error.value) for text in says.split("|")) and "\n" not in str(error.value)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("form", ["python", "binary"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "a file missing", "no names", "too few bytes"])
def test_damaged_archives_are_named(damage: str, form: str, tmp_path: Path) -> None:
    kind = cifar.KINDS["cifar10"]
    archive = tmp_path / f"cifar-10-{form}.tar.gz"
    files = cifar_files(kind, form)
    first = next(iter(files))
    if damage == "a file missing":
        del files[first]
    elif damage == "no names":
        files = {n: content for n, content in files.items() if "meta" not in n}
    elif damage == "too few bytes":
        files[first] = files[first][:-7]
    write_archive(archive, getattr(kind, form), files)
    content = archive.read_bytes()
    half = len(content) // 2
    if damage == "cut":
        archive.write_bytes(content[:half])
    elif damage == "flipped":
        archive.write_bytes(content[:half] + bytes(255 - b for b in content[half : half + 50]) + content[half + 50 :])
    elif damage in ("empty", "text"):
        archive.write_bytes(b"" if damage == "empty" else b"<html>404 not found</html>")
    with pytest.raises(UserError) as error:
        cifar.read(tmp_path, kind)
    assert archive.name in str(error.value) and "corrupt or incomplete" in str(error.value)


def test_a_root_without_data_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither cifar-10-python.tar.gz nor cifar-10-binary.tar.gz"):
        cifar.read(tmp_path, cifar.KINDS["cifar10"])
    with pytest.raises(UserError, match="no such folder"):
        cifar.read(tmp_path / "missing", cifar.KINDS["cifar10"])
    with pytest.raises(UserError, match="needs --root"):
        datasets.load(Options.of(data="cifar10"))


def test_names_of_too_few_classes(tmp_path: Path) -> None:
    kind = cifar.KINDS["cifar10"]
    files = {**cifar_files(kind, "python"), kind.meta: names_pickle(cifar.KINDS["cifar100"])}
    write_archive(tmp_path / "cifar-10-python.tar.gz", kind.python, files)
    with pytest.raises(UserError, match="corrupt"):
        cifar.read(tmp_path, kind)


def photo(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    pytest.importorskip("PIL")
    for part in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            for i in range(3):
                photo(tmp_path / part / name / f"{i}.png", (100 * label, 10 * i, 200))
    return tmp_path


def test_folders_of_images(photos: Path) -> None:
    data = datasets.load(Options.of(data="folder", root=str(photos), size=16))
    assert (data.classes, len(data.train), len(data.test)) == (["cat", "dog"], 6, 6)
    data.train.set_epoch(0, 0)
    x, y = data.train.__getitems__([4, 1])  # type: ignore[misc]
    assert x.shape == (2, 3, 16, 16) and x.dtype == torch.uint8 and y.tolist() == [1, 0]
    assert x[0, :, 8, 8].tolist() == [100, 10, 200] and x[1, :, 8, 8].tolist() == [0, 10, 200]


def test_crops_depend_on_seed_epoch_and_image_only(photos: Path) -> None:
    from PIL import Image

    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(photos / "train" / "cat" / "0.png")

    def crop(seed: int, epoch: int, indices: list[int]) -> torch.Tensor:
        images = ImageFolder(photos, ("train",), 16, random=True)
        images.set_epoch(seed, epoch)
        return images.__getitems__(indices)[0][-1]  # type: ignore[index]

    first = crop(0, 0, [0])
    assert torch.equal(crop(0, 0, [3, 2, 0]), first)
    assert not torch.equal(crop(0, 1, [0]), first) and not torch.equal(crop(1, 0, [0]), first)


def test_workers_change_nothing(photos: Path) -> None:
    data = datasets.load(Options.of(data="folder", root=str(photos), size=16))
    found = []
    for workers in (0, 2):
        training = trainer(options(workers=workers), images=data)
        data.train.set_epoch(0, 1)
        found.append([x for x, _ in training._batches(data.train, [[0, 3], [5, 1], [2, 4]])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_in_one_line(photos: Path, workers: int) -> None:
    bad = photos / "train" / "dog" / "1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    data = datasets.load(Options.of(data="folder", root=str(photos), size=16))
    with pytest.raises(UserError) as error:
        trainer(options(workers=workers, batch=6), images=data).run()
    assert str(bad) in str(error.value) and "\n" not in str(error.value)


def test_bad_folders(photos: Path, tmp_path: Path) -> None:
    def load(root: Path) -> None:
        datasets.load(Options.of(data="folder", root=str(root)))

    with pytest.raises(UserError, match="no folder .*train"):
        load(tmp_path / "missing")
    photo(photos / "val" / "fish" / "0.png", (0, 0, 0))
    with pytest.raises(UserError, match="classes that are not trained: fish"):
        load(photos)
    (photos / "train" / "fish").mkdir()
    with pytest.raises(UserError, match="no images in .*fish"):
        load(photos)
    (tmp_path / "flat" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="one for each class"):
        load(tmp_path / "flat")
