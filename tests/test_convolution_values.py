"""What is not finite or overflows reaches in our own convolutions what it reaches in eager ones."""

import pytest
import torch
import torch.nn.functional as F
from _convolution import INF, NAN, check, eager_grads, forward, fused, grad_weight, grad_x, square

import fastres
from fastres import functional
from fastres.kernels import convolution
from fastres.testing import relative_error

SPECIAL = [
    square(16, 32, 3, 1, 1, 14, batch=2),
    square(17, 24, 3, 2, 1, 9, batch=2),
    square(3, 8, 3, 1, 1, 9, batch=2),
    *(square(24, 24, 3, 1, 1, 9, batch=2, groups=groups) for groups in (24, 6, 3, 8)),
    square(64, 64, 3, 2, 1, 9, batch=2, groups=2),
]
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


#: Convolutions, and whether with Winograd.
WEIGHTS_OF = [(SPECIAL[0], True), (SPECIAL[0], False), (SPECIAL[3], True), (SPECIAL[4], True)]
WEIGHTS_OF_IDS = ["winograd", "direct", "depthwise", "groups"]


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("tap", TAPS.values(), ids=TAPS)
@pytest.mark.parametrize("conv, winograd", WEIGHTS_OF, ids=WEIGHTS_OF_IDS)
def test_weights_that_are_not_finite(monkeypatch, conv, winograd, tap, value):
    """Through the public function, which takes any weight. As in float64: there, too, an infinity times padding is
    NaN."""
    monkeypatch.setattr(fastres.config, "winograd", winograd)
    x, weight, *_ = conv.tensors()
    weight[(5, -1, *tap)] = value
    with fastres.use_kernels("cpu"):
        got = functional.conv_bias_act(x, weight, None, padding=1, groups=conv.groups, act="identity")
    assert_as_in_eager(got, F.conv2d(x.double(), weight.double(), None, *conv.geometry))


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("tap", TAPS.values(), ids=TAPS)
@pytest.mark.parametrize("conv, winograd", WEIGHTS_OF, ids=WEIGHTS_OF_IDS)
def test_gradient_of_weights_that_are_not_finite(monkeypatch, conv, winograd, tap, value):
    monkeypatch.setattr(fastres.config, "winograd", winograd)
    x, weight, _, _, grad = conv.tensors()
    weight[(5, -1, *tap)] = value
    want, witness = (eager_grads(conv, grad.to(d), x.to(d), weight.to(d))[0] for d in (torch.float64, torch.float32))
    assert grad_x(conv, grad, weight, winograd).numel() == 0  # the caller takes ATen's
    got = convolution.convolve_backward(grad, x, weight, False, conv.geometry, (True, False, False))[0]
    assert torch.equal(witness.isnan(), want.isnan())
    assert_as_in_eager(got, want)
