"""Synchronised batch norm over two and three processes, with uneven and empty batches, against one process with all
images; tests/_synchronised.py is what the processes run."""

import functools

import pytest
import torch
import torch.nn.functional as F
from _distributed import found, launched, outcome
from _synchronised import BATCHED, OPS, SPLITS, batches, gradients, leaves, network, parts, tensors, train
from torch import nn

import fastres
from fastres import functional
from fastres.kernels import extension
from fastres.testing import budget, relative_error

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
needs_extension = pytest.mark.skipif(
    not extension.available(), reason=f"compiled kernels are not loaded: {extension.load_error()}"
)
worlds = pytest.mark.parametrize("world", SPLITS)
SUMMED = ("grad_weight", "grad_bias", "grad_conv_weight", "grad_conv_bias")


@functools.cache
def saved(world):
    return [torch.load(launched(world) / f"synchronised-{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.fixture
def results():
    """results(world, case): what each process found."""

    def of(world, case):
        name = f"synchronised: {case}"
        if wrong := outcome(world, name, found(world)):
            pytest.fail(wrong, pytrace=False)
        return [ranks[case] for ranks in saved(world)]

    return of


def eager(case, inputs):
    """The case by torch's own batch norm, on all images."""
    running = [
        t.to(inputs["weight"].dtype) for t in (torch.zeros_like(inputs["weight"]), torch.ones_like(inputs["weight"]))
    ]
    x = inputs["x"]
    with torch.autocast("cpu", torch.bfloat16, enabled=case.get("autocast", False) and x.dtype is torch.float32):
        if inputs["conv_weight"] is not None:
            x = F.conv2d(x, inputs["conv_weight"], inputs["conv_bias"], case.get("stride", 1), case["kernel"] // 2)
        y = F.batch_norm(x, *running, inputs["weight"], inputs["bias"], training=True, momentum=0.3)
        if inputs["residual"] is not None:
            y = y + inputs["residual"].to(y.dtype)
        if case.get("act", "relu") == "relu":
            y = F.relu(y)
        if case.get("maxpool"):
            y = F.max_pool2d(y, 3, 2, 1)
    return {"y": y.detach(), "running_mean": running[0], "running_var": running[1], **gradients(y, inputs)}


@worlds
@pytest.mark.parametrize("name", OPS)
def test_op(results, name, world):
    """Outputs, gradients and running statistics are those of one process with all images."""
    case = OPS[name]
    ranks = results(world, name)
    dtype = case.get("dtype", torch.float32)
    whole = tensors(case, world)
    rounded = {key: None if t is None else t.to(dtype) for key, t in whole.items()}
    rounded |= {key: whole[key] for key in ("weight", "bias")}
    truth = eager(case, leaves(case, rounded, torch.float64))
    witness = eager(case, leaves(case, rounded, dtype))
    stored = torch.bfloat16 if case.get("autocast") else dtype
    for key, want in truth.items():
        if key == "y" or key.removeprefix("grad_") in BATCHED:
            got = torch.cat([rank[key] for rank in ranks])
        elif key.startswith("grad"):
            got = sum(rank[key].double() for rank in ranks)  # DDP adds them up
        else:
            got = ranks[0][key]
            assert all(torch.equal(rank[key], got) for rank in ranks)
        error = relative_error(witness[key], want)
        limit = budget(error, stored, summed=key in SUMMED, winograd=case.get("kernel") == 3)
        assert relative_error(got, want) <= limit, (key, relative_error(got, want), limit)


@needs_extension
@worlds
@pytest.mark.parametrize("when", ["converted before fuse_", "converted after fuse_", "not fused"])
def test_distributed_data_parallel(results, when, world):
    """Three steps of a small bottleneck network end where one process with all images ends."""
    ranks = results(world, when)
    model, witness = network().double(), network()
    train(model, [(x.double(), target) for x, target in batches(world)], sum(SPLITS[world]))
    train(witness, batches(world), sum(SPLITS[world]))
    for key, want in model.state_dict().items():
        limit = max(1e-5, 2 * relative_error(witness.state_dict()[key], want))
        for rank in ranks:
            assert relative_error(rank[key], want) <= limit, key


@needs_extension
@worlds
def test_modules(results, world):
    ranks = results(world, "modules")
    torch.manual_seed(0)
    whole = torch.randn(sum(SPLITS[world]), 6, 4, 4)
    for name, options in {"cumulative": {"momentum": None}, "not tracked": {"track_running_stats": False}}.items():
        bn = nn.BatchNorm2d(6, **options)
        for i in range(2):
            want = parts(F.relu(bn(whole + i)).detach(), world)
            for rank, part in zip(ranks, want, strict=True):
                torch.testing.assert_close(rank[f"{name} {i}"], part, atol=1e-6, rtol=1e-5)
        for key, value in bn.state_dict().items():
            torch.testing.assert_close(ranks[0][f"{name} {key}"], value, atol=1e-6, rtol=1e-5)
        if name == "cumulative":  # the others use the statistics of their own batch in evaluation, as in eager
            want = parts(F.relu(bn.eval()(whole)).detach(), world)
            for rank, part in zip(ranks, want, strict=True):
                torch.testing.assert_close(rank[f"{name} eval"], part, atol=1e-6, rtol=1e-5)
    images = parts(whole, world)
    pair = torch.cat(images[:2])
    want = [*F.relu(nn.BatchNorm2d(6)(pair)).split([len(images[0]), len(images[1])])]
    want += [F.relu(nn.BatchNorm2d(6)(x)) for x in images[2:]]
    for rank, part in zip(ranks, want, strict=True):
        torch.testing.assert_close(rank["group"], part.detach(), atol=1e-6, rtol=1e-5)


@needs_extension
def test_compiled(results):
    for rank in results(2, "compiled"):
        torch.testing.assert_close(rank["compiled"], rank["plain"])
        torch.testing.assert_close(rank["compiled grad"], rank["plain grad"])


def test_gradients_of_gradients_are_refused(results):
    for rank in results(2, "gradients of gradients"):
        assert any("once_differentiable" in message for message in rank)


@needs_extension
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_one_process(mode):
    """Without a process group the ordinary op serves, as in eager: SyncBatchNorm is a plain batch norm then."""
    torch.manual_seed(0)
    conv, x = nn.Conv2d(6, 8, 3, bias=False), torch.randn(2, 6, 9, 9)
    outputs = []
    for bn in (nn.SyncBatchNorm(8), fastres.nn.SyncBatchNorm(8), nn.BatchNorm2d(8)):
        module = fastres.nn.ConvBnAct2d(conv, bn).train(mode == "train")
        outputs.append(module(x))
        assert "conv_bn_act" in type(outputs[-1].grad_fn).__name__
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[2])
    bn = fastres.nn.SyncBatchNorm(8).train(mode == "train")
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(bn(x), nn.BatchNorm2d(8).train(mode == "train")(x))


def test_conversion_of_a_batch_norm():
    bn = nn.BatchNorm2d(3)
    converted = fastres.nn.convert_sync_batchnorm(bn)
    assert type(converted) is fastres.nn.SyncBatchNorm and converted.weight is bn.weight
    assert converted.running_var is bn.running_var and converted.state_dict().keys() == bn.state_dict().keys()


@needs_extension
def test_compiled_whole_without_a_group():
    module = fastres.nn.BnAct2d(nn.SyncBatchNorm(6))
    x = torch.randn(2, 6, 5, 5)
    want = module(x)
    assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x), want)


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@needs_extension
def test_what_saves_memory_and_passes(group):
    """A hidden activation is computed again in backward, and a shortcut's gradient added in the convolution's, as in
    the ordinary ops: with the same result."""

    def block(x, first, second, group):
        fork, options = [], {"training": True, "padding": 1, "process_group": group}
        y = functional.conv_bn_act(x, first, None, None, recompute=True, fork=fork, **options)
        return functional.conv_bn_act(y, second, None, None, residual=fork[0], **options)

    def run(group):
        saved = {}
        values = [x.detach().requires_grad_() for x in inputs]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
            y = block(*values, group)
        return sum(t.nbytes for t in saved.values()), y, *torch.autograd.grad(y.sin().sum(), values)

    x = torch.randn(2, 16, 9, 9).contiguous(memory_format=torch.channels_last)
    inputs = [x, *(torch.randn(16, 16, 3, 3) / 12 for _ in range(2))]
    (saved, *got), (want_saved, *want) = run(group), run(None)
    assert saved == want_saved
    for ours, theirs in zip(got, want, strict=True):
        assert relative_error(ours, theirs) < 1e-5


def test_other_devices():
    x = torch.empty(2, 3, 4, 4, device="meta")
    with pytest.raises(NotImplementedError, match="CPU only"):
        functional.bn_act(x, None, None, training=True, process_group=object())
