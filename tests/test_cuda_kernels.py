"""The CUDA kernels against the float64 reference: on the GPU if there is one, else on the CPU."""

import _cuda
import pytest
import torch
from _kernels import (
    check_add_act,
    check_bn_act,
    check_bn_act_maxpool,
    check_bn_add_bn_act,
    check_large_mean,
    check_nan_and_inf,
    check_nan_and_inf_of_two_branches,
    per_channel,
)

from fastres import reference, reference_join
from fastres.kernels import cuda
from fastres.testing import DTYPES, LAYOUTS, SHAPES, Case, cases

ON_GPU = torch.cuda.is_available()
#: Rows of 16 bytes and not, several blocks of channels (more than 256, more than 32), more tiles than blocks.
SMALL = ((2, 17, 5, 3), (1, 64, 8, 8), (3, 3, 5, 7), (2, 8, 1, 1), (3, 72, 16, 16), (1, 280, 4, 6))
CASES = cases((*SHAPES, *SMALL) if ON_GPU else SMALL)


@pytest.fixture(autouse=True)
def kernels():
    with _cuda.cuda_kernels():
        yield


@pytest.mark.parametrize(
    ("with_residual", "training", "relu"),
    [(True, True, True), (False, True, True), (True, False, True), (False, False, True), (False, True, False)],
    ids=["train-residual", "train", "eval-residual", "eval", "train-identity"],
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bn_act(case, with_residual, training, relu):
    check_bn_act(case, with_residual, training, relu)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bn_add_bn_act(case):
    check_bn_add_bn_act(case, (True, True), True)


@pytest.mark.parametrize(
    ("training", "relu"), [((True, False), True), ((False, True), True), ((False, False), True), ((True, True), False)]
)
@pytest.mark.parametrize("case", cases(((2, 24, 5, 3),)), ids=str)
def test_bn_add_bn_act_otherwise(case, training, relu):
    """Running statistics in either branch; no ReLU, and so no mask."""
    check_bn_add_bn_act(case, training, relu)


@pytest.mark.parametrize(("layout", "other"), [("contiguous", "channels_last"), ("channels_last", "contiguous")])
def test_branches_in_two_layouts(layout, other):
    check_bn_add_bn_act(Case((2, 16, 5, 3), torch.float32, layout), (True, True), True, other_layout=other)


def branches(case, training):
    """Arguments of bn_add_bn_act."""
    found = []
    for values in (case.tensor(mean=0.5), case.tensor()):
        weight, bias, mean, var = per_channel(case.shape[1])
        found += [values, weight, bias, mean, var]
    return (*found, training, training, 1e-5, 1e-3, True, True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_join_gives_what_is_needed(layout, training):
    """The mask's bits are where the reference has them; what is not needed is empty, and changes nothing else."""
    x, weight, _, _, _, other, other_weight, *_ = args = branches(Case((2, 17, 7, 5), torch.float32, layout), training)
    first, second = (torch.ops.fastres.bn_add_bn_act(*args) for _ in range(2))
    assert torch.equal(first[5], reference_join.bn_add_bn_act(*args)[5])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    _, mean, var, other_mean, other_var, mask = first
    saved = (x, x, weight, mean, var, other, other_weight, other_mean, other_var, mask, training, training, 1e-5, 1e-3)
    every = torch.ops.fastres.bn_add_bn_act_backward(*saved, True, True, True, True)
    for a, b in zip(every, reference_join.bn_add_bn_act_backward(*saved, True, True, True, True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for i, names in enumerate(((0,), (1, 2), (3,), (4, 5))):
        some = torch.ops.fastres.bn_add_bn_act_backward(*saved, *(j == i for j in range(4)))
        for j in range(6):
            assert torch.equal(some[j], every[j]) if j in names else some[j].numel() == 0


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "identity"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_add_act(case, relu):
    check_add_act(case, relu)


@pytest.mark.parametrize(("training", "relu"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("pool", [(3, 2, 1), (2, 2, 0), (3, 1, 1), (5, 3, 2)], ids=str)
@pytest.mark.parametrize("case", cases(((2, 17, 7, 5), (1, 16, 9, 11))), ids=str)
def test_bn_act_maxpool(case, pool, training, relu):
    check_bn_act_maxpool(case, pool, training, relu)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_a_large_mean(layout):
    check_large_mean(layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_as_in_eager(dtype, layout):
    check_nan_and_inf(dtype, layout)
    check_nan_and_inf_of_two_branches(dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 17, 7, 5), (1, 64, 8, 8), (1, 3, 5, 5)], ids=str)
def test_mask_and_repeated_results(shape, layout):
    """The mask's bits are where the reference has them, and every result is the same in a second run."""
    case = Case(shape, torch.float32, layout)
    weight, bias, *_ = per_channel(shape[1])
    args = (case.tensor(), weight, bias, None, None, case.tensor(), True, 1e-5, True, True)
    first, second = (torch.ops.fastres.bn_act(*args) for _ in range(2))
    assert torch.equal(first[3], reference.bn_act(*args)[3])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def shifted(t):
    """The same values at an address that is no multiple of 16 bytes."""
    return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].as_strided(t.shape, t.stride()).copy_(t)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_that_are_not_aligned(dtype, layout):
    """Accesses of 16 bytes would fail; single values are read instead, with sums in another order."""
    case = Case((2, 16, 8, 8), dtype, layout)
    weight, bias, *_ = per_channel(16)
    x, residual, grad = case.tensor(), case.tensor(), case.tensor()
    close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-6 if dtype is torch.float32 else 1e-2}

    def run(change):
        ops = torch.ops.fastres
        y, mean, var, mask = ops.bn_act(change(x), weight, bias, None, None, change(residual), True, 1e-5, True, True)
        options = (mask, True, 1e-5, True, True, True, True)
        grads = ops.bn_act_backward(change(grad), change(x), weight, bias, mean, var, *options)
        pooled, *_, index = ops.bn_act_maxpool(change(x), weight, bias, mean, var, False, 1e-5, True, 3, 2, 1)
        pool_grads = ops.bn_act_maxpool_backward(
            change(pooled), change(x), weight, bias, mean, var, index, True, 1e-5, True, 3, 2, 1, True, True
        )
        total = ops.add_act(change(x), change(residual), True)
        return [y, *grads, pooled, *pool_grads, total, ops.add_act_backward(change(grad), change(total))]

    for got, want in zip(run(shifted), run(lambda t: t), strict=True):
        torch.testing.assert_close(got, want, **close)


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "identity"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_what_is_needed(layout, relu):
    """Frozen batch norm: without gradients of weight and bias, grad_x needs no reduction."""
    case = Case((2, 16, 5, 5), torch.float32, layout)
    weight, bias, mean, var = per_channel(16)
    args = (case.tensor(), case.tensor(), weight, bias, mean.double(), var.double(), None, False, 1e-5, relu)
    for needed in ((True, False, False), (False, True, False)):
        got = torch.ops.fastres.bn_act_backward(*args, *needed)
        want = reference.bn_act_backward(*args, *needed)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("vector", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_of_vectors(vector):
    """Weights and running statistics are read in their own dtype, whatever that of the activation."""
    x = Case((2, 16, 5, 5), torch.bfloat16, "channels_last").tensor()
    weight, bias, mean, var = (t.to(vector) for t in per_channel(16))
    got = torch.ops.fastres.bn_act(x, weight, bias, mean, var, None, False, 1e-5, True, False)
    want = reference.bn_act(x, weight, bias, mean, var, None, False, 1e-5, True, False)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cumulative", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_update_running_stats(dtype, cumulative):
    mean, var = torch.randn(300, dtype=torch.float64), torch.rand(300, dtype=torch.float64)
    counter = torch.tensor(7) if cumulative else None
    got, want = ([torch.ones(600, dtype=dtype)[::2], torch.full((300,), 2.0, dtype=dtype)] for _ in range(2))
    cuda.update_running_stats_(*got, mean, var, counter, 0.1, 50)
    reference.update_running_stats_(*want, mean, var, counter, 0.1, 50)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    untouched = [t.clone() for t in got]
    cuda.update_running_stats_(*got, mean, var, counter, 0.1, 0)
    assert all(torch.equal(a, b) for a, b in zip(got, untouched, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conv_bn_act(layout):
    """The op with ATen's convolution before the kernels, forward and backward."""
    case = Case((2, 16, 6, 6), torch.float32, layout)
    x, conv_weight = case.tensor(), torch.randn(24, 16, 3, 3) * 0.1
    grad = case.tensor(shape=(2, 24, 6, 6))
    weight, bias, *_ = per_channel(24)
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    args = (x, conv_weight, None, weight, bias, None, None, None, *geometry, True, 1e-5, True, False)
    got, want = torch.ops.fastres.conv_bn_act(*args), reference.conv_bn_act(*args)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    backward = (grad, x, conv_weight, want[1], weight, bias, *want[2:4], None, *geometry, True, 1e-5, True)
    needed = (True, True, False, True, False, torch.ones_like(x))
    got = torch.ops.fastres.conv_bn_act_backward(*backward, *needed)
    for a, b in zip(got, reference.conv_bn_act_backward(*backward, *needed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "identity"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
def test_conv_bias_act(residual, relu):
    """ATen's convolution, and the kernel that adds."""
    case = Case((2, 16, 6, 6), torch.float32, "channels_last")
    other = case.tensor(shape=(2, 24, 6, 6)) if residual else None
    args = (case.tensor(), torch.randn(24, 16, 3, 3) * 0.1, torch.randn(24), other, [1, 1], [1, 1], [1, 1], 1, relu)
    torch.testing.assert_close(
        torch.ops.fastres.conv_bias_act(*args), reference.conv_bias_act(*args), rtol=1e-4, atol=1e-5
    )


def test_running_statistics_of_many_layers():
    """More than one launch takes; of several sizes and dtypes; an empty batch changes nothing."""
    layers = []
    for i in range(50):
        dtype = (torch.float32, torch.bfloat16, torch.float64)[i % 3]
        c = 300 if i == 7 else 3 + i
        vectors = (torch.randn(c).to(dtype), torch.rand(c).to(dtype), torch.randn(c).double(), torch.rand(c).double())
        layers.append((*vectors, 0.1 * (i % 5), 0 if i == 3 else 2 + i))
    want = [[t.clone() for t in layer[:2]] for layer in layers]
    reference.update_all_running_stats_(
        [w[0] for w in want], [w[1] for w in want], *map(list, zip(*(layer[2:] for layer in layers), strict=True))
    )
    torch.ops.fastres.update_all_running_stats_(*map(list, zip(*layers, strict=True)))
    for layer, (mean, var) in zip(layers, want, strict=True):
        torch.testing.assert_close(layer[0], mean)
        torch.testing.assert_close(layer[1], var)
    with pytest.raises(RuntimeError, match="the lists must have one length"):
        torch.ops.fastres_cuda.update_all_running_stats_([layers[0][0]], [], [], [], [], [])


def test_wrong_arguments_raise():
    x = torch.randn(2, 8, 4, 4)
    ops = torch.ops.fastres_cuda
    with pytest.raises(RuntimeError, match="weight must be a contiguous tensor of 8 values"):
        ops.bn_act(x, torch.ones(7), None, None, None, None, True, 1e-5, True, False, False)
    with pytest.raises(RuntimeError, match="running statistics are missing"):
        ops.bn_act(x, None, None, None, None, None, False, 1e-5, True, False, False)
    with pytest.raises(RuntimeError, match="residual must have the shape of x"):
        ops.add_act(x, x[:1], True, False)
    with pytest.raises(RuntimeError, match="unsupported pooling window"):
        ops.bn_act_maxpool(x, None, None, None, None, True, 1e-5, True, 16, 1, 0, False)
    with pytest.raises(RuntimeError, match="serves float32, bfloat16 and float16"):
        ops.add_act(x.double(), x.double(), True, False)
