"""Triton's bn_add_bn_act against float64, with eager as witness: on the GPU if there is one, else interpreted. How it
compiles, and what the recipes launch of it."""

# ruff: noqa: E402 (what imports Triton follows importorskip)

import pytest
import torch
from _kernels import check_bn_add_bn_act, check_nan_and_inf_of_two_branches, per_channel
from _triton import triton_kernels

import fastres
from fastres import functional, reference_join
from fastres.kernels import table
from fastres.kernels.triton import join
from fastres.kernels.triton.record import recording
from fastres.testing import LAYOUTS, SHAPES, Case, cases

SMALL = ((2, 17, 7, 7), (1, 65, 3, 3), (3, 3, 5, 7), (2, 8, 1, 1))
CASES = cases(SHAPES if torch.cuda.is_available() else SMALL)
if not torch.cuda.is_available():  # several tiles of rows and of channels
    CASES += [Case((3, 130, 7, 9), torch.bfloat16, "channels_last"), Case((1, 9, 33, 31), torch.float32, "contiguous")]
ops = torch.ops.fastres


@pytest.fixture
def kernels():
    with triton_kernels():
        yield


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training(kernels, case):
    check_bn_add_bn_act(case, (True, True), True)


@pytest.mark.parametrize("training", [(True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("case", cases(SMALL[:1]), ids=str)
def test_running_statistics(kernels, case, training):
    check_bn_add_bn_act(case, training, True)


@pytest.mark.parametrize("case", cases(SMALL[:1]), ids=str)
def test_without_relu(kernels, case):
    check_bn_add_bn_act(case, (True, True), False)


@pytest.mark.parametrize(("layout", "other"), [("contiguous", "channels_last"), ("channels_last", "contiguous")])
def test_branches_in_two_layouts(kernels, layout, other):
    check_bn_add_bn_act(Case((2, 17, 5, 3), torch.float32, layout), (True, True), True, other_layout=other)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nan_and_inf_as_in_eager(kernels, dtype, layout):
    check_nan_and_inf_of_two_branches(dtype, layout)


def arguments(case, training=True):
    branches = []
    for values in (case.tensor(mean=0.5), case.tensor()):
        weight, bias, mean, var = per_channel(case.shape[1])
        branches += [values, weight, bias, mean, var]
    return (*branches, training, training, 1e-5, 1e-3, True, True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 17, 7, 5), (1, 64, 3, 3), (1, 3, 5, 5)], ids=str)
def test_mask_and_repeated_results(kernels, shape, layout):
    """The mask's bits are where the reference has them, and every result is the same in a second run."""
    args = arguments(Case(shape, torch.float32, layout))
    first, second = (ops.bn_add_bn_act(*args) for _ in range(2))
    assert torch.equal(first[5], reference_join.bn_add_bn_act(*args)[5])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_only_what_is_needed(kernels, training):
    x, weight, _, _, _, other, other_weight, *_ = args = arguments(SMALL_CASE, training)
    _, mean, var, other_mean, other_var, mask = ops.bn_add_bn_act(*args)
    saved = (x, x, weight, mean, var, other, other_weight, other_mean, other_var, mask, training, training, 1e-5, 1e-3)
    every = ops.bn_add_bn_act_backward(*saved, True, True, True, True)
    groups = ((0,), (1, 2), (3,), (4, 5))
    for i, names in enumerate(groups):
        some = ops.bn_add_bn_act_backward(*saved, *(j == i for j in range(4)))
        for j in range(6):
            assert torch.equal(some[j], every[j]) if j in names else some[j].numel() == 0


SMALL_CASE = Case((2, 17, 5, 3), torch.float32, "channels_last")


def test_without_weight_and_bias(kernels):
    x, other = SMALL_CASE.tensor(), SMALL_CASE.tensor()
    ones, zeros = torch.ones(17), torch.zeros(17)
    got, want = (
        functional.bn_add_bn_act(x, functional.BatchNorm(*affine, True), other, functional.BatchNorm(*affine, True))
        for affine in ((None, None, None, None), (None, None, ones, zeros))
    )
    assert torch.equal(got, want)


def test_what_it_does_not_serve():
    kernel = table.TABLE["bn_add_bn_act", "cuda"][0]
    empty = torch.empty(0, 3, 4, 4)
    assert kernel.name == "triton" and kernel.why_not(empty) == "empty batch"
    assert kernel.why_not(SMALL_CASE.tensor().double()) == "torch.float64 activations"
    assert kernel.why_not(SMALL_CASE.tensor()) is None


def test_empty_batch(kernels):
    with fastres.use_kernels("triton", "reference"):
        x = torch.empty(0, 3, 4, 4).requires_grad_()
        running = [torch.ones(3), torch.ones(3)]
        norm = functional.BatchNorm(*running, training=True)
        y = functional.bn_add_bn_act(x, norm, x * 2, norm)
        y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
    assert all(torch.equal(t, torch.ones(3)) for t in running)


# What is launched


def test_launches(kernels):
    """Statistics of either branch, one pass forward; one reduction and one pass backward. Nothing else."""
    x, other = (torch.empty(4, 32, 9, 9, dtype=torch.bfloat16, device="meta") for _ in range(2))
    weight = torch.empty(32, device="meta")
    with recording() as launches:
        found = join.bn_add_bn_act(*[x, weight, weight, None, None] * 2, True, True, 1e-5, 1e-5, True, True)
        mean, var, other_mean, other_var, mask = found[1:]
        saved = (found[0], x, weight, mean, var, other, weight, other_mean, other_var, mask, True, True, 1e-5, 1e-5)
        join.bn_add_bn_act_backward(*saved, True, True, True, True)
    assert [one.name for one in launches] == [
        *["statistics_kernel", "combine_statistics_kernel"] * 2,
        "join_kernel",
        "reduce_join_kernel",
        *["combine_gradient_kernel"] * 2,
        "apply_join_gradient_kernel",
    ]
