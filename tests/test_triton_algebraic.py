"""Triton's algebraic batch norm against float64, with eager as witness: forward, and backward behind the same mask."""

import pytest
import torch
import torch.nn.functional as F
from _products import NHWC, activation, assert_as_exact, conv, matrix, vector
from _triton import DEVICE, running

from fastres import layout
from fastres.kernels import triton as package
from fastres.kernels.triton import algebraic
from fastres.testing import DTYPES, relative_error

SHAPES = [(2, 16, 9, 7, 65), (1, 65, 9, 8, 130), (3, 3, 5, 7, 17)]
EPS = 1e-5
NAMES = ("grad_x", "grad_conv_weight", "grad_weight", "grad_bias", "grad_residual")


def tensors(shape, dtype, mean=0.0, std=1.0):
    n, c, h, w, k = shape
    x = activation(n, c, h, w, dtype, mean=mean, std=std)
    x = x.relu() if mean == 0 else x
    weight, bias = vector(k, positive=True), vector(k)
    weight[0], weight[1] = 0.0, -1.0
    return x, matrix(k, c, dtype)[:, :, None, None], weight, bias, activation(n, k, h, w, dtype)


def statistics(k):
    return vector(k), vector(k, positive=True)


class Eager:
    """Convolution and batch norm in plain PyTorch, in one dtype."""

    def __init__(self, values, running, training, dtype):
        exact = torch.float64 if dtype is torch.float64 else torch.float32
        dtypes = (dtype, dtype, exact, exact, dtype)
        self.inputs = [
            None if t is None else t.detach().to(d).requires_grad_() for t, d in zip(values, dtypes, strict=True)
        ]
        x, conv_weight, weight, bias, residual = self.inputs
        mean, var = (None, None) if training else (t.to(exact) for t in running)
        z = F.batch_norm(F.conv2d(x, conv_weight), mean, var, weight, bias, training, eps=EPS)
        self.z = z if residual is None else z + residual

    def gradients(self, grad):
        inputs = [t for t in self.inputs if t is not None]
        return torch.autograd.grad(self.z, inputs, grad.to(self.z.dtype))


def run(values, running_statistics, grad_y, training, relu, need=(True, True, True)):
    """y, mean, var, mask and the gradients."""
    x, conv_weight, weight, bias, residual = values
    with running():
        y, mean, var, x_mean, covariance, mask = algebraic.conv1x1_bn_act(
            x, conv_weight, weight, bias, *running_statistics, residual, training, EPS, relu, relu
        )
        saved = (weight, bias, mean, var, x_mean, covariance, mask if relu else None)
        grads = algebraic.conv1x1_bn_act_backward(grad_y, x, conv_weight, *saved, training, EPS, *need)
    return y, mean, var, mask, grads


def check(values, training, relu, dtype, size=1.0):
    k = values[1].shape[0]
    running_statistics = statistics(k)
    grad_y = activation(values[0].shape[0], k, *values[0].shape[2:], dtype, std=size)
    y, _, _, mask, grads = run(values, running_statistics, grad_y, training, relu)
    truth, witness = (Eager(values, running_statistics, training, d) for d in (torch.float64, dtype))
    act = F.relu if relu else lambda z: z
    assert_as_exact(y, act(truth.z), act(witness.z), dtype, "y")
    assert y.stride() == witness.z.stride()
    g = grad_y
    if relu:
        assert torch.equal(mask, layout.pack_mask(~(y <= 0), True))
        g = torch.where(layout.unpack_mask(mask, grad_y.shape, True), grad_y, 0.0)
        assert torch.equal(grads[4], g)
    for name, got, *each in zip(NAMES, grads, truth.gradients(g), witness.gradients(g), strict=False):
        if got.numel():  # the residual's gradient is there behind a ReLU only
            assert_as_exact(got, *each, dtype, name, summed=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, training, dtype):
    check(tensors(shape, dtype), training, True, dtype)


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
def test_without_relu_and_residual(training):
    values = (*tensors(SHAPES[0], torch.float32)[:4], None)
    check(values, training, False, torch.float32)


def test_without_weight_and_bias():
    x, conv_weight, _, _, residual = tensors(SHAPES[0], torch.float32)
    ones, zeros = torch.ones(65, device=DEVICE), torch.zeros(65, device=DEVICE)
    grad_y = torch.randn_like(residual)
    got = run((x, conv_weight, None, None, residual), (None, None), grad_y, True, True)
    want = run((x, conv_weight, ones, zeros, residual), (None, None), grad_y, True, True)
    for a, b in zip((*got[:4], *got[4]), (*want[:4], *want[4]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_means(dtype):
    check(tensors(SHAPES[0], dtype, mean=100.0, std=1.0), True, True, dtype)


@pytest.mark.parametrize("size", [1e-3, 1e-2])
def test_small_gradients_of_fp16(size):
    """What x is multiplied with is less than fp16 holds, as it is of many rows."""
    check(tensors(SHAPES[0], torch.float16, std=100.0), True, True, torch.float16, size)


def test_statistics_of_large_means(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    values = tensors(SHAPES[1], torch.float32, mean=1e3)
    grad_y = activation(1, 130, 9, 8, torch.float32)
    _, mean, var, *_ = run(values, (None, None), grad_y, True, True)
    true_var, true_mean = torch.var_mean(
        conv(values[0].double(), values[1][:, :, 0, 0].double()), (0, 2, 3), correction=0
    )
    assert relative_error(mean, true_mean) < 1e-7 and relative_error(var, true_var) < 1e-6


def test_mixed_dtypes():
    """A fp32 weight counts as it is rounded to the activation's dtype; its gradient is in its own."""
    values = tensors(SHAPES[0], torch.bfloat16)
    grad_y = activation(2, 65, 9, 7, torch.bfloat16)
    mixed = run((values[0], values[1].float(), *values[2:]), (None, None), grad_y, True, True)
    plain = run(values, (None, None), grad_y, True, True)
    assert torch.equal(mixed[0], plain[0]) and torch.equal(mixed[4][0], plain[4][0])
    assert mixed[4][1].dtype is torch.float32
    assert torch.equal(mixed[4][1].bfloat16(), plain[4][1])


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
def test_only_what_is_needed(training):
    values = tensors(SHAPES[2], torch.float32)
    grad_y, running_statistics = activation(3, 17, 5, 7, torch.float32), statistics(17)
    every = run(values, running_statistics, grad_y, training, True)[4]
    for i, names in enumerate([(0,), (1,), (2, 3)]):
        need = [j == i for j in range(3)]
        some = run(values, running_statistics, grad_y, training, True, need)[4]
        for j in range(4):
            assert torch.equal(some[j], every[j]) if j in names else some[j].numel() == 0


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("broken", ["x", "conv_weight", "grad_y"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_what_is_not_finite_stays_so(value, broken):
    values = tensors((1, 16, 8, 8, 64), torch.float32)
    grad_y = activation(1, 64, 8, 8, torch.float32)
    {"x": values[0], "conv_weight": values[1], "grad_y": grad_y}[broken][0, 1, 0, 0] = value
    y, _, _, mask, grads = run(values, (None, None), grad_y, True, True)
    eager = Eager(values, None, True, torch.float32)
    g = torch.where(layout.unpack_mask(mask, grad_y.shape, True), grad_y, 0.0)
    for name, ours, theirs in zip(("y", *NAMES), (y, *grads), (F.relu(eager.z), *eager.gradients(g)), strict=True):
        bad = ~torch.isfinite(theirs)
        assert not torch.isfinite(ours)[bad].any(), f"{name}: finite where eager is not"


def test_why_not():
    def why_not(shape=(1, 16, 8, 8), channels=64, dtype=torch.float32, order=NHWC):
        x, weight = (
            torch.empty(shape, dtype=dtype).contiguous(memory_format=order),
            torch.empty(channels, shape[1], 1, 1),
        )
        return package.conv1x1_bn_act_why_not(x, weight), package.conv1x1_bn_act_backward_why_not(x, x, weight)

    assert why_not() == why_not(dtype=torch.bfloat16) == (None, None)
    assert why_not(dtype=torch.float64) == ("torch.float64 activations",) * 2
    assert why_not(order=torch.contiguous_format) == why_not(channels=1) == ("not channels_last",) * 2
    assert why_not((0, 16, 8, 8)) == ("empty batch",) * 2
