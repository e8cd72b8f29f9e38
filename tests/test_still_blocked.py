"""A block that had to run its original forward is quick to find that it still has to; and as quick to notice that it no
longer has to."""

import copy
import gc
import io
import pickle
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn

import fastres
from fastres import guard, observe, snapshot


def nothing(*args):
    """A forward hook."""


def network(name="resnet20"):
    torch.manual_seed(0)
    return fastres.models.__dict__[name](num_classes=3).eval()


X = torch.randn(1, 3, 32, 32)


def fused_modules(model, x=X):
    """The modules that kernels stand for in a call."""
    found = set()
    with observe.recording(lambda modules, *kernel: found.update(modules)), torch.no_grad():
        model(x)
    return found


#: Every kind of block, plain and in both versions.
@pytest.fixture(params=["resnet20", "resnet20_v2", "plain20", "resnet50"])
def refused(request):
    """A model, a block of it that had to run its original forward, and what undoes the reason."""
    model = network(request.param)
    fastres.fuse_(model)
    block = model.layer2[0]
    handle = block.conv2.register_forward_hook(nothing)
    for _ in range(3):
        fused = fused_modules(model)
        assert not fused & {block.conv1, block.bn1, block.conv2, block.bn2}
        assert model.layer3[0].conv1 in fused
    assert guard.still_blocked(block) and not guard.still_blocked(model.layer3[0])
    return model, block, handle


def fuses_again(model, block):
    return not guard.still_blocked(block) and block.conv2 in fused_modules(model)


def test_a_hook_that_is_removed(refused):
    model, block, handle = refused
    handle.remove()
    assert fuses_again(model, block)


def test_a_dictionary_of_hooks_that_is_emptied_or_replaced(refused):
    model, block, _ = refused
    block.conv2._forward_hooks.clear()
    assert fuses_again(model, block)
    block.conv2.register_forward_hook(nothing)
    assert not fuses_again(model, block) and guard.still_blocked(block)
    block.conv2._forward_hooks = OrderedDict()
    assert fuses_again(model, block)


def test_a_child_that_is_replaced(refused):
    model, block, _ = refused
    plain = nn.Conv2d.__new__(nn.Conv2d)
    plain.__dict__.update(block.conv2.__dict__, _forward_hooks=OrderedDict())
    block.conv2 = plain
    assert fuses_again(model, block)


def test_a_second_hook_that_stays(refused):
    model, block, handle = refused
    other = block.conv1.register_forward_pre_hook(nothing)
    handle.remove()
    assert block.conv1 not in fused_modules(model) and guard.still_blocked(block)
    other.remove()
    assert fuses_again(model, block)


def test_two_hooks_on_one_child(refused):
    """Not remembered, as their order is not compared; refused all the same."""
    model, block, handle = refused
    other = block.conv2.register_forward_hook(nothing)
    for _ in range(2):
        assert block.conv2 not in fused_modules(model)
    handle.remove()
    assert block.conv2 not in fused_modules(model)
    other.remove()
    assert fuses_again(model, block)


def test_a_hook_sees_every_call_and_numbers_are_eagers(refused):
    model, block, handle = refused
    handle.remove()
    outputs = []
    block.conv2.register_forward_hook(lambda module, args, y: outputs.append(y))
    plain = copy.deepcopy(model)
    plain.layer2[0].conv2._forward_hooks.clear()
    fastres.unfuse_(plain)
    with torch.no_grad():
        for count in range(1, 5):
            torch.testing.assert_close(model(X), plain(X), rtol=1e-4, atol=1e-5)
            assert len(outputs) == count


def test_the_first_reason_is_told(refused):
    model, block, _ = refused
    block.conv1.register_forward_hook(nothing)
    report = fastres.explain(model, X)
    reasons = {row.reason for row in report.rows if row.name.startswith("layer2.0") and row.reason}
    assert any("hooks on conv1" in reason for reason in reasons), reasons


def test_modes(refused):
    model, block, handle = refused
    for training in (True, False, True):
        model.train(training)
        for _ in range(2):
            assert block.conv2 not in fused_modules(model, X.repeat(2, 1, 1, 1))
    handle.remove()
    assert fuses_again(model.eval(), block)


def test_copies_do_not_inherit_it(refused):
    model, block, _ = refused
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin = other.layer2[0]
        assert not guard.still_blocked(twin)
        assert twin.conv2 not in fused_modules(other) and guard.still_blocked(twin)
        twin.conv2._forward_hooks.clear()
        assert fuses_again(other, twin)
    assert guard.still_blocked(block)
    kept = io.BytesIO()
    torch.save(model.state_dict(), kept)
    fused_modules(model)
    again = io.BytesIO()
    torch.save(model.state_dict(), again)
    assert kept.getvalue() == again.getvalue()


def test_it_keeps_no_block_alive(refused):
    model, *_ = refused
    model = copy.deepcopy(model)  # the fixture holds the first
    twin = model.layer2[0]
    fused_modules(model)
    gone = weakref.ref(twin), weakref.ref(twin.conv2), weakref.ref(model)
    del model, twin
    gc.collect()
    assert [ref() for ref in gone] == [None, None, None]


def test_another_type_of_child():
    class Other(nn.Conv2d):
        pass

    model = network()
    fastres.fuse_(model)
    block = model.layer1[1]
    block.conv1.__class__ = Other
    for _ in range(2):
        assert block.conv1 not in fused_modules(model) and guard.still_blocked(block)
    block.conv1.__class__ = nn.Conv2d
    assert not guard.still_blocked(block) and block.conv1 in fused_modules(model)


def test_under_compile():
    model = network()
    fastres.fuse_(model)
    block = model.layer2[0]
    handle = block.conv2.register_forward_hook(nothing)
    fused_modules(model)
    assert guard.still_blocked(block)
    compiled, x = torch.compile(block, backend="eager", fullgraph=True), torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-5)
        handle.remove()
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("same", [snapshot._same, snapshot._same_in_python])
def test_what_is_compared(same, monkeypatch):
    monkeypatch.setattr(snapshot, "_same", same)
    module, one, two = nn.Conv2d(1, 1, 1), object(), object()

    def changed(view, change, modules=(module,)):
        holds = snapshot.unchanged(modules, (view, {}))
        assert holds()
        change()
        return not holds()

    view = {"a": one, "b": two}
    assert changed(view, lambda: view.update(c=one))
    assert changed(view, lambda: view.pop("c"))
    assert changed(view, lambda: view.update(a=two))
    assert not changed(view, lambda: view.update(a=two))
    assert changed(view, lambda: view.update(a=view.pop("a")))  # another order
    hooks = OrderedDict({1: one})
    assert changed(hooks, lambda: hooks.update({1: two}))
    hooks[2] = two
    assert not snapshot.unchanged((), (hooks,))()
    assert changed({}, lambda: setattr(module, "__class__", nn.Conv1d))
    assert changed({}, lambda: setattr(module, "__dict__", dict(module.__dict__)))
