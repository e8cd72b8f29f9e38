"""bn_add_bn_act and the recipes that use it: numbers, errors, and when a block takes this way."""

import copy

import pytest
import torch
import torch.nn.functional as F
from _compare import batch_norms, block, image, some_kernels, step
from _kernels import check_bn_add_bn_act, check_nan_and_inf_of_two_branches
from torch import nn

import fastres
from fastres import functional
from fastres.functional import BatchNorm
from fastres.kernels import table
from fastres.recipes import projection
from fastres.testing import LAYOUTS, Case, relative_error


@pytest.mark.parametrize(("training", "relu"), [((True, True), True), ((True, False), False), ((False, False), True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parity(kernels, layout, dtype, training, relu):
    check_bn_add_bn_act(Case((2, 17, 5, 3), dtype, layout), training, relu)


def test_nan_and_inf_as_in_eager(kernels):
    check_nan_and_inf_of_two_branches(torch.float32, "channels_last")


@pytest.fixture
def served(monkeypatch):
    """The reference counts as a kernel for it, so that functional and recipes call the op on the CPU."""
    reference = table.kernels("bn_add_bn_act", "cpu")[0]
    kernel = table.Kernel("triton", reference.run, lambda: None, lambda x, *args: None if x.numel() else "empty batch")
    monkeypatch.setitem(table.TABLE, ("bn_add_bn_act", "cpu"), [kernel, reference])
    with some_kernels():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_parity_of_the_op(served, training, dtype):
    check_bn_add_bn_act(Case((2, 17, 5, 3), dtype, "channels_last"), training, True)


def running(c=4):
    return torch.zeros(c), torch.ones(c)


@pytest.mark.parametrize("way", ["op", "two calls"])
def test_running_statistics_are_updated_once(way, request):
    if way == "op":
        request.getfixturevalue("served")
    x, other = image(4), image(4)
    counter = torch.tensor(5)
    norms = [
        BatchNorm(*running(), training=True, momentum=0.3),
        BatchNorm(*running(), None, None, True, 0.1, 1e-3, counter),
    ]
    functional.bn_add_bn_act(x, norms[0], other, norms[1])
    for values, norm, factor in ((x, norms[0], 0.3), (other, norms[1], 0.2)):
        mean, var = running()
        F.batch_norm(values, mean, var, training=True, momentum=factor)
        assert relative_error(norm.running_mean, mean) < 1e-6 and relative_error(norm.running_var, var) < 1e-6
    assert counter == 5


def test_frozen_statistics_stay(served):
    norms = [BatchNorm(*running()), BatchNorm(*running())]
    functional.bn_add_bn_act(image(4), norms[0], image(4), norms[1])
    assert all(torch.equal(t, want) for norm in norms for t, want in zip(norm[:2], running(), strict=True))


@pytest.mark.parametrize("way", ["op", "two calls"])
@pytest.mark.parametrize(
    ("changed", "kind", "said"),
    [
        ({"other": torch.zeros(3, 4, 7, 6)}, RuntimeError, "other must have the output's shape"),
        ({"other": torch.zeros(3, 4, 7, 7, dtype=torch.float64)}, RuntimeError, "mixed dtype"),
        ({"other": torch.zeros(3, 4, 7)}, ValueError, "expected 4D input"),
        ({"x": torch.zeros(3, 4, 7, 7, dtype=torch.int64)}, NotImplementedError, "not implemented"),
        ({"other_norm": BatchNorm(*running(5))}, RuntimeError, "should contain 4 elements not 5"),
        ({"norm": BatchNorm(None, None)}, RuntimeError, "must be defined in evaluation mode"),
        ({"norm": BatchNorm(*running(), eps=-1.0)}, ValueError, "eps must be non-negative"),
        ({"act": "gelu"}, ValueError, "act must be one of"),
    ],
)
def test_errors_come_before_anything_is_updated(request, way, changed, kind, said):
    if way == "op":
        request.getfixturevalue("served")
    norm = BatchNorm(*running(), training=True)
    arguments = {"x": image(4), "norm": norm, "other": image(4), "other_norm": norm} | changed
    with pytest.raises(kind, match=said):
        functional.bn_add_bn_act(**arguments)
    assert all(torch.equal(t, want) for t, want in zip(norm[:2], running(), strict=True))


def test_one_value_a_channel():
    x = torch.randn(1, 4, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        functional.bn_add_bn_act(x, BatchNorm(*running()), x, BatchNorm(*running(), training=True))


def test_autocast_keeps_the_first_dtype(served):
    x, other = image(4).bfloat16(), image(4)
    norms = [BatchNorm(*running(), training=True), BatchNorm(*running(), training=True)]
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.bn_add_bn_act(x, norms[0], other.requires_grad_(), norms[1])
    assert y.dtype is torch.bfloat16
    assert torch.autograd.grad(y.float().sum(), other)[0].dtype is torch.float32


def test_compiled(served):
    torch._dynamo.reset()
    weight, other_weight = (torch.rand(4).requires_grad_() for _ in range(2))

    def run(x, other, running_mean, running_var):
        norm = BatchNorm(running_mean, running_var, weight, training=True)
        return functional.bn_add_bn_act(x, norm, other, BatchNorm(None, None, other_weight, training=True))

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        inputs = [image(4, n=2).requires_grad_() for _ in range(2)]
        with torch.no_grad():
            for t in inputs:
                t.copy_(torch.linspace(-1, 1, t.numel()).reshape(t.shape).sin())
            inputs[1].mul_(inputs[0] + 0.5)
        statistics = running()
        y = function(*inputs, *statistics)
        results.append([y, *torch.autograd.grad(y.square().sum(), [*inputs, weight, other_weight]), *statistics])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# Blocks


@pytest.fixture
def joined(monkeypatch):
    """How often a block's end was joined."""
    calls = []
    right = functional.bn_add_bn_act
    monkeypatch.setattr(functional, "bn_add_bn_act", lambda *args, **kw: calls.append(1) or right(*args, **kw))
    return calls


def ran(model, x, mode="train"):
    eager, fused = copy.deepcopy(model), copy.deepcopy(model)
    fastres.fuse_(fused)
    outcomes = [step(m, x, mode) for m in (eager, fused)]
    for (name, want), got in zip(outcomes[0].items(), outcomes[1].values(), strict=True):
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4, msg=name)
    return fused


def test_a_projection_is_joined_where_a_kernel_serves(served, joined):
    fused = ran(block(kind="BasicBlock", stride=2), image())
    assert len(joined) == 1
    assert all(bn.num_batches_tracked == 1 for bn in batch_norms(fused))


def test_not_without_a_kernel(joined):
    with some_kernels():
        ran(block(kind="BasicBlock", stride=2), image())
    assert not joined and projection.join(*_branches()) is None


def _branches():
    conv, bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    return conv, bn, image(4), conv, bn, image(4)


@pytest.mark.parametrize(("mode", "times"), [("eval", 1), ("inference", 0)])
def test_frozen_batch_norms(served, joined, mode, times):
    """With gradients; without, batch norm is folded into the convolutions."""
    ran(block(kind="BasicBlock", stride=2), image(), mode)
    assert len(joined) == times


def test_not_without_a_projection_nor_in_an_empty_batch(served, joined):
    ran(block(kind="BasicBlock"), image())
    ran(block(kind="BasicBlock", stride=2), image(n=0), "eval")
    assert not joined


def test_not_behind_a_hook_or_something_else(served, joined):
    for change in (
        lambda b: b.downsample[0].register_forward_hook(lambda *args: None),
        lambda b: b.downsample.register_forward_hook(lambda *args: None),
        lambda b: b.downsample.append(nn.Identity()),
    ):
        model = block(kind="BasicBlock", stride=2)
        change(model)
        ran(model, image())
    assert not joined


@pytest.mark.parametrize("algebraic", [True, False])
def test_a_bottleneck_is_left_to_the_algebraic_batch_norm(served, joined, monkeypatch, algebraic):
    def serves(x, weight, bias, geometry):
        return algebraic and weight.shape[0] == 4 * weight.shape[1] and geometry[0] == [1, 1]

    monkeypatch.setattr(functional, "algebraic", serves)
    ran(block(stride=2), image())
    assert len(joined) == (0 if algebraic else 1)


def test_branches_of_two_shapes_are_left_to_eagers_rules(served, joined):
    """The shortcut is broadcast."""
    model = block(kind="BasicBlock", stride=2)
    model.downsample[0] = nn.Conv2d(16, 16, 7)
    ran(model, image())
    assert not joined


def test_what_is_saved_for_backward(served):
    """The second convolution's input is made again from what its batch norm saved: one activation less."""
    fused = block(kind="BasicBlock", stride=2)
    fastres.fuse_(fused.train())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused(image().requires_grad_())
    large = {t.data_ptr() for t in saved if t.dim() == 4 and t.shape[0] == 3}
    assert len(large) == 4  # the block's input, and three outputs of convolutions
