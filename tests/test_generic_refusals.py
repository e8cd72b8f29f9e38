"""What fuse_ must not write down as a graph, and says so; and what changes after the swap."""

import copy
import random
import re

import pytest
import torch
from _blocks import WIDTH, Block, Detectron2Bottleneck, DropPath, HuggingFaceBasic, TimmBasic, conv3
from _compare import MODES, assert_path, assert_same, check, image, randomise, some_kernels, step, watched
from torch import nn
from torch.nn import functional as F

import fastres
from fastres.recipes import units

modes = pytest.mark.parametrize("mode", MODES)
SEEN = []


@pytest.fixture(autouse=True)
def _kernels():
    with some_kernels():
        yield


class Counts(Block):
    def forward(self, x):
        self.calls += 1
        return self.run(x)


class WritesBuffer(Block):
    def forward(self, x):
        self.count += 1
        return self.run(x)


class KeepsFeatures(Block):
    def __init__(self):
        super().__init__()
        self.features = []

    def forward(self, x):
        y = self.run(x)
        self.features.append(y)
        return y


class Draws(Block):
    def forward(self, x):
        return self.run(x) if random.random() < 2 else x


class DrawsTensor(Block):
    def forward(self, x):
        return self.run(x) + torch.rand(1)


class Bakes(Block):
    def forward(self, x):
        return self.run(x) + torch.ones(1, WIDTH, 1, 1)


class Branches(Block):
    def forward(self, x):
        return self.run(x) if x.sum() > 0 else self.run(-x)


class AsksForTheShape(Block):
    def forward(self, x):
        return self.run(x) if x.shape[2] > 3 else x


class AsksForTheType(Block):
    def forward(self, x):
        return self.run(x if isinstance(x, torch.Tensor) else x[0])


class Prints(Block):
    def forward(self, x):
        print("forward")
        return self.run(x)


class AsksForTheMode(Block):
    def forward(self, x):
        return self.run(x) if torch.is_grad_enabled() else self.run(x) * 1.0


class WritesGlobal(Block):
    def forward(self, x):
        global SEEN
        SEEN = [1]
        return self.run(x)


class StopsGradients(Block):
    def forward(self, x):
        with torch.no_grad():
            x = self.run(x)
        return x + self.conv(x)


class LeavesAutocast(Block):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.run(x)


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class HasItsOwnGradient(Block):
    def forward(self, x):
        return _Doubled.apply(self.run(x))


class TakesAnything(Block):
    def forward(self, x, **options):
        return self.run(x)


REFUSED = {
    Counts: "writes self.calls",
    WritesBuffer: "buffer",
    KeepsFeatures: "writes self.features",
    Draws: "random",
    DrawsTensor: "random|tensor of its own",
    Bakes: "tensor of its own",
    Branches: "does not trace: TraceError",
    AsksForTheShape: "does not trace: TraceError",
    AsksForTheType: "type of its input",
    Prints: "uses print",
    AsksForTheMode: "is_grad_enabled",
    WritesGlobal: "global variable",
    StopsGradients: "the mode of autograd",
    LeavesAutocast: "the mode of autograd or of autocast",
    HasItsOwnGradient: "autograd.Function",
    TakesAnything: "any number of arguments",
}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_refused_with_the_reason_and_without_a_trace(kind):
    model = randomise(kind())
    eager, before, drawn = copy.deepcopy(model), model.__dict__.copy(), (random.getstate(), torch.get_rng_state())
    report = fastres.fuse_(model)
    assert type(model) is kind and report.fused == 0
    for row in report.rows:
        assert re.search(REFUSED[kind], row.reason), row.reason
    assert model.__dict__ == before and random.getstate() == drawn[0] and torch.equal(torch.get_rng_state(), drawn[1])
    x = image(WIDTH)
    for mode in MODES:
        torch.manual_seed(1)
        want = step(eager, x, mode)
        torch.manual_seed(1)
        assert_same(step(model, x, mode), want)


def test_modules_that_are_left_alone():
    scripted = torch.jit.script(nn.Sequential(conv3(), nn.BatchNorm2d(WIDTH)))
    lazy = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d())
    for model in (nn.Sequential(scripted, nn.Identity()), lazy):
        report = fastres.fuse_(model)
        assert report.fused == 0 and not any(isinstance(m, units.Unit) for m in model.modules())


class Shared(nn.Module):
    """The same batch norm twice: its statistics have an order."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.bn = conv3(), conv3(), nn.BatchNorm2d(WIDTH)

    def forward(self, x):
        y = self.bn(self.conv1(x))
        return F.relu(self.bn(self.conv2(x)) + y)


class Reads(nn.Module):
    """The convolution's result is used twice, and an in-place ReLU changes what is added."""

    def __init__(self, raw):
        super().__init__()
        self.conv, self.bn, self.relu, self.raw = conv3(), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True), raw

    def forward(self, x):
        y = self.conv(x)
        z = self.bn(y)
        return self.relu(z) + (y if self.raw else z)


class WritesInput(nn.Module):
    """An in-place ReLU of what the shortcut reads later: the first convolution may not move behind it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = conv3(), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True)

    def forward(self, x):
        x = x * 1.5
        y = self.bn(self.conv(x))
        x = self.relu(x)
        return F.relu(y + x)


class Promotes(nn.Module):
    def __init__(self, in_place):
        super().__init__()
        self.conv, self.bn, self.in_place = conv3(), nn.BatchNorm2d(WIDTH), in_place

    def forward(self, x):
        y, other = self.bn(self.conv(x)), x.double()
        if self.in_place:
            y += other
        else:
            y = y + other
        return F.relu(y)


MEANINGS = {
    "shared": Shared,
    "raw": lambda: Reads(True),
    "in_place": lambda: Reads(False),
    "promotes": lambda: Promotes(False),
    "keeps": lambda: Promotes(True),
}


@modes
@pytest.mark.parametrize("name", MEANINGS)
def test_order_and_writes_keep_their_meaning(name, mode):
    check(randomise(MEANINGS[name]()), image(WIDTH), mode, steps=2)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_moves_behind_a_write_to_its_input(training):
    """Without gradients, with which eager refuses it."""
    eager = randomise(WritesInput()).train(training)
    fused, x = copy.deepcopy(eager), image(WIDTH)
    fastres.fuse_(fused)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), eager(x), rtol=1e-5, atol=1e-5)


@modes
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_drop_path(rate, mode):
    """B8: elided where it is inactive; where it draws, it is called, in the order in which eager draws."""
    model = randomise(TimmBasic(drop_path=DropPath(rate)))
    eager, fused = copy.deepcopy(model), copy.deepcopy(model)
    report = fastres.fuse_(fused.train(mode == "train"))
    assert all(row.fused for row in report.rows)  # where it draws, the addition is fused with the ReLU only
    groups = units.plan_of(fused).matched.groups
    assert (groups[-1].norm is None) == (rate > 0 and mode == "train")
    for _ in range(2):
        torch.manual_seed(7)
        want = step(eager, image(WIDTH), mode)
        torch.manual_seed(7)
        with watched() as seen:
            got = step(fused, image(WIDTH), mode)
        assert_path(seen, "fast")
        assert_same(got, want)


CHANGES = {
    "forward_hook": lambda m: m.conv1.register_forward_hook(lambda module, args, y: y * 2),
    "activation": lambda m: setattr(m, "act1", nn.Sigmoid()),
    "bound_forward": lambda m: setattr(m.bn1, "forward", lambda x: x * 3),
    "gate": lambda m: setattr(m, "se", nn.AvgPool2d(3, 1, 1)),
    "drop_path": lambda m: setattr(m, "drop_path", nn.AvgPool2d(3, 1, 1)),
    "group_norm": lambda m: setattr(m, "bn2", nn.GroupNorm(2, WIDTH)),
    "identity_hook": lambda m: m.drop_block.register_forward_hook(lambda module, args, y: y + 1),
    "padding_mode": lambda m: (
        setattr(m.conv2, "padding_mode", "reflect")
        or setattr(m.conv2, "_reversed_padding_repeated_twice", [1, 1, 1, 1])
    ),
    "freeze": lambda m: m.bn1.eval(),
    "whole": lambda m: setattr(m, "forward", lambda x: x * 2),
    "spectral_norm": lambda m: nn.utils.parametrizations.weight_norm(m.conv1),
}


@modes
@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_the_swap_are_seen(change, mode):
    eager = randomise(TimmBasic())
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    x = image(WIDTH)
    assert_same(step(fused, x, mode), step(eager, x, mode))
    for model in (eager, fused):
        CHANGES[change](model)
    assert_same(step(fused, x, mode), step(eager, x, mode), tolerance=1e-4)


def test_hooks_on_inlined_children_fire():
    model = randomise(HuggingFaceBasic(2))
    fastres.fuse_(model)
    x, seen = image(WIDTH), []
    with torch.no_grad():
        want = model(x)
    handles = [m.register_forward_hook(lambda m, args, y: seen.append(type(m).__name__)) for m in model.layer]
    with torch.no_grad():
        assert_same({"y": model(x)}, {"y": want})
    assert seen == ["ConvLayer", "ConvLayer"]
    for handle in handles:
        handle.remove()
    with torch.no_grad(), watched() as path:
        model(x)
    assert_path(path, "fast")
    assert len(seen) == 2


def test_attributes_that_never_stay_are_not_traced_for_ever():
    class Named(TimmBasic):
        step = None

    model = randomise(Named())
    fastres.fuse_(model)
    x = image(WIDTH)
    for _ in range(units.MADE + 3):
        model.step = object()
        with torch.no_grad(), watched() as seen:
            model(x)
    assert "times traced" in seen[0][1]


def test_other_arguments_run_the_own_forward():
    class Scaled(TimmBasic):
        def forward(self, x, scale=1.0):
            return super().forward(x) * scale

    model = randomise(Scaled()).eval()
    eager = copy.deepcopy(model)
    fastres.fuse_(model)
    x = image(WIDTH)
    with torch.no_grad():
        for args, kwargs, other in (
            ((x,), {}, False),
            ((x, 2.0), {}, True),
            ((), {"x": x}, False),
            ((x,), {"scale": 3.0}, True),
        ):
            with watched() as seen:
                torch.testing.assert_close(model(*args, **kwargs), eager(*args, **kwargs), rtol=1e-5, atol=1e-5)
            assert (seen[0][1] is not None) == other
        for args in ((), (x, 1.0, 2.0)):
            with pytest.raises(TypeError):
                model(*args)


def test_autocast_around_frozen_batch_norms_is_eager():
    """Their fp32 tensors promote the result."""
    model = randomise(Detectron2Bottleneck(2)).eval()
    eager = copy.deepcopy(model)
    fastres.fuse_(model)
    x = image(WIDTH)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = model(x), eager(x)
    assert got.dtype is want.dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
