"""Triton's convolutions against float64, with eager as witness."""

import pytest
import torch
import torch.nn.functional as F
from _products import SHAPES, activation, assert_as_exact, conv, matrix, vector
from _triton import running

from fastres.kernels.triton.convolution import conv1x1_forward, conv1x1_grad_input, conv1x1_grad_weight
from fastres.kernels.triton.implicit import convolution_forward
from fastres.kernels.triton.operands import norm_of
from fastres.testing import DTYPES, relative_error

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
strides = pytest.mark.parametrize("stride", [(1, 1), (2, 2)], ids=str)


def batch_norm(c):
    """(mean, var, weight, bias), whose normalised zero is not zero."""
    return vector(c).double(), vector(c, positive=True).double(), vector(c), vector(c).abs() + 0.5


def activated(x, norm, dtype):
    """relu(batch_norm(x)) as it would be stored."""
    mean, var, weight, bias = (v.double() for v in norm)
    return F.relu(F.batch_norm(x.double(), mean, var, weight, bias, eps=1e-5)).to(x.dtype).to(dtype)


@dtypes
@strides
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_conv1x1(shape, stride, dtype):
    n, c, h, w, k = shape
    x, weight, norm = activation(n, c, h, w, dtype), matrix(k, c, dtype), batch_norm(c)
    grad_y = activation(n, k, -(-h // stride[0]), -(-w // stride[1]), dtype)
    with running():
        y, mean, var = conv1x1_forward(x, weight[:, :, None, None], stride=stride, statistics=True)
        folded = norm_of(*norm, 1e-5)
        behind, none, _ = conv1x1_forward(x, weight[:, :, None, None], stride=stride, norm=folded)
        grad_x = conv1x1_grad_input(grad_y, weight[:, :, None, None], x.shape, stride=stride)
        grad_weight = conv1x1_grad_weight(grad_y, x, stride=stride, norm=folded)

    def eager(dtype):
        values = activated(x, norm, dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        z = conv(*values, stride)
        return conv(x.to(dtype), weight.to(dtype), stride), z, *torch.autograd.grad(z, values, grad_y.to(dtype))

    names = ("y", "behind", "grad_x", "grad_weight")
    got = (y, behind, grad_x, grad_weight[:, :, 0, 0])
    for name, ours, *each in zip(names, got, eager(torch.float64), eager(dtype), strict=True):
        assert_as_exact(ours, *each, dtype, name, summed=name == "grad_weight")
        assert name == "grad_weight" or ours.stride() == each[1].stride(), name
    assert none.numel() == 0
    true_var, true_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    assert relative_error(mean, true_mean) < 1e-6 and relative_error(var, true_var) < 1e-6


#: input channels, output channels, window, stride, padding, dilation
CONVOLUTIONS = [
    (17, 65, (3, 3), (1, 1), (1, 1), (1, 1)),
    (64, 64, (3, 3), (2, 2), (1, 1), (1, 1)),
    (3, 17, (5, 5), (2, 2), (2, 2), (1, 1)),
    (16, 3, (3, 3), (1, 1), (2, 2), (2, 2)),
    (17, 130, (3, 1), (1, 2), (0, 1), (1, 1)),
    (130, 17, (1, 1), (2, 2), (0, 0), (1, 1)),
]


@dtypes
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolution(case, dtype):
    c, k, window, *geometry = case
    stride, padding, dilation = geometry
    x, norm, bias = activation(1, c, 9, 10, dtype), batch_norm(c), vector(k)
    weight = (torch.randn(k, c, *window) / (c * window[0] * window[1]) ** 0.5).to(x)

    def eager(dtype, residual, prologue):
        values = activated(x, norm, dtype) if prologue else x.to(dtype)
        z = F.conv2d(values, weight.to(dtype), bias.to(dtype), *geometry)
        return F.relu(z + residual.to(dtype)) if residual is not None else z

    residual = torch.randn_like(eager(dtype, None, False))
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    with running():
        y, *_ = convolution_forward(x, weight, bias, residual, relu=True, **options)
        norm_ = norm_of(*norm, 1e-5)
        behind, mean, var = convolution_forward(x, weight, bias, norm=norm_, statistics=True, **options)
    for ours, arguments in ((y, (residual, False)), (behind, (None, True))):
        witness = eager(dtype, *arguments)
        assert_as_exact(ours, eager(torch.float64, *arguments), witness, dtype)
        assert ours.stride() == witness.stride()
    true_var, true_mean = torch.var_mean(behind.double(), (0, 2, 3), correction=0)
    assert relative_error(mean, true_mean) < 1e-6 and relative_error(var, true_var) < 1e-6
