"""Our own convolutions and their gradients against float64, in every geometry, and what has to hold besides: values
that are not finite, threads, memory, the choice of the method, bad input."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import fastres
from fastres import functional, models
from fastres.kernels import convolution, extension
from fastres.testing import budget, relative_error

if not extension.available():
    pytest.skip(f"compiled kernels are not loaded: {extension.load_error()}", allow_module_level=True)

OPS = torch.ops.fastres_cpu
NHWC = torch.channels_last
GEMM, WINOGRAD = 1, 2
NAMES = ("y", "grad_x", "grad_weight")


@dataclass(frozen=True)
class Conv:
    """A convolution and the shape of its input."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def __str__(self):
        text = "_".join("x".join(map(str, shape)) for shape in (self.x, self.weight, self.stride, self.padding))
        return text if self.dilation == (1, 1) else text + f"_{self.dilation[0]}x{self.dilation[1]}"

    @property
    def geometry(self):
        return self.stride, self.padding, self.dilation, 1

    @property
    def y(self):
        """Shape of the output."""
        window = zip(self.x[2:], self.weight[2:], *self.geometry[:3], strict=True)
        return (self.x[0], self.weight[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in window))

    def method(self, winograd=True):
        return OPS.conv_method(self.x, self.weight, *self.geometry, winograd)

    def methods(self, winograd=True):
        """The method of y, grad_x and grad_weight."""
        k, c, *kernel = self.weight
        method, back = self.method(winograd), GEMM
        full = [d * (n - 1) - p for n, p, d in zip(kernel, self.padding, self.dilation, strict=True)]
        if self.stride == (1, 1) and min(full) >= 0:
            back = OPS.conv_method(self.y, (c, k, *kernel), self.stride, full, self.dilation, 1, winograd)
        return method, back, method

    def tensors(self):
        """x, weight, bias, residual, grad_y."""
        weight = torch.randn(self.weight) / (self.weight[1] * self.weight[2] * self.weight[3]) ** 0.5
        return nhwc(*self.x), weight.contiguous(memory_format=NHWC), torch.randn(self.weight[0]), *grads(self)


def square(c, k, size, stride, padding, pixels, dilation=1, batch=1):
    return Conv((batch, c, pixels, pixels), (k, c, size, size), (stride,) * 2, (padding,) * 2, (dilation,) * 2)


def nhwc(*shape):
    return torch.randn(shape).contiguous(memory_format=NHWC)


def grads(conv):
    return nhwc(*conv.y), nhwc(*conv.y)


def forward(conv, x, weight, bias=None, residual=None, relu=False, winograd=True):
    method = conv.method(winograd)
    packed = OPS.conv_pack(weight, conv.x, *conv.geometry, method)
    return OPS.conv(x, packed, conv.weight, bias, residual, *conv.geometry, relu, method)


def grad_x(conv, grad, weight, winograd=True):
    return OPS.conv_backward_input(grad, weight, conv.x, *conv.geometry, winograd)


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
        limit = budget(relative_error(e, t), torch.float32, summed=True, winograd=method == WINOGRAD)
        error = relative_error(a, t)
        assert error <= limit, f"{name}: error {error:.2e}, budget {limit:.2e}"
        assert a.is_contiguous(memory_format=NHWC)


def of_models():
    """Every distinct convolution of ResNet-18 and -50 at 224 pixels."""
    found = {}

    def note(module, args, y):
        conv = Conv(tuple(args[0].shape), tuple(module.weight.shape), module.stride, module.padding, module.dilation)
        found[conv] = None

    with torch.device("meta"):
        for name in ("resnet18", "resnet50"):
            model = models.create_model(name)
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    module.register_forward_hook(note)
            model(torch.empty(1, 3, 224, 224))
    return list(found)


CIFAR = [
    square(3, 16, 3, 1, 1, 32),
    square(16, 16, 3, 1, 1, 32),
    square(16, 32, 3, 2, 1, 32),
    square(16, 32, 1, 2, 0, 32),
    square(32, 32, 3, 1, 1, 16),
    square(32, 64, 3, 2, 1, 16),
    square(32, 64, 1, 2, 0, 16),
    square(64, 64, 3, 1, 1, 8),
]

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


@pytest.mark.parametrize("conv", [*of_models(), *CIFAR], ids=str)
def test_convolutions_of_resnets(conv):
    tensors = conv.tensors()
    got = fused(conv, tensors)
    check(conv, tensors, got, conv.methods())
    x, weight, *rest = tensors
    other = fused(conv, (x, weight.contiguous(), *rest))
    assert all(torch.equal(a, b) for a, b in zip(got, other, strict=True)), "depends on the layout of the weight"


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


NAN, INF = float("nan"), float("inf")
#: Served by Winograd and by the matrix product; the last with rows of the kernel as taps.
SPECIAL = [square(16, 32, 3, 1, 1, 14, batch=2), square(17, 24, 3, 2, 1, 9, batch=2), square(3, 8, 3, 1, 1, 9, batch=2)]
#: (channel, row, column) -> value
BAD_VALUES = {
    "nan": {(2, 5, 6): NAN},
    "inf": {(2, 5, 6): INF},
    "-inf in a corner": {(0, 0, 0): -INF},
    "inf in the last corner": {(1, -1, -1): INF},
    "inf on an edge": {(1, 0, 4): INF, (0, 3, -1): -INF},
    "inf - inf": {(2, 4, 4): INF, (1, 4, 5): INF},
    "nan and inf": {(0, 2, 2): NAN, (2, 7, 7): INF},
}


def spoil(t, values):
    t = t.clone(memory_format=torch.preserve_format)
    for (c, h, w), value in values.items():
        t[-1, c, h, w] = value
    return t


def assert_as_in_eager(got, want):
    """NaN, infinities with their signs and finite values, each where eager has it."""
    assert torch.equal(got.isnan(), want.isnan()), "NaN"
    assert torch.equal(got.isposinf(), want.isposinf()) and torch.equal(got.isneginf(), want.isneginf()), "infinities"
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("values", BAD_VALUES.values(), ids=BAD_VALUES)
@pytest.mark.parametrize("conv", SPECIAL, ids=str)
def test_inputs_that_are_not_finite(conv, values):
    x, weight, bias, residual, _ = conv.tensors()
    x = spoil(x, values)
    for relu in (False, True):
        want = F.conv2d(x.double(), weight.double(), bias.double(), *conv.geometry) + residual
        want = F.relu(want) if relu else want
        assert not want.isfinite().all() or relu
        assert_as_in_eager(forward(conv, x, weight, bias, residual, relu), want)


@pytest.mark.parametrize("values", BAD_VALUES.values(), ids=BAD_VALUES)
@pytest.mark.parametrize("conv", SPECIAL, ids=str)
def test_gradients_that_are_not_finite(conv, values):
    """As in float64; where a tap multiplies an infinity with padding, eager's float32 may differ: see below."""
    x, weight, _, _, grad = conv.tensors()
    grad = spoil(grad, {(c, min(h, 3), min(w, 3)): value for (c, h, w), value in values.items()})
    want_x, want_weight = eager_grads(conv, grad.double(), x.double(), weight.double())
    assert not want_x.isfinite().all() and not want_weight.isfinite().all()
    assert_as_in_eager(grad_x(conv, grad, weight), want_x)
    assert_as_in_eager(grad_weight(conv, grad, x), want_weight)


@pytest.mark.parametrize("values", BAD_VALUES.values(), ids=BAD_VALUES)
@pytest.mark.parametrize("conv", SPECIAL, ids=str)
def test_weight_gradient_of_inputs_that_are_not_finite(conv, values):
    x, weight, _, _, grad = conv.tensors()
    x = spoil(x, values)
    want = eager_grads(conv, grad, x, weight)[1]
    assert not want.isfinite().all()
    assert_as_in_eager(grad_weight(conv, grad, x), want)


@pytest.mark.parametrize("place", [(2, 5, 6), (0, 0, 0), (1, -1, -1)], ids=str)
def test_huge_values_that_overflow_in_the_transforms_only(place):
    conv, value = SPECIAL[0], -3e38
    x, weight, _, _, grad = conv.tensors()
    huge_x, huge_grad, small = spoil(x, {place: value}), spoil(grad, {place: value}), grad * 1e-3
    exact = weight.double()
    want_y = F.conv2d(huge_x.double(), exact, None, *conv.geometry)
    want_x = eager_grads(conv, huge_grad.double(), x.double(), exact)[0]
    want_weight = eager_grads(conv, small.double(), huge_x.double(), exact)[1]
    assert_as_in_eager(forward(conv, huge_x, weight), want_y)
    assert_as_in_eager(grad_x(conv, huge_grad, weight), want_x)
    assert_as_in_eager(grad_weight(conv, small, huge_x), want_weight)


@pytest.mark.parametrize("value", [1e36, -1e38, 2e38])
@pytest.mark.parametrize("place", [(2, 5, 6), (0, 0, 0), (1, -1, -1)], ids=str)
def test_huge_values_as_exact_as_others(place, value):
    """Whether the transforms overflow or not."""
    conv = SPECIAL[0]
    x, weight, bias, residual, grad = conv.tensors()
    tensors = spoil(x, {place: value}), weight, bias, residual, grad * 1e-3
    check(conv, tensors, fused(conv, tensors), conv.methods())


TAPS = {"corner": (0, 0), "centre": (1, 1), "all": (slice(None), slice(None))}


@pytest.mark.parametrize("value", [1e38, 3e38])
@pytest.mark.parametrize("tap", TAPS.values(), ids=TAPS)
@pytest.mark.parametrize("winograd", [True, False], ids=["winograd", "direct"])
def test_huge_weights(monkeypatch, winograd, tap, value):
    """Through the public function and its gradient, which take any weight."""
    monkeypatch.setattr(fastres.config, "winograd", winograd)
    conv = SPECIAL[0]
    x, weight, _, _, grad = conv.tensors()
    x, grad = x.clamp(-1, 1) * 0.01, grad.clamp(-1, 1) * 0.01
    weight[(5, 3, *tap)] = value
    with fastres.use_kernels("cpu"):
        got = functional.conv_bias_act(x, weight, None, padding=1, act="identity")
    exact = x.double(), weight.double()
    want, want_x = F.conv2d(*exact, None, *conv.geometry), eager_grads(conv, grad.double(), *exact)[0]
    assert relative_error(got, want) < 5e-6
    assert relative_error(grad_x(conv, grad, weight, winograd), want_x) < 5e-6


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("tap", TAPS.values(), ids=TAPS)
@pytest.mark.parametrize("winograd", [True, False], ids=["winograd", "direct"])
def test_weights_that_are_not_finite(monkeypatch, winograd, tap, value):
    """Through the public function, which takes any weight. As in float64: there, too, an infinity times padding is
    NaN."""
    monkeypatch.setattr(fastres.config, "winograd", winograd)
    conv = SPECIAL[0]
    x, weight, *_ = conv.tensors()
    weight[(5, 3, *tap)] = value
    with fastres.use_kernels("cpu"):
        got = functional.conv_bias_act(x, weight, None, padding=1, act="identity")
    assert_as_in_eager(got, F.conv2d(x.double(), weight.double(), None, *conv.geometry))


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("tap", TAPS.values(), ids=TAPS)
@pytest.mark.parametrize("winograd", [True, False], ids=["winograd", "direct"])
def test_gradient_of_weights_that_are_not_finite(monkeypatch, winograd, tap, value):
    monkeypatch.setattr(fastres.config, "winograd", winograd)
    conv = SPECIAL[0]
    x, weight, _, _, grad = conv.tensors()
    weight[(5, 3, *tap)] = value
    want, witness = (eager_grads(conv, grad.to(d), x.to(d), weight.to(d))[0] for d in (torch.float64, torch.float32))
    assert grad_x(conv, grad, weight, winograd).numel() == 0  # the caller takes ATen's
    got = convolution.convolve_backward(grad, x, weight, False, conv.geometry, (True, False, False))[0]
    assert torch.equal(witness.isnan(), want.isnan())
    assert_as_in_eager(got, want)


@pytest.mark.parametrize("winograd", [True, False], ids=["winograd", "direct"])
@pytest.mark.parametrize(
    "conv",
    [
        square(64, 64, 3, 1, 1, 28, batch=2),
        square(128, 144, 3, 1, 1, 7),
        square(3, 64, 7, 2, 3, 64),
        square(64, 128, 1, 2, 0, 28),
    ],
    ids=str,
)
def test_bitwise_repeatable_for_any_number_of_threads(conv, winograd):
    tensors = conv.tensors()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(fused(conv, tensors, winograd))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, a, b in zip(NAMES, results[0], other, strict=True):
            assert torch.equal(a, b), name


def embedded(t, offset=13):
    """A copy of t with its strides, in the middle of a buffer of NaN; and the buffer."""
    buffer = torch.full((t.numel() + 2 * offset + 4096,), NAN)
    inner = buffer.as_strided(t.shape, t.stride(), offset)
    inner.copy_(t)
    return inner, buffer


@pytest.mark.parametrize(
    "conv",
    [
        square(16, 32, 3, 1, 1, 9, batch=2),
        square(64, 80, 3, 1, 1, 14),
        square(17, 21, 3, 2, 1, 9, batch=2),
        square(3, 5, 7, 2, 3, 11, batch=2),
        square(65, 33, 1, 1, 0, 5),
        square(5, 3, 3, 1, 2, 8, dilation=2),
    ],
    ids=str,
)
def test_touches_nothing_outside_of_its_tensors(conv):
    tensors = conv.tensors()
    inner, buffers = zip(*map(embedded, tensors), strict=True)
    before = [buffer.clone() for buffer in buffers]
    method = conv.method()
    packed = OPS.conv_pack(inner[1], conv.x, *conv.geometry, method)
    packed, packed_buffer = embedded(packed.nan_to_num())  # nan_to_num: of lanes between the planes that none reads
    y = OPS.conv(inner[0], packed, conv.weight, *inner[2:4], *conv.geometry, True, method)
    got = (y, grad_x(conv, inner[4], inner[1]), grad_weight(conv, inner[4], inner[0]))
    for name, a, b in zip(NAMES, got, fused(conv, tensors), strict=True):
        assert torch.equal(a, b), name
    for buffer, same in zip(buffers, before, strict=True):
        assert torch.equal(buffer.view(torch.int32), same.view(torch.int32))
    assert packed_buffer[:13].isnan().all() and packed_buffer[13 + packed.numel() :].isnan().all()


def test_method():
    lanes = 8 if extension.isa() in ("base", "avx2") else 16
    fits = square(2 * lanes, lanes, 3, 1, 1, 14)
    assert fits.method() == WINOGRAD and fits.method(winograd=False) == GEMM
    for c, k in ((2 * lanes + 1, lanes), (2 * lanes, lanes + 1), (lanes // 2, lanes), (3, 64)):
        assert square(c, k, 3, 1, 1, 14).method() == GEMM
    others = [(1, 1, 0, 1), (5, 1, 2, 1), (3, 2, 1, 1), (3, 1, 2, 2)]
    for size, stride, padding, dilation in others:
        assert square(64, 64, size, stride, padding, 14, dilation).method() == GEMM
    assert square(64, 64, 3, 1, 1, 2).method() == GEMM  # most of a tile would be thrown away
    for groups in (2, 64):
        args = ((1, 64, 14, 14), (64, 64 // groups, 3, 3), (1, 1), (1, 1), (1, 1), groups, True)
        assert OPS.conv_method(*args) == 0


def test_config_winograd_of_a_function(monkeypatch):
    conv = square(16, 16, 3, 1, 1, 14, batch=2)
    x, weight, bias, residual, grad = conv.tensors()
    x.requires_grad_()
    for winograd in (True, False, True):
        monkeypatch.setattr(fastres.config, "winograd", winograd)
        with fastres.use_kernels("cpu"):
            y = functional.conv_bias_act(x.detach(), weight, bias, residual, padding=1)
            out = functional.conv_bn_act(x, weight, None, None, training=True, padding=1)
            got = torch.autograd.grad(out, x, grad)[0]
        assert torch.equal(y, forward(conv, x.detach(), weight, bias, residual, True, winograd))
        assert not torch.equal(y, forward(conv, x.detach(), weight, bias, residual, True, not winograd))
        if winograd:
            by_winograd = got
        else:
            assert not torch.equal(got, by_winograd) and relative_error(got, by_winograd) < 2e-5


def block(channels=32):
    block = models.BasicBlock(channels, channels).eval().to(memory_format=NHWC)
    for bn in (block.bn1, block.bn2):
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
    return block


def test_config_winograd_of_a_fused_model(monkeypatch):
    plain = block()
    model = deepcopy(plain)
    fastres.fuse_(model)
    x = nhwc(2, 32, 14, 14)
    results = []
    with torch.no_grad():
        truth = deepcopy(plain).double()(x.double())
        for winograd in (True, False, True, False):
            monkeypatch.setattr(fastres.config, "winograd", winograd)
            results.append(model(x))
        fresh = deepcopy(plain)
        fastres.fuse_(fresh)
        assert torch.equal(fresh(x), results[1])  # the weights kept for Winograd were left
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
    assert not torch.equal(results[0], results[1])
    assert relative_error(results[0], truth) < 5e-6 and relative_error(results[1], truth) < 1e-6


def test_one_layer_with_shapes_that_need_different_methods():
    plain = block()
    model = deepcopy(plain)
    fastres.fuse_(model)
    exact = deepcopy(plain).double()
    shapes = [(2, 32, 2, 2), (2, 32, 14, 14), (1, 32, 1, 1), (3, 32, 14, 13), (1, 32, 3, 3), (2, 32, 2, 2)]
    methods = {Conv(shape, (32, 32, 3, 3), padding=(1, 1)).method() for shape in shapes}
    assert methods == {GEMM, WINOGRAD}
    with torch.no_grad():
        for shape in shapes * 2:
            x = nhwc(*shape)
            assert relative_error(model(x), exact(x.double())) < 5e-6, shape


def test_several_threads_at_once():
    jobs = []
    for conv in (square(64, 64, 3, 1, 1, 28, batch=2), square(3, 64, 7, 2, 3, 64), square(64, 65, 3, 2, 1, 28)) * 4:
        tensors = conv.tensors()
        jobs.append((conv, tensors, fused(conv, tensors)))

    def again(job):
        conv, tensors, alone = job
        return all(torch.equal(a, b) for _ in range(3) for a, b in zip(fused(conv, tensors), alone, strict=True))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(again, jobs))


def bad_calls():
    conv = square(16, 32, 3, 1, 1, 14, batch=2)
    other = square(16, 32, 3, 1, 1, 13, batch=2)
    x, weight, bias, residual, grad = conv.tensors()
    where = conv.geometry
    packed = {m: OPS.conv_pack(weight, conv.x, *where, m) for m in (GEMM, WINOGRAD)}

    def run(x=x, packed=packed[GEMM], weight=conv.weight, bias=bias, residual=residual, where=where, method=GEMM):
        return lambda: OPS.conv(x, packed, weight, bias, residual, *where, True, method)

    def back(grad=grad, weight=weight, x=conv.x, where=where):
        return lambda: OPS.conv_backward_input(grad, weight, x, *where, True)

    def back_weight(grad=grad, x=x, weight=conv.weight, where=where):
        return lambda: OPS.conv_backward_weight(grad, x, weight, *where, True)

    def pack(weight=weight, where=where, method=GEMM, x=conv.x):
        return lambda: OPS.conv_pack(weight, x, *where, method)

    grouped = (*where[:3], 2)
    not_dense, no_shape = "dense in channels_last", "must have the shape of"
    return {
        "float64 x": (run(x=x.double()), "x must be float32"),
        "bfloat16 x": (run(x=x.bfloat16()), "x must be float32"),
        "NCHW x": (run(x=x.contiguous()), f"x must be {not_dense}"),
        "x with gaps": (run(x=nhwc(2, 32, 14, 14)[:, :16]), f"x must be {not_dense}"),
        "3D x": (run(x=x[0]), "4 dimensions|[Dd]imension out of range"),
        "channels of x": (run(x=nhwc(2, 17, 14, 14)), "channels do not match"),
        "short packed": (run(packed=packed[GEMM][:-1]), "packed weight does not fit"),
        "packed for Winograd": (run(packed=packed[WINOGRAD]), "packed weight does not fit"),
        "packed for the matrix product": (run(packed=packed[GEMM], method=WINOGRAD), "packed weight does not fit"),
        "float16 packed": (run(packed=packed[GEMM].half()), "packed weight"),
        "packed with gaps": (run(packed=packed[GEMM][:1].expand(packed[GEMM].numel())), "packed weight"),
        "unknown method": (run(method=7), "method"),
        "bias of another size": (run(bias=bias[:-1].clone()), "bias must be .* of 32 values"),
        "float64 bias": (run(bias=bias.double()), "bias must be a contiguous float32"),
        "residual of another size": (run(residual=nhwc(2, 32, 13, 14)), f"residual {no_shape}"),
        "float64 residual": (run(residual=residual.double()), "residual must have the dtype"),
        "NCHW residual": (run(residual=residual.contiguous()), f"residual must be {not_dense}"),
        "float16 weight": (pack(weight.half()), "weight must be a 4D float32"),
        "3D weight": (pack(weight[0]), "weight must be a 4D float32"),
        "channels of the weight": (pack(torch.randn(32, 17, 3, 3)), "channels do not match"),
        "Winograd of 1x1": (pack(torch.randn(32, 16, 1, 1), method=WINOGRAD), "Winograd does not serve"),
        "stride 0": (pack(where=((0, 1), (1, 1), (1, 1), 1)), "unsupported convolution"),
        "negative padding": (pack(where=((1, 1), (1, -1), (1, 1), 1)), "unsupported convolution"),
        "no output": (pack(where=((1, 1), (0, 0), (7, 7), 1)), "output would be empty"),
        "no output with a stride": (pack(x=(1, 16, 2, 2), where=((2, 2), (0, 0), (1, 1), 1)), "output would be empty"),
        "float64 grad": (back(grad.double()), "grad_y must be float32"),
        "NCHW grad": (back(grad.contiguous()), f"grad_y must be {not_dense}"),
        "grad of another size": (back(nhwc(*other.y)), f"grad_y {no_shape} the output"),
        "grad of another batch": (back(grad[:1].contiguous(memory_format=NHWC)), f"grad_y {no_shape} the output"),
        "float64 weight": (back(weight=weight.double()), "weight must be a 4D float32"),
        "grad_x of groups": (back(weight=weight[:, :8], where=grouped), "grouped"),
        "grad for the weight": (back_weight(nhwc(*other.y)), f"grad_y {no_shape} the output"),
        "float64 grad for the weight": (back_weight(grad.double()), "grad_y must be float32"),
        "float64 x for the weight": (back_weight(x=x.double()), "x must be float32"),
        "NCHW x for the weight": (back_weight(x=x.contiguous()), f"x must be {not_dense}"),
        "channels of the gradient's weight": (back_weight(weight=(32, 17, 3, 3)), "channels do not match"),
        "grad_weight of groups": (back_weight(weight=(32, 8, 3, 3), where=grouped), "grouped"),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_input(name):
    call, message = bad_calls()[name]
    with pytest.raises(RuntimeError, match=message):
        call()


def test_empty_batch():
    """In a process of its own: a division by zero would end this one."""
    code = f"""if True:
        import torch
        from fastres.kernels import convolution, extension
        ops, where = torch.ops.fastres_cpu, ([1, 1], [1, 1], [1, 1], 1)
        x = torch.empty(0, 16, 14, 14, memory_format=torch.channels_last)
        w = torch.randn(16, 16, 3, 3)
        for method in ({GEMM}, {WINOGRAD}):
            packed = ops.conv_pack(w, [1, 16, 14, 14], *where, method)
            assert ops.conv(x, packed, w.shape, None, None, *where, False, method).shape == x.shape
            winograd = method == {WINOGRAD}
            assert ops.conv_backward_input(x, w, x.shape, *where, winograd).shape == x.shape
            assert ops.conv_backward_weight(x, x, w.shape, *where, winograd).eq(0).all()
    """
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, f"exit status {process.returncode}\n{process.stderr}"
