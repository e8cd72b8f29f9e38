"""The kernels that keep an activation on the chip between two passes: on the GPU if there is one, else on the CPU,
where eight blocks at most run at once and wait for each other."""

import sys
from pathlib import Path

import _cuda
import pytest
import torch
import torch.nn.functional as F
from _kernels import check_bn_act, per_channel

import fastres
from fastres import functional, reference
from fastres.kernels import cuda, persistent, table
from fastres.testing import DTYPES, Case, relative_error

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

#: One block; eight with six tiles each, the last of them not full; two groups of channels; eight groups; single pixels.
SHAPES = ((2, 8, 5, 3), (3, 72, 16, 15), (1, 280, 4, 6), (2, 2048, 2, 1), (9, 16, 1, 1))
CASES = [Case(shape, dtype, "channels_last") for shape in SHAPES for dtype in DTYPES]
NAMES = ("cuda_persistent",)


@pytest.fixture(autouse=True)
def kernels():
    with _cuda.cuda_kernels(*NAMES):
        yield


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bn_act(case):
    check_bn_act(case, True, True, True)


@pytest.mark.parametrize(("residual", "relu"), [(False, True), (False, False), (True, False)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bn_act_otherwise(dtype, residual, relu):
    """Without a residual: the sign of the ReLU's input is computed again; without a ReLU: there is no mask."""
    check_bn_act(Case((3, 24, 9, 8), dtype, "channels_last"), residual, True, relu)


def arguments(shape, dtype=torch.float32):
    case = Case(shape, dtype, "channels_last")
    weight, bias, *_ = per_channel(shape[1])
    return case.tensor(mean=0.5), weight, bias, None, None, case.tensor(), True, 1e-5, True, True


def both_ways(args):
    """Forward and backward: y, mean, var, mask, grad_x, grad_weight, grad_bias, grad_residual."""
    x, weight, bias, *_ = args
    y, mean, var, mask = torch.ops.fastres.bn_act(*args)
    saved = (x, weight, bias, mean, var, mask, True, 1e-5, True, True, True, True)
    return y, mean, var, mask, *torch.ops.fastres.bn_act_backward(y - 0.5, *saved)


@pytest.mark.parametrize("shape", [(3, 72, 16, 15), (1, 280, 4, 6)], ids=str)
def test_one_launch_each_way_and_the_same_bits(shape):
    """The mask is where the reference has it; every run gives the same bits."""
    args = arguments(shape)
    launches = getattr(torch.ops.fastres_cuda, "launches", None) if _cuda.DEVICE.type == "cpu" else None
    before = launches and launches()
    first = both_ways(args)
    assert launches is None or launches() - before == 2
    assert torch.equal(first[3], reference.bn_act(*args)[3])
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(both_ways(args), first, strict=True))


def test_close_to_the_kernels_of_two_launches():
    args = arguments((3, 72, 16, 15))
    got = both_ways(args)
    with _cuda.cuda_kernels("cuda"):
        want = both_ways(args)
    for a, b in zip(got, want, strict=True):
        assert a.dtype is torch.uint8 or relative_error(a, b) < 1e-6  # other sums


def test_large_mean():
    """Mean 1e4, deviation 1e-2."""
    x = torch.randn(8, 16, 14, 14, dtype=torch.float64) * 1e-2 + 1e4
    x = x.float().contiguous(memory_format=torch.channels_last)
    _, mean, var, _ = torch.ops.fastres.bn_act(x, None, None, None, None, None, True, 1e-5, False, False)
    true_var, true_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert relative_error(mean, true_mean) < 1e-12 and relative_error(var, true_var) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_as_in_eager(dtype):
    x, residual = (torch.randn(2, 24, 6, 6) for _ in range(2))
    x[0, 3, 1, 1], x[1, 5, 2, 2], x[1, 18, 0, 0], residual[0, 7, 3, 3] = (
        float(v) for v in ("nan", "inf", "-inf", "nan")
    )
    x, residual = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, residual))
    x.requires_grad_()
    mean, var, grad_y = torch.zeros(24), torch.ones(24), torch.ones_like(residual)
    want = F.relu(F.batch_norm(x, mean.clone(), var.clone(), training=True) + residual)
    got = functional.bn_act(x, mean, var, residual=residual, training=True)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    grads = [torch.autograd.grad(y, x, grad_y)[0] for y in (got, want)]
    assert torch.equal(grads[0].isnan(), grads[1].isnan())


def test_tensors_that_are_not_aligned():
    """They are copied to where they are."""
    args = arguments((2, 16, 8, 8), torch.bfloat16)
    shifted = [
        torch.empty(t.numel() + 1, dtype=t.dtype)[1:].as_strided(t.shape, t.stride()).copy_(t)
        if isinstance(t, torch.Tensor) and t.dim() == 4
        else t
        for t in args
    ]
    assert shifted[0].data_ptr() % 16
    for a, b in zip(both_ways(shifted), both_ways(args), strict=True):
        assert torch.equal(a, b)


def test_conv_bn_act():
    x = Case((2, 16, 9, 9), torch.float32, "channels_last").tensor()
    conv_weight = torch.randn(24, 16, 3, 3) * 0.1
    weight, bias, *_ = per_channel(24)
    geometry = ([2, 2], [1, 1], [1, 1], 1)
    args = (x, conv_weight, None, weight, bias, None, None, None, *geometry, True, 1e-5, True, False)
    got, want = torch.ops.fastres.conv_bn_act(*args), reference.conv_bn_act(*args)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(want[0])
    backward = (grad, x, conv_weight, want[1], weight, bias, *want[2:4], None, *geometry, True, 1e-5, True)
    needed = (True, True, False, True, False, None)
    got = torch.ops.fastres.conv_bn_act_backward(*backward, *needed)
    for a, b in zip(got, reference.conv_bn_act_backward(*backward, *needed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_contender_of_the_benchmark(monkeypatch):
    """Where an activation fits, the benchmark of ops times these kernels too."""
    import gpu_ops
    from gpu_timing import Stopwatch

    shapes = ((8, 4, 4), (12, 4, 4))
    found = [gpu_ops.Case("bn_act", mode, shape, {}) for shape in shapes for mode in ("forward", "backward")]
    monkeypatch.setattr(gpu_ops, "cases", lambda: found)
    monkeypatch.setattr(gpu_ops, "_COMPILE_SECONDS", -1)
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    watch = Stopwatch(_cuda.DEVICE.type, 2, 1e-4)
    with _cuda.cuda_kernels(*NAMES, "cuda"):
        rows = gpu_ops.ops(watch, torch.float32, 2, {"copy": 1e9}, False, lambda text: None)["rows"]
    assert [row["persistent_vs_cuda"] is not None for row in rows] == [True, True, False, False]
    assert all("seconds" in times for row in rows for name, times in row["times"].items() if name != "compile")


def serving(op, args):
    return table.select(op, args).name


def test_what_does_not_fit_goes_to_the_others():
    """Named with "cuda" behind them, the kernels leave it what they do not serve. The table prefers the others."""
    small, layers = (2, 16, 6, 6), [Case((2, 16, 6, 6), torch.float32, "channels_last").tensor()]
    with _cuda.cuda_kernels("cuda_persistent", "cuda"):
        forward = [*arguments(small)]
        assert serving("bn_act", forward) == "cuda_persistent"
        backward = (layers[0], *forward[:3], *per_channel(16)[:2], None, True, 1e-5, True, True, True, False)
        assert serving("bn_act_backward", backward) == "cuda_persistent"
        for at, value, op in ((6, False, "bn_act"), (7, False, "bn_act_backward"), (10, False, "bn_act_backward")):
            changed = list(forward if op == "bn_act" else backward)
            changed[at] = value
            assert serving(op, changed) == "cuda"
        for x in (forward[0].contiguous(), torch.randn(2, 17, 6, 6).to(memory_format=torch.channels_last)):
            assert serving("bn_act", (x, *forward[1:])) == "cuda"
    with _cuda.cuda_kernels("cuda", "cuda_persistent"):
        assert serving("bn_act", forward) == "cuda"
    names = [kernel.name for kernel in table.TABLE[("bn_act", "cuda")]]
    assert names == ["triton", "cuda", "cuda_persistent", "reference"]


@pytest.mark.skipif(_cuda.DEVICE.type != "cpu", reason="of the chip that tests on the CPU have")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_fits(dtype):
    """Four multiprocessors with 227 KB for a block, 26 of them for sums. Backward keeps two activations."""
    for backward in (False, True):
        most = 4 * ((201 << 10) // (2048 * dtype.itemsize * (1 + backward)))  # tiles of 8 rows
        assert persistent._fits(0, dtype, 1, 256, 8 * most, backward)
        assert not persistent._fits(0, dtype, 1, 256, 8 * most + 1, backward)
    x = torch.empty(64, 64, 56, 56, dtype=dtype).to(memory_format=torch.channels_last)
    assert persistent.why_not(x, *[None] * 5, True) == "larger than the memory on the chip"
    with pytest.raises(RuntimeError, match="does not fit on the chip"):
        torch.ops.fastres_cuda.bn_act_persistent(x, None, None, None, 1e-5, True, False)


def test_wrong_arguments_raise():
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    run = torch.ops.fastres_cuda.bn_act_persistent
    with pytest.raises(RuntimeError, match="weight must be a contiguous tensor of 8 values"):
        run(x, torch.ones(7), None, None, 1e-5, True, False)
    with pytest.raises(RuntimeError, match="channels_last"):
        run(x.contiguous(), None, None, None, 1e-5, True, False)
    with pytest.raises(RuntimeError, match="residual must have the shape of x"):
        run(x, None, None, x[:1], 1e-5, True, False)
    with pytest.raises(RuntimeError, match="cuda_persistent: running statistics"), fastres.use_kernels(*NAMES):
        torch.ops.fastres.bn_act(x, None, None, torch.zeros(8), torch.ones(8), None, False, 1e-5, True, False)
