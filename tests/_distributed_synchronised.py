"""Synchronised batch norm in whole networks: what the processes of tests/test_distributed.py check, with uneven and
empty batches, against one process with all images."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from _distributed import FUSED, WORLDS, assert_close, assert_same_everywhere, check, data, network, ran, values
from _distributed_wrapped import Checkpointed
from _synchronised import SPLITS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastres
from fastres.kernels import extension


class Twice(nn.Module):
    """A network that runs one of its blocks twice."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        net.layer3 = nn.Sequential(net.layer3, net.layer3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def checkpointed(model: Any, reentrant: bool) -> nn.Module:
    model.layer1, model.layer2 = Checkpointed(model.layer1, reentrant), Checkpointed(model.layer2, reentrant)
    return model


def accumulate(model: nn.Module, steps: int, rank: int, group: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    """Gradients of the mean over all images of `steps` batches, of which this process has its part."""
    total = steps * sum(sizes[process] for process in group)
    for number in range(steps):
        x, target = data(0, 70 + number, sum(sizes))
        x, target = x.to(next(model.parameters()).dtype), target
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = number == steps - 1  # as no_sync does
            x, target = (t.split(sizes)[rank] for t in (x, target))
        else:
            x, target = (torch.cat([t.split(sizes)[process] for process in group]) for t in (x, target))
        loss = nn.functional.cross_entropy(model(x), target, reduction="sum") / total
        (loss * len(group) if isinstance(model, DistributedDataParallel) else loss).backward()


#: change to the network, options of DistributedDataParallel, number of batches, process groups
CASES: dict[str, tuple[Any, dict[str, Any], int, dict[int, list[tuple[int, ...]]]]] = {
    "accumulated gradients": (lambda model: model, {}, 3, {}),
    "a block that runs twice": (Twice, {}, 1, {}),
    "static graph": (lambda model: model, {"static_graph": True}, 1, {}),
    "checkpointed": (functools.partial(checkpointed, reentrant=False), {}, 2, {}),
    "reentrant checkpoints": (functools.partial(checkpointed, reentrant=True), {"static_graph": True}, 1, {}),
    "groups of processes": (lambda model: model, {}, 2, {3: [(0, 2), (1,)], 2: [(0,), (1,)]}),
}


def train(rank: int, world: int, name: str) -> None:
    change, options, steps, groups = CASES[name]
    sizes = SPLITS[world] if world == 2 or "groups" not in name else (4, 3, 2)
    group = next((group for group in groups.get(world, []) if rank in group), tuple(range(world)))
    handles = {ranks: dist.new_group(list(ranks)) for ranks in groups.get(world, [])}  # by every process
    handle = handles.get(group)
    model = network()
    fastres.fuse_(model)
    ddp = DistributedDataParallel(change(model), process_group=handle, **options)
    nn.SyncBatchNorm.convert_sync_batchnorm(ddp.module, handle)
    with ran() as reasons:
        accumulate(ddp, steps, rank, group, sizes)
    assert reasons == FUSED, reasons
    if handle is None:
        assert_same_everywhere([*ddp.parameters(), *ddp.buffers()])

    alone = []
    for dtype in (torch.float64, torch.float32):
        single = change(network().to(dtype))
        accumulate(single, steps, rank, group, sizes)
        alone.append(values(single))
    assert_close(values(ddp), *alone)


if extension.available():  # without compiled kernels PyTorch's own runs, which refuses CPUs
    for _name in CASES:
        check(f"synchronised network: {_name}", (2,) if "checkpoint" in _name else WORLDS)(
            functools.partial(train, name=_name)
        )
