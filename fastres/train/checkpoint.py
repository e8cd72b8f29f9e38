"""Checkpoints of a run: written as a whole or not at all, and read without running code from the file."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastres.errors import UserError
from fastres.models.checkpoint import torch_load

__all__ = ["FORMAT", "load", "restored", "save", "save_weights", "write_atomically"]

Record = TypeVar("Record")

#: Changes when what a checkpoint holds changes.
FORMAT = 1


def save(content: dict[str, Any], path: Path) -> None:
    """Writes tensors, numbers, strings, lists and dicts to `path`.

    The file is written under another name, forced to the disk and renamed: at every moment, also after a crash or on a
    full disk, `path` is the old checkpoint or the new one.

    Raises:
        OSError: if it cannot be written; the old checkpoint is as it was.
    """
    save_weights({"format": FORMAT, **content}, path)


def save_weights(state: dict[str, Any], path: Path) -> None:
    """As `save`, for a plain state dict that any program can read."""
    buffer = io.BytesIO()  # torch.save into a file reports a full disk as an unspecific RuntimeError
    torch.save(state, buffer)
    write_atomically(path, buffer.getbuffer())


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Replaces the contents of a file: temporary file, fsync, rename, fsync of the folder. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(path: Path) -> dict[str, Any]:
    """Reads what `save` wrote, tensors on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        UserError: if it is corrupt, no checkpoint of a run, or of another format.
    """
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "no such checkpoint", str(path))
    if not path.is_file():
        raise UserError(f"cannot load checkpoint {path}: not a regular file")
    try:
        content = torch_load(path)
    except Exception as error:  # a damaged file makes the reader raise nearly anything
        raise UserError(f"cannot load checkpoint {path}: corrupt, or not a checkpoint") from error
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(f"{path} is no checkpoint of a training run")
    if content["format"] != FORMAT:
        raise UserError(f"{path} has format {content['format']}; this version of fastres reads format {FORMAT}")
    return content


def restored(kind: type[Record], values: Any, path: Path) -> Record:
    """A dataclass from what `dataclasses.asdict` made of one.

    Raises:
        UserError: if a value is of another type than its field, or there is no such field. path: for the message.
    """
    hints = typing.get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]  # a dataclass
    if not isinstance(values, dict) or not set(values) <= names:
        raise UserError(f"{path} is damaged, or of another version of fastres: no {kind.__name__}")
    if wrong := [name for name, value in values.items() if not _is(value, hints[name])]:
        raise UserError(f"{path} is damaged: {kind.__name__} has a {wrong[0]} of {values[wrong[0]]!r:.60}")
    return kind(**values)


def _is(value: Any, hint: Any) -> bool:
    """Whether a value is of a type: a class, a union, a list or a dict of such."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(_is(value, one) for one in arguments)
    if origin is list:
        return isinstance(value, list) and all(_is(one, arguments[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is(k, arguments[0]) and _is(v, arguments[1]) for k, v in value.items())
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint
