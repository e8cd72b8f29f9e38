"""Every convolution of the ResNets on the CPU: our kernels beside oneDNN's, and beside what the processor can do.

    python benchmarks/cpu_layers.py --batch 1 16
    make bench-cpu ARGS=layers

Both are kernels of conv_bias_act with packed weights, bias and ReLU, on channels_last fp32 activations. Each
provider has a process of its own; they take turns of 50 ms, layer by layer, so that what else the machine does meets
both. Times are medians over the turns, with everything of a layer in the cache that fits into it.

The floor of a layer is the longer of two times: its multiplications at the rate of a large matrix product, and its
bytes (input, output and packed weights, once each) at the rate of the faster of a copy and a triad of as many bytes,
hot like the layer. A third process measures both rates, spread over every round. The multiplications are those of the
method that serves the layer, so Winograd's transforms count as loss; GFLOP/s are those of the direct algorithm.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from floor import Ceilings, Layer, Shape, layers_of, work
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fastres.bench import machine, process, report
from fastres.errors import UserError
from fastres.kernels import convolution, onednn

NETWORKS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("wide_resnet50_2", "wide_resnet101_2", "resnext50_32x4d"),
)
BATCHES = (1, 16)
LAGGING = 0.8  # of the floor
PROVIDERS = ("fastres", "oneDNN")
CEILING = "ceiling"
_PRODUCT = 1536
_SIZES = tuple(1 << exponent for exponent in range(20, 29))  # bytes that a copy moves: from cache and from memory
_TURN_SECONDS = 0.05


def tensors(shape: Shape, batch: int, device: str = "cpu") -> tuple[Any, ...]:
    """The arguments of `prepare`: x, weight, bias, stride, padding, dilation, groups."""
    c, h, k, r, stride, groups = shape
    x = torch.randn(batch, c, h, h, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(k, c // groups, r, r, device=device) / (c // groups * r * r) ** 0.5
    weight = weight.contiguous(memory_format=torch.channels_last)
    return x, weight, torch.randn(k, device=device), [stride] * 2, [r // 2] * 2, [1, 1], groups


def method_of(x: torch.Tensor, weight: torch.Tensor, *geometry: Any) -> int:
    """What our kernels do with these arguments; 0 where they leave them to oneDNN."""
    if convolution.unavailable() or convolution.why_not(x, weight, None, None, *geometry):
        return 0
    return convolution.method(x, weight, *geometry)


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


def convolution_calls(provider: str, layers: Sequence[Layer], batch: int) -> list[Callable[[], Any]]:
    calls = []
    for layer in layers:
        x, *rest = tensors(layer.shape, batch)
        weight, _, *geometry = rest
        ours = provider == "fastres" and method_of(x, weight, *geometry)
        run: Callable[..., Any] = (convolution if ours else onednn).prepare(x, *rest)
        calls.append(partial(run, x, None, True))
    return calls


def ceiling_calls() -> list[Callable[[], Any]]:
    """A matrix product of _PRODUCT rows and columns, then copies of all sizes, then triads of all sizes."""
    left, right = torch.randn(_PRODUCT, _PRODUCT), torch.randn(_PRODUCT, _PRODUCT)
    a, b, c = (torch.ones(_SIZES[-1] // 8) for _ in range(3))
    copies = [partial(a[: size // 8].copy_, b[: size // 8]) for size in _SIZES]
    triads = []
    for size in _SIZES:
        n = size // 12
        triads.append(partial(torch.add, b[:n], c[:n], alpha=2.0, out=a[:n]))
    return [partial(torch.mm, left, right), *copies, *triads]


def ceilings(samples: Sequence[Sequence[float]]) -> Ceilings:
    """From the seconds of the ceiling's calls, in their order."""
    product, *rest = [median(found) for found in samples]
    copies, triads = rest[: len(_SIZES)], rest[len(_SIZES) :]
    bandwidth = {size: size / min(pair) for size, *pair in zip(_SIZES, copies, triads, strict=True)}
    return Ceilings(2 * _PRODUCT**3 / product, bandwidth)


def worker(provider: str, networks: Sequence[str], batch: int, threads: int) -> None:
    """Answers each line, the number of a call, with its seconds."""
    torch.set_num_threads(threads)
    with torch.inference_mode():
        ceiling = provider == CEILING
        calls = ceiling_calls() if ceiling else convolution_calls(provider, layers_of(networks), batch)
        print("ready", flush=True)
        for line in sys.stdin:
            print(seconds_of(calls[int(line)], _TURN_SECONDS), flush=True)


class Provider:
    """A process of `worker`, and the samples of its calls."""

    def __init__(self, name: str, calls: int, networks: Sequence[str], batch: int, threads: int) -> None:
        self.samples: list[list[float]] = [[] for _ in range(calls)]
        options = ["--networks", *networks, "--batch", str(batch), "--threads", str(threads), "--worker", name]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=process.environment(threads, tempfile.gettempdir()),
        )

    def receive(self) -> str:
        line = self.process.stdout.readline().strip()  # type: ignore[union-attr]
        if not line:
            raise process.ContenderError("a provider died; its message is above")
        return line

    def turn(self, call: int) -> None:
        self.process.stdin.write(f"{call}\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        self.samples[call].append(float(self.receive()))


def measure(
    batch: int, networks: Sequence[str] = NETWORKS, threads: int = 0, seconds: float = 60.0, rounds: int = 3
) -> dict[str, Any]:
    """The table of one batch size, after about `seconds`, at least `rounds` rounds and all ceilings.

    Raises:
        UserError: for an unknown network.
    """
    layers, threads = layers_of(networks), threads or machine.physical_cores()
    about = (networks, batch, threads)
    ceiling = Provider(CEILING, 1 + 2 * len(_SIZES), *about)
    providers = [Provider(name, len(layers), *about) for name in PROVIDERS]
    ceiling_turns = itertools.cycle(range(len(ceiling.samples)))
    try:
        for provider in (ceiling, *providers):
            provider.receive()
        start = time.perf_counter()
        with Progress(transient=True) as progress:
            bar = progress.add_task(f"layers, batch {batch}", total=seconds)
            for done in itertools.count():
                elapsed = time.perf_counter() - start
                enough = done >= rounds and all(ceiling.samples)
                if enough and elapsed * (done + 1) / done > seconds:
                    break
                for i in range(len(layers)):
                    if i % 2:  # spread over the round: what the processor can do changes within seconds
                        ceiling.turn(next(ceiling_turns))
                    for provider in providers:
                        provider.turn(i)
                    progress.update(bar, completed=time.perf_counter() - start)
    finally:
        for provider in (ceiling, *providers):
            provider.process.kill()
    can = ceilings(ceiling.samples)
    ours, theirs = (provider.samples for provider in providers)
    rows = [row(layer, batch, can, *pair) for layer, *pair in zip(layers, ours, theirs, strict=True)]
    return {
        "batch": batch,
        "threads": threads,
        "peak_flops": can.flops,
        "bandwidth": can.bandwidth,
        "ceiling_samples": ceiling.samples,
        "layers": rows,
    }


def row(layer: Layer, batch: int, can: Ceilings, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """A layer as it goes into the result file. ours, theirs: seconds, turn by turn."""
    x, weight, _, *geometry = tensors(layer.shape, batch, "meta")
    needs = work(layer.shape, batch, method_of(x, weight, *geometry))
    floor, limit = can.floor(needs)
    return {
        "layer": layer.name,
        "shape": str(layer.shape),
        "counts": layer.counts,
        **needs._asdict(),
        "seconds": {"fastres": median(ours), "oneDNN": median(theirs)},
        "ratio": median(b / a for a, b in zip(ours, theirs, strict=True)),
        "floor_seconds": floor,
        "limit": limit,
        "of_floor": floor / median(ours),
        "samples": {"fastres": ours, "oneDNN": theirs},
    }


def show(console: Console, table: dict[str, Any]) -> None:
    """The layers, and for each network its sum and the layers that lose most against the floor."""
    rich = Table(title=f"convolutions, batch {table['batch']}, fp32", title_justify="left", box=None)
    left = ("shape", "method", "limit")
    for name in ("shape", "method", "oneDNN ms", "fastres ms", "x oneDNN", "GFLOP/s", "GB/s", "limit", "of floor"):
        rich.add_column(name, justify="left" if name in left else "right", header_style="bold")
    for found in table["layers"]:
        ours = found["seconds"]["fastres"]
        rich.add_row(
            found["shape"],
            found["method"],
            f"{found['seconds']['oneDNN'] * 1e3:.3f}",
            f"{ours * 1e3:.3f}",
            f"{found['ratio']:.2f}",
            f"{found['direct_flops'] / ours / 1e9:.0f}",
            f"{found['bytes'] / ours / 1e9:.1f}",
            found["limit"],
            f"{found['of_floor']:.0%}{' !' if found['of_floor'] < LAGGING else '  '}",
        )
    console.print(rich)
    lagging = sum(found["of_floor"] < LAGGING for found in table["layers"])
    rates = [f"{rate / 1e9:.0f} ({size >> 20} MiB)" for size, rate in table["bandwidth"].items()]
    console.print(
        f"! under {LAGGING:.0%} of the floor: {lagging} of {len(table['layers'])} layers. Ceilings: "
        f"{table['peak_flops'] / 1e9:.0f} GFLOP/s; GB/s {', '.join(rates)}."
    )
    console.print()
    rich = Table(box=None)
    rich.add_column("convolutions of", header_style="bold")
    for name in ("oneDNN ms", "fastres ms", "x oneDNN", "of floor"):
        rich.add_column(name, justify="right", header_style="bold")
    rich.add_column("most ms above the floor", header_style="bold")
    for network in dict.fromkeys(name for found in table["layers"] for name in found["counts"]):
        rich.add_row(*summary(network, table["layers"]))
    console.print(rich)
    console.print()


def summary(network: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """The convolutions of one network together, and the two shapes that lose most time against their floors."""
    own = [(found["counts"][network], found) for found in rows if network in found["counts"]]
    ours, theirs = (1e3 * sum(n * found["seconds"][name] for n, found in own) for name in PROVIDERS)
    floor = 1e3 * sum(n * found["floor_seconds"] for n, found in own)
    lost = [(1e3 * n * (found["seconds"]["fastres"] - found["floor_seconds"]), found["shape"]) for n, found in own]
    worst = "\n".join(f"{shape}: {ms:.2f}" for ms, shape in sorted(lost, reverse=True)[:2] if ms > 0)
    return [network, f"{theirs:.1f}", f"{ours:.1f}", f"{theirs / ours:.2f}", f"{floor / ours:.0%}", worst]


def run(
    console: Console, batches: Sequence[int], networks: Sequence[str], threads: int, seconds: float
) -> list[dict[str, Any]]:
    """Measure and show the tables of these batch sizes.

    Raises:
        UserError: for an unknown network, or a number that is too small.
        ContenderError: if a provider dies.
    """
    if min(batches) < 1 or seconds <= 0 or threads < 0:
        raise UserError("batch sizes, threads and seconds must be above zero")
    layers_of(networks)  # a typing error must not cost a minute
    tables = []
    for batch in batches:
        tables.append(measure(batch, networks, threads, seconds))
        show(console, tables[-1])
    return tables


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES), metavar="N", help="(default: 1 16)")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), metavar="NAME", help="of fastres.models")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="(default: one per core)")
    parser.add_argument("--seconds", type=float, default=60, metavar="S", help="of each batch size (default: 60)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.networks, options.batch[0], options.threads)
        return 0
    console = Console(width=max(Console().width, report.WIDTH), highlight=False)
    try:
        tables = run(console, options.batch, options.networks, options.threads, options.seconds)
    except (UserError, process.ContenderError) as error:
        print(f"cpu_layers.py: error: {error}", file=sys.stderr)
        return 2
    if options.json:
        report.write_json({"schema": 1, "machine": machine.describe(), "tables": tables}, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
