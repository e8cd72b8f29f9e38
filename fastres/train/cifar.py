"""CIFAR-10 and CIFAR-100 from the archives of their authors, or from what lies unpacked beside them.

Both forms are read: the binary one (records of labels and 3,072 bytes: red, green, blue, each 32 x 32), and the Python
one, whose pickles are read by an unpickler that knows nothing but arrays of bytes. Nothing is unpacked to the disk.
"""

from __future__ import annotations

import functools
import gzip
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastres.errors import UserError

__all__ = ["KINDS", "Kind", "read"]

_PIXELS = 3 * 32 * 32
#: No file of the archives is as large: more would be a decompression bomb.
_MOST_BYTES = 256 << 20
#: No archive is as large, unpacked.
_MOST_BYTES_IN_ALL = 1 << 30


@dataclass(frozen=True)
class Kind:
    """What the archives of a data set hold.

    Attributes:
        python, binary: folders in the archives NAME-python.tar.gz and NAME-binary.tar.gz.
        train, test: names of the files; those of the binary form end in ".bin".
        label, names: keys of the pickles: of the labels, and of the class names in `meta`.
        meta, text: where the class names are: a pickle, and a text file in the binary form.
        label_bytes: a record's labels in the binary form; the last is the class.
    """

    name: str
    python: str
    binary: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    label: str
    names: str
    meta: str
    text: str
    label_bytes: int
    classes: int


KINDS = {
    "cifar10": Kind(
        name="cifar-10",
        python="cifar-10-batches-py",
        binary="cifar-10-batches-bin",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test=("test_batch",),
        label="labels",
        names="label_names",
        meta="batches.meta",
        text="batches.meta.txt",
        label_bytes=1,
        classes=10,
    ),
    "cifar100": Kind(
        name="cifar-100",
        python="cifar-100-python",
        binary="cifar-100-binary",
        train=("train",),
        test=("test",),
        label="fine_labels",
        names="fine_label_names",
        meta="meta",
        text="fine_label_names.txt",
        label_bytes=2,
        classes=100,
    ),
}

_DAMAGE = (EOFError, KeyError, OSError, RecursionError, TypeError, ValueError)

Part = tuple[Tensor, Tensor]
Found = tuple[Part, Part, list[str]]
Read = Callable[[str], bytes]


def read(root: Path, kind: Kind) -> Found:
    """Images, uint8 (N, 3, 32, 32), and labels, int64 (N), for training and for the test; and the classes' names.

    Args:
        root: a folder with an archive or with its unpacked folder, or that folder itself.

    Raises:
        UserError: if there is none, or it is corrupt or incomplete.
    """
    if not root.is_dir():
        raise UserError(f"no such folder: {root}")
    for folder, parse, end, form in ((kind.python, _pickled, "", "python"), (kind.binary, _binary, ".bin", "binary")):
        for place in (root / folder, root):
            if (place / (kind.test[0] + end)).is_file():
                return _guarded(place, functools.partial(parse, functools.partial(_file, place), kind))
        archive = root / f"{kind.name}-{form}.tar.gz"
        if archive.is_file():
            return _guarded(archive, functools.partial(_from_archive, archive, folder, parse, kind))
    raise UserError(
        f"{root} has neither {kind.name}-python.tar.gz nor {kind.name}-binary.tar.gz, nor their folders "
        f"{kind.python} and {kind.binary}"
    )


def _guarded(source: Path, parse: Callable[[], Found]) -> Found:
    """What a damaged archive raises, in one line that names it."""
    try:
        return parse()
    except (*_DAMAGE, pickle.UnpicklingError, tarfile.TarError, zlib.error) as error:
        what = f"no {error.args[0]!r} in it" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise UserError(f"cannot read {source}: corrupt or incomplete ({what}); get it again") from error


def _from_archive(archive: Path, folder: str, parse: Callable[[Read, Kind], Found], kind: Kind) -> Found:
    # As a stream of blocks: what comes out of gzip is counted, also where tarfile skips over it.
    with gzip.open(archive) as file, tarfile.open(fileobj=(stream := _Limited(file)), mode="r|") as tar:  # type: ignore[call-overload]  # it reads only
        # One pass: a compressed archive has to be decompressed from the start for every step back.
        wanted = {f"{folder}/{n}{end}" for n in (*kind.train, *kind.test, kind.meta, kind.text) for end in ("", ".bin")}
        files: dict[str, bytes] = {}
        for member in tar:
            name = member.name.removeprefix("./")
            if name in wanted and member.isfile():
                if member.size > _MOST_BYTES or member.issparse():
                    raise ValueError(f"{name} is larger than any file of {kind.name}")
                content = tar.extractfile(member)
                assert content is not None
                files[name.removeprefix(folder + "/")] = content.read()
        while stream.read(1 << 20):  # to the end, where gzip compares the checksum
            pass
    return parse(lambda name: files[name], kind)


class _Limited:
    """A file that ends in an error where an archive would be larger, unpacked, than any that there is."""

    def __init__(self, file: gzip.GzipFile) -> None:
        self.file, self.left = file, _MOST_BYTES_IN_ALL

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(f"more than {_MOST_BYTES_IN_ALL >> 20} MB in it")
        return data


def _file(folder: Path, name: str) -> bytes:
    path = folder / name
    if not path.is_file():
        raise KeyError(name)
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{name} is too large")
    return path.read_bytes()


def _part(images: np.ndarray, labels: np.ndarray, kind: Kind) -> Part:
    if len(images) != len(labels) or not len(images):
        raise ValueError(f"{len(images)} images with {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= kind.classes:
        raise ValueError(f"a label is not in 0..{kind.classes - 1}")
    x = torch.from_numpy(np.ascontiguousarray(images)).view(-1, 3, 32, 32)
    return x, torch.from_numpy(labels.astype(np.int64))


def _binary(read: Read, kind: Kind) -> Found:
    def part(names: tuple[str, ...]) -> Part:
        length = kind.label_bytes + _PIXELS
        content = [read(f"{name}.bin") for name in names]
        if wrong := [n for n, data in zip(names, content, strict=True) if len(data) % length]:
            raise ValueError(f"{wrong[0]}.bin does not consist of records of {length} bytes")
        records = np.frombuffer(b"".join(content), np.uint8).reshape(-1, length)
        return _part(records[:, kind.label_bytes :], records[:, kind.label_bytes - 1], kind)

    names = read(kind.text).decode("ascii", "replace").split("\n")
    return part(kind.train), part(kind.test), _names([name.strip() for name in names if name.strip()], kind)


def _pickled(read: Read, kind: Kind) -> Found:
    def part(names: tuple[str, ...]) -> Part:
        content = [_unpickle(read(name)) for name in names]
        images = [_pixels(batch["data"]) for batch in content]
        labels = [np.array(batch[kind.label]) for batch in content]
        if any(label.ndim != 1 or label.dtype.kind != "i" for label in labels):
            raise ValueError("the labels are not a list of numbers")
        return _part(np.concatenate(images), np.concatenate(labels), kind)

    return part(kind.train), part(kind.test), _names(_unpickle(read(kind.meta))[kind.names], kind)


def _names(names: Any, kind: Kind) -> list[str]:
    if not isinstance(names, list) or len(names) != kind.classes or not all(isinstance(n, str) for n in names):
        raise ValueError(f"there should be the names of {kind.classes} classes")
    return names


def _pixels(data: Any) -> np.ndarray:
    if not isinstance(data, _Array):
        raise ValueError("the images are not an array")
    return data.array()


def _unpickle(data: bytes) -> dict[str, Any]:
    try:
        content = _Unpickler(io.BytesIO(data), encoding="latin1").load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise pickle.UnpicklingError(f"damaged pickle: {type(error).__name__}") from error
    if not isinstance(content, dict):
        raise ValueError("a pickle that holds no dict")
    return content


class _Dtype:
    """Stands in for numpy.dtype; the only one there is are bytes."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        if code not in ("u1", "|u1"):
            raise pickle.UnpicklingError(f"an array of {code!r}, not of bytes")

    def __setstate__(self, state: Any) -> None:
        pass  # byte order and fields, which bytes do not have


class _Array:
    """Stands in for numpy.ndarray: keeps shape and bytes, checks them."""

    def __init__(self, *arguments: Any) -> None:
        self.shape: Any = ()
        self.data = b""

    def __setstate__(self, state: Any) -> None:
        _, self.shape, _, fortran, data = state
        if fortran:
            raise pickle.UnpicklingError("an array in Fortran's order")
        self.data = data.encode("latin1") if isinstance(data, str) else data  # Python 2 wrote bytes as str

    def array(self) -> np.ndarray:
        if len(self.shape) != 2 or self.shape[1] != _PIXELS or self.shape[0] * _PIXELS != len(self.data):
            raise ValueError(f"an array of {self.shape} in {len(self.data)} bytes, not images of {_PIXELS}")
        return np.frombuffer(self.data, np.uint8).reshape(self.shape)


class _Unpickler(pickle._Unpickler):
    """Knows three names, which stand for the two classes above. Any other, such as os.system, is refused unseen.

    In Python, because the one in C makes room for as many values as a damaged or hostile file says (LONG_BINPUT).
    """

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _Array
        if module == "numpy" and name in ("ndarray", "dtype"):
            return _Dtype if name == "dtype" else _Array
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which these files do not hold")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("a persistent id, which these files do not hold")
