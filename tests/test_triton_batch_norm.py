"""The Triton kernels of batch norm, addition and pooling against the float64 reference: on the GPU if there is one,
else interpreted, on fewer and smaller shapes."""

import pytest
import torch
from _kernels import check_add_act, check_bn_act, check_bn_act_maxpool, check_large_mean, check_nan_and_inf, per_channel
from _triton import triton_kernels

from fastres import reference
from fastres.testing import LAYOUTS, SHAPES, Case, cases

SMALL = ((2, 17, 5, 3), (1, 65, 3, 3), (3, 3, 5, 7), (2, 8, 1, 1))
CASES = cases(SHAPES if torch.cuda.is_available() else SMALL)
if not torch.cuda.is_available():  # several tiles of rows and of channels
    CASES += [Case((3, 130, 7, 9), torch.bfloat16, "channels_last"), Case((1, 9, 33, 31), torch.float32, "contiguous")]


@pytest.fixture(autouse=True)
def kernels():
    with triton_kernels():
        yield


@pytest.mark.parametrize(
    ("with_residual", "training", "relu"),
    [(True, True, True), (False, True, True), (True, False, True), (False, False, True), (False, True, False)],
    ids=["train-residual", "train", "eval-residual", "eval", "train-identity"],
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bn_act(case, with_residual, training, relu):
    check_bn_act(case, with_residual, training, relu)


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "identity"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_add_act(case, relu):
    check_add_act(case, relu)


@pytest.mark.parametrize(
    ("pool", "training", "relu"),
    [
        ((3, 2, 1), True, True),
        ((3, 2, 1), False, True),
        pytest.param((3, 2, 1), True, False, marks=pytest.mark.slow),
        ((2, 2, 0), True, True),
        pytest.param((3, 1, 1), True, True, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", cases(((2, 17, 7, 5), (1, 3, 9, 11))), ids=str)
def test_bn_act_maxpool(case, pool, training, relu):
    check_bn_act_maxpool(case, pool, training, relu)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_a_large_mean(layout):
    check_large_mean(layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nan_and_inf_as_in_eager(dtype, layout):
    check_nan_and_inf(dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 17, 7, 5), (1, 64, 3, 3), (1, 3, 5, 5)], ids=str)
def test_mask_and_repeated_results(shape, layout):
    """The mask's bits are where the reference has them, and every result is the same in a second run."""
    case = Case(shape, torch.float32, layout)
    weight, bias, *_ = per_channel(shape[1])
    args = (case.tensor(), weight, bias, None, None, case.tensor(), True, 1e-5, True, True)
    first, second = (torch.ops.fastres.bn_act(*args) for _ in range(2))
    assert torch.equal(first[3], reference.bn_act(*args)[3])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("cumulative", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_running_stats(dtype, cumulative):
    mean, var = torch.randn(300, dtype=torch.float64), torch.rand(300, dtype=torch.float64)
    counter = torch.tensor(7) if cumulative else None
    got, want = ([torch.ones(300, dtype=dtype), torch.full((300,), 2.0, dtype=dtype)] for _ in range(2))
    torch.ops.fastres.update_running_stats_(*got, mean, var, counter, 0.1, 50)
    reference.update_running_stats_(*want, mean, var, counter, 0.1, 50)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    untouched = [t.clone() for t in got]
    torch.ops.fastres.update_running_stats_(*got, mean, var, counter, 0.1, 0)
    assert all(torch.equal(a, b) for a, b in zip(got, untouched, strict=True))
