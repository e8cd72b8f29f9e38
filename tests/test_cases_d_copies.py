"""Cases D3 to D7 and D9 to D11: copies, pickles, checkpoints, optimizers, averages, un-swapping, printing."""

import copy
import io
import pickle
import re
import sys
from contextlib import ExitStack

import pytest
import torch
from _compare import (
    assert_path,
    assert_same,
    batch_norms,
    block,
    buffers,
    image,
    kept,
    kinds,
    libraries,
    modes,
    network,
    resnet,
    set_mode,
    some_kernels,
    step,
    watched,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastres
from fastres.kernels import extension


@pytest.fixture(autouse=True)
def _kernels():
    with some_kernels():
        yield


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@libraries
@kinds
@pytest.mark.parametrize("how", [copy.deepcopy, pickled, saved], ids=["deepcopy", "pickle", "torch.save"])
def test_d3_copies(library, kind, how):
    """A copy is swapped and independent: neither's weights, statistics nor folded weights reach the other."""
    model = block(library, kind, stride=2)
    fastres.fuse_(model)
    x = image()
    want = step(model, x, "inference")
    copied = how(model)
    assert type(copied) is type(model)
    with watched() as seen:
        assert_same(step(copied, x, "inference"), want)
    assert_path(seen, "fast")
    with torch.no_grad():
        copied.conv1.weight.mul_(-1.5)
        copied.bn2.running_mean.add_(1.0)
    assert_same(step(model, x, "inference"), want)
    eager = fastres.unfuse_(how(copied))
    assert_same(step(copied, x, "inference"), step(eager, x, "inference"))


@libraries
def test_d3_pickles_carry_no_folded_weights(library):
    model = block(library)
    fastres.fuse_(model)
    size = len(pickle.dumps(model))
    step(model, image(), "inference")
    assert len(pickle.dumps(model)) <= size + 64


@libraries
def test_d3_without_fastres_the_error_names_it(library, monkeypatch):
    model = block(library)
    fastres.fuse_(model)
    data = pickle.dumps(model)
    for name in [name for name in sys.modules if name.partition(".")[0] == "fastres"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [])
    with pytest.raises(ModuleNotFoundError, match="fastres"):
        pickle.loads(data)


@libraries
def test_d4_state_dict(library):
    model = network(library)
    before = model.state_dict()
    fused = copy.deepcopy(model)
    fastres.fuse_(fused)
    after = fused.state_dict()
    assert list(after) == list(before)
    for name, t in before.items():
        assert after[name].shape == t.shape and after[name].dtype is t.dtype and torch.equal(after[name], t)
    assert after._metadata == before._metadata


@libraries
@pytest.mark.parametrize("assign", [False, True])
def test_d4_loading_both_ways(library, assign):
    eager, fused = network(library), network(library)
    fastres.fuse_(fused)
    x = image(3, size=32)
    step(fused, x, "inference")
    state = {name: t.clone() for name, t in eager.state_dict().items()}
    assert not any(fused.load_state_dict(state, strict=True, assign=assign))
    if assign:
        assert fused.conv1.weight.data_ptr() == state["conv1.weight"].data_ptr()
    with watched() as seen:
        assert_same(step(fused, x, "inference"), step(eager, x, "inference"))
    assert_path(seen, "fast")
    step(fused, x, "train")
    assert not any(eager.load_state_dict(fused.state_dict(), strict=True, assign=assign))
    assert_same(step(fused, x, "inference"), step(eager, x, "inference"))


@libraries
def test_d4_checkpoint_file(library, tmp_path):
    fused, eager = network(library), network(library)
    fastres.fuse_(fused)
    torch.save(fused.state_dict(), tmp_path / "model.pth")
    eager.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True), strict=True)
    x = image(3, size=32)
    assert_same(step(fused, x, "inference"), step(eager, x, "inference"))


@libraries
def test_d5_parameters(library):
    model = network(library)
    before = [(name, id(p)) for name, p in model.named_parameters()] + [
        (name, id(b)) for name, b in model.named_buffers()
    ]
    for change in (fastres.fuse_, fastres.unfuse_):
        change(model)
        after = [(name, id(p)) for name, p in model.named_parameters()] + [
            (name, id(b)) for name, b in model.named_buffers()
        ]
        assert after == before


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "sgd_foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_d5_optimizer(optimizer, when):
    """Made before or after the swap, with layer decay by name: training goes the same way."""
    models = []
    images = [image() for _ in range(3)]
    for fuse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(block(), block(stride=2))
        if fuse and when == "after":
            fastres.fuse_(model)
        groups = [{"params": [p], "lr": 0.01 * (1 + i % 3)} for i, p in enumerate(model.parameters())]
        made = OPTIMIZERS[optimizer](groups)
        if fuse and when == "before":
            fastres.fuse_(model)
        for x in images:
            step(model, x, "train")
            made.step()
        models.append(model)
    assert_same(step(models[1], images[0], "inference"), step(models[0], images[0], "inference"), 1e-3)


@libraries
def test_d6_averages(library):
    """AveragedModel and update_bn look for batch norms by isinstance, and reset and re-estimate their statistics."""
    results = []
    images = [image(3, size=32) for _ in range(2)]
    for fuse in (False, True):
        torch.manual_seed(0)
        model = network(library)
        if fuse:
            fastres.fuse_(model)
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for x in images:
            step(average, x, "inference")  # folds weights that the next update changes
            step(model, x, "train")
            optimizer.step()
            average.update_parameters(model)
        torch.optim.swa_utils.update_bn(images, average)
        assert len(batch_norms(average)) == len(batch_norms(model)) > 0
        results.append(step(average, images[0], "inference") | buffers(average))
    assert_same(results[1], results[0], 1e-4)


@libraries
@modes
def test_d7_functional_call(library, mode):
    """Parameters and buffers are read through the modules' attributes at call time, in eval too."""
    eager = network(library)
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    x = image(3, size=32)
    step(fused, x, "inference")
    state = {name: t.detach() * 1.25 if t.is_floating_point() else t.clone() for name, t in eager.state_dict().items()}
    outcomes = []
    for model in (fused, eager):
        given = {name: t.clone() for name, t in state.items()}
        with watched() as seen, torch.set_grad_enabled(mode != "inference"):
            y = torch.func.functional_call(set_mode(model, mode), given, (x,))
        if model is fused:
            assert_path(seen, "fast")
        outcomes.append({"y": y} | given)
    assert_same(*outcomes)
    assert_same(step(fused, x, "inference"), step(eager, x, "inference"))


def test_d7_stacked_modules():
    """vmap over stack_module_state: the eager path for wrapped tensors."""
    models = [block(kind="BasicBlock").eval() for _ in range(3)]
    x = image()
    want = torch.stack([model(x) for model in models])
    for model in models:
        fastres.fuse_(model)
    parameters, statistics = torch.func.stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")

    def call(p, b):
        return torch.func.functional_call(skeleton, (p, b), (x,))

    with watched() as seen:
        got = torch.func.vmap(call)(parameters, statistics)
    assert_path(seen, "eager", "transform|func")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@libraries
@kinds
def test_d9_unswap(library, kind):
    model = nn.Sequential(block(library, kind, stride=2), block(library, kind))
    x = image()
    classes = [type(m) for m in model.modules()]
    state = pickle.dumps([(k, v.numpy().tobytes()) for k, v in model.state_dict().items()])
    attributes = [sorted(m.__dict__) for m in model.modules()]
    before = {mode: step(copy.deepcopy(model), x, mode) for mode in ("train", "eval", "inference")}
    fastres.fuse_(model)
    with torch.no_grad():
        model.eval()(x)
    assert fastres.unfuse_(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert [sorted(m.__dict__) for m in model.modules()] == attributes
    assert pickle.dumps([(k, v.numpy().tobytes()) for k, v in model.state_dict().items()]) == state
    assert not any(kept(m) for m in model.modules())
    for mode, want in before.items():
        got = step(copy.deepcopy(model), x, mode)
        assert all(w is None or torch.equal(got[name], w) for name, w in want.items())
    assert fastres.unfuse_(model) is model


def test_d9_disabled():
    model = block()
    fastres.fuse_(model)
    fused = type(model)
    with pytest.raises(KeyError, match="inside"), fastres.disabled(model) as plain:
        with watched() as seen:
            plain(image())
        assert not seen and type(model) is resnet("fastres").Bottleneck
        raise KeyError("inside")
    assert type(model) is fused


@libraries
def test_d10_tree_and_repr(library):
    model = network(library)
    before = repr(model), [name for name, _ in model.named_modules()], [name for name, _ in model.named_children()]
    fastres.fuse_(model)
    assert (
        repr(model),
        [name for name, _ in model.named_modules()],
        [name for name, _ in model.named_children()],
    ) == before


@modes
@pytest.mark.parametrize("library", ["fastres"])
def test_d10_flop_counter(library, mode):
    """The counter sees the custom ops: forward and backward count as many FLOPs as eager does."""
    counts = []
    x = image(3, size=32)
    for fuse in (False, True):
        torch.manual_seed(0)
        model = set_mode(network(library), mode)
        if fuse:
            fastres.fuse_(model)
        with ExitStack() as stack:
            counter = stack.enter_context(FlopCounterMode(display=False))
            stack.enter_context(torch.set_grad_enabled(mode != "inference"))
            y = model(x)
            if y.requires_grad:
                y.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[1] == counts[0] > 0


@libraries
@kinds
def test_d11_types_and_names(library, kind):
    base = getattr(resnet(library), kind)
    model = nn.Sequential(block(library, kind))
    fastres.fuse_(model)
    inner = model[0]
    assert isinstance(inner, base) and issubclass(type(inner), base)
    assert inner._get_name() == kind
    assert re.fullmatch(rf"fastres\.recipes\.\w+\.Fused{kind}", f"{type(inner).__module__}.{type(inner).__qualname__}")
    assert base.__qualname__ == kind


@libraries
def test_d11_wrap_policy(library):
    """FSDP's ModuleWrapPolicy asks isinstance."""
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    model = network(library)
    policy = ModuleWrapPolicy({resnet(library).BasicBlock})
    before = len(policy._run_policy(model, set(), {}))
    fastres.fuse_(model)
    assert len(policy._run_policy(model, set(), {})) == before == 2


@pytest.mark.skipif(
    not extension.available(), reason=f"folded weights are kept for the compiled kernels only: {extension.load_error()}"
)
def test_d3_deepcopy_drops_folded_weights():
    model = block()
    fastres.fuse_(model)
    step(model, image(), "inference")
    copied = copy.deepcopy(model)
    assert kept(model.conv1) is not None and kept(copied.conv1) is None
