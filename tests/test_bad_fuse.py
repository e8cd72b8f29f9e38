"""fuse_ and explain that fail: an error of a fitting type, and the model as it was."""

import pytest
import torch
from _compare import (
    batch_norms,
    block,
    check,
    image,
    modes,
    network,
    some_kernels,
)
from torch import nn

import fastres
from fastres import fuse, guard, recipes
from fastres.nn import ConvBnAct2d


@pytest.fixture(autouse=True)
def _kernels():
    with some_kernels():
        yield


def fails(function, *args, **options):
    with pytest.raises(Exception) as info:
        function(*args, **options)
    return info.value


def test_modules_that_do_not_fit():
    error = fails(ConvBnAct2d, nn.Conv2d(4, 8, 3), nn.BatchNorm2d(4))
    assert type(error) is ValueError and "8" in str(error) and "4" in str(error)


def test_kernel_that_does_not_exist():
    error = fails(fastres.use_kernels("warp").__enter__)
    assert type(error) is ValueError and "reference" in str(error)


@pytest.mark.parametrize(
    "model", [None, 3, "resnet50", block, nn.Module, [nn.Conv2d(1, 1, 1)], {}], ids=lambda m: str(m)[:20]
)
def test_fuse_something_else(model):
    assert type(fails(fastres.fuse_, model)) is TypeError


def state_of(model):
    return [(name, id(m), type(m), sorted(m.__dict__)) for name, m in model.named_modules()], [
        (name, id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()
    ]


def assert_untouched(model, before):
    modules, tensors = state_of(model)
    assert modules == before[0]
    for (name, identity, t), (name_before, identity_before, t_before) in zip(tensors, before[1], strict=True):
        assert (name, identity) == (name_before, identity_before) and torch.equal(t, t_before)


def test_fuse_that_fails_while_it_looks(monkeypatch):
    """For one recipe that cannot be imported, say: the model is as it was, and can be fused later."""
    model = nn.Sequential(network(), block())
    before = state_of(model)
    calls = []
    real = recipes.fused_class

    def broken(cls):
        calls.append(cls)
        if len(calls) == 30:
            raise ImportError("no such recipe")
        return real(cls)

    with monkeypatch.context() as patch:
        patch.setattr(fuse, "fused_class", broken)
        assert type(fails(fastres.fuse_, model)) is ImportError
    assert_untouched(model, before)
    assert fastres.fuse_(model).fused > 0


def test_fuse_that_fails_half_way(monkeypatch):
    """The third class swap is refused by Python (another object layout): the first two are taken back."""
    model = nn.Sequential(network(), block())
    before = state_of(model)
    real = fuse.plan

    class OtherLayout(nn.Module):
        __slots__ = ("more",)

    def plan(model):
        found = real(model)
        assert len(found.swaps) > 3
        found.swaps[2] = (found.swaps[2][0], OtherLayout)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(fuse, "plan", plan)
        assert type(fails(fastres.fuse_, model)) is TypeError
    assert_untouched(model, before)
    assert fastres.fuse_(model).fused > 0


def test_fuse_that_is_interrupted(monkeypatch):
    model = nn.Sequential(network(), block())
    before = state_of(model)

    def interrupt(role, child):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(guard, "child_blocked", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fastres.fuse_(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("x", ["rank", "channels", "dtype"])
def test_explain_that_fails_changes_nothing(x):
    """It runs in training mode here: statistics and counters go back although the forward raises."""
    model = network().train()
    fastres.fuse_(model)
    model.layer2[0].conv2 = (
        nn.Conv2d(128, 128, 3, padding=1, dtype=torch.float64) if x == "dtype" else model.layer2[0].conv2
    )
    before = state_of(model)
    given = {"rank": image(3, size=32)[0], "channels": image(4, size=32), "dtype": image(3, size=32)}[x]
    assert isinstance(fails(fastres.explain, model, given), (RuntimeError, ValueError))
    assert_untouched(model, before)
    assert all(int(bn.num_batches_tracked) == 0 for bn in batch_norms(model))


@modes
def test_a_model_works_after_an_error(mode):
    """Errors leave nothing behind: the next call is right."""
    check(block(stride=2), image(), mode, after=lambda model: [fails(model, image(12)), fails(model, image()[0])])
