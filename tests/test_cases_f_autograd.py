"""Cases F1 to F4, F6, F11 to F13: which gradients, how often, of which order, under which hooks and casts."""

import copy
import itertools

import pytest
import torch
from _compare import (
    KINDS,
    assert_parity,
    assert_path,
    assert_same,
    batch_norms,
    block,
    buffers,
    image,
    kinds,
    set_mode,
    some_kernels,
    step,
    watched,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import fastres
from fastres.testing import relative_error


@pytest.fixture(autouse=True)
def _kernels():
    with some_kernels():
        yield


@pytest.fixture(params=KINDS)
def models(request):
    """A block with a projection, eager and fused."""
    eager = block(kind=request.param, stride=2)
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    return eager, fused


class Calls(TorchDispatchMode):
    """The calls of the ops of fastres, by name, and of ATen ops that read a value back to the host."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func.name(), func._schema, args))
        return func(*args, **(kwargs or {}))

    def asked_for(self):
        """What the backward ops were told to compute: names of their arguments `need_...`."""
        return {
            argument.name
            for name, schema, args in self.calls
            if name.startswith("fastres::") and "backward" in name
            for argument, value in zip(schema.arguments, args, strict=False)
            if argument.name.startswith("need_") and value
        }


#: The only leaves with gradients, and what backward has to compute for them.
WANTED = {
    "x": ({"need_x", "need_residual"}, lambda model: []),
    "conv1": ({"need_x", "need_conv_weight"}, lambda model: [model.conv1.weight]),
    "bn2": ({"need_affine", "need_x"}, lambda model: [*model.bn2.parameters()]),
    "the last bn": ({"need_affine"}, lambda model: [*batch_norms(model)[-2].parameters()]),
    "the shortcut": ({"need_residual", "need_conv_weight", "need_affine"}, lambda m: [*m.downsample.parameters()]),
    "nothing": (set(), lambda model: []),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("wanted", WANTED)
def test_f1_only_some_gradients(models, wanted, mode):
    """None for the rest, as in eager, and no gradient is computed that nobody wants."""
    x, outcomes = image(), []
    for model in models:
        set_mode(model, mode).requires_grad_(False)
        for p in WANTED[wanted][1](model):
            p.requires_grad_()
        leaf = x.clone().requires_grad_(wanted == "x")
        with watched() as seen, Calls() as calls:
            y = model(leaf)
            if wanted != "nothing":
                y.backward(torch.ones_like(y))
        outcome = {"y": y, "x.grad": leaf.grad}
        outcomes.append(outcome | {f"{name}.grad": p.grad for name, p in model.named_parameters()} | buffers(model))
    assert_path(seen, "fast")
    assert_same(*outcomes[::-1])
    asked = calls.asked_for()
    assert asked <= WANTED[wanted][0], asked
    if wanted in ("x", "nothing", "bn2", "the last bn"):
        assert not any("weight" in name for name in asked)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_f2_backward_twice(models, mode):
    """What is saved survives the first backward, bit for bit."""
    _, fused = models
    set_mode(fused, mode)
    x = image().requires_grad_()
    y = fused(x)
    leaves = [x, *fused.parameters()]
    weights = torch.randn_like(y)
    first = [g.clone() for g in torch.autograd.grad(y, leaves, weights, retain_graph=True)]
    others = [torch.full_like(x, 7.0) for _ in range(4)]  # what was freed, if anything was, is overwritten
    again = torch.autograd.grad(y, leaves, weights, retain_graph=True)
    assert all(map(torch.equal, first, again)) and len(others) == 4
    torch.autograd.backward(y, weights)
    assert torch.equal(x.grad, first[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, leaves, weights)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_f3_second_order(models, mode):
    """A gradient penalty: gradients of gradients against eager's in float64."""
    eager, fused = models

    def penalty(model, x):
        set_mode(model, mode)
        x = x.clone().requires_grad_()
        y = model(x)
        leaves = [x, *model.parameters()]
        grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    x = image()
    truth = penalty(copy.deepcopy(eager).double(), x.double())
    want = penalty(copy.deepcopy(eager), x)
    with watched() as seen:
        got = penalty(fused, x)
    assert_path(seen, "fast")
    for g, w, t in zip(got, want, truth, strict=True):
        assert relative_error(g, t) <= max(4 * relative_error(w, t), 1e-4)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("hooks", ["offload", "own"])
def test_f4_saved_tensor_hooks(models, hooks, mode):
    """What is saved goes through the hooks, and comes back as other tensors."""
    fused, plain = copy.deepcopy(models[1]), models[1]
    x, packed = image(), []

    def pack(t):
        packed.append(t.shape)
        return t.detach().numpy().copy(order="K")

    own = torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy)
    with watched() as seen, own if hooks == "own" else torch.autograd.graph.save_on_cpu():
        got = step(fused, x, mode)
    assert_path(seen, "fast")
    assert_same(got, step(plain, x, mode), 1e-6)
    assert len(packed) > 5 or hooks == "offload"


@kinds
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_f4_checkpoint(kind, reentrant, mode):
    """The recomputation saves the same tensors, which PyTorch checks; with dropout behind it, from the same state."""
    model = nn.Sequential(block(kind=kind, stride=2), nn.Dropout(0.3), block(kind=kind))
    x, results = image(), []
    for fuse, wrap in itertools.product((False, True), repeat=2):
        m = copy.deepcopy(model)
        if fuse:
            fastres.fuse_(m)
        torch.manual_seed(3)
        with fastres.statistics_once(m):
            call = (lambda x, m=m: checkpoint(m, x, use_reentrant=reentrant)) if wrap else None
            results.append(step(m, x, mode, call=call))
    for other in results[1:]:
        assert_same(other, results[0])


def test_f4_selective_checkpoint():
    """The ops have names that a policy can save: only the rest is computed again."""
    plain = block(kind="BasicBlock")
    fastres.fuse_(plain)
    kept = copy.deepcopy(plain)
    x = image()
    ops = [torch.ops.fastres.conv_bn_act.default]

    def call(x):
        contexts = lambda: create_selective_checkpoint_contexts(ops)  # noqa: E731
        return checkpoint(kept, x, use_reentrant=False, context_fn=contexts)

    with fastres.statistics_once(kept):
        got = step(kept, x, "train", call=call)
    assert_same(got, step(plain, x, "train"))


def test_f6_input_changed_after_forward(models):
    """PyTorch's error about versions, for inputs and for weights."""
    for change in ("x", "weight", "affine"):
        errors = []
        for model in models:
            model = copy.deepcopy(model).train()
            x = image().requires_grad_() * 1
            y = model(x)
            with torch.no_grad():
                {"x": x, "weight": model.conv2.weight, "affine": model.bn1.weight}[change].mul_(2)
            with pytest.raises(RuntimeError, match="modified (by an )?inplace") as info:
                y.sum().backward()
            errors.append(type(info.value))
        assert errors[0] is errors[1]


@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_f11_autocast(models, dtype, mode):
    """Nested off, weights used twice in one region (its cache), backward outside: dtypes as in eager."""
    x, outcomes, dtypes = image(), [], []
    exact = copy.deepcopy(models[0]).double()
    for model in (*models, exact):
        enabled = model is not exact

        def call(x, model=model, enabled=enabled):
            with torch.autocast("cpu", dtype, enabled=enabled):
                first = model(x)
                with torch.autocast("cpu", enabled=False):
                    plain = model(x)
                second = model(2 * x)
            dtypes.append((first.dtype, plain.dtype, second.dtype))
            return first.to(plain.dtype) + second.to(plain.dtype) + plain

        outcomes.append(step(model, x if enabled else x.double(), mode, call=call))
    eager, fused, truth = outcomes
    assert dtypes[0] == dtypes[1] == (dtypes[0][0], torch.float32, dtypes[0][0])
    assert_parity(fused, eager, truth, dtype)


def test_f12_grad_scaler(models):
    """Infinities come out as infinities: the scaler skips the step and lowers its scale, as with the eager model."""
    x, states = image(), []
    for model in models:
        model.train()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        scales = []
        for scale in (1.0, float("inf"), 1.0, 1.0, 3e38):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(x).float().mean() * scale
            scaler.scale(loss).backward()
            overflow = [bool(p.grad.isfinite().all()) for p in model.parameters()]
            scaler.step(optimizer)
            scaler.update()
            scales.append((scaler.get_scale(), overflow))
        states.append((scales, {name: p.detach() for name, p in model.named_parameters()}))
    (want, eager), (got, fused) = states
    assert got == want and any(not all(finite) for _, finite in want)
    assert_same(fused, eager, 0.02)


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_f13_deterministic(models, mode):
    """With torch.use_deterministic_algorithms: no error, and the same bits in every run, whatever the threads."""
    x, threads = image(n=5, size=11), torch.get_num_threads()
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(step(copy.deepcopy(models[1]), x, mode))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(t is None or torch.equal(other[name], t) for name, t in results[0].items())
