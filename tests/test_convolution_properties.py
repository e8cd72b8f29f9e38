"""Properties of convolutions over random shapes, strides, paddings, dilations, groups, dtypes and layouts."""

import pytest
import torch
import torch.nn.functional as F
from _convolution import (
    GEMM,
    NAMES,
    OPS,
    STEM,
    WINOGRAD,
    WINOGRAD2,
    Conv,
    by_functions,
    eager_grads,
    fused,
    grad_weight,
    grad_x,
)
from _properties import (
    DTYPES,
    FORMS,
    Truth,
    any_groups,
    assert_close,
    bounded,
    convs,
    dtypes,
    forms,
    guarded,
    one_group,
    seeds,
)
from hypothesis import assume, given
from hypothesis import strategies as st

import fastres
from fastres import functional
from fastres.kernels import convolution

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of switching oneDNN off and on


def eager(conv, tensors, act):
    """y, grad_x and grad_weight by ATen's own loops, of new tensors.

    oneDNN is wrong for some strides of the weight, and ends the process for some channels_last convolutions with more
    padding than their kernel reaches (PyTorch 2.13).
    """
    copies = [None if t is None else t.clone(memory_format=torch.contiguous_format) for t in tensors]
    x, weight, bias, residual, grad = copies
    with torch.backends.mkldnn.flags(enabled=False):
        y = F.conv2d(x, weight, bias, *conv.geometry)
        y = y if residual is None else y + residual
        return F.relu(y) if act == "relu" else y, *eager_grads(conv, grad, x, weight)


def served(conv, x, weight):
    """Whether our own kernels serve a call of the public functions."""
    return convolution.why_not(x, weight, None, None, *conv.geometry) is None


def assume_not_fatal(conv, x, weight):
    """Leaves out what may end the process in oneDNN, see `eager`."""
    reach = [d * (r - 1) for d, r in zip(conv.dilation, conv.weight[2:], strict=True)]
    assume(served(conv, x, weight) or all(p <= n for p, n in zip(conv.padding, reach, strict=True)))


def truths(conv, tensors, act):
    """In float64, with the norms of sums of absolute values."""
    exact = [None if t is None else t.double() for t in tensors]
    absolute = [None if t is None else t.abs() for t in exact]
    k, c, r, s = conv.weight
    pixels = conv.y[0] * conv.y[2] * conv.y[3]
    terms = c * r * s, k // conv.groups * r * s, pixels
    pairs = zip(eager(conv, exact, act), eager(conv, absolute, act), terms, strict=True)
    return [Truth.of(*pair) for pair in pairs]


@bounded(150)
@given(convs(any_groups), dtypes, st.tuples(*[forms] * 4), st.booleans(), st.booleans(), st.booleans(), seeds)
def test_against_float64(conv, dtype, places, with_bias, with_residual, relu, seed):
    """The public functions, whichever kernel serves, on tensors that lie in memory in any way."""
    torch.manual_seed(seed)
    x, weight, bias, residual, grad = (t.to(dtype) for t in conv.tensors())
    x, weight, residual, grad = (FORMS[form](t) for form, t in zip(places, (x, weight, residual, grad), strict=True))
    assume_not_fatal(conv, x, weight)
    tensors = x, weight, bias if with_bias else None, residual if with_residual else None, grad
    act = "relu" if relu else "identity"
    winograd = 3 in conv.weight[2:]  # may have been used
    for name, got, truth, witness in zip(
        NAMES, by_functions(conv, tensors, act), truths(conv, tensors, act), eager(conv, tensors, act), strict=True
    ):
        assert got.dtype is dtype
        assert_close(name, got, truth, witness, winograd=winograd)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shape", [(4, 2, 2, 1), (4, 2, 1, 2), (4, 2, 1, 1), (4, 1, 3, 1)], ids=str)
def test_strides_of_weights_where_a_size_is_one(shape, groups, dtype):
    """As slices and expanded tensors have them. oneDNN computes wrong values from some."""
    k, c, r, s = shape
    conv = Conv((2, c * groups, 5, 4), shape, padding=(1, 0), groups=groups)
    x, weight, bias, residual, grad = (t.to(dtype) for t in conv.tensors())
    strides = [w if n > 1 else 4 for n, w in zip(shape, (c * r * s, 1, s * c, c), strict=True)]
    for layout in (torch.channels_last, torch.contiguous_format):
        tensors = x.contiguous(memory_format=layout), torch.empty_strided(shape, strides, dtype=dtype).copy_(weight)
        tensors = *tensors, bias, residual, grad
        for name, got, truth, witness in zip(
            NAMES, by_functions(conv, tensors), truths(conv, tensors, "relu"), eager(conv, tensors, "relu"), strict=True
        ):
            assert_close(name, got, truth, witness)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, strides", [((4, 2, 2, 1), (4, 1, 2, 7)), ((4, 2, 1, 2), (4, 1, 7, 2))], ids=str)
def test_gradients_of_conv_bias_act_for_such_strides(shape, strides, dtype):
    conv = Conv((2, 4, 6, 6), shape, groups=2)
    x, weight, bias, residual, grad = (t.to(dtype) for t in conv.tensors())
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.empty_strided(shape, strides, dtype=dtype).copy_(weight).requires_grad_()
    tensors = x.detach(), weight.detach(), bias, residual, grad
    y = functional.conv_bias_act(x, weight, bias, residual, groups=2, act="identity")
    found = y.detach(), *torch.autograd.grad(y, (x, weight), grad)
    every = found, truths(conv, tensors, "identity"), eager(conv, tensors, "identity")
    for name, got, truth, witness in zip(NAMES, *every, strict=True):
        assert_close(name, got, truth, witness)


def by_method(conv, method, x, weight, bias=None, residual=None, relu=False):
    packed = OPS.conv_pack(weight, conv.x, *conv.geometry, method)
    return OPS.conv(x, guarded(packed), conv.weight, bias, residual, *conv.geometry, relu, method)


def legal_methods(conv):
    k, c, *kernel = conv.weight
    plain = kernel == [3, 3] and conv.stride == conv.dilation == (1, 1)
    return [GEMM, WINOGRAD, WINOGRAD2] if plain and c % 16 == k % 16 == 0 else [GEMM]


@bounded(100)
@given(convs(), st.booleans(), st.booleans(), st.booleans(), seeds)
def test_every_method_against_float64(conv, with_bias, with_residual, relu, seed):
    """Also those that are not chosen for a shape, on dense tensors inside of NaN."""
    torch.manual_seed(seed)
    x, weight, bias, residual, grad = map(guarded, conv.tensors())
    tensors = x, weight, bias if with_bias else None, residual if with_residual else None, grad
    act = "relu" if relu else "identity"
    truth, witness = truths(conv, tensors, act), eager(conv, tensors, act)
    for method in legal_methods(conv):
        got = by_method(conv, method, *tensors[:4], relu)
        assert_close(f"y by method {method}", got, truth[0], witness[0], winograd=method == WINOGRAD)
    for winograd in (True, False):
        _, back, of_weight = conv.methods(winograd)
        got = grad_x(conv, grad, weight, winograd)
        assert_close("grad_x", got, truth[1], witness[1], winograd=back == WINOGRAD)
        got = grad_weight(conv, grad, x, winograd)
        assert_close("grad_weight", got, truth[2], witness[2], winograd=of_weight == WINOGRAD)


@bounded(60)
@given(convs(), st.booleans(), st.booleans(), st.tuples(*[st.integers(1, 4)] * 2), st.data(), seeds)
def test_conv_maxpool_against_float64(conv, with_bias, relu, window, data, seed):
    kernel, stride = window
    padding = data.draw(st.integers(0, kernel // 2), label="padding of the pool")
    assume(min(conv.y[2:]) + 2 * padding >= kernel)
    torch.manual_seed(seed)
    x, weight, bias, *_ = map(guarded, conv.tensors())
    bias = bias if with_bias else None
    method = conv.method() if conv.method() == STEM else GEMM
    packed = guarded(OPS.conv_pack(weight, conv.x, *conv.geometry, method))
    got = OPS.conv_maxpool(x, packed, conv.weight, bias, *conv.geometry[:3], relu, method, kernel, stride, padding)
    tensors, act = (x, weight, bias, None, torch.zeros(conv.y)), "relu" if relu else "identity"
    truth, witness = truths(conv, tensors, act)[0], eager(conv, tensors, act)[0]
    pooled = Truth(F.max_pool2d(truth.value, kernel, stride, padding), truth.norm)
    assert_close("y", got, pooled, F.max_pool2d(witness, kernel, stride, padding))


@bounded(60)
@given(convs(any_groups), st.booleans(), seeds)
def test_an_image_does_not_depend_on_its_batch(conv, winograd, seed):
    """Bit by bit where our kernels serve it by the same method, else within the budget; nor does its gradient."""
    torch.manual_seed(seed)
    tensors = conv.tensors()
    x, weight, bias, residual, grad = tensors
    assume_not_fatal(conv, x, weight)
    alone = Conv((1, *conv.x[1:]), conv.weight, *conv.geometry)
    before, fastres.config.winograd = fastres.config.winograd, winograd
    try:
        together = by_functions(conv, tensors)[:2]
        same = conv.methods(winograd)[:2], alone.methods(winograd)[:2]
        for i in range(conv.x[0]):
            one = [t[i : i + 1] for t in (x, residual, grad)]
            apart = by_functions(alone, (one[0], weight, bias, *one[1:]))[:2]
            truth = truths(alone, (one[0], weight, bias, *one[1:]), "relu")
            for name, a, b, t, method, other in zip(NAMES, together, apart, truth, *same, strict=False):
                if method == other and served(conv, x, weight) and served(alone, one[0], weight):
                    assert torch.equal(a[i : i + 1], b), name
                assert_close(name, a[i : i + 1], t, t.value, winograd=winograd and 3 in conv.weight[2:])
    finally:
        fastres.config.winograd = before


@bounded(40)
@given(convs(st.one_of(one_group, any_groups)), dtypes, seeds)
def test_the_same_bits_every_time_and_with_any_number_of_threads(conv, dtype, seed):
    """By our own kernels; oneDNN's gradients of weights are not."""
    torch.manual_seed(seed)
    tensors = [t.to(dtype) for t in conv.tensors()]
    assume(served(conv, *tensors[:2]))
    threads = torch.get_num_threads()
    want = by_functions(conv, tensors)
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            for name, a, b in zip(NAMES, by_functions(conv, tensors), want, strict=True):
                assert torch.equal(a, b), f"{name} with {count} threads"
    finally:
        torch.set_num_threads(threads)


@bounded(40)
@given(convs(), st.booleans(), st.integers(-20, 20), seeds)
def test_powers_of_two_pass_exactly(conv, winograd, power, seed):
    """Multiplication with them rounds nothing, so each result is theirs times what it was, to the bit."""
    torch.manual_seed(seed)
    x, weight, _, _, grad = conv.tensors()
    factor = 2.0**power

    def run(x, weight, grad):
        return fused(conv, (x, weight, None, None, grad), winograd)

    y, back, of_weight = run(x, weight, grad)
    for other, scaled in (
        (run(x * factor, weight, grad), (y * factor, back, of_weight * factor)),
        (run(x, weight * factor, grad), (y * factor, back * factor, of_weight)),
        (run(x, weight, grad * factor), (y, back * factor, of_weight * factor)),
    ):
        for name, a, b in zip(NAMES, other, scaled, strict=True):
            assert torch.equal(a, b), name


@bounded(40)
@given(convs(), st.booleans(), seeds)
def test_gradients_of_single_outputs_add_up(conv, winograd, seed):
    """Whole numbers, so that no sum is rounded: a gradient is the sum of those of its parts, to the bit by the direct
    way."""
    torch.manual_seed(seed)
    x, weight, grad, other = (t.mul(2).round() for t in (*conv.tensors()[:2], *conv.tensors()[3:]))
    for function, arguments in ((grad_x, weight), (grad_weight, x)):
        parts = [function(conv, g, arguments, winograd).double() for g in (grad, other)]
        whole = function(conv, grad + other, arguments, winograd).double()
        if winograd:
            scale = max(float(p.norm()) for p in (*parts, whole))
            assert float((whole - sum(parts)).norm()) <= 2e-5 * scale + 1e-4
        else:
            assert torch.equal(whole, sum(parts))
            assert torch.equal(whole, whole.round())


@pytest.mark.parametrize("zero", ["x", "weight", "grad"])
@pytest.mark.parametrize("winograd", [True, False], ids=["winograd", "direct"])
def test_zeros_give_zeros(zero, winograd):
    conv = Conv((2, 16, 9, 9), (32, 16, 3, 3), padding=(1, 1))
    x, weight, _, _, grad = conv.tensors()
    tensors = {"x": x, "weight": weight, "grad": grad}
    tensors[zero] = torch.zeros_like(tensors[zero])
    got = fused(conv, (tensors["x"], tensors["weight"], None, None, tensors["grad"]), winograd)
    touched = {"x": (0, 2), "weight": (0, 1), "grad": (1, 2)}[zero]
    for i, result in enumerate(got):
        assert (result == 0).all() == (i in touched), NAMES[i]
