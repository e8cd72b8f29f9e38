"""Inference is replayed from the third like call on, gives the same bits, and ends with whatever changes."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.utils.prune
from _changes import CHANGES, conv2
from _compare import assert_same_in_threads, image, network
from torch import nn

import fastres
from fastres import replay
from fastres.kernels import extension

pytestmark = pytest.mark.skipif(
    not extension.available(), reason=f"only the compiled kernels are replayed: {extension.load_error()}"
)


def infer(model, x):
    with torch.no_grad():
        return model(x)


def is_replayed(model):
    return isinstance(replay._replays.get(model), replay._Replay)


@pytest.fixture
def pair():
    """An eager model, and the same fused and replayed; an image."""
    eager, x = network().eval(), image(3, size=32)
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    for _ in range(2):
        infer(fused, x)
    assert is_replayed(fused)
    return eager, fused, x


def assert_same(eager, fused, x):
    torch.testing.assert_close(infer(fused, x), infer(eager, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [32, 57, 64])
@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "contiguous"])
def test_same_bits(order, size):
    model, x = fastres.models.resnet18(num_classes=7).eval().to(memory_format=order), image(3, size=size, order=order)
    fastres.fuse_(model)
    results = [infer(model, x) for _ in range(4)]
    assert is_replayed(model)
    assert all(torch.equal(y, results[0]) and y.stride() == results[0].stride() for y in results)
    other = torch.randn_like(x)
    replayed = infer(model, other)
    fastres.refresh_(model)
    assert not is_replayed(model)
    assert torch.equal(replayed, infer(model, other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, x = network().eval().to(dtype), image(3, size=32).to(dtype)
    fastres.fuse_(model)
    results = [infer(model, x) for _ in range(3)]
    assert is_replayed(model) and results[2].dtype is dtype and torch.equal(results[0], results[2])


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights(pair, change):
    eager, fused, x = pair
    before = infer(fused, x)
    for model in (eager, fused):
        CHANGES[change](model)
        model.eval()
    assert not torch.allclose(before, infer(eager, x), rtol=1e-3), "the change is too small to be seen"
    for _ in range(4):
        assert_same(eager, fused, x)


@pytest.mark.parametrize("inference", [True, False], ids=["inference_tensors", "tensors"])
def test_weights_made_in_inference_mode(inference):
    """They have no version counters."""
    with torch.inference_mode(inference):
        eager, x = network().eval(), image(3, size=32)
        fused = copy.deepcopy(eager)
        fastres.fuse_(fused)
        for step in range(6):
            assert_same(eager, fused, x)
            if step == 3:
                assert is_replayed(fused)
                for model in (eager, fused):
                    conv2(model).weight.data.mul_(1.5)


def hook(module, *args):
    hook.calls += 1


def add_block(model):
    model.layer1.append(copy.deepcopy(model.layer1[0]))


def swap_blocks(model):
    torch.manual_seed(2)
    model.layer1[0].conv2 = nn.Conv2d(64, 64, 3, padding=1, bias=False)


def patch_call(monkeypatch):
    original = nn.Module.__call__
    monkeypatch.setattr(
        nn.Module, "__call__", lambda self, *args, **kwargs: (hook(self), original(self, *args, **kwargs))[1]
    )


#: Each makes the model call `hook`, which a replay would leave out.
SEEN = {
    "hook on a convolution": lambda m: conv2(m).register_forward_hook(hook),
    "hook before a batch norm": lambda m: m.layer1[0].bn2.register_forward_pre_hook(hook),
    "hook on an activation": lambda m: m.layer1[0].relu.register_forward_hook(hook),
    "hook on a block": lambda m: m.layer1[0].register_forward_hook(hook),
    "hook before a layer": lambda m: m.layer2.register_forward_pre_hook(hook),
    "hook on the shortcut": lambda m: m.layer2[0].downsample.register_forward_hook(hook),
    "hook on the stem": lambda m: m.conv1.register_forward_hook(hook),
    "global hook": lambda m: nn.modules.module.register_module_forward_hook(hook),
}


@pytest.mark.parametrize("change", SEEN)
def test_hooks_added_later(pair, change):
    eager, fused, x = pair
    handle, hook.calls = SEEN[change](fused), 0
    assert_same(eager, fused, x)
    assert hook.calls > 0
    handle.remove()
    for _ in range(4):
        assert_same(eager, fused, x)
    assert is_replayed(fused)


def test_hooks_that_were_there_before():
    eager, x = network().eval(), image(3, size=32)
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    fused.layer2.register_forward_hook(hook)
    hook.calls = 0
    for _ in range(4):
        assert_same(eager, fused, x)
    assert hook.calls == 4 and not is_replayed(fused)


def test_patched_call(pair, monkeypatch):
    eager, fused, x = pair
    patch_call(monkeypatch)
    hook.calls = 0
    infer(fused, x)
    assert hook.calls > 5


def doubled_forward(module):
    module.forward = lambda x, forward=module.forward: 2 * forward(x)


class Doubled(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


#: Applied to the eager and the fused model.
STRUCTURE = {
    "a block more": add_block,
    "a block less": lambda m: setattr(m, "layer1", nn.Sequential()),
    "another convolution": swap_blocks,
    "forward of a layer": lambda m: doubled_forward(m.layer2),
    "forward of a block": lambda m: doubled_forward(m.layer1[0]),
    "class of a layer": lambda m: setattr(m.layer2, "__class__", Doubled),
    "batch norm in training mode": lambda m: m.layer1[0].bn1.train(),
    "pruned": lambda m: nn.utils.prune.l1_unstructured(conv2(m), "weight", 0.5),
    "parametrized": lambda m: nn.utils.parametrizations.weight_norm(conv2(m)),
    "no shortcut": lambda m: setattr(m.layer1[0], "downsample", nn.Sequential()),
    "momentum": lambda m: setattr(m.layer1[0].bn1, "momentum", 0.5),
    "pooling": lambda m: setattr(m.maxpool, "stride", 1),
    "activation": lambda m: setattr(m.layer1[0], "relu", nn.Hardtanh()),
    "dictionary of attributes": lambda m: conv2(m).__dict__.update(padding=(2, 2), dilation=(2, 2)),
    "new dictionary of attributes": lambda m: setattr(
        conv2(m), "__dict__", {**conv2(m).__dict__, "padding": (2, 2), "dilation": (2, 2)}
    ),
    "float64": lambda m: m.double(),
    "sync batch norm": lambda m: setattr(m, "layer1", nn.SyncBatchNorm.convert_sync_batchnorm(m.layer1)),
}


@pytest.mark.parametrize("change", STRUCTURE)
def test_changed_structure(pair, change):
    eager, fused, x = pair
    for model in (eager, fused):
        STRUCTURE[change](model)
    x = x.to(next(eager.parameters()).dtype)
    for _ in range(4):
        assert_same(eager, fused, x)


def test_changed_class(pair, monkeypatch):
    eager, fused, x = pair
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: torch.relu(x) * 2)
    for _ in range(3):
        assert_same(eager, fused, x)


def test_other_inputs(pair):
    eager, fused, x = pair
    for other in (
        image(3, size=48),
        x[:1],
        x.contiguous(),
        x.expand(3, -1, -1, -1) if len(x) == 1 else x[:, :, ::2],
        x[:0],
        nn.Parameter(x),
        x,
    ):
        for _ in range(3):
            assert_same(eager, fused, other)


def test_other_settings(pair, monkeypatch):
    eager, fused, x = pair
    replayed = infer(fused, x)
    with fastres.use_kernels("reference"):
        assert not torch.equal(infer(fused, x), replayed)
    with fastres.disabled(fused):
        assert_same(eager, fused, x)
    monkeypatch.setattr(fastres.config, "winograd", False)
    direct = infer(fused, x)
    assert not torch.equal(direct, replayed)
    monkeypatch.setattr(fastres.config, "keep_folded_weights", False)
    assert_same(eager, fused, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert infer(fused, x).dtype is infer(eager, x).dtype
    monkeypatch.undo()
    assert torch.equal(infer(fused, x), replayed)


def test_gradients_are_not_replayed(pair):
    eager, fused, x = pair
    for model in (eager, fused):
        model(x).square().sum().backward()
    for a, b in zip(fused.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3 * float(b.grad.abs().max()))


def test_compile_and_explain(pair):
    eager, fused, x = pair
    torch.testing.assert_close(infer(torch.compile(fused, backend="eager", fullgraph=True), x), infer(eager, x))
    report = fastres.explain(fused, x)
    assert is_replayed(fused)
    fastres.refresh_(fused)
    assert report.rows == fastres.explain(fused, x).rows


def test_model_is_freed(pair):
    _, fused, x = pair
    gone = weakref.ref(fused)
    before = len(replay._replays)
    del fused, pair
    gc.collect()
    assert gone() is None or len(replay._replays) <= before


def test_copies_start_anew(pair):
    eager, fused, x = pair
    twin = copy.deepcopy(fused)
    assert not is_replayed(twin)
    conv2(twin).weight.data.mul_(2)
    conv2(eager).weight.data.mul_(2)
    for _ in range(3):
        assert_same(eager, twin, x)


def test_keeps_no_activations(pair):
    _, fused, x = pair
    seen = []
    y = infer(fused, x)
    seen.append(weakref.ref(y))
    del y
    assert seen[0]() is None
    x = x.clone()
    alive = weakref.ref(x)
    infer(fused, x)
    del x
    assert alive() is None


def test_threads(pair):
    eager, fused, x = pair
    assert_same_in_threads(eager, fused, x)


def test_limit_of_packed_weights(pair, monkeypatch):
    eager, fused, x = pair
    everything = fastres.packed_bytes(fused)
    convs = [m for m in fused.modules() if isinstance(m, nn.Conv2d)]
    assert everything > sum(conv.weight.nbytes for conv in convs) and everything <= fastres.packed_bytes()
    fastres.refresh_(fused)
    others = fastres.packed_bytes()
    assert fastres.packed_bytes(fused) == 0
    for room in (0, everything // 2, everything - 4, everything):
        monkeypatch.setattr(fastres.config, "max_packed_bytes", others + room)
        for _ in range(3):
            assert_same(eager, fused, x)
        assert fastres.packed_bytes(fused) <= room
        assert is_replayed(fused) == (room == everything)
        assert (fastres.packed_bytes(fused) > 0) == (room > 0)
        fastres.refresh_(fused)
