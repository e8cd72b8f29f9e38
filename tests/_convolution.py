"""A convolution with its shapes and tensors, by our own kernels and by eager, for the tests of convolutions."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from fastres import functional
from fastres.kernels import extension
from fastres.testing import budget, relative_error

if not extension.available():
    pytest.skip(f"compiled kernels are not loaded: {extension.load_error()}", allow_module_level=True)

OPS = torch.ops.fastres_cpu
NHWC = torch.channels_last
GEMM, WINOGRAD, WINOGRAD2, GROUPED, STEM = 1, 2, 3, 4, 5  # WINOGRAD2: F(2x2, 3x3), as exact as the direct way
INF, NAN = float("inf"), float("nan")
NAMES = ("y", "grad_x", "grad_weight")


@dataclass(frozen=True)
class Conv:
    """A convolution and the shape of its input."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def __str__(self):
        text = "_".join("x".join(map(str, shape)) for shape in (self.x, self.weight, self.stride, self.padding))
        text = text if self.dilation == (1, 1) else text + f"_{self.dilation[0]}x{self.dilation[1]}"
        return text if self.groups == 1 else text + f"_g{self.groups}"

    @property
    def geometry(self):
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def y(self):
        """Shape of the output."""
        window = zip(self.x[2:], self.weight[2:], *self.geometry[:3], strict=True)
        return (self.x[0], self.weight[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in window))

    def method(self, winograd=True):
        return OPS.conv_method(self.x, self.weight, *self.geometry, winograd)

    def methods(self, winograd=True):
        """The method of y, grad_x and grad_weight."""
        if self.groups > 1:
            return (self.method(winograd),) * 3
        k, c, *kernel = self.weight
        shape = (c * self.groups, k // self.groups, *kernel)  # of the data gradient's weight
        method, back = self.method(winograd), GEMM
        full = [d * (n - 1) - p for n, p, d in zip(kernel, self.padding, self.dilation, strict=True)]
        if self.stride == (1, 1) and min(full) >= 0:
            back = OPS.conv_method(self.y, shape, self.stride, full, self.dilation, self.groups, winograd)
        return method, back, WINOGRAD if method in (WINOGRAD, WINOGRAD2) else method

    def tensors(self):
        """x, weight, bias, residual, grad_y."""
        weight = torch.randn(self.weight) / (self.weight[1] * self.weight[2] * self.weight[3]) ** 0.5
        return nhwc(*self.x), weight.contiguous(memory_format=NHWC), torch.randn(self.weight[0]), *grads(self)


def square(c, k, size, stride, padding, pixels, dilation=1, batch=1, groups=1):
    weight = (k, c // groups, size, size)
    return Conv((batch, c, pixels, pixels), weight, (stride,) * 2, (padding,) * 2, (dilation,) * 2, groups)


def nhwc(*shape):
    return torch.randn(shape).contiguous(memory_format=NHWC)


def grads(conv):
    return nhwc(*conv.y), nhwc(*conv.y)


def forward(conv, x, weight, bias=None, residual=None, relu=False, winograd=True):
    method = conv.method(winograd)
    packed = OPS.conv_pack(weight, conv.x, *conv.geometry, method)
    return OPS.conv(x, packed, conv.weight, bias, residual, *conv.geometry, relu, method)


def grad_x(conv, grad, weight, winograd=True, addend=None):
    return OPS.conv_backward_input(grad, weight, conv.x, *conv.geometry, winograd, addend)


def grad_weight(conv, grad, x, winograd=True):
    return OPS.conv_backward_weight(grad, x, conv.weight, *conv.geometry, winograd)


def fused(conv, tensors, winograd=True):
    """y, grad_x, grad_weight."""
    x, weight, bias, residual, grad = tensors
    return (
        forward(conv, x, weight, bias, residual, True, winograd),
        grad_x(conv, grad, weight, winograd),
        grad_weight(conv, grad, x, winograd),
    )


def by_functions(conv, tensors, act="relu"):
    """y, grad_x and grad_weight by the public functions, whichever kernel serves. The gradients pass a batch norm that
    changes no bit."""
    x, weight, bias, residual, grad = tensors
    where = dict(zip(("stride", "padding", "dilation", "groups"), conv.geometry, strict=True))
    y = functional.conv_bias_act(x, weight, bias, residual, act=act, **where)
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    zeros, ones = torch.zeros(weight.shape[0]), torch.ones(weight.shape[0])
    raw = functional.conv_bn_act(x, weight, zeros, ones, eps=0.0, act="identity", **where)
    return y, *torch.autograd.grad(raw, (x, weight), grad)


def eager_grads(conv, grad, x, weight):
    stride, padding, dilation, groups = conv.geometry
    mask = [True, True, False]
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
    )[:2]


def eager(conv, tensors, dtype):
    x, weight, bias, residual, grad = (t.to(dtype) for t in tensors)
    y = F.relu(F.conv2d(x, weight, bias, *conv.geometry) + residual)
    return y, *eager_grads(conv, grad, x, weight)


def check(conv, tensors, got, methods):
    truth, witness = eager(conv, tensors, torch.float64), eager(conv, tensors, torch.float32)
    for name, a, t, e, method in zip(NAMES, got, truth, witness, methods, strict=True):
        if conv.groups > 1 and name != "y" and not a.numel():
            continue  # left to ATen
        limit = budget(relative_error(e, t), torch.float32, summed=True, winograd=method == WINOGRAD)
        error = relative_error(a, t)
        assert error <= limit, f"{name}: error {error:.2e}, budget {limit:.2e}"
        assert a.is_contiguous(memory_format=NHWC)
