"""Cases D1, D2 and D8: hooks, parametrizations, and children that are converted to something else."""

import copy

import pytest
import torch
from _compare import (
    assert_path,
    assert_same,
    block,
    check,
    check_error,
    image,
    modes,
    network,
    some_kernels,
    step,
    watched,
)
from torch import nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrizations, prune

import fastres

CHILDREN = ("conv1", "bn1", "relu", "bn3", "downsample", "downsample.0", "downsample.1")


@pytest.fixture(autouse=True)
def _kernels():
    with some_kernels():
        yield


def values(args):
    return tuple(a.detach().clone() for a in args if isinstance(a, torch.Tensor))


HOOKS = {
    "forward": lambda m, log: m.register_forward_hook(lambda m, args, y: log.append(values((*args, y)))),
    "forward_kwargs": lambda m, log: m.register_forward_hook(
        lambda m, args, kw, y: log.append(values((*args, y))), with_kwargs=True
    ),
    "forward_always": lambda m, log: m.register_forward_hook(
        lambda m, args, y: log.append(values((*args, y))), always_call=True
    ),
    "forward_pre": lambda m, log: m.register_forward_pre_hook(lambda m, args: log.append(values(args))),
    "forward_changes": lambda m, log: m.register_forward_hook(lambda m, args, y: log.append(values(args)) or y * 0.5),
    "full_backward": lambda m, log: m.register_full_backward_hook(
        lambda m, grads_in, grads_out: log.append(values(grads_out))
    ),
    "full_backward_pre": lambda m, log: m.register_full_backward_pre_hook(
        lambda m, grads_out: log.append(values(grads_out))
    ),
    "backward": lambda m, log: m.register_backward_hook(lambda m, grads_in, grads_out: log.append(values(grads_out))),
}


def assert_same_log(got, want):
    assert len(got) == len(want) > 0
    for g, w in zip(got, want, strict=True):
        for a, b in zip(g, w, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("child", CHILDREN)
def test_d1_hooks_on_children(hook, child):
    """They fire with eager's values, whether they were there before the swap or came after; once gone, all is fast."""
    if child == "bn3" and hook.startswith("full_backward"):
        # `out += identity` does not go with them.
        check_error(block(), image(), after=lambda model: HOOKS[hook](model.bn3, []))
        return
    mode = "train"
    logs, outcomes = [], []
    x = image()
    for when in ("eager", "before", "after"):
        torch.manual_seed(0)
        model = block(stride=2)
        model.relu.inplace = False  # eager refuses to combine backward hooks with what is changed in place
        if when == "after":
            fastres.fuse_(model)
        logs.append([])
        handle = HOOKS[hook](model.get_submodule(child), logs[-1])
        if when == "before":
            fastres.fuse_(model)
        with watched() as seen:
            outcomes.append(step(model, x, mode))
        if when != "eager":
            # A hook on the shortcut leaves the branch on the fast path.
            assert_path(seen, *(("block",) if child.startswith("downsample") else ("eager", "hooks")))
            handle.remove()
            with watched() as seen:
                step(model, x, mode)
            assert_path(seen, "fast")
    for log, outcome in zip(logs[1:], outcomes[1:], strict=True):
        assert_same_log(log, logs[0])
        assert_same(outcome, outcomes[0])


@modes
def test_d1_hooks_on_the_block_itself_keep_it_fast(mode):
    logs, outcomes = [], []
    x = image()
    for fuse in (False, True):
        torch.manual_seed(0)
        model = block(stride=2)
        if fuse:
            fastres.fuse_(model)
        logs.append([])
        (
            HOOKS["forward"](model, logs[-1]),
            HOOKS["forward_pre"](model, logs[-1]),
            HOOKS["full_backward"](model, logs[-1]),
        )
        with watched() as seen:
            outcomes.append(step(model, x, mode))
        if fuse:
            assert_path(seen, "fast")
    assert_same_log(*logs)
    assert_same(*outcomes)


@pytest.mark.parametrize("child", ["conv1", "bn1", "relu", "maxpool", "layer1.0.relu", "layer2", "avgpool", "fc"])
@pytest.mark.parametrize("mode", ["train", "inference"])
def test_d1_hooks_in_a_model(child, mode):
    logs, outcomes = [], []
    x = image(3, size=32)
    for fuse in (False, True):
        torch.manual_seed(0)
        model = network()
        if fuse:
            fastres.fuse_(model)
        logs.append([])
        HOOKS["forward"](model.get_submodule(child), logs[-1])
        outcomes.append(step(model, x, mode))
    assert_same_log(*logs)
    assert_same(*outcomes)


GLOBAL_HOOKS = {
    "forward": lambda log: nn_module.register_module_forward_hook(lambda m, args, y: log.append(m._get_name())),
    "forward_pre": lambda log: nn_module.register_module_forward_pre_hook(lambda m, args: log.append(m._get_name())),
    "full_backward": lambda log: nn_module.register_module_full_backward_hook(
        lambda m, a, b: log.append(m._get_name())
    ),
    "full_backward_pre": lambda log: nn_module.register_module_full_backward_pre_hook(
        lambda m, a: log.append(m._get_name())
    ),
}


@pytest.mark.parametrize("hook", ["full_backward", "full_backward_pre"])
def test_d1_global_backward_hooks_are_eagers_error(hook):
    """Eager refuses `out += identity` under them; the modules of fastres.nn go their plain way."""
    handle = GLOBAL_HOOKS[hook](log := [])
    try:
        error = check_error(block(), image())
        assert "is being modified inplace" in str(error)
        module = fastres.nn.ConvBnAct2d(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16))
        with watched() as seen:
            step(module, image(), "train")
    finally:
        handle.remove()
    assert_path(seen, "eager", "global")
    assert {"Conv2d", "BatchNorm2d"} <= set(log)


@pytest.mark.parametrize("hook", ["forward", "forward_pre"])
def test_d1_global_hooks(hook):
    eager = block(stride=2)
    eager.relu.inplace = False
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    x, logs = image(), ([], [])
    for model, log in zip((eager, fused), logs, strict=True):
        handle = GLOBAL_HOOKS[hook](log)
        try:
            with watched() as seen:
                step(model, x, "train")
        finally:
            handle.remove()
    assert_path(seen, "eager", "global")
    assert logs[0] == logs[1] and len(logs[0]) > 5
    with watched() as seen:
        step(fused, x, "train")
    assert_path(seen, "fast")


PARAMETRIZATIONS = {
    "weight_norm": lambda model: parametrizations.weight_norm(model.conv2),
    "spectral_norm": lambda model: parametrizations.spectral_norm(model.conv2),
    "orthogonal": lambda model: parametrizations.orthogonal(model.conv1),
    "legacy_weight_norm": lambda model: nn.utils.weight_norm(model.conv2),
    "legacy_spectral_norm": lambda model: nn.utils.spectral_norm(model.conv2),
    "prune": lambda model: prune.l1_unstructured(model.conv2, "weight", 0.5),
    "prune_batch_norm": lambda model: prune.random_structured(model.conv3, "weight", 0.3, dim=0),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@modes
@pytest.mark.parametrize("late", [False, True], ids=["before_fuse_", "after_fuse_"])
@pytest.mark.parametrize("how", PARAMETRIZATIONS)
def test_d2_parametrizations(how, late, mode):
    """The weight is made anew at each call from other parameters; an optimizer step in between is seen."""
    outcomes = []
    x = image()
    for fuse in (False, True):
        torch.manual_seed(0)
        model = block(stride=2)
        if fuse and late:
            fastres.fuse_(model)
        PARAMETRIZATIONS[how](model)
        if fuse and not late:
            fastres.fuse_(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        results = [step(model, x, mode)]
        step(model, x, "train")
        optimizer.step()
        results.append(step(model, x, mode))
        outcomes.append(results)
    for got, want in zip(*outcomes, strict=True):
        assert_same(got, want, 1e-4)  # a scale in front of a batch norm has no gradient but rounding


def test_d2_pruned_for_good_is_fast_again():
    model = block()
    fastres.fuse_(model)
    prune.l1_unstructured(model.conv2, "weight", 0.5)
    with watched() as seen:
        step(model, image(), "inference")
    assert_path(seen, "eager", "hooks")
    prune.remove(model.conv2, "weight")
    with watched() as seen:
        got = step(model, x := image(), "inference")
    assert_path(seen, "fast")
    assert_same(got, step(fastres.unfuse_(model), x, "inference"))


def synchronise(model):
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def fold_and_remove(model):
    """As torch.nn.utils.fusion users do: the batch norm is folded for good and an Identity put in its place."""
    for conv, bn in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")):
        setattr(model, conv, nn.utils.fuse_conv_bn_eval(getattr(model, conv).eval(), getattr(model, bn).eval()))
        setattr(model, bn, nn.Identity())
    return model


def freeze(model):
    for name in ("bn1", "bn2", "bn3"):
        setattr(model, name, nn.GroupNorm(2, getattr(model, name).num_features))
    return model


def relu_for_batch_norm(model):
    model.bn2, model.relu.inplace = nn.ReLU(), False
    return model


CONVERSIONS = {
    "fuse_conv_bn_eval": (fold_and_remove, "Identity"),
    "group_norm": (freeze, "GroupNorm"),
    "no_relu": (lambda model: setattr(model, "relu", nn.Identity()) or model, "Identity"),
    "relu_for_batch_norm": (relu_for_batch_norm, "ReLU"),
    "no_convolution": (lambda model: setattr(model, "conv2", nn.Identity()) or model, "Identity"),
    "pool_for_convolution": (lambda model: setattr(model, "conv2", nn.MaxPool2d(3, 1, 1)) or model, "MaxPool2d"),
}


@pytest.mark.parametrize("mode", ["eval", "inference"])
@pytest.mark.parametrize("late", [False, True], ids=["before_fuse_", "after_fuse_"])
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_d8_children_converted(conversion, late, mode):
    """A child of another type in a role: the guard sees it, and the block's original forward runs."""
    convert, reason = CONVERSIONS[conversion]
    model = block()
    if late:
        check(model, image(), mode, after=convert, path="eager", reason=reason)
    else:
        check(convert(model), image(), mode, path="any")  # a unit, with whatever there is to fuse


def test_d8_stem_converted():
    """The same in a ResNet's stem."""
    for convert in (
        lambda model: setattr(model, "bn1", nn.Identity()),
        lambda model: setattr(model, "relu", nn.Identity()),
        lambda model: setattr(model, "maxpool", nn.Identity()),  # the usual change for CIFAR
        lambda model: setattr(model, "maxpool", nn.AvgPool2d(3, 2, 1)),
        lambda model: setattr(model, "bn1", nn.GroupNorm(4, 64)),
    ):
        check(network(), image(3, size=16), "eval", after=convert, path="eager")
        check(network(), image(3, size=16), "inference", after=convert, path="eager")


@pytest.mark.parametrize("mode", ["eval", "inference"])
def test_d8_shortcut_converted(mode):
    """It runs as it is; the branch stays fast."""

    def put(i, module):
        return lambda model: model.downsample.__setitem__(i, module)

    bn = nn.SyncBatchNorm(16)
    for convert in (
        put(1, bn),
        put(1, nn.Identity()),
        put(0, nn.AvgPool2d(1, 2)),
        put(1, nn.ReLU()),
        put(0, nn.MaxPool2d(1, 2)),
    ):
        check(block(stride=2), image(), mode, after=convert, path="block")


@pytest.mark.parametrize("mode", ["eval", "inference"])
@pytest.mark.parametrize("late", [False, True], ids=["before_fuse_", "after_fuse_"])
def test_d8_synchronised(late, mode):
    """SyncBatchNorm in evaluation is a batch norm like any other; in training see test_synchronised.py."""
    model = block()
    if late:
        check(model, image(), mode, after=synchronise, path="fast")
    else:
        check(synchronise(model), image(), mode, path="fast")


def test_d8_convert_back():
    """fuse_ survives the conversion of a whole model: its blocks stay swapped, and run fused with both."""
    model = network()
    fastres.fuse_(model)
    converted = synchronise(model)
    assert converted is model and type(model.layer1[0]).__name__ == "FusedBasicBlock"
    assert any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
    report = fastres.explain(model.eval(), image(3, size=32))
    assert report.fused > 0 and any("SyncBatchNorm" in row.note for row in report.rows)
