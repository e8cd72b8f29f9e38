"""Registration of the ops: opcheck, gradcheck in float64 (first and second order), torch.compile, torch.export,
autocast."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn
from torch.library import opcheck

import fastres
from fastres import functional
from fastres.testing import relative_error

ops = torch.ops.fastres


def stem_case(dtype, layout, channels=6, requires_grad=True):
    def make(*shape):
        t = torch.randn(*shape, dtype=dtype)
        t = t.contiguous(memory_format=layout) if len(shape) == 4 else t
        return t.requires_grad_(requires_grad)

    x, residual = make(3, channels, 5, 4), make(3, channels, 5, 4)
    vector = torch.float64 if dtype is torch.float64 else torch.float32
    weight, bias = (torch.randn(channels, dtype=vector, requires_grad=requires_grad) for _ in range(2))
    mean, var = torch.randn(channels, dtype=vector), torch.rand(channels, dtype=vector) + 0.5
    conv_weight, conv_bias = make(channels, channels, 3, 3), make(channels)
    return x, residual, weight, bias, mean, var, conv_weight, conv_bias


GEOMETRY = ([1, 1], [1, 1], [1, 1], 1)


def sample_calls(dtype, layout, requires_grad=True):
    """(op, arguments) of every op in every mode."""
    x, residual, weight, bias, mean, var, conv_weight, conv_bias = stem_case(dtype, layout, requires_grad=requires_grad)
    for training in (True, False):
        yield ops.bn_act, (x, weight, bias, mean, var, None, training, 1e-5, True, False)
        yield ops.bn_act, (x, weight, bias, mean, var, residual, training, 1e-5, True, True)
        yield ops.bn_act, (x, None, None, mean, var, residual, training, 1e-5, False, False)
        yield ops.bn_act_maxpool, (x, weight, bias, mean, var, training, 1e-5, True, 3, 2, 1)
        branches = (x, weight, bias, mean, var, residual, bias, None, var, var)
        yield ops.bn_add_bn_act, (*branches, training, True, 1e-5, 1e-3, True, True)
        yield ops.bn_add_bn_act, (*branches, False, training, 1e-5, 1e-3, False, False)
        yield (
            ops.conv_bn_act,
            (x, conv_weight, None, weight, bias, mean, var, residual, *GEOMETRY, training, 1e-5, True, True),
        )
        yield (
            ops.conv_bn_act,
            (x, conv_weight, conv_bias, weight, bias, mean, var, None, *GEOMETRY, training, 1e-5, True, False),
        )
        one = conv_weight.detach()[:, :, :1, :1].clone().requires_grad_(requires_grad)
        yield ops.conv1x1_bn_act, (x, one, weight, bias, mean, var, residual, training, 1e-5, True, True)
        yield ops.conv1x1_bn_act, (x, one, weight, bias, mean, var, None, training, 1e-5, False, False)
    yield ops.add_act, (x, residual, True)
    yield ops.add_act, (x, residual, False)
    yield ops.conv_bias_act, (x, conv_weight, conv_bias, residual, *GEOMETRY, True)
    yield ops.conv_bias_act, (x, conv_weight, None, None, *GEOMETRY, False)


def names(calls):
    return [f"{op.__name__ if hasattr(op, '__name__') else op}-{i}" for i, (op, _) in enumerate(calls)]


LAYOUTS = [torch.contiguous_format, torch.channels_last]
COUNT = len(list(sample_calls(torch.float32, LAYOUTS[0])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("index", range(COUNT))
def test_opcheck(index, layout, dtype):
    op, args = list(sample_calls(dtype, layout, requires_grad=True))[index]
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if (dtype, layout) in ((torch.float32, LAYOUTS[1]), (torch.bfloat16, LAYOUTS[0])):  # a second each
        utils.append("test_aot_dispatch_dynamic")
    opcheck(
        op,
        args,
        test_utils=utils,
        rtol=1e-2 if dtype is torch.bfloat16 else None,
        atol=1e-2 if dtype is torch.bfloat16 else None,
    )


def test_opcheck_of_backward_and_update():
    x, residual, weight, bias, mean, var, conv_weight, _ = (
        t.detach() for t in stem_case(torch.float32, torch.channels_last)
    )
    y, m, v, mask = ops.bn_act(x, weight, bias, mean, var, residual, True, 1e-5, True, True)
    for need in (True, False):
        opcheck(ops.bn_act_backward, (y, x, weight, bias, m, v, mask, True, 1e-5, True, need, need, True))
    p, m, v, index = ops.bn_act_maxpool(x, weight, bias, mean, var, True, 1e-5, True, 3, 2, 1)
    opcheck(ops.bn_act_maxpool_backward, (p, x, weight, bias, m, v, index, True, 1e-5, True, 3, 2, 1, True, True))
    branches = (x, weight, bias, mean, var, residual, bias, None, mean, var)
    y, m, v, other_m, other_v, mask = ops.bn_add_bn_act(*branches, True, True, 1e-5, 1e-3, True, True)
    for need in (True, False):
        saved = (x, weight, m, v, residual, bias, other_m, other_v, mask, True, True, 1e-5, 1e-3)
        opcheck(ops.bn_add_bn_act_backward, (y, *saved, need, True, True, need))
    y, raw, m, v, mask = ops.conv_bn_act(
        x, conv_weight, None, weight, bias, mean, var, residual, *GEOMETRY, True, 1e-5, True, True
    )
    for need in (True, False):
        args = (
            y,
            x,
            conv_weight,
            raw,
            weight,
            bias,
            m,
            v,
            mask,
            *GEOMETRY,
            True,
            1e-5,
            True,
            need,
            need,
            need,
            True,
            True,
            x if need else None,
        )
        opcheck(ops.conv_bn_act_backward, args)
    one = conv_weight[:, :, :1, :1].clone()
    y, *moments, mask = ops.conv1x1_bn_act(x, one, weight, bias, mean, var, residual, True, 1e-5, True, True)
    for need in (True, False):
        args = (y, x, one, weight, bias, *moments, mask, True, 1e-5, need, need, need)
        opcheck(ops.conv1x1_bn_act_backward, args)
    opcheck(ops.add_act_backward, (x, y))
    opcheck(ops.update_running_stats_, (mean.clone(), var.clone(), m, v, None, 0.1, 60))
    opcheck(ops.update_running_stats_, (mean.clone(), var.clone(), m, v, torch.tensor(3), 0.0, 60))
    opcheck(ops.update_all_running_stats_, ([mean.clone()], [var.clone()], [m], [v], [0.1], [60]))


def differentiable_calls():
    """Functions of float64 tensors that need gradients, through fastres.functional."""
    x, residual, weight, bias, mean, var, conv_weight, conv_bias = stem_case(
        torch.float64, torch.channels_last, channels=3
    )
    for training in (True, False):
        options = {"training": training, "momentum": 0.0}
        yield lambda x, w, b, o=options: functional.bn_act(x, mean, var, w, b, **o), (x, weight, bias)
        yield lambda x, w, b, r, o=options: functional.bn_act(x, mean, var, w, b, r, **o), (x, weight, bias, residual)
        yield lambda x, r, o=options: functional.bn_act(x, mean, var, None, None, r, act="identity", **o), (x, residual)
        yield lambda x, w, b, o=options: functional.bn_act_maxpool(x, mean, var, w, b, **o), (x, weight, bias)
        yield (
            lambda x, w, b, r, t=training: fastres.ops.bn_add_bn_act.call(
                x, w, b, mean, var, r, b, None, mean, var, True, t, 1e-5, 1e-3, t, t
            )[0],
            (x, weight, bias, residual),
        )
        yield (
            lambda x, k, w, b, r, o=options: functional.conv_bn_act(x, k, mean, var, w, b, r, padding=1, **o),
            (x, conv_weight, weight, bias, residual),
        )
        yield (
            lambda x, k, kb, w, o=options: functional.conv_bn_act(
                x, k, mean, var, w, None, conv_bias=kb, stride=2, **o
            ),
            (x, conv_weight, conv_bias, weight),
        )
    yield functional.add_act, (x, residual)
    yield lambda x, k, b, r: functional.conv_bias_act(x, k, b, r, padding=1), (x, conv_weight, conv_bias, residual)


@pytest.mark.parametrize("index", range(16))
def test_gradcheck(index):
    function, inputs = list(differentiable_calls())[index]
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("index", range(16))
def test_double_backward(index):
    function, inputs = list(differentiable_calls())[index]
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_double_backward_of_the_compiled_kernels_is_the_references(dtype):
    x, residual, weight, bias, mean, var, conv_weight, _ = stem_case(dtype, torch.channels_last)

    def penalty(function):
        y = function(x, conv_weight, weight, bias, residual).float()
        grads = torch.autograd.grad(y.square().sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(g.float().square().sum() for g in grads), (x, conv_weight, weight))

    def eager(x, k, w, b, r):
        return F.relu(F.batch_norm(F.conv2d(x, k, padding=1), None, None, w, b, True) + r)

    def fused(x, k, w, b, r):
        return functional.conv_bn_act(x, k, None, None, w, b, r, padding=1, training=True)

    tolerance = 1e-4 if dtype is torch.float32 else 5e-2
    for got, want in zip(penalty(fused), penalty(eager), strict=True):
        assert relative_error(got, want) < tolerance


class Block(nn.Module):
    """A residual block written with the functions and modules of this library, with every op in it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(8)
        self.a = fastres.nn.ConvBnAct2d(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.b = fastres.nn.ConvBnAct2d(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.bn = fastres.nn.BnAct2d(nn.BatchNorm2d(8))
        self.add = fastres.nn.AddAct()

    def forward(self, x):
        bn = self.bn0
        x = functional.bn_act_maxpool(
            self.stem(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, training=self.training
        )
        return self.add(self.bn(self.b(self.a(x), x)), x)


def gradients(model, function, x):
    model.zero_grad()
    y = function(x)
    y.square().mean().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compile_fullgraph(training, backend):
    import copy

    torch._dynamo.reset()
    model = Block().train(training)
    twin = copy.deepcopy(model)
    x = torch.randn(4, 3, 12, 12).contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for got, want in zip(gradients(model, compiled, x), gradients(twin, twin, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert relative_error(compiled(x), twin(x)) < 1e-5


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compile_does_not_recompile_for_new_sizes(training):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = Block().train(training)
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for n, h, w in ((2, 12, 16), (3, 16, 12), (4, 20, 24), (5, 14, 18)):  # all sizes differ: torch ties equal ones
            x = torch.randn(n, 3, h, w).contiguous(memory_format=torch.channels_last)
            assert compiled(x).shape[0] == n
            if n == 2:
                graphs = counter.frame_count
    assert counter.frame_count == graphs, "recompiled for a new size"


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_export_with_dynamic_batch(training):
    import copy

    model = Block().train(training)
    twin = copy.deepcopy(model)
    x = torch.randn(4, 3, 12, 12).contiguous(memory_format=torch.channels_last)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    targets = {str(node.target) for node in exported.graph.nodes}
    assert any("fastres" in target for target in targets)
    module = exported.run_decompositions({}).module()
    for n in (4, 7):
        x = torch.randn(n, 3, 12, 12).contiguous(memory_format=torch.channels_last)
        assert relative_error(module(x), twin(x)) < 1e-5


def test_autocast_casts_the_convolution_and_leaves_batch_norm_alone():
    x, residual, weight, bias, mean, var, conv_weight, conv_bias = stem_case(torch.float32, torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = functional.conv_bn_act(
            x, conv_weight, mean, var, weight, bias, residual, padding=1, training=True, momentum=0.0
        )
        want = F.batch_norm(F.conv2d(x, conv_weight, padding=1), None, None, weight, bias, True)
        want += residual  # in place: keeps bfloat16
        want = F.relu(want)
        assert y.dtype is want.dtype is torch.bfloat16
        folded = functional.conv_bias_act(x, conv_weight, conv_bias, residual, padding=1)
        assert folded.dtype is torch.bfloat16
        assert functional.bn_act(x, mean, var, weight, bias, training=True, momentum=0.0).dtype is torch.float32
        assert functional.add_act(x.bfloat16(), residual).dtype is torch.float32
        with torch.autocast("cpu", enabled=False):
            assert functional.conv_bias_act(x, conv_weight, padding=1).dtype is torch.float32
    grads = torch.autograd.grad(y.float().square().sum(), (x, conv_weight, weight, bias, residual))
    truth = torch.autograd.grad(want.float().square().sum(), (x, conv_weight, weight, bias, residual))
    for got, expected in zip(grads, truth, strict=True):
        assert got.dtype is expected.dtype is torch.float32
        assert relative_error(got, expected) < 3e-2


def test_gradients_only_where_needed():
    x, residual, weight, bias, mean, var, conv_weight, _ = (
        t.detach() for t in stem_case(torch.float32, torch.channels_last)
    )
    for wanted in (x, weight, bias, residual, conv_weight):
        wanted.requires_grad_()
        y = functional.conv_bn_act(
            x, conv_weight, mean, var, weight, bias, residual, padding=1, training=True, momentum=0.0
        )
        y.square().sum().backward()
        assert wanted.grad is not None and wanted.grad.shape == wanted.shape
        others = [t for t in (x, weight, bias, residual, conv_weight) if t is not wanted]
        assert all(t.grad is None for t in others)
        wanted.requires_grad_(False)
        wanted.grad = None


def test_running_statistics_are_functions_of_the_schema():
    """Forward ops write nothing; those that do say so."""
    for name in (
        "bn_act",
        "bn_add_bn_act",
        "conv_bn_act",
        "conv1x1_bn_act",
        "bn_act_maxpool",
        "add_act",
        "conv_bias_act",
    ):
        assert not getattr(ops, name).default._schema.is_mutable
    assert ops.update_running_stats_.default._schema.is_mutable
    assert ops.update_all_running_stats_.default._schema.is_mutable


def test_cumulative_average_and_momentum_of_statistics():
    x = torch.randn(5, 4, 3, 3)
    for momentum in (0.0, 0.1, 1.0, None):
        bn, twin = nn.BatchNorm2d(4, momentum=momentum), nn.BatchNorm2d(4, momentum=momentum)
        fused = fastres.nn.BnAct2d(bn)
        for step in range(3):
            assert relative_error(fused(x * (step + 1)), F.relu(twin(x * (step + 1)))) < 1e-6
        assert relative_error(bn.running_mean, twin.running_mean) < 1e-6
        assert relative_error(bn.running_var, twin.running_var) < 1e-6
        assert bn.num_batches_tracked == twin.num_batches_tracked == 3
