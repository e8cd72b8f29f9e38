"""What the tests of training share: tiny networks, tiny data, runs without files, archives like those of CIFAR."""

from __future__ import annotations

import io
import os
import signal
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastres import models
from fastres.train import Options, Trainer, datasets, network
from fastres.train.cifar import Kind
from fastres.train.distributed import World
from fastres.train.log import Log


def tiny(num_classes: int) -> nn.Module:
    """Three residual blocks."""
    return models.CifarResNet(models.BasicBlock, (1, 1, 1), num_classes)


def with_dropout(num_classes: int) -> nn.Module:
    """As tiny, with a layer that draws random numbers."""
    model = tiny(num_classes)
    model.fc = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, num_classes))
    return model


def smooth(num_classes: int) -> nn.Module:
    """As tiny, without kinks: where a ReLU's input is near 0, a rounding error changes a gradient by any amount."""
    model = tiny(num_classes)
    for module in list(model.modules()):
        if isinstance(getattr(module, "relu", None), nn.ReLU):
            module.relu = nn.Softplus()
    return model


def without_batch_norm(num_classes: int) -> nn.Module:
    """A gradient is a sum over the images."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)
    )


def data(train: int = 26, test: int = 10, augment: str = "crop-flip") -> datasets.Data:
    return datasets.synthetic(8, classes=3, train=train, test=test, augment=augment)


def options(model: str = "tiny", **given: Any) -> Options:
    """Two epochs of four steps on `data()`."""
    return Options.of(**{"data": "synthetic", "model": f"_train:{model}", "epochs": 2, "batch": 8, "lr": 0.05, **given})


def trainer(
    given: Options, folder: Path | None = None, images: datasets.Data | None = None, world: World | None = None
) -> Trainer:
    images = images or data()
    model = network.build(given.model, len(images.classes), fused=given.fused, seed=given.seed)
    return Trainer(given, model, images, world or World(torch.device("cpu")), Log(None), folder)


def signal_after(training: Trainer, step: int, number: int = signal.SIGTERM) -> None:
    """Lets a signal arrive at the end of this step: the next one is the last."""

    def note(done: int, loss: float) -> None:
        if done == step:
            os.kill(os.getpid(), number)

    training.log.step = note  # type: ignore[method-assign]


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """All leaves of nested dicts and lists, but for those that are times."""
    if isinstance(value, dict):
        found = [flat(part, f"{name}.{key}") for key, part in value.items() if key not in ("seconds", TIME)]
    elif isinstance(value, (list, tuple)):
        found = [flat(part, f"{name}.{i}") for i, part in enumerate(value)]
    else:
        return {name: value}
    return {key: leaf for part in found for key, leaf in part.items()}


TIME = "images_per_second"


def assert_same_bits(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Two states of a trainer are equal, bit for bit."""
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for name, value in a.items():
        same = torch.equal(value, b[name]) if isinstance(value, Tensor) else value == b[name]
        assert same, f"{name}: {value} and {b[name]}"


# ---- CIFAR


def images_and_labels(n: int, kind: Kind, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (n, 3072), dtype=np.uint8), random.integers(0, kind.classes, n)


def _string(text: bytes) -> bytes:
    return (b"U" + bytes([len(text)]) if len(text) < 256 else b"T" + struct.pack("<I", len(text))) + text


def _list(items: list[bytes]) -> bytes:
    return b"](" + b"".join(items) + b"e"


def python2_pickle(images: np.ndarray, labels: np.ndarray, key: str, dtype: bytes = b"u1") -> bytes:
    """Protocol 2 as Python 2 and NumPy of that time wrote it: strings of bytes, and numpy.core.multiarray."""
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R("
    array += b"K\x01J" + struct.pack("<i", len(images)) + b"M\x00\x0c\x86"
    array += (
        b"cnumpy\ndtype\n" + _string(dtype) + b"K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    array += b"\x89" + _string(images.tobytes()) + b"tb"
    items = [_string(b"data"), array, _string(key.encode()), _list([b"K" + bytes([label]) for label in labels])]
    return b"\x80\x02}(" + _string(b"batch_label") + _string(b"batch 1 of 5") + b"".join(items) + b"u."


def names_pickle(kind: Kind) -> bytes:
    names = [_string(f"class {i}".encode()) for i in range(kind.classes)]
    return b"\x80\x02}(" + _string(kind.names.encode()) + _list(names) + b"u."


def cifar_files(kind: Kind, form: str, n: int = 3) -> dict[str, bytes]:
    """The files of an archive, by name; n images in each."""
    files = {}
    for seed, name in enumerate((*kind.train, *kind.test)):
        images, labels = images_and_labels(n, kind, seed)
        if form == "python":
            files[name] = python2_pickle(images, labels, kind.label)
        else:
            coarse = np.zeros((n, kind.label_bytes - 1), np.uint8)
            files[f"{name}.bin"] = np.hstack([coarse, labels[:, None].astype(np.uint8), images]).tobytes()
    if form == "python":
        files[kind.meta] = names_pickle(kind)
    else:
        files[kind.text] = "".join(f"class {i}\n" for i in range(kind.classes)).encode() + b"\n"
    return files


def write_archive(path: Path, folder: str, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
