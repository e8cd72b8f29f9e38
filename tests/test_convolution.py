"""Our own convolutions and their gradients against float64, in every geometry."""

import math

import pytest
import torch
import torch.nn.functional as F
from _convolution import (
    GEMM,
    INF,
    NAMES,
    NHWC,
    OPS,
    WINOGRAD,
    WINOGRAD2,
    Conv,
    check,
    forward,
    fused,
    grad_x,
    nhwc,
    square,
)
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
    # more products than are summed at once: taps together, and parts of one tap
    square(300, 17, 1, 1, 0, 5, batch=3),
    square(17, 600, 1, 1, 0, 3),
    Conv((1, 65, 6, 5), (17, 65, 3, 3), (1, 1), (2, 1), (2, 1)),
    Conv((1, 257, 4, 5), (3, 257, 2, 3), (2, 1), (1, 1)),
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

DEPTHWISE = [
    square(c, multiplier * c, size, stride, size // 2, 14, batch=2, groups=c)
    for c, size in ((32, 3), (64, 7), (160, 3))
    for multiplier in (1, 2)
    for stride in (1, 2)
]

#: Groups of every width, also those left to oneDNN, and channels that fill no vector.
UGLY_GROUPS = [
    *(
        square(g * c, g * k, 3, 1, 1, 7, batch=3, groups=g)
        for g, c, k in ((17, 1, 1), (65, 1, 1), (33, 1, 2), (17, 1, 3))
    ),
    *(
        square(g * c, g * k, 3, 1, 1, 7, batch=3, groups=g)
        for g, c, k in ((9, 2, 2), (17, 2, 1), (9, 2, 4), (11, 4, 2))
    ),
    *(
        square(g * c, g * k, 3, 2, 1, 9, groups=g)
        for g, c, k in ((5, 4, 4), (7, 4, 8), (7, 8, 4), (7, 3, 3), (3, 6, 7))
    ),
    *(
        square(g * c, g * k, 3, 1, 1, 6, groups=g)
        for g, c, k in ((3, 8, 8), (3, 8, 16), (3, 16, 8), (5, 8, 3), (2, 8, 24))
    ),
    *(square(g * c, g * k, 3, 2, 1, 7, groups=g) for g, c, k in ((2, 16, 16), (3, 17, 21), (2, 65, 33), (2, 20, 5))),
    *(square(c, c, 1, s, 0, 7, batch=2, groups=g) for c, g, s in ((32, 32, 1), (32, 8, 2), (64, 4, 1), (64, 2, 3))),
    *(square(c, c, 5, 1, 2, 8, groups=g) for c, g in ((24, 24), (32, 8), (48, 3))),
    *(square(c, c, 2, 2, 1, 8, groups=g) for c, g in ((24, 24), (32, 8), (48, 3))),
    *(square(c, c, 3, 2, 3, 11, dilation=3, groups=g) for c, g in ((24, 24), (32, 8), (48, 3))),
    *(square(c, c, 3, 1, 4, 5, groups=g) for c, g in ((24, 24), (32, 8), (48, 3))),
    *(square(c, c, 3, 1, 1, 1, batch=2, groups=g) for c, g in ((24, 24), (32, 8), (48, 3))),
    Conv((1, 24, 9, 7), (24, 1, 5, 3), (1, 2), (3, 0), (2, 1), 24),
    Conv((2, 32, 7, 19), (32, 4, 1, 5), (3, 1), (0, 2), (1, 2), 8),
    Conv((1, 48, 23, 3), (96, 16, 3, 1), (2, 1), (1, 0), groups=3),
    Conv((1, 16, 130, 120), (16, 1, 3, 3), (1, 1), (1, 1), groups=16),  # more rows than are computed together
    Conv((1, 32, 9, 1200), (32, 4, 3, 3), (2, 1), (1, 1), groups=8),
]


@pytest.mark.parametrize("conv", DEPTHWISE, ids=str)
def test_depthwise(conv):
    tensors = conv.tensors()
    got = fused(conv, tensors)
    check(conv, tensors, got, conv.methods())
    x, weight, *rest = tensors
    other = fused(conv, (x, weight.contiguous(), *rest))
    assert all(torch.equal(a, b) for a, b in zip(got, other, strict=True)), "depends on the layout of the weight"


@pytest.mark.parametrize("layout", [torch.contiguous_format, NHWC], ids=str)
@pytest.mark.parametrize("conv", [*UGLY, *UGLY_GROUPS], ids=str)
def test_ugly_shapes(conv, layout):
    x, weight, *rest = conv.tensors()
    if not conv.method():
        pytest.skip("left to oneDNN")
    tensors = (x, weight.contiguous(memory_format=layout), *rest)
    check(conv, tensors, fused(conv, tensors), conv.methods())


#: A convolution of inputs with a mean, and the largest error, as a share of what is not its channels' mean. In one long
#: sum of all products the errors were 3.5e-6 and 1.2e-6.
LONG_SUMS = [(square(2048, 40, 1, 1, 0, 5), 2e-6), (square(300, 40, 3, 1, 2, 6, dilation=2), 7e-7)]


@pytest.mark.parametrize(("conv", "limit"), LONG_SUMS, ids=str)
def test_many_input_channels_are_summed_in_blocks(conv, limit):
    assert conv.method() == GEMM
    torch.manual_seed(0)
    mean = 1.2 * (-1.0) ** torch.arange(conv.x[1]).reshape(-1, 1, 1)
    x = F.relu(mean + 0.2 * nhwc(*conv.x))
    weight = torch.randn(conv.weight) / math.sqrt(math.prod(conv.weight[1:]))
    truth = F.conv2d(x.double(), weight.double(), None, *conv.geometry)
    error = forward(conv, x, weight, None, None, False).double() - truth
    assert error.norm() < limit * (truth - truth.mean((0, 2, 3), keepdim=True)).norm()


EPILOGUES = [
    square(16, 48, 3, 1, 1, 10),
    square(17, 21, 3, 2, 1, 9),
    *(square(51, 51, 3, 1, 1, 5, groups=g) for g in (51, 17)),
    square(48, 48, 3, 1, 1, 5, groups=3),
    square(40, 40, 3, 2, 1, 9, groups=10),
]


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "identity"])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("conv", EPILOGUES, ids=str)
def test_epilogue(conv, with_bias, with_residual, relu):
    x, weight, bias, residual, _ = conv.tensors()
    bias, residual = bias if with_bias else None, residual if with_residual else None
    want = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), *conv.geometry)
    want = want if residual is None else want + residual
    want = F.relu(want) if relu else want
    assert relative_error(forward(conv, x, weight, bias, residual, relu), want) < 2e-6


#: Input and output channels of a group.
GROUP_WIDTHS = [
    (1, 1),
    (1, 2),
    (2, 1),
    (1, 3),
    (3, 3),
    (3, 5),
    (2, 2),
    (2, 4),
    (4, 4),
    (4, 8),
    (8, 8),
    (16, 16),
    (16, 32),
]


@st.composite
def convs(draw):
    def pair(low, high):
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    channels = st.one_of(st.integers(1, 20), st.sampled_from([8, 16, 24, 32, 33]))
    c, k, three, groups = draw(channels), draw(channels), draw(st.booleans()), 1
    if draw(st.booleans()):
        c, k = draw(st.sampled_from(GROUP_WIDTHS))
        groups = -(-16 // min(c, k)) + draw(st.integers(0, 8))
    kernel, stride = ((3, 3), (1, 1)) if three else (pair(1, 5), pair(1, 3))
    size = pair(1, 14)
    x, weight = (draw(st.integers(1, 3)), groups * c, *size), (groups * k, c, *kernel)
    conv = Conv(x, weight, stride, pair(0, 4), (1, 1) if three else pair(1, 3), groups)
    reach = [n + 2 * p - d * (r - 1) for n, p, d, r in zip(size, conv.padding, conv.dilation, kernel, strict=True)]
    assume(min(reach) > 0)
    assume(conv.method() != 0)
    return conv


@settings(deadline=None, derandomize=True, max_examples=120)
@given(convs(), st.booleans(), st.integers(0, 2**31))
def test_any_geometry(conv, winograd, seed):
    torch.manual_seed(seed)
    tensors = conv.tensors()
    check(conv, tensors, fused(conv, tensors, winograd), conv.methods(winograd))


@pytest.mark.parametrize("pixels", [6, 14, 17])
@pytest.mark.parametrize("channels", [(16, 16), (64, 48), (32, 96)], ids=str)
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


@pytest.mark.parametrize("conv", [*EPILOGUES, square(16, 24, 1, 2, 0, 7), square(8, 8, 3, 1, 3, 6)], ids=str)
def test_gradient_plus_another(conv):
    """The same bits as a gradient and an addition, but for the rounding of one to the other."""
    _, weight, _, _, grad = conv.tensors()
    addend = nhwc(*conv.x)
    alone = grad_x(conv, grad, weight)
    assert alone.numel()
    assert relative_error(grad_x(conv, grad, weight, addend=addend), alone.double() + addend) < 2e-7
    with pytest.raises(RuntimeError, match="addend must have the shape of x"):
        grad_x(conv, grad, weight, addend=addend[:, :, :-1].contiguous(memory_format=NHWC))
