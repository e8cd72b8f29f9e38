"""Triton's convolutions against float64, with eager as witness."""

import pytest
import torch
import torch.nn.functional as F
from _products import SHAPES, activation, assert_as_exact, conv, matrix, vector
from _triton import DEVICE, running

from fastres.kernels.triton import batch_norm as passes
from fastres.kernels.triton.convolution import conv1x1_forward, conv1x1_grad_input, conv1x1_grad_weight
from fastres.kernels.triton.implicit import convolution_forward
from fastres.kernels.triton.operands import norm_gradient_of, norm_of
from fastres.kernels.triton.product import Pair, product
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


def normalisation(k, training):
    """weight, bias, mean, var, training, eps; the last four are replaced where the batch's own are used."""
    return vector(k), vector(k), vector(k).double(), vector(k, positive=True).double(), training, 1e-5


@dtypes
@pytest.mark.parametrize(("training", "relu"), [(True, True), (True, False), (False, True)])
def test_gradients_behind_a_batch_norm_are_those_that_it_would_store(training, relu, dtype):
    """Times the identity, so that sums round nothing."""
    n, k, h, w = 1, 65, 9, 8
    raw, grad_y = activation(n, k, h, w, dtype, mean=0.5, std=2.0), activation(n, k, h, w, dtype)
    weight, bias, mean, var, *mode = normalisation(k, training)
    out = torch.empty_like(raw)
    with running():
        if training:
            _, mean, var, _ = passes.bn_act(raw, weight, bias, None, None, None, *mode, relu, False)
        want = passes.bn_act_backward(grad_y, raw, weight, bias, mean, var, None, *mode, relu, True, True, False)
        behind, *affine = norm_gradient_of(grad_y, raw, weight, bias, mean, var, *mode, relu)
        product(Pair(grad_y, torch.eye(k, device=DEVICE, dtype=dtype), behind=behind), out)
    assert torch.equal(out, want[0])
    assert all(torch.equal(a, b) for a, b in zip(affine, want[1:3], strict=True))


@dtypes
@strides
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_conv1x1_gradients_behind_a_batch_norm(shape, stride, dtype):
    n, c, h, w, k = shape
    x, weight = activation(n, c, h, w, dtype), matrix(k, c, dtype)
    raw = conv(x.double(), weight.double(), stride).to(dtype)
    grad_y, gamma, beta = torch.randn_like(raw), vector(k), vector(k)
    with running():
        mean, var = passes.bn_act(raw, gamma, beta, None, None, None, True, 1e-5, True, False)[1:3]
        behind, *_ = norm_gradient_of(grad_y, raw, gamma, beta, mean, var, True, 1e-5, True)
        grad_x = conv1x1_grad_input(grad_y, weight[:, :, None, None], x.shape, stride=stride, behind=behind)
        grad_weight = conv1x1_grad_weight(grad_y, x, stride=stride, behind=behind)[:, :, 0, 0]

    def eager(dtype):
        exact = torch.float64 if dtype is torch.float64 else torch.float32
        leaf = raw.detach().to(dtype).requires_grad_()
        y = F.relu(F.batch_norm(leaf, None, None, gamma.to(exact), beta.to(exact), True))
        (grad_raw,) = torch.autograd.grad(y, leaf, grad_y.to(dtype))
        values = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        return torch.autograd.grad(conv(*values, stride), values, grad_raw)

    for name, ours, *each in zip("xw", (grad_x, grad_weight), eager(torch.float64), eager(dtype), strict=True):
        assert_as_exact(ours, *each, dtype, name, summed=True)


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


@pytest.mark.filterwarnings("ignore:invalid value")
@dtypes
def test_what_is_not_finite_reaches_what_it_reaches_in_eager(dtype):
    x, weight = activation(1, 17, 9, 10, dtype), (torch.randn(19, 17, 3, 3) / 12).to(DEVICE, dtype)
    x[0, 3, 0, 0], x[0, 4, 8, 9], x[0, 5, 4, 4] = float("nan"), float("inf"), float("-inf")
    options = {"stride": (1, 2), "padding": (1, 0)}
    with running():
        y, *_ = convolution_forward(x, weight, relu=True, **options)
    want = F.relu(F.conv2d(x.double(), weight.double(), **options))
    assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.isinf(), want.isinf())
