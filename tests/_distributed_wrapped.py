"""DistributedDataParallel around fused models: what the processes of tests/test_distributed.py check."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from _distributed import (
    FUSED,
    NHWC,
    WORLDS,
    assert_close,
    assert_same_everywhere,
    check,
    data,
    data_parallel,
    loss_of,
    network,
    ran,
    sgd,
    step_of,
    train,
    values,
)
from torch import Tensor, nn
from torch.distributed.algorithms import Join
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastres
from fastres import folding
from fastres.testing import relative_error


@functools.cache
def eager(rank: int, dtype: torch.dtype, broadcast: bool = True) -> dict[str, Tensor]:
    """Three steps by PyTorch alone."""
    ddp = data_parallel(None, dtype, broadcast_buffers=broadcast)
    train(ddp, rank)
    return values(ddp)


def assert_as_eager(ddp: nn.Module, rank: int, broadcast: bool = True) -> None:
    """Parameters, gradients and buffers after the same steps; parameters the same, bit for bit, in all processes."""
    assert_close(values(ddp), *(eager(rank, dtype, broadcast) for dtype in (torch.float64, torch.float32)))
    assert_same_everywhere(ddp.parameters())


#: Options of DistributedDataParallel that change nothing but the way.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "buffers not broadcast": {"broadcast_buffers": False},
    "static graph": {"static_graph": True},
    "search for unused parameters": {"find_unused_parameters": True},
    "gradients as views of buckets, of one layer": {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.01},
}


def wrapped(rank: int, world: int, fuse: str, options: dict[str, Any]) -> None:
    ddp = data_parallel(fuse, **options)
    with ran() as reasons:
        train(ddp, rank)
    assert reasons == FUSED, reasons
    assert_as_eager(ddp, rank, options.get("broadcast_buffers", True))


for _name, _options in OPTIONS.items():
    for _fuse in ("before", "after") if _name in ("plain", "static graph") else ("before",):
        _check = functools.partial(wrapped, fuse=_fuse, options=_options)
        check(f"fuse_ {_fuse} wrapping, {_name}", WORLDS if _name == "plain" else (2,))(_check)


@check("gradients are the mean of those of single processes")
def mean_gradients(rank: int, world: int) -> None:
    def alone(dtype: torch.dtype) -> dict[str, Tensor]:
        found: dict[str, Any] = {}
        for process in range(world):
            model = network().to(dtype)
            loss_of(model, *data(process, 0)).backward()
            for name, p in model.named_parameters():
                found[f"grad of {name}"] = found.get(f"grad of {name}", 0) + p.grad / world
        return found

    ddp = data_parallel("before")
    loss_of(ddp, *data(rank, 0)).backward()
    got = {name: t for name, t in values(ddp).items() if "grad" in name}
    assert_close(got, alone(torch.float64), alone(torch.float32))


@check("accumulated gradients", (2,))
def accumulation(rank: int, world: int) -> None:
    def steps(ddp: Any) -> dict[str, Tensor]:
        def step(model: Any, optimizer: Any, rank: int, number: int) -> None:
            optimizer.zero_grad()
            with model.no_sync():
                loss_of(model, *data(rank, number)).backward()
                loss_of(model, *data(rank, number + 10)).backward()
            loss_of(model, *data(rank, number + 20)).backward()
            optimizer.step()

        train(ddp, rank, range(2), step)
        return values(ddp)

    ddp = data_parallel("before", gradient_as_bucket_view=True)
    got = steps(ddp)
    assert_close(got, steps(data_parallel(None, torch.float64)), steps(data_parallel()))
    assert_same_everywhere(ddp.parameters())


class SometimesUnused(nn.Module):
    """A network with a second branch that not every call takes."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.other, self.calls = network(), network(1), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.net(x)
        return y if self.calls % 2 else y + self.other(x)


@check("parameters that some steps do not use", (2,))
def unused(rank: int, world: int) -> None:
    found = []
    for dtype, fuse in ((torch.float32, True), (torch.float64, False), (torch.float32, False)):
        model = SometimesUnused().to(dtype)
        if fuse:
            fastres.fuse_(model)
        ddp = DistributedDataParallel(model, find_unused_parameters=True)
        train(ddp, rank)
        found.append(values(ddp))
    assert_close(*found)


@check("autocast", (2,))
def autocast(rank: int, world: int) -> None:
    def step(model: Any, optimizer: Any, rank: int, number: int) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=next(model.parameters()).dtype is torch.float32):
            step_of(model, optimizer, rank, number)

    def run(fuse: Any, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        ddp = data_parallel(fuse, dtype)
        train(ddp, rank, range(2), step)
        assert_same_everywhere(ddp.parameters())
        return values(ddp)

    assert_close(run("before"), run(None, torch.float64), run(None), least=2e-2)


class Checkpointed(nn.Module):
    """A block whose activations are computed again in backward."""

    def __init__(self, block: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


def checkpointed(rank: int, world: int, reentrant: bool) -> None:
    def change(model: Any) -> None:
        model.layer1, model.layer2 = Checkpointed(model.layer1, reentrant), Checkpointed(model.layer2, reentrant)

    def run(fuse: Any, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        ddp = data_parallel(fuse, dtype, change, static_graph=reentrant)
        train(ddp, rank, range(2))
        return values(ddp)

    assert_close(run("before"), run(None, torch.float64), run(None))


check("checkpointed blocks", (2,))(functools.partial(checkpointed, reentrant=False))
check("reentrant checkpoints, static graph", (2,))(functools.partial(checkpointed, reentrant=True))


@check("gradients compressed to fp16", (2,))
def compressed(rank: int, world: int) -> None:
    ddp = data_parallel("before")
    ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
    train(ddp, rank)
    assert_close(values(ddp), *(eager(rank, dtype) for dtype in (torch.float64, torch.float32)), least=5e-3)
    assert_same_everywhere(ddp.parameters())


@check("ZeroRedundancyOptimizer")
def zero_redundancy(rank: int, world: int) -> None:
    def make(model: nn.Module) -> Any:
        return ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9)

    ddp = data_parallel("before")
    train(ddp, rank, make=make)
    assert_as_eager(ddp, rank)


@check("Join: processes with fewer batches")
def join(rank: int, world: int) -> None:
    def run(fuse: Any, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        ddp = data_parallel(fuse, dtype)
        with Join([ddp]):
            train(ddp, rank, range(1 + rank))
        assert_same_everywhere(ddp.parameters())
        return {name: t for name, t in values(ddp).items() if "grad" not in name}

    assert_close(run("before"), run(None, torch.float64), run(None))


# Buffers that others write


def evaluate(model: nn.Module, rank: int) -> Tensor:
    with torch.no_grad():
        return model(data(rank, 50)[0])


def assert_evaluates(model: nn.Module, rank: int) -> None:
    """As the same model without fused code, twice: the second call has folded weights."""
    for _ in range(3):
        got = evaluate(model, rank)
    plain = network().eval()
    plain.load_state_dict({name.removeprefix("module."): t for name, t in model.state_dict().items()})
    assert relative_error(got, plain(data(rank, 50)[0])) < 1e-5


def evaluates_after_broadcasts(rank: int) -> None:
    """DistributedDataParallel broadcasts buffers in the first forward after a step, and moves no version counter."""
    ddp = data_parallel("before")
    train(ddp, rank, range(1))
    ddp.eval()
    for _ in range(2):
        assert_evaluates(ddp.module, rank)  # folded from statistics of this process
        assert_evaluates(ddp, rank)  # from those of the first
        assert_same_everywhere(ddp.buffers())
        assert_evaluates(ddp.module, rank)
        loss_of(ddp, *data(rank, 1)).backward()
        if rank == 0:
            ddp.module.bn1.running_mean.add_(1.0)


@check("folded weights after a broadcast")
def folded_after_broadcast(rank: int, world: int) -> None:
    evaluates_after_broadcasts(rank)
    ddp = data_parallel("before").eval()
    for tensor in (ddp.module.layer1[0].conv2.weight, ddp.module.layer1[0].bn2.running_var):
        assert_evaluates(ddp, rank)
        if rank == 0:
            tensor.detach().mul_(1.5)
        dist.broadcast(tensor.detach(), 0)  # moves no version counter in the others
        assert_evaluates(ddp, rank)
    ddp.load_state_dict({name: t * 0.9 if t.is_floating_point() else t for name, t in ddp.state_dict().items()})
    assert_evaluates(ddp, rank)


@check("folded weights after a broadcast, without fingerprints", (2,))
def folded_without_fingerprints(rank: int, world: int) -> None:
    """As on a GPU, where version counters alone tell of a change."""
    before = folding.packs, folding.serves
    folding.packs, folding.serves = lambda x: False, lambda x: True
    try:
        evaluates_after_broadcasts(rank)
    finally:
        folding.packs, folding.serves = before


@check("distributed checkpoint")
def saved_and_loaded(rank: int, world: int) -> None:
    import shutil
    import tempfile

    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    folder = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    ddp = data_parallel("before")
    optimizer = sgd(ddp)
    step_of(ddp, optimizer, rank, 0)
    model_state, optimizer_state = get_state_dict(ddp, optimizer)
    assert model_state.keys() == network().state_dict().keys()
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder[0])
    step_of(ddp, optimizer, rank, 1)

    again = network(1)
    other = sgd(again)
    state = dict(zip(("model", "optimizer"), get_state_dict(again, other), strict=True))
    dcp.load(state, checkpoint_id=folder[0])
    set_state_dict(again, other, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    wrapped = DistributedDataParallel(again.to(memory_format=NHWC))
    fastres.fuse_(wrapped)
    step_of(wrapped, other, rank, 1)
    # Of running statistics, which differ between processes, the file has those of any.
    got, want = (
        {name: t for name, t in found.items() if "running" not in name} for found in (values(wrapped), values(ddp))
    )
    assert_close(got, want, want)
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder[0])
