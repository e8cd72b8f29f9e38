"""The stem's method: Winograd along the rows of kernels of 7 pixels width with stride 2, alone and pooled."""

import pytest
import torch
import torch.nn.functional as F
from _convolution import GEMM, INF, NAN, NHWC, OPS, STEM, Conv, eager, nhwc, square

from fastres import functional
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
    assert not OPS.conv_pack(weight, conv.x, *conv.geometry, STEM).numel()
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
