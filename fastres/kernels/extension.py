"""Loads the compiled kernels, fastres._C for CPUs and fastres._cuda for GPUs, once, or keeps the reason why not.
FASTRES_NO_EXT=1 leaves them out."""

from __future__ import annotations

import importlib
import json
import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parents[1]

#: Why the compiled kernels are not loaded, or None. Set by `load`.
error: str | None = None


#: Why the compiled kernels for CUDA are not loaded, or None. Set by `load`.
cuda_error: str | None = None


@cache
def load() -> None:
    """Loads fastres._C, which registers the ops of torch.ops.fastres_cpu, and where PyTorch has CUDA fastres._cuda and
    its torch.ops.fastres_cuda. Runs when this module is imported."""
    global error, cuda_error
    error = _load("_C", build_info(), "this source tree was not built: `pip install -e .` does that")
    if torch.version.cuda is None:  # the binary would not find the functions of libtorch_cuda
        cuda_error = "this PyTorch is built without CUDA"
    else:
        cuda_error = _load("_cuda", build_info().get("cuda", {}), "fastres was built without it")


def _load(name: str, build: dict[str, Any], missing: str) -> str | None:
    """Imports fastres.NAME, or says why not; missing: why there may be no such file, if its build does not say."""
    if os.environ.get("FASTRES_NO_EXT") == "1":
        return "FASTRES_NO_EXT=1 leaves the compiled kernels out"
    if not any((_PACKAGE / f"{name}{suffix}").is_file() for suffix in EXTENSION_SUFFIXES):  # beside us, nobody else's
        return f"fastres.{name} is not there: {build.get('error') or missing}"
    try:
        importlib.import_module(f"fastres.{name}")
    except Exception as e:  # a binary for another processor, PyTorch or operating system: fastres works without it
        built = build.get("torch", torch.__version__)
        other = "" if built == torch.__version__ else f" (built for torch {built}, this is {torch.__version__})"
        return f"fastres.{name} does not load{other}: {type(e).__name__}: {e}"
    return None


def build_info() -> dict[str, Any]:
    """What setup.py wrote about its build: compiled, error, torch, compiler, flags, and the same under "cuda". Empty if
    it never ran."""
    path = _PACKAGE / "_build_info.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def available() -> bool:
    """Whether the compiled kernels are loaded."""
    return error is None


def load_error() -> str | None:
    """Why the compiled kernels are not loaded, or None."""
    return error


def cuda_load_error() -> str | None:
    """Why the compiled kernels for CUDA are not loaded, or None."""
    return cuda_error


def isa() -> str:
    """The instruction set that the kernels use: base, avx2, avx512 or avx512_bf16.

    Raises:
        RuntimeError: if the kernels are not loaded, with the reason.
    """
    if error is not None:
        raise RuntimeError(error)
    return torch.ops.fastres_cpu.isa()


load()
