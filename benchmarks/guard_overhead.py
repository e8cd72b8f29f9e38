"""What a swapped model costs whose guard always refuses, beside the same model before the swap.

    python benchmarks/guard_overhead.py                                    ResNet-18, batch 1, inference and training
    python benchmarks/guard_overhead.py resnet50 --json benchmarks/results/guard-overhead.json

Both share their weights and have the same hooks, on the last child that each guard asks about, so it asks all its
questions before it refuses; explain says that nothing ran fused. Both then run PyTorch's own kernels only, in one pool
of threads, so they live in one process and take turns at every iteration, in an order that alternates: what slows the
machine down slows both of a pair. The overhead is the median over the pairs of (refused - eager), as a share of the
median of eager, with its 95 % confidence interval. A training step is a forward, a cross-entropy and a backward pass.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from math import floor, sqrt
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import fastres
from fastres import images as photographs
from fastres.bench import machine, report
from fastres.bench.task import prepared_model
from fastres.errors import UserError

_WARM_UP = 10  # pairs


def nothing(*args: Any) -> None:
    """A forward hook."""


def pair(eager: nn.Module, images: Tensor) -> tuple[nn.Module, nn.Module]:
    """The model with a hook on every child that would end a guard's questions; and the same, swapped, on the same
    weights.

    Raises:
        RuntimeError: if anything runs fused in it.
    """
    eager.get_submodule("conv1").register_forward_hook(nothing)  # of the stem, which is asked about twice
    for module in eager.modules():
        last = [child for name, child in module.named_children() if name[:2] == "bn" or name == "maxpool"][-1:]
        for child in last:
            child.register_forward_hook(nothing)
    shared = {id(tensor): tensor for tensor in (*eager.parameters(), *eager.buffers())}
    refused = copy.deepcopy(eager, shared)
    fastres.fuse_(refused)
    found = fastres.explain(refused, images)
    if found.fused or not found.total:
        raise RuntimeError(f"{found.fused} operations ran fused")
    return eager, refused


def measure(models: tuple[nn.Module, nn.Module], images: Tensor, mode: str, pairs: int) -> dict[str, Any]:
    """Seconds of each iteration of both models, in turns."""
    labels = torch.arange(len(images)) % 1000
    for model in models:
        model.train(mode == "train")

    def infer(model: nn.Module) -> None:
        with torch.no_grad():
            model(images)

    def train(model: nn.Module) -> None:
        model.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(images), labels).backward()

    step: Callable[[nn.Module], None] = train if mode == "train" else infer
    samples: tuple[list[float], list[float]] = ([], [])
    for number in range(-_WARM_UP, pairs):
        for which in (0, 1) if number % 2 else (1, 0):
            start = time.perf_counter()
            step(models[which])
            if number >= 0:
                samples[which].append(time.perf_counter() - start)
    return summary(*samples) | {"samples": dict(zip(("eager", "refused"), samples, strict=True))}


def summary(eager: list[float], refused: list[float]) -> dict[str, Any]:
    """The medians in seconds; the overhead as a share of eager's, with the 95 % confidence interval of a median: the
    order statistics n / 2 -+ 0.98 sqrt(n)."""
    base = median(eager)
    shares = sorted((ours - theirs) / base for theirs, ours in zip(eager, refused, strict=True))
    count = len(shares)
    low = max(0, floor(count / 2 - 0.98 * sqrt(count)))
    return {
        "seconds": {"eager": base, "refused": median(refused)},
        "overhead": median(shares),
        "overhead_low": shares[low],
        "overhead_high": shares[count - 1 - low],
        "overhead_seconds": median(shares) * base,
    }


def run(models: list[str], modes: list[str], batch: int, size: int, pairs: int) -> list[dict[str, Any]]:
    """A table for each model and mode.

    Raises:
        UserError: for an unknown model, or a value out of range.
    """
    if min(batch, size, pairs) < 1:
        raise UserError("--batch, --size and --pairs must be above zero")
    tables = []
    for name in models:
        images = photographs.photographs(max(batch, 4), size)
        eager = prepared_model(name, images).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images[:batch].contiguous(memory_format=torch.channels_last)
        models_ = pair(eager, images)
        about = {"model": name, "batch": batch, "size": size, "threads": torch.get_num_threads(), "pairs": pairs}
        tables += [{**about, "mode": mode, **measure(models_, images, mode, pairs)} for mode in modes]
    return tables


def line(table: dict[str, Any]) -> str:
    return (
        f"{table['model']} {table['mode']}, batch {table['batch']}, {table['size']} px, {table['threads']} threads: "
        f"eager {table['seconds']['eager'] * 1e3:.2f} ms, refused {table['seconds']['refused'] * 1e3:.2f} ms, overhead "
        f"{table['overhead']:+.2%} ({table['overhead_low']:+.2%} to {table['overhead_high']:+.2%}), "
        f"{table['overhead_seconds'] * 1e6:+.0f} us, {table['pairs']} pairs"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="(default: resnet18)")
    parser.add_argument("--mode", choices=("infer", "train", "both"), default="both", help="(default: both)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="(default: 1)")
    parser.add_argument("--size", type=int, default=224, metavar="N", help="height and width (default: 224)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="(default: one per core)")
    parser.add_argument("--pairs", type=int, default=800, metavar="N", help="(default: 800)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    given = parser.parse_args()
    started = datetime.now(timezone.utc)
    described = machine.describe()
    torch.set_num_threads(given.threads or machine.physical_cores())
    try:
        modes = ["infer", "train"] if given.mode == "both" else [given.mode]
        tables = run(given.models or ["resnet18"], modes, given.batch, given.size, given.pairs)
    except UserError as error:
        print(f"guard_overhead.py: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(line, tables)))
    if given.json:
        result = {
            "schema": 1,
            "date": started.isoformat(timespec="seconds"),
            "command": shlex.join(["python", "benchmarks/guard_overhead.py", *sys.argv[1:]]),
            "machine": described,
            "tables": tables,
        }
        report.write_json(result, given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
