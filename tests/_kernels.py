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
