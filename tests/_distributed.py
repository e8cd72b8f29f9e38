"""What several processes are asked to do in one launch, and how it is started: tests/distributed_worker.py runs every
check of `CHECKS` in each process that torchrun started, and tests/test_distributed.py shows what came of each."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastres
from fastres import observe
from fastres.kernels import table
from fastres.models import Bottleneck, CifarResNet
from fastres.recipes.residual import FusedModule

NHWC = torch.channels_last
TESTS = Path(__file__).parent
WORLDS = (2, 3)

#: check(rank, world), by name; it raises an error where something is wrong.
CHECKS: dict[str, Callable[[int, int], None]] = {}
#: The numbers of processes with which a check runs.
SIZES: dict[str, tuple[int, ...]] = {}


def check(name: str, worlds: tuple[int, ...] = WORLDS) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function of (rank, world)."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        CHECKS[name], SIZES[name] = function, worlds
        return function

    return register


# The launch


class Agreement:
    """Tells the processes of each other's errors: after one that is not everyone's, some wait for others forever."""

    def __init__(self, folder: Path, rank: int, world: int) -> None:
        self.store = dist.FileStore(str(folder / "agreement"), world)
        self.rank, self.world = rank, world

    def reached(self, name: str, seconds: float) -> bool:
        """Whether every process came here in this time."""
        self.store.set(f"{name}/{self.rank}", "")
        try:
            self.store.wait([f"{name}/{rank}" for rank in range(self.world)], timedelta(seconds=seconds))
        except RuntimeError:
            return False
        return True


def outcome(world: int, name: str, ranks: list[dict[str, str | None]]) -> str | None:
    """What a check's processes say is wrong, or None."""
    wrong = {rank: found.get(name, "did not get to it") for rank, found in enumerate(ranks)}
    return "\n".join(f"process {rank} of {world}: {text}" for rank, text in wrong.items() if text) or None


@functools.cache
def launched(world: int) -> Path:
    """The folder in which the processes of one torchrun left what they found: once in a session of pytest."""
    if not dist.is_available():
        pytest.skip("PyTorch without torch.distributed")
    folder = Path(tempfile.mkdtemp(prefix=f"fastres-{world}-processes-"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    running = subprocess.Popen(
        [*command, str(TESTS / "distributed_worker.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        (folder / "output.txt").write_text(running.communicate(timeout=600)[0])
    except subprocess.TimeoutExpired:
        running.terminate()  # torchrun ends its processes
        (folder / "output.txt").write_text(running.communicate()[0] + "\nno end within 600 s")
    return folder


def found(world: int) -> list[dict[str, str | None]]:
    """What each process says of each check: an error's text, or None."""
    folder = launched(world)
    files = [folder / f"{rank}.json" for rank in range(world)]
    if not all(path.exists() for path in files):
        pytest.fail((folder / "output.txt").read_text()[-4000:], pytrace=False)
    return [json.loads(path.read_text()) for path in files]


# What checks share


def network(seed: int = 0) -> nn.Module:
    """A small network with projections and an identity shortcut, for images 3x16x16, in which no ReLU has an input near
    0: there a rounding error changes gradients by any amount, in eager as in fused code."""
    torch.manual_seed(seed)
    model = CifarResNet(Bottleneck, (1, 1, 1), num_classes=5, shortcut="B")
    model.layer3, model.fc = Bottleneck(128, 32), nn.Linear(128, 5)
    for name, bn in model.named_modules():
        if isinstance(bn, nn.BatchNorm2d):
            nn.init.constant_(bn.bias, 7.0)
            if not name.endswith(("bn3", "downsample.1")):  # a shortcut may bring what was taken away
                bn.bias.data[::4] = -7.0  # off
    return model.to(memory_format=NHWC)


def data(rank: int, step: int, images: int = 4) -> tuple[Tensor, Tensor]:
    """A batch of one process."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(images, 3, 16, 16, generator=generator).contiguous(memory_format=NHWC)
    return x, torch.randint(5, (images,), generator=generator)


def loss_of(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """In the precision of the model's parameters."""
    dtype = next(p.dtype for p in model.parameters())
    return nn.functional.cross_entropy(model(x.to(dtype)), target)


def step_of(model: nn.Module, optimizer: Any, rank: int, number: int) -> None:
    optimizer.zero_grad()
    loss_of(model, *data(rank, number)).backward()
    optimizer.step()


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(model: nn.Module, rank: int, steps: Iterable[int] = range(3), step: Any = step_of, make: Any = sgd) -> None:
    optimizer = make(model)
    for number in steps:
        step(model, optimizer, rank, number)


def values(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and gradients, whole where they are sharded, without the prefix of a wrapper."""
    tensors = dict(model.state_dict())
    tensors |= {f"grad of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {
        name.replace("module.", ""): (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()
        for name, t in tensors.items()
    }


def assert_close(
    got: dict[str, Tensor], truth: dict[str, Tensor], witness: dict[str, Tensor], least: float = 1e-5
) -> None:
    """No farther from float64 than twice what eager is. Of gradients that are next to nothing, batch norms behind them
    for instance take biases away, the rounding errors count as those of the others."""
    assert got.keys() == truth.keys() == witness.keys(), got.keys() ^ truth.keys()
    sizes = {name: t.double().square().mean().sqrt().item() for name, t in truth.items()}
    usual = sorted(size for name, size in sizes.items() if "grad" in name)
    for name, want in truth.items():
        size = max(sizes[name], usual[len(usual) // 2]) if "grad" in name else sizes[name]
        error, eager = (
            (found[name].double() - want.double()).square().mean().sqrt().item() / max(size, 1e-30)
            for found in (got, witness)
        )
        assert error <= max(least, 2 * eager), (name, error, eager)


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def assert_same_everywhere(tensors: Iterable[Tensor]) -> None:
    """Bit for bit in all processes."""
    mine = torch.cat([t.detach().flatten().double() for t in tensors])
    theirs = mine.clone()
    dist.broadcast(theirs, 0)
    assert torch.equal(mine, theirs)


class ran:
    """The reasons of the blocks that ran inside the `with` block; None: fused."""

    def __enter__(self) -> set[str | None]:
        reasons: set[str | None] = set()
        self.listening = observe.listening(lambda block, reason: reasons.add(reason))
        self.listening.__enter__()
        return reasons

    def __exit__(self, *error: Any) -> None:
        self.listening.__exit__(*error)


def fused_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, FusedModule)]


#: What every block says where nothing is in the way.
FUSED = {table.no_fused_kernel("bn_act", "cpu")}


def data_parallel(
    fuse: str | None = None, dtype: torch.dtype = torch.float32, change: Any = lambda model: None, **options: Any
) -> DistributedDataParallel:
    """The network, fused "before" or "after" it is wrapped, or not at all.

    change: to the network, after fuse_.
    """
    model = network().to(dtype)
    if fuse == "before":
        fastres.fuse_(model)
    change(model)
    wrapped = DistributedDataParallel(model, **options)
    if fuse == "after":
        assert fastres.fuse_(wrapped).fused > 0
    return wrapped
