"""fastres on the CPU beside its peers: one command, one part after the other, a JSON file and a chart for each.

    python benchmarks/cpu.py                       everything: about half an hour on 2 cores, by estimate
    python benchmarks/cpu.py layers depth          these parts only
    make bench-cpu ARGS='networks --peers onnxruntime,openvino'
    make bench-cpu ARGS='batch threads --quick'    a smoke run; its figures mean nothing

    networks   inference and training of whole networks, with errors, memory and set-up times
    layers     every convolution: GFLOP/s, GB/s, share of what the processor can do     (cpu_layers.py)
    memory     what a training step saves for its backward pass, and its peak           (memory.py)
    batch      inference of ResNet-18 and -50 with 1 to 64 images
    threads    the same with 1 and 2 threads
    depth      inference of ResNet-18 to -152
    avx2       everyone held to AVX2, on a processor with more
    bf16       inference and training in bf16, on a processor that has it

Whole networks are measured by the harness of `fastres bench` (own processes, interleaved rounds). Points that parts
share are measured once. A part is written as soon as its last point is measured.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import cpu_layers
import memory
import plots
import sweeps
from rich.console import Console

from fastres.bench import command, harness, machine, plot, report
from fastres.bench.process import ContenderError
from fastres.errors import UserError

RESULTS = Path(__file__).parent / "results" / "local"
PARTS = ("networks", "layers", "memory", "batch", "threads", "depth", "avx2", "bf16")


class Results:
    """Writes what the parts give: <folder>/cpu-2core-avx2-<part>.json and .png."""

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder, self.console = folder, console
        self.machine = machine.describe()  # before anything of ours loads the machine
        self.date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.start = time.monotonic()

    def write(
        self, part: str, tables: list[dict[str, Any]], draw: Callable[..., None] = lambda result, path: None
    ) -> None:
        result = {
            "schema": 1,
            "part": part,
            "date": self.date,
            "seconds": round(time.monotonic() - self.start, 1),
            "command": shlex.join(["benchmarks/cpu.py", *sys.argv[1:]]),
            "machine": self.machine,
            "tables": tables,
        }
        path = self.folder / f"{stem()}-{part}.json"
        chart = path.with_suffix(".png")
        chart.unlink(missing_ok=True)  # of an earlier run
        report.write_json(result, path)
        try:
            draw(result, path=chart)
        except ImportError as error:
            self.console.print(f"no chart: {error}")
        written = [str(file) for file in (path, chart) if file.exists()]
        self.console.print(f"{part}: {' and '.join(written)}\n", soft_wrap=True)


def stem() -> str:
    """How result files of this machine are called: "cpu-2core-avx2"."""
    found = machine.cpu()
    isa = [name for flag, name in (("avx512f", "avx512"), ("avx2", "avx2"), ("asimd", "neon")) if flag in found["isa"]]
    return "-".join(["cpu", f"{found['cores']}core", *isa[:1]])


def run_networks(parts: list[sweeps.Part], options: argparse.Namespace, results: Results) -> bool:
    """Measure the points of these parts; show and write a part when its last one is done. Whether fastres never
    failed."""
    contenders = [name for name in command.contenders(options.peers) if name != "eager" or options.peers]
    measured: dict[sweeps.Point, dict[str, Any]] = {}
    pending = list(parts)
    for group in sweeps.runs([point for part in parts for point in part.points]):
        with command.progress("cpu.py") as say:
            tables = sweeps.measure(group, contenders, options.seconds, 3 if options.quick else 15, say)
        measured.update(zip(group, tables, strict=True))
        for part in [part for part in pending if all(point in measured for point in part.points)]:
            pending.remove(part)
            finish(part, [measured[point] for point in part.points], results)
    rows = [row for table in measured.values() for row in table["contenders"]]
    return all((row["name"], row["status"]) != (harness.OURS, "failed") for row in rows)


def finish(part: sweeps.Part, tables: list[dict[str, Any]], results: Results) -> None:
    console = results.console
    if part.name == "networks":
        for text in report.tables({"tables": tables}):
            console.print(text)
        console.print(report.LEGEND + "\n", style="dim")
    sweeps.show(console, part, tables)
    results.write(part.name, tables, partial(plots.sweep, along=part.along) if part.along else plot.write)


def run(options: argparse.Namespace) -> int:
    """Run the parts that are asked for. The exit code is 1 if fastres itself failed somewhere.

    Raises:
        UserError: for an unknown part or contender, or a value out of range.
        ContenderError: if the memory of a contender cannot be measured.
    """
    wanted = options.parts or list(PARTS)
    if unknown := [name for name in wanted if name not in PARTS]:
        raise UserError(f"no part is named {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if options.threads < 0 or options.seconds <= 0:
        raise UserError("--threads and --seconds must be above zero")
    command.contenders(options.peers)  # a typing error must not cost minutes
    console = Console(highlight=False)
    console.width = max(console.width, report.WIDTH)
    threads = options.threads or machine.physical_cores()
    results = Results(options.out, console)
    console.print(report.machine_line({"machine": results.machine, "date": results.date}) + "\n", soft_wrap=True)
    if "layers" in wanted:
        seconds = 5 if options.quick else 60
        tables = cpu_layers.run(console, cpu_layers.BATCHES, cpu_layers.NETWORKS, threads, seconds)
        results.write("layers", tables, partial(plots.layers, lagging=cpu_layers.LAGGING))
    if "memory" in wanted:
        tables = memory.run(list(memory.MODELS), batch=4, size=64 if options.quick else 224, threads=threads)
        memory.show(console, tables)
        results.write("memory", tables)
    parts = []
    for part in [part for part in sweeps.parts(threads, results.machine["cpu"]) if part.name in wanted]:
        if part.skipped:
            console.print(f"{part.name}: skipped: {part.skipped}\n")
        else:
            parts.append(sweeps.smaller(part) if options.quick else part)
    return 0 if run_networks(parts, options, results) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--peers", metavar="LIST", help="as for fastres bench (default: all but contiguous eager)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="(default: one per core)")
    parser.add_argument(
        "--seconds", type=float, default=5.0, metavar="S", help="for the rounds of a table of networks (default: 5)"
    )
    parser.add_argument("--quick", action="store_true", help="small images and few rounds: does it work?")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="(default: results/local)")
    options = parser.parse_args()
    # A terminated benchmark ends its contenders and removes its files, as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return run(options)
    except (UserError, ContenderError) as error:
        print(f"cpu.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cpu.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
