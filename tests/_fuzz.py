"""What fuzzing reads: for each kind of file some good ones, and a function that reads bytes as the package does a file.
It returns None, or the UserError; anything else that is raised is a finding."""

from __future__ import annotations

import functools
import gzip
import importlib.util
import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _train import cifar_files, data, images_and_labels, names_pickle, python2_pickle, write_archive
from torch import nn

from fastres import models
from fastres.errors import UserError
from fastres.images import open_image
from fastres.kernels import choices
from fastres.kernels.triton import tuning
from fastres.train import Options, Trainer, checkpoint, cifar, network
from fastres.train.distributed import World
from fastres.train.log import Log
from fastres.transfer import features


@dataclass(frozen=True)
class Target:
    """A kind of file: good ones, how it is read, and the module that reads it, if it may not be there."""

    seeds: Callable[[], list[bytes]]
    load: Callable[[Path], object]
    name: str
    needs: str = ""

    def there(self) -> bool:
        return not self.needs or importlib.util.find_spec(self.needs) is not None

    def read(self, folder: Path | None, content: bytes) -> UserError | None:
        """folder: where the file is to be; None: in a temporary one."""
        if folder is None:
            with tempfile.TemporaryDirectory() as place:
                return self.read(Path(place), content)
        path = folder / self.name
        path.write_bytes(content)
        try:
            self.load(path)
        except UserError as error:
            return error
        return None


def check(error: UserError | None) -> None:
    """One line, that is not empty."""
    assert error is None or len(str(error).strip().splitlines()) == 1


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def _load_weights(path: Path) -> None:
    """All or nothing."""
    into = model()
    before = {key: value.clone() for key, value in into.state_dict().items()}
    try:
        models.load_checkpoint(into, path)
    except UserError:
        assert all(torch.equal(value, before[key]) for key, value in into.state_dict().items())
        raise


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


@functools.cache
def _checkpoints() -> list[bytes]:
    state = model().state_dict()
    return [saved(state), saved({"state_dict": state}, _use_new_zipfile_serialization=False)]


@functools.cache
def _safetensors() -> list[bytes]:
    from safetensors.torch import save

    return [save(dict(model().state_dict()))]


def run() -> tuple[Trainer, dict[str, Any]]:
    """A trainer that has done nothing, and the state of a run like it."""
    options = Options.of(data="synthetic", epochs=1, batch=8, ema=0.9, out="unused")
    images = data(augment="none")
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    trainer = Trainer(options, net, images, World(torch.device("cpu")), Log(None), None)
    return trainer, trainer.state()


@functools.cache
def _runs() -> list[bytes]:
    return [saved({"format": checkpoint.FORMAT, **run()[1]})]


def _load_run(path: Path) -> None:
    content = checkpoint.load(path)
    options = checkpoint.restored(Options, content.get("options"), path)
    options.check()
    network.check_named(options.model, {})
    run()[0].load_state(content)


@functools.cache
def _images() -> list[bytes]:
    from PIL import Image

    image, found = Image.radial_gradient("L").resize((9, 7)).convert("RGB"), []
    for kind in ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "PPM"):
        buffer = io.BytesIO()
        image.save(buffer, kind)
        found.append(buffer.getvalue())
    return found


def _choices() -> list[bytes]:
    rules = [{"kernel": "cuda", "channels_last": True, "most_bytes": 4096}, {"kernel": "triton"}]
    return [json.dumps({"measured": {}, "ops": {"bn_act": rules}}).encode()]


def _read_sizes(path: Path) -> None:
    tuning._read.cache_clear()
    tuning._read(str(path))


KIND = cifar.KINDS["cifar10"]


def _archive(form: str) -> bytes:
    """Not compressed: what is damaged is to be more than gzip's checksum."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "x.tar.gz")
        write_archive(path, getattr(KIND, form), cifar_files(KIND, form, n=1))
        return gzip.decompress(path.read_bytes())


def _read_archive(form: str, path: Path) -> None:
    path.write_bytes(gzip.compress(path.read_bytes(), 0))
    parse = cifar._binary if form == "binary" else cifar._pickled
    cifar._guarded(path, functools.partial(cifar._from_archive, path, getattr(KIND, form), parse, KIND))


def _pickles() -> list[bytes]:
    return [python2_pickle(*images_and_labels(1, KIND, 0), KIND.label), names_pickle(KIND)]


def _unpickle(path: Path) -> None:
    def parse() -> Any:
        content = cifar._unpickle(path.read_bytes())
        if "data" in content:
            cifar._pixels(content["data"])
        return content

    cifar._guarded(path, parse)


def cifar_record(label: int) -> bytes:
    return bytes([label]) + bytes(3072)


def read_records(folder: Path, content: bytes) -> UserError | None:
    for name in (*KIND.train, *KIND.test):
        (folder / f"{name}.bin").write_bytes(content)
    (folder / KIND.text).write_text("\n".join("abcdefghij"))
    try:
        cifar.read(folder, KIND)
    except UserError as error:
        return error
    return None


@functools.cache
def _features() -> list[bytes]:
    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, key=np.array("k"), features=np.ones((2, 3), np.float32), labels=np.zeros(2, np.int64))
    return [buffer.getvalue()]


def _read_features(path: Path) -> None:
    try:
        features._read(path, "k", 2)
    except ValueError as error:  # `cached` makes the file anew
        raise UserError(str(error)) from error


def _decisions() -> list[bytes]:
    from fastres import decisions

    site = decisions.Site("layer1.0", "eval", (1, 64, 8, 8), "float32", "channels_last", 1.0, 0.5, "fused")
    machine = {"device": "cpu", "name": "a processor", "isa": "avx2", "threads": 2}
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "x.json")
        decisions.TuneReport(machine, decisions.versions(), [site]).save(path)
        return [path.read_bytes()]


def _read_decisions(path: Path) -> None:
    from fastres import decisions

    decisions.read(path)


TARGETS = {
    "checkpoint": Target(_checkpoints, _load_weights, "x.pt"),
    "safetensors": Target(_safetensors, _load_weights, "x.safetensors"),
    "run": Target(_runs, _load_run, "last.pt"),
    "image": Target(_images, open_image, "x.png"),
    "choices": Target(_choices, choices.read, "sm_90.json"),
    "block sizes": Target(lambda: [b'{"cpu": {"k": {"BLOCK": 8}}}'], _read_sizes, "sizes.json"),
    "binary archive": Target(lambda: [_archive("binary")], functools.partial(_read_archive, "binary"), "x.tar.gz"),
    "python archive": Target(lambda: [_archive("python")], functools.partial(_read_archive, "python"), "x.tar.gz"),
    "pickle": Target(_pickles, _unpickle, "data_batch_1"),
    "decisions": Target(_decisions, _read_decisions, "tuned.json", needs="fastres.decisions"),
    "features": Target(_features, _read_features, "x.npz"),
}
