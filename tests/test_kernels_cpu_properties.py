"""The ops without a convolution over random shapes, dtypes and layouts, against float64."""

import torch
import torch.nn.functional as F
from _properties import FORMS, Truth, assert_close, bounded, dtypes, forms, seeds
from hypothesis import assume, given
from hypothesis import strategies as st

from fastres import functional

sizes = st.tuples(
    st.integers(1, 4), st.one_of(st.integers(1, 40), st.sampled_from([64, 65])), st.integers(1, 12), st.integers(1, 12)
)
three_forms = st.tuples(forms, forms, forms)


def gradients(function, leaves, grad, dtype):
    """The result and the gradient of each leaf that is a tensor; batch norm's vectors stay in float32 at least."""
    leaves = [
        None if t is None else t.detach().to(dtype if t.dim() == 4 else torch.promote_types(dtype, torch.float32))
        for t in leaves
    ]
    leaves = [None if t is None else t.requires_grad_() for t in leaves]
    y = function(*leaves)
    wanted = [t for t in leaves if t is not None]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad(y).to(dtype))]


def vectors(channels):
    return torch.rand(channels) + 0.5, torch.randn(channels), torch.randn(channels) * 0.5, torch.rand(channels) + 0.2


def norms(x, weight, bias, mean, var, residual, training, grad):
    """Without cancellation: of x_hat * weight + bias + residual and its gradients for x, residual, weight and bias."""
    x, grad = x.double(), grad.double().expand_as(x) if grad.dim() == 0 else grad.double()
    if training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    inverse = (var.double() + 1e-5).rsqrt().reshape(1, -1, 1, 1)
    x_hat = (x - mean.double().reshape(1, -1, 1, 1)) * inverse
    scale = weight.double().reshape(1, -1, 1, 1)
    y = (x_hat * scale).norm() + bias.double().reshape(1, -1, 1, 1).expand_as(x).norm()
    y = y if residual is None else y + residual.double().norm()
    count = max(x.numel() // x.shape[1], 1) ** 0.5
    sums = (grad * x_hat).abs().sum((0, 2, 3)).norm() / count, grad.abs().sum((0, 2, 3)).norm() / count
    return [float(n) for n in (y, (grad * scale * inverse).norm(), grad.norm(), *sums)]


@bounded(120)
@given(sizes, dtypes, three_forms, st.booleans(), st.booleans(), st.booleans(), seeds)
def test_bn_act(shape, dtype, places, with_residual, training, relu, seed):
    assume(not training or shape[0] * shape[2] * shape[3] > 1)
    torch.manual_seed(seed)
    x, residual, grad = (FORMS[form](torch.randn(shape).to(dtype)) for form in places)
    residual = residual if with_residual else None
    weight, bias, mean, var = vectors(shape[1])
    act = "relu" if relu else "identity"

    def run(function, to):
        running = [t.to(torch.promote_types(to, torch.float32)) for t in (mean, var)]
        running = [t.clone() for t in running]

        def call(x, residual, weight, bias):
            return function(x, *running, weight, bias, residual)

        return gradients(call, (x, residual, weight, bias), lambda y: grad, to), running

    def eager(x, running_mean, running_var, weight, bias, residual):
        y = F.batch_norm(x, running_mean, running_var, weight, bias, training)
        y = y if residual is None else y + residual
        return F.relu(y) if relu else y

    got, statistics = run(lambda *args: functional.bn_act(*args, training=training, act=act), dtype)
    truth, true_statistics = run(eager, torch.float64)
    witness, their_statistics = run(eager, dtype)
    lengths = norms(x, weight, bias, mean, var, residual, training, grad)
    names = ["y", "grad_x", "grad_residual", "grad_weight", "grad_bias"]
    if not with_residual:
        del lengths[2], names[2]
    for name, a, t, e, length in zip(names, got, truth, witness, lengths, strict=True):
        assert_close(name, a, Truth(t, max(float(t.norm()), length)), e)
    for name, a, t, e in zip(("mean", "var"), statistics, true_statistics, their_statistics, strict=True):
        assert_close(f"running_{name}", a, Truth(t, float(t.norm()) + float(x.double().norm()) / shape[0]), e)


@bounded(80)
@given(sizes, dtypes, three_forms, st.booleans(), seeds)
def test_add_act(shape, dtype, places, relu, seed):
    torch.manual_seed(seed)
    x, residual, grad = (FORMS[form](torch.randn(shape).to(dtype)) for form in places)

    def run(to):
        act = "relu" if relu else "identity"
        return gradients(lambda x, r: functional.add_act(x, r, act=act), (x, residual), lambda y: grad, to)

    def eager(to):
        return gradients(lambda x, r: F.relu(x + r) if relu else x + r, (x, residual), lambda y: grad, to)

    for name, a, t, e in zip(
        ("y", "grad_x", "grad_residual"), run(dtype), eager(torch.float64), eager(dtype), strict=True
    ):
        assert torch.equal(a, e), name
        assert_close(name, a, Truth(t, float(t.norm())), e)


@bounded(100)
@given(sizes, dtypes, forms, st.booleans(), st.booleans(), st.integers(1, 5), st.integers(1, 3), st.data(), seeds)
def test_bn_act_maxpool(shape, dtype, form, training, relu, kernel, stride, data, seed):
    """On few different values: ties within a window are common, and have to go to the same element as in eager."""
    padding = data.draw(st.integers(0, kernel // 2), label="padding")
    assume(min(shape[2:]) + 2 * padding >= kernel and -(-kernel // stride) <= 4)
    assume(not training or shape[0] * shape[2] * shape[3] > 1)
    torch.manual_seed(seed)
    x = FORMS[form]((torch.randn(shape) * 2).round().to(dtype))
    weight, bias, mean, var = vectors(shape[1])

    def run(function, to):
        running = [t.to(torch.promote_types(to, torch.float32)).clone() for t in (mean, var)]
        return gradients(lambda x, w, b: function(x, *running, w, b), (x, weight, bias), weights_of, to)

    def weights_of(y):
        return torch.linspace(-1, 1, y.numel(), dtype=torch.float32).reshape(y.shape).to(dtype)

    def eager(x, running_mean, running_var, weight, bias):
        y = F.batch_norm(x, running_mean, running_var, weight, bias, training)
        return F.max_pool2d(F.relu(y) if relu else y, kernel, stride, padding)

    window = {"kernel_size": kernel, "stride": stride, "padding": padding}
    act = "relu" if relu else "identity"
    got = run(lambda *args: functional.bn_act_maxpool(*args, training=training, act=act, **window), dtype)
    truth, witness = run(eager, torch.float64), run(eager, dtype)
    y, grad_x, _, grad_weight, grad_bias = norms(x, weight, bias, mean, var, None, training, torch.tensor(1.0))
    for name, a, t, e, length in zip(
        ("y", "grad_x", "grad_weight", "grad_bias"),
        got,
        truth,
        witness,
        (y, grad_x, grad_weight, grad_bias),
        strict=True,
    ):
        assert_close(name, a, Truth(t, max(float(t.norm()), length)), e)
