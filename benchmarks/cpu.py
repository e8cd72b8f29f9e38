"""Every convolution of the ResNets on the CPU: our kernels beside oneDNN's, and their share of the processor's peak.

    python benchmarks/cpu.py --batch 1 16
    make bench-cpu ARGS='--batch 16 --seconds 60'

Both are kernels of conv_bias_act with packed weights, bias and ReLU, on channels_last fp32 activations. Each
provider has a process of its own; they take turns of 50 ms, layer by layer, so that what else the machine does meets
both. Times are medians over the turns, with everything of a layer in the cache that fits into it.

Columns: GFLOP/s are those of the direct algorithm, whatever method computes it; "of peak" is the share of the measured
peak that the method's own multiplications make (Winograd's transforms count as loss); GB/s count each value of input,
output and packed weight once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch
from layers import DEPTHS, LAYERS, Layer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fastres.bench import machine
from fastres.kernels import convolution, onednn

RESULTS = Path(__file__).parent / "results" / "local"
METHODS = {1: "product", 2: "F(4x4)", 3: "F(2x2)"}
Shape = tuple[int, int, int, int, int]  # input channels and size, output channels, kernel, stride


def shape_of(layer: Layer) -> Shape:
    return layer.c, layer.h, layer.k, layer.r, layer.stride


def unique_layers() -> dict[Shape, list[Layer]]:
    """Layers of the same shape differ in what follows, which is not measured here."""
    found: dict[Shape, list[Layer]] = {}
    for layer in LAYERS:
        found.setdefault(shape_of(layer), []).append(layer)
    return found


def tensors(shape: Shape, batch: int) -> tuple[Any, ...]:
    c, size, k, r, stride = shape
    x = torch.randn(batch, c, size, size).contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(k, c, r, r) / (c * r * r) ** 0.5).contiguous(memory_format=torch.channels_last)
    return x, weight, torch.randn(k), [stride] * 2, [r // 2] * 2, [1, 1], 1


def work(shape: Shape, batch: int) -> tuple[str, int, int, int]:
    """The method that serves a layer, the multiplications of the direct algorithm and of the method, the bytes of
    input, output and packed weights."""
    c, size, k, r, stride = shape
    x, weight, _, *geometry = tensors(shape, batch)
    method, out = METHODS[convolution.method(x, weight, *geometry)], -(-size // stride)
    direct = batch * out * out * c * k * r * r
    tile = {"F(4x4)": 4, "F(2x2)": 2}.get(method)
    needed, values = direct, k * c * r * r
    if tile:
        values = c * k * (tile + 2) ** 2
        needed = batch * (-(-out // tile)) ** 2 * values
    return method, direct, needed, 4 * (batch * size * size * c + batch * out * out * k + values)


def seconds_of(call: Callable[[], Any], turn: float) -> float:
    """Median seconds of a call, during `turn` seconds."""
    call()
    samples: list[float] = []
    end = time.perf_counter() + turn
    while time.perf_counter() < end or len(samples) < 3:
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return median(samples)


def worker(provider: str, batch: int, threads: int) -> None:
    """Answers each line, a number of a layer, with the seconds of one call."""
    torch.set_num_threads(threads)
    prepare: Any = {"fastres": convolution.prepare, "oneDNN": onednn.prepare}[provider]
    calls = []
    with torch.inference_mode():
        for shape in unique_layers():
            x, *rest = tensors(shape, batch)
            run = prepare(x, *rest)
            calls.append(lambda run=run, x=x: run(x, None, True))
        print("ready", flush=True)
        for line in sys.stdin:
            print(seconds_of(calls[int(line)], 0.05), flush=True)


def ceilings(threads: int) -> tuple[float, float]:
    """FLOP/s of a large matrix product and bytes/s of a copy out of memory, the best of some."""
    torch.set_num_threads(threads)
    a, b = torch.randn(1536, 1536), torch.randn(1536, 1536)
    source = torch.randn(1 << 25)
    target = torch.empty_like(source)
    product = min(seconds_of(lambda: a @ b, 0.2) for _ in range(5))
    copy = min(seconds_of(lambda: target.copy_(source), 0.2) for _ in range(5))
    return 2 * 1536**3 / product, 2 * source.nbytes / copy


def measure(batch: int, threads: int, seconds: float) -> list[dict[str, Any]]:
    shapes = unique_layers()
    providers = ("fastres", "oneDNN")
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--batch", str(batch), "--threads", str(threads), "--worker"]
    processes = [
        subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for name in providers
    ]
    samples: dict[tuple[int, str], list[float]] = {}
    try:
        for process in processes:
            if process.stdout.readline().strip() != "ready":  # type: ignore[union-attr]
                raise RuntimeError("a provider did not start; its message is above")
        start, rounds = time.perf_counter(), 0
        with Progress(transient=True) as progress:
            task = progress.add_task(f"batch {batch}", total=seconds)
            while time.perf_counter() - start < seconds or rounds < 3:
                for i in range(len(shapes)):
                    for name, process in zip(providers, processes, strict=True):
                        process.stdin.write(f"{i}\n")  # type: ignore[union-attr]
                        process.stdin.flush()  # type: ignore[union-attr]
                        samples.setdefault((i, name), []).append(float(process.stdout.readline()))  # type: ignore[union-attr]
                    progress.update(task, completed=time.perf_counter() - start)
                rounds += 1
    finally:
        for process in processes:
            process.kill()
    rows = []
    for i, (shape, layers) in enumerate(shapes.items()):
        method, direct, needed, moved = work(shape, batch)
        c, size, k, r, stride = shape
        ours, theirs = samples[i, "fastres"], samples[i, "oneDNN"]
        rows.append(
            {
                "layer": ", ".join(layer.name for layer in layers),
                "shape": f"{r}x{r}/{stride} {c}-{k} at {size}",
                "counts": {depth: sum(layer.count(depth) for layer in layers) for depth in DEPTHS},
                "method": method,
                "seconds": {"fastres": median(ours), "oneDNN": median(theirs)},
                "ratio": median(b / a for a, b in zip(ours, theirs, strict=True)),
                "direct_flops": 2 * direct,
                "method_flops": 2 * needed,
                "bytes": moved,
                "samples": {"fastres": ours, "oneDNN": theirs},
            }
        )
    return rows


def show(console: Console, batch: int, rows: list[dict[str, Any]], peak: float) -> None:
    table = Table(title=f"batch {batch}, fp32", title_justify="left", box=None, header_style="bold")
    left = ("shape", "method")
    for name in (*left, "in -18", "in -50", "oneDNN ms", "fastres ms", "x oneDNN", "GFLOP/s", "of peak", "GB/s"):
        table.add_column(name, justify="left" if name in left else "right")
    for row in rows:
        ours = row["seconds"]["fastres"]
        table.add_row(
            row["shape"],
            row["method"],
            str(row["counts"][18] or ""),
            str(row["counts"][50] or ""),
            f"{row['seconds']['oneDNN'] * 1e3:.3f}",
            f"{ours * 1e3:.3f}",
            f"{row['ratio']:.2f}",
            f"{row['direct_flops'] / ours / 1e9:.0f}",
            f"{row['method_flops'] / ours / peak:.0%}",
            f"{row['bytes'] / ours / 1e9:.1f}",
        )
    console.print(table)
    for depth in DEPTHS:
        total = {name: sum(r["counts"][depth] * r["seconds"][name] for r in rows) for name in ("fastres", "oneDNN")}
        console.print(
            f"convolutions of ResNet-{depth}: {total['fastres'] * 1e3:.1f} ms, oneDNN {total['oneDNN'] * 1e3:.1f} ms "
            f"({total['oneDNN'] / total['fastres']:.2f} times as fast)"
        )
    console.print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], metavar="N")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=60, help="of each batch size (default: 60)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: in benchmarks/results/local")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker, options.batch[0], options.threads)
    console = Console(width=max(Console().width, 110))
    peak, bandwidth = ceilings(options.threads)
    console.print(f"peak {peak / 1e9:.0f} GFLOP/s (matrix product), {bandwidth / 1e9:.1f} GB/s (copy)\n")
    tables = {}
    for batch in options.batch:
        tables[batch] = measure(batch, options.threads, options.seconds)
        show(console, batch, tables[batch], peak)
    now = datetime.now(timezone.utc)
    path = options.json or RESULTS / f"{now:%Y-%m-%dT%H%M}-cpu-layers.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "date": now.isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "threads": options.threads,
        "peak_flops": peak,
        "copy_bytes": bandwidth,
        "batches": tables,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"Results: {path}")


if __name__ == "__main__":
    main()
