"""Reading checkpoints: never runs code from the file, never leaves a model half loaded. SECURITY.md says more."""

from __future__ import annotations

import errno
import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastres.errors import UserError

__all__ = ["check_fits", "load_checkpoint", "read_state_dict", "torch_load"]

Model = TypeVar("Model", bound=nn.Module)

_WRAPPERS = ("state_dict", "model", "model_state_dict")
#: DistributedDataParallel and torch.compile put these before every key.
_PREFIXES = ("module.", "_orig_mod.")


def load_checkpoint(model: Model, path: str | os.PathLike[str]) -> Model:
    """Loads weights from a file into a model, strictly and all or nothing.

    Reads `.safetensors`, and anything else as a file of `torch.save` (`weights_only=True`: a pickle that calls for code
    is refused). The state dict may lie under "state_dict", "model" or "model_state_dict", and its keys may have the
    prefixes of DistributedDataParallel and torch.compile. Batch counters (`num_batches_tracked`) may be missing, as in
    files from before PyTorch 0.4.1.

    Args:
        model: receives the weights, which are cast to its dtype and device.
        path: the file.

    Returns:
        The model.

    Raises:
        FileNotFoundError: if there is no such file.
        UserError: if it cannot be read, is corrupt, holds anything but tensors, or does not fit the model (one line,
            naming the first keys that do not fit). The model is as it was before.
    """
    expected = model.state_dict()
    state = read_state_dict(path, expected)
    check_fits(state, expected, path)
    model.load_state_dict(state)
    return model


def read_state_dict(path: str | os.PathLike[str], expected: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict in a file, unwrapped, with the prefixes removed that the keys of `expected` do not have.

    Raises: as `load_checkpoint`, but for weights that do not fit.
    """
    path = Path(path)
    state = _state_dict(_read(path), path)
    while prefix := next((p for p in _PREFIXES if _all_start(state, p) and not _all_start(expected, p)), ""):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _read(path: Path) -> Any:
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "no such checkpoint", str(path))
    if not path.is_dir() and not path.is_file():  # opening a pipe would wait for who writes to it
        raise UserError(f"cannot read checkpoint {path}: not a regular file")
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror}") from error
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise UserError(f"reading {path} needs safetensors: pip install 'fastres[safetensors]'") from error
        read: Any = load_file
    else:
        read = torch_load
    # A damaged file makes the readers raise nearly anything: KeyError, UnicodeDecodeError, RuntimeError, OSError, ...
    try:
        return read(path)
    except Exception as error:
        raise UserError(f"cannot load checkpoint {path}: {_reason(error)}") from error


def torch_load(path: Path) -> Any:
    """What a file of torch.save holds, tensors on the CPU; objects other than tensors and plain containers are refused.

    A damaged file raises nearly anything.
    """
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\3\4"
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
                raise ValueError("its parts are larger than the file; torch.save does not compress")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        return torch.load(path, map_location="cpu", weights_only=True)


def _reason(error: Exception) -> str:
    """torch's message is a page long and advises weights_only=False; this is the one line that matters."""
    if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"it holds Python objects ({found[1]}), not only tensors; they are refused because they can run code"
    message = (str(error).splitlines() or [""])[0]
    if message.startswith("Weights only load failed"):
        return "corrupt, or not a checkpoint"
    return f"corrupt, or not a checkpoint ({type(error).__name__}: {message[:120]})"


def _state_dict(content: Any, path: Path) -> dict[str, Any]:
    """Unwraps the state dict. The copy has no `_metadata`, so that load_state_dict fills in missing batch counters."""
    if isinstance(content, Mapping):
        content = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content or not all(isinstance(key, str) for key in content):
        raise UserError(f"checkpoint {path} holds no state dict")
    if wrong := [key for key, value in content.items() if not isinstance(value, Tensor)]:
        raise UserError(f"checkpoint {path} holds no state dict: not a tensor: {_first(wrong)}")
    return dict(content)


def _all_start(state: Mapping[str, Any], prefix: str) -> bool:
    return all(key.startswith(prefix) for key in state)


def check_fits(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """UserError if load_state_dict would reject the state, or take a part of it: it copies what fits before it raises.

    Args:
        state: to be loaded. expected: what the model has. path: of the file, for the message.
    """
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
    shapes = [
        f"{key} {tuple(value.shape)} for {tuple(expected[key].shape)}"
        for key, value in state.items()
        if key in expected and value.shape != expected[key].shape
    ]
    kinds = [
        f"{key} {_kind(value)}" for key, value in state.items() if key in expected and not _copies(value, expected[key])
    ]
    problems = {"missing": missing, "unexpected": unexpected, "other shape": shapes, "of another kind": kinds}
    if text := "; ".join(f"{what}: {_first(keys)}" for what, keys in problems.items() if keys):
        raise UserError(f"checkpoint {path} does not fit the model: {text}")


def _copies(value: Tensor, into: Tensor) -> bool:
    """Whether value can be copied into a tensor without loss of more than precision."""
    plain = value.layout is torch.strided and not value.is_quantized and not value.is_nested and not value.is_meta
    return plain and (into.is_complex() or not value.is_complex())


def _kind(value: Tensor) -> str:
    what = str(value.dtype).removeprefix("torch.")
    return what + (" on no device" if value.is_meta else "" if value.layout is torch.strided else f" {value.layout}")


def _first(keys: list[str], count: int = 3) -> str:
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return ", ".join(keys[:count]) + more
