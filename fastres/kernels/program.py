"""Inference of a small network by one call of a compiled program (csrc/cpu/program.cpp), and the steps that it can have
besides our own convolutions."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastres import layout
from fastres.kernels import convolution

#: (run, number of x, number of the residual or None, relu); the input has number 0, the result of step i number i + 1
Step = tuple[Any, int, "int | None", bool]


@dataclass(frozen=True, slots=True)
class ZeroPad:
    """Every stride-th pixel of x, followed by zeros for the channels it lacks."""

    channels: int
    stride: int

    def __call__(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(x, (0, 0, 0, 0, 0, self.channels - x.shape[1]))


@dataclass(frozen=True, slots=True)
class Classify:
    """logits = weight * mean over pixels(x) + bias."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        return torch.ops.fastres_cpu.classify.default(layout.like(x, True), self.weight, self.bias)


class Program:
    """A list of steps, and the tensors that their weights were made from.

    Attributes:
        sampled: those of the tensors, the large ones, of which only samples are compared in each call.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.sampled: list[Tensor] = []
        weakref.finalize(self, torch.ops.fastres_cpu.program_delete.default, number).atexit = False
        self.run = torch.ops.fastres_cpu.program_run.default

    def __call__(self, x: Tensor) -> Tensor | None:
        """The result of the last step; None if one of the sources is not what it was, or a value is not finite."""
        y = self.run(self.number, layout.like(x, True))
        if not y.numel():
            return None
        return layout.in_format(y, torch.channels_last) if y.dim() == 4 else y


def compiled(shape: torch.Size, dtype: torch.dtype, steps: Iterable[Step], sources: list[Tensor]) -> Program | None:
    """The program of these steps for an input of this shape and dtype, or None where one of them is not served.

    Args:
        sources: what the weights were made from.
    """
    if dtype is not torch.float32:
        return None
    ops = torch.ops.fastres_cpu
    program = Program(ops.program_new.default(list(shape)))
    for run, x, residual, relu in steps:
        if isinstance(run, convolution.Packed) and run.geometry[3] == 1 and run.method:
            *geometry, _ = run.geometry
            given = (run.weight, run.shape, run.bias, *geometry, relu, run.method)
            if not ops.program_conv.default(program.number, x, -1 if residual is None else residual, *given):
                return None
        elif isinstance(run, ZeroPad):
            ops.program_zero_pad.default(program.number, x, run.channels, run.stride)
        elif isinstance(run, Classify):
            ops.program_classify.default(program.number, x, run.weight, run.bias)
        else:
            return None
    program.sampled = [sources[i] for i in ops.program_finish.default(program.number, sources)]
    return program
