"""FSDP around fused models and inside of them: what the processes of tests/test_distributed.py check.

What FSDP manages runs as PyTorch runs it, so results are equal bit for bit."""

from __future__ import annotations

import functools
from typing import Any

import torch
from _distributed import (
    FUSED,
    WORLDS,
    assert_close,
    assert_equal,
    check,
    data,
    data_parallel,
    fused_modules,
    network,
    ran,
    train,
    values,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

import fastres
from fastres import folding
from fastres.models import Bottleneck
from fastres.testing import relative_error


@functools.cache
def mesh(world: int) -> Any:
    return init_device_mesh("cpu", (world,))


def plain_network() -> nn.Module:
    """FSDP takes weights in their ordinary order only."""
    return network().to(memory_format=torch.contiguous_format)


def shard(model: nn.Module, world: int, whole: bool = False, **options: Any) -> nn.Module:
    """The whole network in one, or each block and then the rest."""
    if not whole:
        for block in [module for module in model.modules() if isinstance(module, Bottleneck)]:
            fully_shard(block, mesh=mesh(world), **options)
    return fully_shard(model, mesh=mesh(world), **options)


@functools.cache
def eager(rank: int, world: int, whole: bool) -> dict[str, Tensor]:
    model = shard(plain_network(), world, whole)
    train(model, rank)
    return values(model)


def assert_managed(model: nn.Module, rank: int) -> None:
    """Nothing was fused, and explain says why; no weights are kept, which FSDP takes apart between calls."""
    report = fastres.explain(model, data(rank, 0)[0])
    assert report.total > 20 and report.fused == 0, str(report)
    assert all(row.reason.startswith("FSDP manages") for row in report.rows), str(report)
    model.eval()
    with torch.no_grad():
        model(data(rank, 0)[0])
    model.train()
    assert folding.packed_bytes(model) == 0


def sharded(rank: int, world: int, fuse: str, whole: bool) -> None:
    """Trained, evaluated, un-swapped and trained again."""
    model = plain_network()
    if fuse == "before":
        fastres.fuse_(model)
    shard(model, world, whole)
    if fuse == "after":
        report = fastres.fuse_(model)
        assert report.fused == 0 and "FSDP manages" in str(report), str(report)
    with ran() as reasons:
        train(model, rank)
    assert all(reason and reason.startswith("FSDP manages") for reason in reasons), reasons
    assert_equal(values(model), eager(rank, world, whole))
    assert_managed(model, rank)

    reference = shard(plain_network(), world, whole)
    model.load_state_dict(reference.state_dict())
    classes = {name: type(module) for name, module in model.named_modules()}
    with fastres.disabled(model):
        assert not fused_modules(model)
    assert classes == {name: type(module) for name, module in model.named_modules()}
    fastres.unfuse_(model)
    assert not fused_modules(model)
    shards = {name for name, module in reference.named_modules() if isinstance(module, FSDPModule)}
    assert shards == {name for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    assert repr(model) == repr(reference)
    train(model, rank)
    assert_equal(values(model), eager(rank, world, whole))


for _fuse in ("before", "after"):
    for _whole in (False, True):
        _what = "the whole" if _whole else "every block"
        _check = functools.partial(sharded, fuse=_fuse, whole=_whole)
        check(f"fuse_ {_fuse} fully_shard of {_what}", WORLDS if (_fuse, _whole) == ("before", False) else (2,))(_check)


@check("fully_shard of one block")
def part(rank: int, world: int) -> None:
    """The others run fused."""
    model = plain_network()
    fastres.fuse_(model)
    fully_shard(model.layer2[0], mesh=mesh(world))
    with ran() as reasons:
        train(model, rank, range(1))
    assert reasons == {*FUSED, "FSDP manages the block"}, reasons
    rows = {row.name: row for row in fastres.explain(model, data(rank, 0)[0]).rows}
    assert rows["layer2.0.conv2"].reason.startswith("FSDP manages")
    assert rows["layer1.0.conv2"].fused == (None in FUSED)

    found = []
    for dtype in (torch.float64, torch.float32):
        again = plain_network().to(dtype)
        fully_shard(again.layer2[0], mesh=mesh(world))
        train(again, rank, range(1))
        found.append(values(again))
    assert_close(values(model), *found)


@check("fully_shard as DistributedDataParallel", (2,))
def as_data_parallel(rank: int, world: int) -> None:
    found = []
    for dtype in (torch.float64, torch.float32):
        ddp = data_parallel(None, dtype, broadcast_buffers=False)
        train(ddp, rank)
        found.append(values(ddp))
    assert_close(eager(rank, world, False), *found)


@check("fully_shard in bf16", (2,))
def mixed_precision(rank: int, world: int) -> None:
    """With batch norms in fp32: on CPUs PyTorch's own takes no bf16 weights beside fp32 statistics."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def run(fuse: bool) -> dict[str, Tensor]:
        model = plain_network()
        if fuse:
            fastres.fuse_(model)
        for module in [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]:
            fully_shard(module, mesh=mesh(world))
        shard(model, world, mp_policy=policy)
        with ran() as reasons:
            train(model, rank, range(2))
        assert None not in reasons
        assert all(t.dtype is not torch.bfloat16 for t in model.state_dict().values())
        return values(model)

    assert_equal(run(True), run(False))


@check("fully_shard with synchronised batch norm")
def synchronised(rank: int, world: int) -> None:
    """On a CPU, where PyTorch's own raises an error: as one process with the images of all."""

    def alone(dtype: torch.dtype) -> dict[str, Tensor]:
        model = plain_network().to(dtype)
        parts = [data(process, 0) for process in range(world)]
        x, target = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        nn.functional.cross_entropy(model(x.to(dtype)), target).backward()
        return values(model)

    model = plain_network()
    fastres.fuse_(model)
    shard(fastres.nn.convert_sync_batchnorm(model), world)
    x, target = data(rank, 0)
    nn.functional.cross_entropy(model(x), target).backward()
    assert_close(values(model), alone(torch.float64), alone(torch.float32))


@check("fully_shard, state for one process")
def whole_state(rank: int, world: int) -> None:
    """Saved whole, loaded into a fused model that is not sharded."""
    model = plain_network()
    fastres.fuse_(model)
    shard(model, world)
    train(model, rank, range(1))
    model.eval()
    with torch.no_grad():
        want = model(data(rank, 1)[0])
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank > 0:  # the state is that of the first process, and there only
        return
    alone = network(1).eval()
    assert alone.load_state_dict(state).missing_keys == []
    fastres.fuse_(alone)
    with torch.no_grad():
        assert relative_error(alone(data(rank, 1)[0]), want) < 1e-5


def wrapped(rank: int, world: int, original: bool) -> None:
    """FullyShardedDataParallel, the older one."""

    def run(fuse: str | None) -> dict[str, Tensor]:
        model = plain_network()
        if fuse == "before":
            fastres.fuse_(model)
        policy = ModuleWrapPolicy({Bottleneck})
        model = FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=original, device_id=torch.device("cpu")
        )
        assert sum(isinstance(module, FullyShardedDataParallel) for module in model.modules()) == 4
        if fuse == "after":
            fastres.fuse_(model)
        with ran() as reasons:
            train(model, rank)
            if fuse:
                assert_managed(model, rank)
                fastres.unfuse_(model)
                assert not fused_modules(model)
            train(model, rank, range(1))
        assert all(reason and reason.startswith("FSDP manages") for reason in reasons), reasons
        return {name: t.clone() for name, t in model.state_dict().items()}

    want = run(None)
    for fuse in ("before", "after"):
        assert_equal(run(fuse), want)


check("FullyShardedDataParallel", (2,))(functools.partial(wrapped, original=True))
check("FullyShardedDataParallel, flat parameters only", (2,))(functools.partial(wrapped, original=False))


@check("weights that are DTensors")
def distributed_weights(rank: int, world: int) -> None:
    """Replicated by hand, as tensor parallelism does it."""
    model = network().layer1[0]
    fastres.fuse_(model)
    x = torch.randn(2, 16, 8, 8)
    want = model(x)
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(distribute_tensor(p.detach(), mesh(world))))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, distribute_tensor(buffer, mesh(world)))
    with ran() as reasons:
        got = model(DTensor.from_local(x, mesh(world), run_check=False))
    assert reasons == {"input is a DTensor, not a plain tensor"}, reasons
    assert relative_error(got.to_local(), want) < 1e-5
    with ran() as reasons:
        try:
            model(x)
        except Exception as error:
            assert "DTensor" in str(error), error  # eager's
    assert reasons == {"convolution weight is a DTensor"}, reasons
