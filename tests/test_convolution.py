"""Our own convolutions and their gradients against float64, in every geometry."""

import pytest
import torch
import torch.nn.functional as F
from _convolution import GEMM, INF, NAMES, NHWC, OPS, WINOGRAD, WINOGRAD2, Conv, check, forward, fused, square
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastres.testing import relative_error

UGLY = [
    # channels
    *(square(c, k, 3, 1, 1, 7, batch=3) for c, k in ((1, 1), (1, 65), (3, 5), (5, 3), (17, 65), (65, 17), (65, 1))),
    *(square(c, k, 1, 1, 0, 5, batch=3) for c, k in ((1, 1), (3, 17), (17, 3), (65, 65))),
    # kernels
    square(3, 5, 2, 1, 0, 5),
    square(17, 5, 2, 2, 1, 9, batch=3),
    square(5, 17, 7, 2, 3, 15),
    square(17, 3, 7, 1, 3, 7),
    Conv((3, 5, 9, 7), (3, 5, 5, 3), (1, 1), (2, 1)),
    Conv((1, 17, 9, 7), (65, 17, 5, 3), (2, 2), (2, 1)),
    Conv((3, 3, 9, 11), (17, 3, 1, 7), (1, 1), (0, 3)),
    Conv((1, 17, 9, 11), (5, 17, 1, 7), (1, 2), (0, 3)),
    Conv((1, 3, 11, 9), (5, 3, 7, 1), (2, 1), (3, 0)),
    # strides
    square(3, 17, 3, 3, 1, 11, batch=3),
    square(17, 5, 1, 3, 0, 8),
    square(17, 5, 2, 3, 0, 10),
    Conv((3, 17, 9, 10), (5, 17, 3, 3), (1, 2), (1, 1)),
    Conv((1, 16, 13, 9), (16, 16, 3, 3), (2, 1), (1, 1)),
    Conv((1, 5, 4, 4), (3, 5, 1, 1), (7, 5)),
    # padding, also more of it than the kernel can use
    square(5, 17, 3, 1, 3, 5),
    square(17, 5, 3, 2, 3, 6),
    square(17, 3, 1, 1, 2, 4),
    square(16, 16, 3, 1, 2, 10),
    square(16, 16, 3, 1, 0, 10),
    square(16, 16, 3, 1, 5, 6),
    Conv((3, 3, 6, 5), (5, 3, 3, 3), (1, 1), (0, 3)),
    Conv((1, 16, 9, 17), (32, 16, 3, 3), (1, 1), (2, 0)),
    Conv((1, 17, 6, 5), (5, 17, 2, 2), (2, 3), (3, 1)),
    # dilation
    square(5, 17, 3, 1, 2, 9, dilation=2),
    square(17, 5, 3, 2, 3, 11, dilation=3, batch=3),
    square(16, 16, 3, 1, 2, 12, dilation=2),
    Conv((1, 3, 9, 11), (5, 3, 3, 3), (1, 1), (2, 1), (2, 1)),
    Conv((1, 17, 9, 11), (5, 17, 3, 2), (2, 1), (1, 3), (1, 3)),
    # maps of one pixel, in and out
    *(square(c, k, 1, s, 0, 1) for c, k, s in ((65, 17, 1), (3, 5, 2))),
    square(16, 16, 3, 1, 1, 1, batch=3),
    square(3, 17, 3, 2, 1, 1, batch=3),
    square(17, 65, 5, 1, 0, 5),
    square(3, 5, 7, 2, 0, 7, batch=3),
    # tiles of Winograd that are cut on all sides
    *(square(16, 24, 3, 1, 1, n, batch=3) for n in (5, 7, 9, 13)),
    Conv((3, 24, 7, 15), (40, 24, 3, 3), (1, 1), (1, 1)),
    Conv((1, 8, 23, 3), (8, 8, 3, 3), (1, 1), (1, 1)),
]


@pytest.mark.parametrize("layout", [torch.contiguous_format, NHWC], ids=str)
@pytest.mark.parametrize("conv", UGLY, ids=str)
def test_ugly_shapes(conv, layout):
    x, weight, *rest = conv.tensors()
    tensors = (x, weight.contiguous(memory_format=layout), *rest)
    check(conv, tensors, fused(conv, tensors), conv.methods())


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "identity"])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("conv", [square(16, 48, 3, 1, 1, 10), square(17, 21, 3, 2, 1, 9)], ids=str)
def test_epilogue(conv, with_bias, with_residual, relu):
    x, weight, bias, residual, _ = conv.tensors()
    bias, residual = bias if with_bias else None, residual if with_residual else None
    want = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), *conv.geometry)
    want = want if residual is None else want + residual
    want = F.relu(want) if relu else want
    assert relative_error(forward(conv, x, weight, bias, residual, relu), want) < 2e-6


@st.composite
def convs(draw):
    def pair(low, high):
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    channels = st.one_of(st.integers(1, 20), st.sampled_from([8, 16, 24, 32, 33]))
    c, k, three = draw(channels), draw(channels), draw(st.booleans())
    kernel, stride = ((3, 3), (1, 1)) if three else (pair(1, 5), pair(1, 3))
    size = pair(1, 14)
    conv = Conv(
        (draw(st.integers(1, 3)), c, *size), (k, c, *kernel), stride, pair(0, 4), (1, 1) if three else pair(1, 3)
    )
    reach = [n + 2 * p - d * (r - 1) for n, p, d, r in zip(size, conv.padding, conv.dilation, kernel, strict=True)]
    assume(min(reach) > 0)
    return conv


@settings(deadline=None, derandomize=True, max_examples=80)
@given(convs(), st.booleans(), st.integers(0, 2**31))
def test_any_geometry(conv, winograd, seed):
    torch.manual_seed(seed)
    tensors = conv.tensors()
    check(conv, tensors, fused(conv, tensors, winograd), conv.methods(winograd))


@pytest.mark.parametrize("pixels", [6, 14, 17])
@pytest.mark.parametrize("channels", [(16, 16), (64, 48), (32, 128)], ids=str)
def test_winograd_agrees_with_the_direct_way(channels, pixels):
    conv = square(*channels, 3, 1, 1, pixels, batch=2)
    assert conv.methods() == (WINOGRAD,) * 3 and conv.methods(winograd=False) == (GEMM,) * 3
    tensors = conv.tensors()
    for name, fast, direct in zip(NAMES, fused(conv, tensors), fused(conv, tensors, winograd=False), strict=True):
        assert not torch.equal(fast, direct), f"{name}: the same method twice"
        assert relative_error(fast, direct) < 5e-6, name


@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 7), (14, 14), (5, 18)], ids=str)
@pytest.mark.parametrize("channels", [(16, 16), (64, 48), (512, 32)], ids=str)
def test_small_tiles_of_winograd_are_as_exact_as_the_direct_way(channels, size, with_residual):
    c, k = channels
    conv = Conv((2, c, *size), (k, c, 3, 3), padding=(1, 1))
    x, weight, bias, residual, _ = conv.tensors()
    residual = residual if with_residual else None
    y = {}
    for method in (GEMM, WINOGRAD2):
        packed = OPS.conv_pack(weight, conv.x, *conv.geometry, method)
        y[method] = OPS.conv(x, packed, conv.weight, bias, residual, *conv.geometry, True, method)
    truth = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    truth = F.relu(truth if residual is None else truth + residual)
    assert relative_error(y[WINOGRAD2], truth) <= max(1.5 * relative_error(y[GEMM], truth), 4e-7)
    x[0, 0, 0, 0] = INF
    got = OPS.conv(x, packed, conv.weight, bias, residual, *conv.geometry, False, WINOGRAD2)
    want = F.conv2d(x, weight, bias, padding=1)
    assert torch.equal(got.isfinite(), want.isfinite())


#: Served by Winograd and by the matrix product; the last with rows of the kernel as taps.
