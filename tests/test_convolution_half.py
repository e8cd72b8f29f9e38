"""Our own convolutions with bf16 and fp16 activations: those of fp32 activations, rounded once."""

import pytest
import torch
import torch.nn.functional as F
from _convolution import GEMM, NAMES, NHWC, OPS, Conv, eager, forward, fused, grad_weight, grad_x, square
from test_convolution import UGLY
from test_convolution_maxpool import CONVS, run
from test_convolution_nets import CIFAR
from test_convolution_values import BAD_VALUES, SPECIAL, spoil

import fastres
from fastres import functional
from fastres.kernels import convolution, onednn
from fastres.testing import budget, relative_error, unit_roundoff

HALF = [torch.bfloat16, torch.float16]
UNGROUPED = [conv for conv in SPECIAL if conv.groups == 1]  # of the others, half precision is left to ATen


@pytest.fixture(autouse=True)
def without_onednn(monkeypatch):
    """Where oneDNN convolves in half precision, the ops leave it to oneDNN. Ours are tested everywhere."""
    monkeypatch.setattr(onednn, "compute_dtype", lambda dtype: torch.float32)


LARGER = [  # several blocks of pixels, on all threads
    square(64, 64, 3, 1, 1, 30),
    square(64, 128, 3, 2, 1, 56),
    square(3, 64, 7, 2, 3, 96),
    square(64, 256, 1, 1, 0, 40),
    square(128, 48, 1, 2, 0, 57),
    square(512, 256, 3, 1, 1, 7),
    square(32, 17, 3, 1, 4, 30, dilation=4),
    Conv((1, 16, 5, 400), (24, 16, 3, 3), (1, 2), (1, 1)),
]


def halved(conv, dtype):
    """x, weight, bias, residual, grad_y as `fused` takes them: activations in `dtype`, with fp32 values that it has."""
    x, weight, bias, residual, grad = conv.tensors()
    return x.to(dtype), weight, bias, residual.to(dtype), grad.to(dtype)


def assert_rounded(got, want, dtype):
    """Elementwise within one rounding, hence also in norm; NaN and infinities in the same places."""
    assert got.dtype is dtype and got.is_contiguous(memory_format=NHWC)
    assert relative_error(got, want) <= unit_roundoff(dtype)


def check_rounded(conv, dtype, winograd=True):
    x, weight, bias, residual, grad = tensors = halved(conv, dtype)
    y, back, gradient = fused(conv, tensors, winograd)
    want = fused(conv, (x.float(), weight, bias, residual.float(), grad.float()), winograd)
    assert_rounded(y, want[0], dtype)
    assert_rounded(back, want[1], dtype)
    assert gradient.dtype is torch.float32 and relative_error(gradient, want[2]) < 1e-6


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("conv", [*CIFAR, *UGLY, *LARGER], ids=str)
def test_fp32_results_rounded_once(conv, dtype):
    check_rounded(conv, dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("conv", [square(16, 24, 3, 1, 1, 13, batch=2), *LARGER[:1]], ids=str)
def test_without_winograd(conv, dtype):
    check_rounded(conv, dtype, winograd=False)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("conv", [*CIFAR, *LARGER], ids=str)
def test_within_twice_eagers_error(conv, dtype):
    """Through what ops call, with a weight in the dtype of the activations: y, grad_x and grad_weight in that dtype."""
    tensors = [t.to(dtype) for t in conv.tensors()]
    x, weight, bias, residual, grad = tensors
    want, witness = eager(conv, tensors, torch.float64), eager(conv, tensors, dtype)
    geometry = ([*conv.stride], [*conv.padding], [*conv.dilation], 1)
    y = convolution.prepare(x, weight, bias, *geometry)(x, residual, True)
    back = convolution.convolve_backward(grad, x, weight, True, geometry, (True, True, True))
    for name, a, t, e in zip(NAMES, (y, *back), want, witness, strict=False):
        assert a.dtype is dtype
        limit = budget(relative_error(e, t), dtype, summed=name == "grad_weight")
        assert relative_error(a, t) <= limit, name
    assert relative_error(back[2], grad.double().sum((0, 2, 3))) <= 4 * unit_roundoff(dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("layout", "groups"), [(torch.contiguous_format, 1), (NHWC, 4), (NHWC, 16)], ids=str)
def test_what_is_left_to_aten_runs_in_fp32(layout, groups, dtype):
    """NCHW, grouped, depthwise: y and every gradient are fp32 results, rounded once."""
    geometry = ([1, 1], [1, 1], [1, 1], groups)
    x, grad = (torch.randn(2, 16, 9, 9).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    weight, bias = torch.randn(16, 16 // groups, 3, 3).to(dtype), torch.randn(16).to(dtype)
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    want = F.conv2d(*exact, 1, 1, 1, groups)
    want.backward(grad.double())
    y = convolution.convolve(x, weight, bias, geometry)
    grads = convolution.convolve_backward(grad, x, weight, True, geometry, (True, True, True))
    for got, truth in zip((y, *grads), (want, *(t.grad for t in exact)), strict=True):
        assert got.dtype is dtype and relative_error(got, truth) <= unit_roundoff(dtype)
    assert convolution.convolve_backward(grad, x, weight, False, geometry, (False, True, False))[::2] == [None, None]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients_of_the_op_are_exact_but_for_two_roundings(dtype):
    """ATen's, of the convolution that the stem is in training; in fp32 where oneDNN has no half precision."""
    x, weight, bias, *_ = (t.to(dtype).requires_grad_() for t in square(3, 8, 7, 2, 3, 15, batch=2).tensors())
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    functional.conv_bias_act(x, weight, bias, stride=2, padding=3, act="identity").sum().backward()
    F.conv2d(*exact, 2, 3).sum().backward()
    for t, truth in zip((x, weight, bias), exact, strict=True):
        assert t.grad.dtype is dtype and relative_error(t.grad, truth.grad) <= 2 * unit_roundoff(dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("values", BAD_VALUES.values(), ids=BAD_VALUES)
@pytest.mark.parametrize("conv", UNGROUPED, ids=str)
def test_values_that_are_not_finite(conv, values, dtype):
    x, weight, bias, residual, grad = halved(conv, dtype)
    bad = spoil(x, values)
    for got, want in (
        (forward(conv, bad, weight, bias, residual), forward(conv, bad.float(), weight, bias, residual.float())),
        (grad_weight(conv, grad, bad), grad_weight(conv, grad.float(), bad.float())),
    ):
        assert not want.isfinite().all()
        torch.testing.assert_close(got.float(), want, rtol=2 * unit_roundoff(dtype), atol=1e-4, equal_nan=True)
    bad = spoil(grad, {(c, min(h, 3), min(w, 3)): value for (c, h, w), value in values.items()})
    got, want = grad_x(conv, bad, weight), grad_x(conv, bad.float(), weight)
    assert not want.isfinite().all()
    torch.testing.assert_close(got.float(), want, rtol=2 * unit_roundoff(dtype), atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("conv", UNGROUPED, ids=str)
def test_fp16_overflows_to_infinity_as_in_eager(conv):
    x, weight, *_ = conv.tensors()
    x = (x * 3e4).half()
    want = F.conv2d(x.double(), weight.half().double(), None, *conv.geometry).half()
    got = forward(conv, x, weight.half().float())
    assert want.isinf().any()
    differ = got.isinf() != want.isinf()  # only values that lie on the edge
    assert differ.float().mean() < 1e-3 and torch.equal(got.sign()[want.isinf()], want.sign()[want.isinf()])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_maxpool(conv, dtype):
    x, weight, bias, *_ = halved(conv, dtype)
    pool = (3, 2, 1)
    assert_rounded(run(conv, x, weight, bias, True, pool), run(conv, x.float(), weight, bias, True, pool), dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_groups(dtype):
    conv = Conv((2, 24, 9, 9), (36, 8, 3, 3), padding=(1, 1))
    x, weight, bias, residual, _ = halved(conv, dtype)
    where = (*conv.geometry[:3], 3)
    packed = OPS.conv_pack(weight, conv.x, *where, GEMM)
    y = OPS.conv(x, packed, conv.weight, bias, residual, *where, False, GEMM)
    want = F.conv2d(x.float(), weight, bias, 1, 1, 1, 3) + residual.float()
    assert relative_error(y, want) <= 1.1 * unit_roundoff(dtype)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("conv", LARGER[:5], ids=str)
def test_same_for_all_numbers_of_threads(conv, threads):
    tensors = halved(conv, torch.bfloat16)
    want, before = fused(conv, tensors), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(a, b) for a, b in zip(fused(conv, tensors), want, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("resnet18", "infer"),
        ("resnet18", "train"),
        ("resnet18", "autocast"),
        pytest.param("resnet50", "train", marks=pytest.mark.slow),
    ],
)
def test_networks_in_bf16_run_by_our_own_convolutions(name, mode):
    """Logits, or the gradient of all weights together, at most twice as wrong as eager's."""
    torch.manual_seed(0)
    model = fastres.models.create_model(name, num_classes=10, fused=False).to(memory_format=NHWC)
    x, labels = torch.randn(2, 3, 64, 64).contiguous(memory_format=NHWC), torch.arange(2)
    state = model.state_dict()

    def result(dtype, fuse):
        other = fastres.models.create_model(name, num_classes=10, fused=False).to(memory_format=NHWC)
        other.load_state_dict(state)
        other.train(mode != "infer")
        autocast = mode == "autocast" and dtype is torch.bfloat16
        images = x if autocast else x.to(dtype)
        if not autocast:
            other.to(dtype)
        if fuse:
            fastres.fuse_(other)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.set_grad_enabled(mode != "infer"):
            logits = other(images)
            if mode == "infer":
                return logits.double()
            loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        return torch.cat([p.grad.double().ravel() for p in other.parameters()])

    truth, witness = result(torch.float64, False), result(torch.bfloat16, False)
    with fastres.use_kernels("cpu"):  # an error if another kernel would have to serve
        got = result(torch.bfloat16, True)
    assert relative_error(got, truth) <= budget(relative_error(witness, truth), torch.bfloat16)
