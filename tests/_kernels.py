"""Ops against the float64 reference with eager as second witness, whichever kernels serve: outputs, gradients,
statistics."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastres import functional
from fastres.testing import LAYOUTS, Case, budget, relative_error


def assert_parity(got, truth, eager, dtype, names, winograd=False):
    for name, a, t, e in zip(names, got, truth, eager, strict=True):
        limit = budget(relative_error(e, t), dtype, summed=name in ("grad_weight", "grad_bias"), winograd=winograd)
        error = relative_error(a, t)
        assert error <= limit, f"{name}: error {error:.2e}, budget {limit:.2e}"


def per_channel(channels):
    return torch.rand(channels) + 0.5, torch.randn(channels) * 0.5, torch.randn(channels), torch.rand(channels) + 0.2


def check_bn_act(case: Case, with_residual: bool, training: bool, relu: bool) -> None:
    weight, bias, mean, var = per_channel(case.shape[1])
    x, grad_y = case.tensor(mean=0.3, std=1.5), case.tensor()
    residual = case.tensor() if with_residual else None

    def run(function, dtype):
        tensors = [t if t is None else t.detach().to(dtype).requires_grad_() for t in (x, residual)]
        affine = [
            t.clone().to(torch.float64 if dtype is torch.float64 else torch.float32).requires_grad_()
            for t in (weight, bias)
        ]
        running = [t.clone().to(affine[0].dtype) for t in (mean, var)]
        y = function(tensors[0], *running, *affine, tensors[1])
        inputs = [t for t in (*tensors, *affine) if t is not None]
        return [y, *torch.autograd.grad(y, inputs, grad_y.to(dtype)), *running]

    def eager(x, running_mean, running_var, weight, bias, residual):
        y = F.batch_norm(x, running_mean, running_var, weight, bias, training)
        y = y if residual is None else y + residual
        return F.relu(y) if relu else y

    def fused(x, running_mean, running_var, weight, bias, residual):
        act = "relu" if relu else "identity"
        return functional.bn_act(x, running_mean, running_var, weight, bias, residual, training=training, act=act)

    got = run(fused, case.dtype)
    witness = run(eager, case.dtype)
    assert got[0].stride() == witness[0].stride()
    names = [
        "y",
        "grad_x",
        *(["grad_residual"] if with_residual else []),
        "grad_weight",
        "grad_bias",
        "running_mean",
        "running_var",
    ]
    assert_parity(got, run(eager, torch.float64), witness, case.dtype, names)


def check_add_act(case: Case, relu: bool) -> None:
    a, b, grad_y = case.tensor(), case.tensor(), case.tensor()

    def run(function, dtype):
        tensors = [t.detach().to(dtype).requires_grad_() for t in (a, b)]
        y = function(*tensors)
        return [y, *torch.autograd.grad(y, tensors, grad_y.to(dtype))]

    def eager(x, residual):
        return F.relu(x + residual) if relu else x + residual

    got = run(lambda x, r: functional.add_act(x, r, act="relu" if relu else "identity"), case.dtype)
    assert_parity(got, run(eager, torch.float64), run(eager, case.dtype), case.dtype, ["y", "grad_x", "grad_residual"])


def check_nan_and_inf_of_two_branches(dtype: torch.dtype, layout: str) -> None:
    x, other = (torch.randn(2, 20, 6, 6) for _ in range(2))
    x[0, 3, 1, 1], x[1, 5, 2, 2], other[1, 18, 0, 0], other[0, 7, 3, 3] = (
        float(v) for v in ("nan", "inf", "-inf", "nan")
    )
    x, other = (t.to(dtype).contiguous(memory_format=LAYOUTS[layout]).requires_grad_() for t in (x, other))
    grad_y = torch.ones_like(x)
    for training in ((True, True), (True, False), (False, False)):
        norms = [
            functional.BatchNorm(torch.zeros(20), torch.ones(20), training=mode) for mode in (*training, *training)
        ]
        want = F.relu(F.batch_norm(x, *norms[0][:5]) + F.batch_norm(other, *norms[1][:5]))
        got = functional.bn_add_bn_act(x, norms[2], other, norms[3])
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
        for g, w in zip(*(torch.autograd.grad(y, (x, other), grad_y) for y in (got, want)), strict=True):
            assert torch.equal(g.isnan(), w.isnan())


def check_bn_act_maxpool(case: Case, pool: tuple[int, int, int], training: bool, relu: bool) -> None:
    weight, bias, mean, var = per_channel(case.shape[1])
    # Few different values: ties within a window are common, and have to go to the same element as in eager.
    x = case.tensor(std=2.0).round()
    kernel_size, stride, padding = pool

    def run(function, dtype):
        x_ = x.detach().to(dtype).requires_grad_()
        affine = [
            t.clone().to(torch.float64 if dtype is torch.float64 else torch.float32).requires_grad_()
            for t in (weight, bias)
        ]
        running = [t.clone().to(affine[0].dtype) for t in (mean, var)]
        y = function(x_, *running, *affine)
        grad_y = torch.linspace(-1, 1, y.numel(), dtype=torch.float32).reshape(y.shape).to(case.dtype).to(dtype)
        return [y, *torch.autograd.grad(y, [x_, *affine], grad_y), *running]

    def eager(x, running_mean, running_var, weight, bias):
        y = F.batch_norm(x, running_mean, running_var, weight, bias, training)
        return F.max_pool2d(F.relu(y) if relu else y, kernel_size, stride, padding)

    def fused(x, running_mean, running_var, weight, bias):
        options = {"training": training, "act": "relu" if relu else "identity"}
        windows = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
        return functional.bn_act_maxpool(x, running_mean, running_var, weight, bias, **options, **windows)

    got = run(fused, case.dtype)
    witness = run(eager, case.dtype)
    assert got[0].stride() == witness[0].stride()
    names = ["y", "grad_x", "grad_weight", "grad_bias", "running_mean", "running_var"]
    assert_parity(got, run(eager, torch.float64), witness, case.dtype, names)


def check_bn_add_bn_act(case: Case, training: tuple[bool, bool], relu: bool, *, other_layout: str = "") -> None:
    """training: of either branch. other_layout: of the second branch, if it is not the case's."""
    channels = case.shape[1]
    parameters = [per_channel(channels) for _ in range(2)]
    x, other, grad_y = case.tensor(mean=0.3, std=1.5), case.tensor(mean=-0.2), case.tensor()
    other = other.contiguous(memory_format=LAYOUTS[other_layout or case.layout])

    def run(function, dtype):
        exact = torch.float64 if dtype is torch.float64 else torch.float32
        branches = [t.detach().to(dtype).requires_grad_() for t in (x, other)]
        affine = [[t.clone().to(exact).requires_grad_() for t in (w, b)] for w, b, _, _ in parameters]
        running = [[t.clone().to(exact) for t in (mean, var)] for _, _, mean, var in parameters]
        norms = [functional.BatchNorm(*r, *a, mode) for r, a, mode in zip(running, affine, training, strict=True)]
        y = function(branches[0], norms[0], branches[1], norms[1])
        inputs = [t for branch, two in zip(branches, affine, strict=True) for t in (branch, *two)]
        return [y, *torch.autograd.grad(y, inputs, grad_y.to(dtype)), *running[0], *running[1]]

    def eager(x, norm, other, other_norm):
        y = F.batch_norm(x, *norm[:5]) + F.batch_norm(other, *other_norm[:5])
        return F.relu(y) if relu else y

    got = run(lambda *args: functional.bn_add_bn_act(*args, act="relu" if relu else "identity"), case.dtype)
    witness = run(eager, case.dtype)
    if not other_layout:
        assert got[0].stride() == witness[0].stride()
    names = ["y", *(["grad_x", "grad_weight", "grad_bias"] * 2), *(["running_mean", "running_var"] * 2)]
    assert_parity(got, run(eager, torch.float64), witness, case.dtype, names)


def check_large_mean(layout: str) -> None:
    """Mean 1e4, std 1e-2: sums of x and x^2 would cancel to nothing."""
    x = (torch.randn(8, 17, 14, 14, dtype=torch.float64) * 1e-2 + 1e4).float().contiguous(memory_format=LAYOUTS[layout])
    y, mean, var, _ = torch.ops.fastres.bn_act(x, None, None, None, None, None, True, 1e-5, False, False)
    true_var, true_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert relative_error(mean, true_mean) < 1e-12
    assert relative_error(var, true_var) < 1e-6
    truth = F.batch_norm(x.double(), None, None, training=True)
    assert relative_error(y, truth) < 1e-6


def check_nan_and_inf(dtype: torch.dtype, layout: str) -> None:
    x = torch.randn(2, 20, 6, 6)
    x[0, 3, 1, 1], x[1, 5, 2, 2], x[1, 18, 0, 0] = float("nan"), float("inf"), float("-inf")
    x = x.to(dtype).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    mean, var = torch.zeros(20), torch.ones(20)
    residual = torch.randn(2, 20, 6, 6).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    residual[0, 7, 3, 3] = float("nan")
    grad_y = torch.ones_like(residual)
    for training in (True, False):
        want = F.relu(F.batch_norm(x, mean.clone(), var.clone(), training=training) + residual)
        want_grad = torch.autograd.grad(want, x, grad_y)[0]
        got = functional.bn_act(x, mean.clone(), var.clone(), residual=residual, training=training)
        got_grad = torch.autograd.grad(got, x, grad_y)[0]
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
        assert torch.equal(got_grad.isnan(), want_grad.isnan())
    total = functional.add_act(x, residual)
    pooled = functional.bn_act_maxpool(x, mean.clone(), var.clone())
    assert torch.equal(total.isnan(), F.relu(x + residual).isnan())
    want = F.max_pool2d(F.relu(F.batch_norm(x, mean, var)), 3, 2, 1)
    assert torch.equal(pooled.isnan(), want.isnan()) and torch.equal(pooled.isinf(), want.isinf())
