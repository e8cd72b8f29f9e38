"""Checkpoints of a run: written as a whole or not at all, and read without running code from the file."""

from __future__ import annotations

import contextlib
import errno
import io
import os
from pathlib import Path
from typing import Any

import torch

from fastres.errors import UserError

__all__ = ["FORMAT", "load", "save", "save_weights", "write_atomically"]

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
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the reader raise nearly anything
        raise UserError(f"cannot load checkpoint {path}: corrupt, or not a checkpoint") from error
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(f"{path} is no checkpoint of a training run")
    if content["format"] != FORMAT:
        raise UserError(f"{path} has format {content['format']}; this version of fastres reads format {FORMAT}")
    return content
