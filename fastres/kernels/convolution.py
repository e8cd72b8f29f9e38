"""conv_bias_act by our own convolutions (csrc/cpu/conv.cpp): NHWC activations, fp32 arithmetic, packed weights.

Methods: an implicit matrix product for every kernel size, stride, padding and dilation; Winograd's F(4x4, 3x3), which
needs a quarter of the multiplications of a 3x3 convolution and has an error of about 1e-6 (relative L2) instead of
2e-7; and F(2x2, 3x3), which is as exact as the direct way and has fewer weights to read at small batch sizes;
a kernel of its own for convolutions in groups, depthwise ones included (float32 only); and one for the stem, 7 pixels
wide with stride 2 and few input channels: Winograd along the rows, half of the multiplications, as exact as the direct
way.
`fastres.config.winograd = False` leaves Winograd's out. bf16 and fp16 activations are converted to fp32 and back in
blocks that stay in the cache; products and sums are fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastres import config, layout, reference
from fastres.kernels import extension, onednn

#: The methods by the numbers that `method` gives.
METHODS = ("oneDNN", "matrix product", "Winograd 4x4", "Winograd 2x2", "grouped", "Winograd in rows")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable() -> str | None:
    return extension.load_error()


def why_not(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    *args: Any,
) -> str | None:
    if x.dtype not in _DTYPES:
        return f"{x.dtype} activations"
    if not x.numel():
        return "empty batch"
    if reference.conv_format(x, weight) is not torch.channels_last:
        return "not channels_last"
    if onednn_convolves(x.dtype):
        return f"oneDNN convolves in {x.dtype} here"
    if groups > 1 and x.dtype is not torch.float32:
        return f"grouped convolution of {x.dtype} activations"
    return (
        None if method(x, weight, stride, padding, dilation, groups) else "oneDNN is faster with groups of this width"
    )


def onednn_convolves(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products of a half precision on this processor: they take half the time of our fp32 ones."""
    return dtype is not torch.float32 and onednn.unavailable() is None and onednn.compute_dtype(dtype) is dtype


def method(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int) -> int:
    """Which method serves this shape: 0 none, 1 matrix product, 2 and 3 Winograd with tiles of 4x4 and 2x2,
    4 convolution in groups, 5 the stem."""
    return torch.ops.fastres_cpu.conv_method.default(
        x.shape, weight.shape, stride, padding, dilation, groups, config.winograd
    )


def method_name(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *options: Any) -> str:
    """The method that serves conv_bias_act of these arguments."""
    return METHODS[method(x, weight, *options[:4])]


@dataclass(frozen=True, slots=True)
class Packed:
    """A convolution with packed weights: what `prepare` returns."""

    weight: Tensor
    bias: Tensor | None
    shape: list[int]  # of the weight that was packed
    geometry: tuple[list[int], list[int], list[int], int]
    method: int

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    @property
    def kernel(self) -> tuple[str, str]:
        return "cpu", METHODS[self.method]

    def __call__(self, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        residual = None if residual is None else layout.like(residual.to(x.dtype), True)
        y = torch.ops.fastres_cpu.conv.default(
            layout.like(x, True), self.weight, self.shape, self.bias, residual, *self.geometry, relu, self.method
        )
        return layout.in_format(y, torch.channels_last)

    def with_statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Its output, and the mean and biased variance (float64) of each channel of that."""
        y, mean, var = torch.ops.fastres_cpu.conv_with_statistics.default(
            layout.like(x, True), self.weight, self.shape, self.bias, *self.geometry, self.method
        )
        return layout.in_format(y, torch.channels_last), mean, var

    def then_maxpool(
        self, kernel: int, stride: int, padding: int
    ) -> Callable[[Tensor, Tensor | None, bool], Tensor] | None:
        """max_pool2d of it, without its whole output ever lying in memory; None where it can not be had in rows."""
        if self.method not in (1, 5):
            return None
        *geometry, _ = self.geometry

        def run(x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
            options = (*geometry, relu, self.method, kernel, stride, padding)
            y = torch.ops.fastres_cpu.conv_maxpool.default(
                layout.like(x, True), self.weight, self.shape, self.bias, *options
            )
            return layout.in_format(y, torch.channels_last)

        return run


def prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Packed:
    """Packs `weight` for inputs like `x`."""
    geometry = (stride, padding, dilation, groups)
    kind = method(x, weight, *geometry)
    pack = torch.ops.fastres_cpu.conv_pack.default
    packed = pack(weight.float(), x.shape, *geometry, kind)
    if not packed.numel():  # Winograd's transform of the weight overflows, or the weight is not finite
        kind = 1
        packed = pack(weight.float(), x.shape, *geometry, kind)
    bias = None if bias is None else bias.float().contiguous()
    return Packed(packed, bias, list(weight.shape), geometry, kind)


def conv_bias_act(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *options: Any) -> Tensor:
    *geometry, relu = options
    return prepare(x, weight, bias, *geometry)(x, residual, relu)


def _aten_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which ATen convolves x fast: where oneDNN has no half precision, ATen's takes 5 to 30 times as long
    as fp32 (3x3 of 28x28 maps in NCHW, grouped and depthwise, one thread of Zen 3)."""
    half = x.is_cpu and x.dtype in (torch.bfloat16, torch.float16)
    return onednn.compute_dtype(x.dtype) if half and onednn.unavailable() is None else x.dtype


def aten_backward(
    grad: Tensor, x: Tensor, weight: Tensor, has_bias: bool, geometry: tuple[Any, ...], needed: Sequence[bool]
) -> list[Tensor | None]:
    """ATen's gradients of x, weight and bias, those that are needed; geometry: stride, padding, dilation, groups."""
    stride, padding, dilation, groups = geometry
    sizes = [weight.shape[0]] if has_bias else None
    inputs = (t.to(_aten_dtype(x)) for t in (grad, x, layout.plain(weight)))
    grads = torch.ops.aten.convolution_backward(
        *inputs, sizes, stride, padding, dilation, False, [0, 0], groups, list(needed)
    )
    return [None if g is None else g.to(x.dtype) for g in grads]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> Tensor:
    """conv2d(x, weight, bias): by our own kernels where they serve, else by ATen's."""
    if why_not(x, weight, bias, None, *geometry) is None:
        return conv_bias_act(x, weight, bias, None, *geometry, False)
    stride, padding, dilation, groups = geometry
    inputs = (None if t is None else t.to(_aten_dtype(x)) for t in (x, layout.plain(weight), bias))
    y = torch.ops.aten.convolution(*inputs, stride, padding, dilation, False, [0, 0], groups)
    return layout.in_format(y.to(x.dtype), reference.conv_format(x, weight))


def convolve_with_statistics(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """conv2d(x, weight, bias), and where our own kernels serve the mean and biased variance (float64) of a channel."""
    if why_not(x, weight, bias, None, *geometry) is not None:
        return convolve(x, weight, bias, geometry), None, None
    return prepare(x, weight, bias, *geometry).with_statistics(x)


def convolve_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    has_bias: bool,
    geometry: tuple[Any, ...],
    needed: tuple[bool, bool, bool],
    addend: Tensor | None = None,
) -> list[Tensor | None]:
    """The gradients of x (plus addend), weight and bias that are needed, for the gradient of the output."""
    ops, dtype = torch.ops.fastres_cpu, x.dtype
    own = [why_not(x, weight, None, None, *geometry) is None and need for need in needed]
    if any(own):
        grad = layout.like(grad.to(dtype), True)
    grads: list[Tensor | None] = [None, None, None]
    if own[0]:
        plus = None if addend is None else layout.like(addend.to(dtype), True)
        grad_x = ops.conv_backward_input.default(grad, weight.float(), x.shape, *geometry, config.winograd, plus)
        if grad_x.numel():  # none where the weight is not finite, or ATen is faster
            grads[0] = layout.in_format(grad_x, torch.channels_last).to(dtype)
    if own[1]:
        grad_weight = ops.conv_backward_weight.default(
            grad, layout.like(x, True), weight.shape, *geometry, config.winograd
        )
        if grad_weight.numel():
            grads[1] = grad_weight.to(dtype)
    if own[2]:
        grads[2] = grad.sum((0, 2, 3)).to(dtype)
    rest = [need and one is None for need, one in zip(needed, grads, strict=True)]
    if any(rest):
        found = aten_backward(grad, x, weight, has_bias, geometry, rest)
        if found[0] is not None and addend is not None:
            found[0] += addend
        grads = [mine if mine is not None else theirs for mine, theirs in zip(grads, found, strict=True)]
    return grads
