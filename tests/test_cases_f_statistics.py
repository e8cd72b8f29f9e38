"""Case F5: running statistics count a batch as often as eager does, and once where that is asked for."""

import copy
from contextlib import nullcontext

import pytest
import torch
from _compare import (
    assert_path,
    assert_same,
    batch_norms,
    block,
    buffers,
    image,
    kinds,
    libraries,
    network,
    some_kernels,
    step,
    watched,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastres

reentrant = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])


@pytest.fixture(autouse=True)
def _kernels():
    with some_kernels():
        yield


def checkpointed(module, reentrant):
    return lambda x: checkpoint(module, x, use_reentrant=reentrant)


def counts(model):
    return [int(bn.num_batches_tracked) for bn in batch_norms(model)]


def steps(model, x, call=None, *, once=False, count=1):
    """The outcome of the last of some steps in training."""
    for _ in range(count):
        with fastres.statistics_once(model) if once else nullcontext():
            outcome = step(model, x, "train", call=call)
    return outcome


@libraries
@kinds
@reentrant
def test_f5_default_is_eagers(library, kind, reentrant):
    """Checkpointing runs a block twice, and both count its batch twice."""
    eager = block(library, kind, stride=2)
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    x = image()
    with watched() as seen:
        got = steps(fused, x, checkpointed(fused, reentrant))
    assert_path(seen, "fast")
    assert_same(got, steps(eager, x, checkpointed(eager, reentrant)))
    assert set(counts(fused)) == {2}


#: What is done to a model before it runs; a hook on a child makes its block run the original forward.
CHANGES = {
    "fused": lambda model: None,
    "blocked": lambda model: model.conv1.register_forward_hook(lambda *args: None),
    "blocked by a batch norm": lambda model: model.bn2.register_forward_hook(lambda *args: None),
    "cumulative": lambda model: [setattr(bn, "momentum", None) for bn in batch_norms(model)],
    "no statistics": lambda model: model.bn1.__init__(model.bn1.num_features, track_running_stats=False),
    "no counter": lambda model: setattr(model.bn1, "num_batches_tracked", None),
    "frozen": lambda model: model.bn1.register_forward_pre_hook(lambda bn, args: bn.eval() and None),
}


@reentrant
@pytest.mark.parametrize(("kind", "swap"), [("BasicBlock", True), ("Bottleneck", True), ("Bottleneck", False)])
@pytest.mark.parametrize("change", CHANGES)
def test_f5_once(kind, reentrant, swap, change):
    """What a step leaves behind is what it leaves without checkpointing: statistics, counters, gradients."""
    plain = block(kind=kind, stride=2)
    kept = copy.deepcopy(plain)
    for model in (plain, kept):
        if swap:
            fastres.fuse_(model)
        CHANGES[change](model)
    x = image()
    with watched() as seen:
        got = steps(kept, x, checkpointed(kept, reentrant), once=True, count=2)
    if swap and change in ("fused", "cumulative"):
        assert_path(seen, "fast")
    want = steps(plain, x, count=2)
    assert_same(got, want)  # reentrant: the first forward is one without gradients, where other kernels may serve
    if not (swap and reentrant):
        assert all(t is None or torch.equal(got[name], t) for name, t in want.items())
    for bn in batch_norms(kept):
        assert bn.track_running_stats == (bn is not kept.bn1 or change != "no statistics")
        mine = [*bn._forward_hooks.values(), *bn._forward_pre_hooks.values()]
        assert all("running_statistics" not in hook.__module__ for hook in mine)


@reentrant
def test_f5_once_in_a_network(reentrant):
    """Each block of it checkpointed, and a batch norm that is in no block; then evaluation, inside and after."""
    plain = nn.Sequential(network(), nn.Unflatten(1, (10, 1, 1)), nn.BatchNorm2d(10))
    kept = copy.deepcopy(plain)
    for model in (plain, kept):
        fastres.fuse_(model)
    x = image(3, size=32)

    def forward(x):
        net = kept[0]
        x = checkpoint(net._stem, x, use_reentrant=reentrant)
        for layer in (net.layer1, net.layer2):
            x = checkpoint(layer, x, use_reentrant=reentrant)
        x = net.fc(torch.flatten(net.avgpool(x), 1))
        return checkpoint(kept[2], kept[1](x), use_reentrant=reentrant)

    got, want = steps(kept, x, forward, once=True), steps(plain, x)
    assert_same(got, want)
    assert set(counts(kept)) == {1}
    with fastres.statistics_once(kept), watched() as seen:
        inside = step(kept, x, "inference")
    assert_path(seen, "fast")
    assert_same(inside, step(plain, x, "inference"))


def test_f5_once_is_about_recomputations_only():
    """A batch norm that runs twice in a forward is two batches, also with the switch on; nested switches are one."""
    model = nn.Sequential(block(), nn.ReLU(), block())
    model[2] = model[0]
    fastres.fuse_(model)
    x = image()
    with fastres.statistics_once(model), fastres.statistics_once(model[0]):
        step(model, x, "train", call=checkpointed(model, False))
    assert set(counts(model)) == {2}
    copied = copy.deepcopy(model)
    for m in (model, copied):
        step(m, x, "train", call=checkpointed(m, False))
    assert set(counts(model)) == set(counts(copied)) == {6}


@reentrant
def test_f5_once_survives_errors(reentrant):
    """An exception inside a recomputation puts everything back."""
    model = block()
    fastres.fuse_(model)
    model.conv1.register_forward_hook(lambda *args: None)
    held = dict(model.named_buffers())

    def fail(bn, args):
        if torch._C._current_graph_task_id() != -1:
            raise KeyError("in backward")

    with fastres.statistics_once(model):
        model.bn2.register_forward_pre_hook(fail)
        with pytest.raises(KeyError, match="in backward"):
            step(model, image(), "train", call=checkpointed(model, reentrant))
    assert all(b is held[name] for name, b in model.named_buffers())
    assert set(counts(model)) == {1}


def test_f5_batch_norms_of_other_kinds_once():
    """Whatever has running statistics of torch.nn: in one, three and no spatial dimensions, of instances, in a
    subclass that binds new tensors."""

    class Binds(nn.BatchNorm2d):
        def forward(self, x):
            self.running_mean = self.running_mean * 0.9 + 0.1 * x.detach().mean((0, 2, 3))
            return super().forward(x)

    model = nn.Sequential(Binds(4), nn.InstanceNorm2d(4, track_running_stats=True), nn.Flatten(2), nn.BatchNorm1d(4))
    plain = copy.deepcopy(model)
    x = image(4)
    assert_same(steps(model, x, checkpointed(model, False), once=True), steps(plain, x))


@pytest.mark.parametrize("fail", [False, True])
def test_f5_snapshot(fail):
    """Everything that happens inside is taken back, in place."""
    model = nn.Sequential(block(stride=2), nn.InstanceNorm2d(16, track_running_stats=True))
    model[0].bn1.num_batches_tracked = None
    fastres.fuse_(model)
    x = image()
    step(model, x, "train")
    before, held = buffers(model), dict(model.named_buffers())
    with pytest.raises(KeyError) if fail else nullcontext(), fastres.snapshot_statistics(model):
        for _ in range(3):
            step(model, 3 * x, "train")
        assert int(model[0].bn2.num_batches_tracked) == 4
        if fail:
            raise KeyError
    for name, b in model.named_buffers():
        assert b is held[name] and torch.equal(b, before[name]), name
    assert_same(step(model, x, "inference"), step(fastres.unfuse_(model), x, "inference"))
