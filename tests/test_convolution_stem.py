"""The stem's method: Winograd along the rows of kernels of 7 pixels width with stride 2, alone and pooled."""

import pytest
import torch
import torch.nn.functional as F
from _convolution import (
    GEMM,
    INF,
    NAN,
    NHWC,
    OPS,
    STEM,
    Conv,
    eager,
    eager_grads,
    grad_weight,
    nhwc,
    square,
)

from fastres import functional, use_kernels
from fastres.testing import budget, relative_error

CONVS = [
    square(3, 64, 7, 2, 3, 224),
    square(3, 64, 7, 2, 3, 64, batch=2),
    square(3, 17, 7, 2, 3, 37, batch=3),
    square(1, 65, 7, 2, 3, 8),
    square(15, 3, 7, 2, 0, 23),
    Conv((2, 4, 9, 30), (33, 4, 5, 7), (2, 2), (2, 3)),
    Conv((1, 3, 6, 50), (8, 3, 1, 7), (3, 2), (0, 1)),
    Conv((2, 2, 12, 19), (24, 2, 7, 7), (1, 2), (9, 5)),
]
POOL = (3, 2, 1)


def run(conv, x, weight, bias=None, *, relu=False, method=STEM, residual=None):
    packed = OPS.conv_pack(weight, conv.x, *conv.geometry, method)
    return OPS.conv(x, packed, conv.weight, bias, residual, *conv.geometry, relu, method)


def pooled(conv, x, weight, bias=None, method=STEM):
    packed = OPS.conv_pack(weight, conv.x, *conv.geometry, method)
    return OPS.conv_maxpool(x, packed, conv.weight, bias, *conv.geometry[:3], True, method, *POOL)


@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_against_float64(conv):
    assert conv.method() == STEM and conv.method(winograd=False) == GEMM
    x, weight, bias, *_ = conv.tensors()
    truth = F.conv2d(x.double(), weight.double(), bias.double(), *conv.geometry)
    witness = F.conv2d(x, weight, bias, *conv.geometry)
    limit = budget(relative_error(witness, truth), torch.float32, summed=True)
    for relu in (False, True):
        y = run(conv, x, weight, bias, relu=relu)
        assert y.shape == truth.shape and y.is_contiguous(memory_format=NHWC)
        assert relative_error(y, truth.relu() if relu else truth) <= limit
    want = F.max_pool2d(truth.relu(), *POOL)
    assert relative_error(pooled(conv, x, weight, bias), want) <= limit
    assert not torch.equal(run(conv, x, weight), run(conv, x, weight, method=GEMM)), "the same method twice"


def test_large_mean():
    """Photographs that were not normalised: 0 to 255."""
    conv = square(3, 64, 7, 2, 3, 64)
    _, weight, bias, *_ = conv.tensors()
    x = (torch.rand(conv.x) * 4 + 250).contiguous(memory_format=NHWC)
    truth = F.conv2d(x.double(), weight.double(), bias.double(), *conv.geometry)
    assert relative_error(run(conv, x, weight, bias), truth) < 1e-6


@pytest.mark.parametrize("value", [NAN, INF, -INF, 3e38])
def test_values_that_overflow_or_are_not_finite(value):
    conv = square(3, 24, 7, 2, 3, 33, batch=2)
    x, weight, bias, *_ = conv.tensors()
    weight *= 1e-3
    x[1, 2, 8, 9] = value
    want = F.conv2d(x, weight, bias, *conv.geometry)
    torch.testing.assert_close(run(conv, x, weight, bias), want, equal_nan=True)
    torch.testing.assert_close(pooled(conv, x, weight, bias), F.max_pool2d(want.relu(), *POOL), equal_nan=True)


@pytest.mark.parametrize("value", [NAN, INF, 3e38])
def test_weights_that_overflow_or_are_not_finite(value):
    conv = square(3, 24, 7, 2, 3, 33)
    x, weight, bias, *_ = conv.tensors()
    weight[5, 1, 3, 3] = value  # meets no padding: what NaN times that is, is not defined
    assert bool(OPS.conv_pack(weight, conv.x, *conv.geometry, STEM).numel()) == (value == 3e38)
    got = functional.conv_bias_act(x, weight, bias, act="identity", stride=2, padding=3)
    torch.testing.assert_close(got, F.conv2d(x, weight, bias, *conv.geometry), equal_nan=True)


def test_same_bits_alone_in_a_batch_and_with_any_number_of_threads():
    conv, one = square(3, 64, 7, 2, 3, 45, batch=3), square(3, 64, 7, 2, 3, 45)
    x, weight, bias, *_ = conv.tensors()
    y, z = run(conv, x, weight, bias), pooled(conv, x, weight, bias)
    torch.testing.assert_close(run(one, x[1:2], weight, bias), y[1:2], rtol=0, atol=0)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(run(conv, x, weight, bias), y) and torch.equal(pooled(conv, x, weight, bias), z)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    """Pooled by the same method, from values converted to fp32; alone the direct way."""
    conv = square(3, 64, 7, 2, 3, 45, batch=2)
    x, weight, bias, *_ = conv.tensors()
    x = x.to(dtype)
    wide = x.float().contiguous(memory_format=NHWC)
    assert torch.equal(pooled(conv, x, weight, bias), pooled(conv, wide, weight, bias).to(dtype))
    assert torch.equal(run(conv, x, weight, bias), run(conv, wide, weight, bias, method=GEMM).to(dtype))


def test_with_a_residual():
    conv = square(3, 17, 7, 2, 3, 37)
    tensors = conv.tensors()
    x, weight, bias, residual, _ = tensors
    y = run(conv, x, weight, bias, relu=True, residual=residual)
    assert relative_error(y, eager(conv, tensors, torch.float64)[0]) < 1e-6


def test_choice():
    assert square(3, 64, 7, 2, 3, 7).method() == STEM
    others = [
        square(16, 64, 7, 2, 3, 32),  # its taps are no rows
        square(3, 64, 3, 2, 1, 32),
        square(3, 64, 7, 1, 3, 32),
        square(3, 64, 7, 2, 6, 32, dilation=2),
        square(3, 64, 7, 2, 0, 9),  # less than a tile
    ]
    assert [conv.method() for conv in others] == [GEMM] * len(others)
    for conv in others:
        with pytest.raises(RuntimeError, match="method 5 does not serve"):
            OPS.conv_pack(torch.randn(conv.weight), conv.x, *conv.geometry, STEM)


def test_weights_that_do_not_fit():
    conv = square(3, 64, 7, 2, 3, 32)
    x, weight, bias, *_ = conv.tensors()
    packed = {method: OPS.conv_pack(weight, conv.x, *conv.geometry, method) for method in (GEMM, STEM)}
    for method, other in ((GEMM, STEM), (STEM, GEMM)):
        with pytest.raises(RuntimeError, match="does not fit"):
            OPS.conv(x, packed[method], conv.weight, bias, None, *conv.geometry, False, other)
        with pytest.raises(RuntimeError, match="does not fit"):
            OPS.conv_maxpool(x, packed[method], conv.weight, bias, *conv.geometry[:3], True, other, *POOL)
    with pytest.raises(RuntimeError, match="does not pool"):
        OPS.conv_maxpool(x, packed[GEMM], conv.weight, bias, *conv.geometry[:3], True, 2, *POOL)
    empty = nhwc(0, 3, 32, 32)
    assert run(conv, empty, weight).shape == (0, 64, 16, 16) and pooled(conv, empty, weight).shape == (0, 64, 8, 8)


@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_weight_gradient_against_float64(conv):
    x, weight, *_, grad = conv.tensors()
    truth = eager_grads(conv, grad.double(), x.double(), weight.double())[1]
    witness = eager_grads(conv, grad, x, weight)[1]
    got = grad_weight(conv, grad, x)
    assert got.is_contiguous(memory_format=NHWC)
    assert relative_error(got, truth) <= budget(relative_error(witness, truth), torch.float32, summed=True)
    assert not torch.equal(got, grad_weight(conv, grad, x, winograd=False)), "the same method twice"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weight_gradient_in_half_precision(dtype):
    conv = square(3, 24, 7, 2, 3, 37, batch=2)
    x, weight, *_, grad = conv.tensors()
    x, grad = x.to(dtype), grad.to(dtype)
    wide = (t.float().contiguous(memory_format=NHWC) for t in (grad, x))
    assert torch.equal(grad_weight(conv, grad, x), grad_weight(conv, *wide))


def test_weight_gradient_is_the_same_for_any_number_of_threads():
    conv = square(3, 64, 7, 2, 3, 64, batch=3)
    x, *_, grad = conv.tensors()
    want, before = grad_weight(conv, grad, x), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(grad_weight(conv, grad, x), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("of", ["x", "grad"])
def test_gradients_with_values_that_are_not_finite(of, value):
    """They reach what they reach in eager."""
    conv = square(3, 24, 7, 2, 3, 33, batch=2)
    x, weight, bias, *_, grad = conv.tensors()
    (x if of == "x" else grad)[1, 2, 8, 9] = value
    assert not grad_weight(conv, grad, x).numel()
    tensors = weight.requires_grad_(), bias.requires_grad_()
    y = functional.conv_bias_act(x, *tensors, act="identity", stride=2, padding=3)
    want = torch.autograd.grad(F.conv2d(x, *tensors, *conv.geometry), tensors, grad)
    for a, b in zip(torch.autograd.grad(y, tensors, grad), want, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_gradients_of_conv_bias_act():
    """By our own kernels in eager training, and by PyTorch's where they are differentiated again."""
    conv = square(3, 24, 7, 2, 3, 33, batch=2)
    x, weight, bias, residual, grad = conv.tensors()
    tensors = [t.requires_grad_() for t in (x, weight, bias, residual)]

    def gradients(function, inputs, **options):
        return torch.autograd.grad(function(*inputs), inputs, grad.to(inputs[0].dtype), **options)

    def fused(*inputs):
        return functional.conv_bias_act(*inputs, stride=2, padding=3)

    def plain(x, weight, bias, residual):
        return F.relu(F.conv2d(x, weight, bias, *conv.geometry) + residual)

    truth = gradients(plain, [t.detach().double().requires_grad_() for t in tensors])
    witness = gradients(plain, tensors)
    for options in ({}, {"create_graph": True}):
        for got, e, t in zip(gradients(fused, tensors, **options), witness, truth, strict=True):
            assert relative_error(got, t) <= budget(relative_error(e, t), torch.float32, summed=True)
        assert gradients(fused, tensors, **options)[0].requires_grad == bool(options)
    own = gradients(fused, tensors)[1]
    with use_kernels("reference"):
        assert not torch.equal(gradients(fused, tensors)[1], own)
