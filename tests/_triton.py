"""Triton kernels without a GPU: run by Triton's interpreter on CPU tensors, bit patterns of bfloat16 understood.

The stock interpreter (3.6 to 3.9) truncates where it should round to bfloat16, multiplies bfloat16's bit patterns in
tl.dot, and leaves triton.language patched, after which nothing can be compiled in that process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import fastres  # noqa: E402
from fastres.kernels import table  # noqa: E402
from fastres.kernels.triton import launch as launching  # noqa: E402
from fastres.kernels.triton.record import record  # noqa: E402


def _to_float(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16  # to nearest even
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


_Builder: Any = interpreter.InterpreterBuilder
_cast_impl, _create_fp_to_fp, _create_dot = _Builder.cast_impl, _Builder.create_fp_to_fp, _Builder.create_dot


def _cast(self: Any, src: Any, dst_type: Any) -> Any:
    source, target = src.dtype.scalar, dst_type.scalar
    if source == target:
        return src
    if source == tl.bfloat16:
        value = interpreter.TensorHandle(_to_float(src.data), tl.float32)
        return value if target == tl.float32 else _cast_impl(self, value, dst_type)
    if target == tl.bfloat16:
        return interpreter.TensorHandle(_to_bfloat16(src.data.astype(np.float32)), target)
    return _cast_impl(self, src, dst_type)


def _fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
    if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
        return _cast(self, src, dst_type)
    return _create_fp_to_fp(self, src, dst_type, rounding_mode)


def _dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    a, b = (
        interpreter.TensorHandle(_to_float(t.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b)
    )
    return _create_dot(self, a, b, *rest)


def _sum(self: Any, values: Any) -> Any:
    """In a tree, as a GPU adds; numpy would add rows one after the other, with many times the error."""
    data = values.handle.data
    if self.axis is not None:
        data = np.ascontiguousarray(np.moveaxis(data, self.axis, -1))
    total = data.sum(axis=None if self.axis is None else -1, keepdims=self.keep_dims and self.axis is None)
    if self.keep_dims and self.axis is not None:
        total = np.expand_dims(total, self.axis)
    return self.to_tensor(total, values.dtype)


@functools.cache
def _interpreted(function: Callable[..., Any]) -> Any:
    return interpreter.InterpretedFunction(function)


def _call(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
    """A @triton.jit function that an interpreted one calls."""
    return _interpreted(self.fn).rewrite()(*args, **kwargs)


#: Stands for a function that uses all of the language: patched once a launch, not once a call (a third of the time).
_LANGUAGE: Any = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})


def _interpret(kernel: Any, grid: tuple[int, ...], options: dict[str, int], arguments: dict[str, Any]) -> None:
    record(kernel, grid, options, arguments)
    scope = interpreter._patch_lang(_LANGUAGE)
    try:
        _interpreted(kernel.fn)[grid](**arguments)
    finally:
        scope.restore()


@contextmanager
def interpretable(kernel: Any, arguments: dict[str, Any]) -> Iterator[Callable[[], None]]:
    """Inside interpreting(): one program of a kernel as a function; interpreter_builder says which."""
    scope = interpreter._patch_lang(_LANGUAGE)
    try:
        constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
        values = {name: v if name in constants else interpreter._implicit_cvt(v) for name, v in arguments.items()}
        yield functools.partial(_interpreted(kernel.fn).rewrite(), **values)
    finally:
        scope.restore()


@contextmanager
def interpreting() -> Iterator[None]:
    """All launches in this context are checked (record.py), then interpreted."""
    with pytest.MonkeyPatch.context() as patched, launching.launching(_interpret):
        patched.setattr(_Builder, "cast_impl", _cast)
        patched.setattr(_Builder, "create_fp_to_fp", _fp_to_fp)
        patched.setattr(_Builder, "create_dot", _dot)
        patched.setattr(interpreter.ReduceOps, "sum", _sum)
        patched.setattr(JITFunction, "__call__", _call, raising=False)
        yield


#: Where tests of Triton kernels run: on the GPU if there is one, else interpreted on the CPU.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def running() -> AbstractContextManager[None]:
    """In this context kernels run on DEVICE."""
    return nullcontext() if DEVICE.type == "cuda" else interpreting()


@contextmanager
def serving(device_type: str) -> Iterator[None]:
    """In this context Triton's kernels serve the ops on such devices, and no others."""
    with pytest.MonkeyPatch.context() as patched, fastres.use_kernels("triton"):
        for (op, device), row in [*table.TABLE.items()]:
            if device == "cuda":
                patched.setitem(table.TABLE, (op, device_type), row)
        yield


@contextmanager
def triton_kernels() -> Iterator[None]:
    """In this context Triton's kernels serve the ops, and no others; tensors are made on DEVICE."""
    with serving(DEVICE.type), DEVICE, running():
        yield
