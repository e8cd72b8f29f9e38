"""fastres on a GPU beside its peers: one command, in units that are measured once and resumed.

    python benchmarks/gpu.py                              the next 8 minutes of what is not measured yet
    python benchmarks/gpu.py ceilings ops                 these stages only
    python benchmarks/gpu.py networks/resnet50 --minutes 9
    python benchmarks/gpu.py --list                       units, in order, and which are done
    make bench-gpu ARGS='ops/bf16 --again'
    python benchmarks/gpu.py --device cpu --quick         does it work? the figures mean nothing

    ceilings      GB/s of copies, TFLOP/s of matrix products
    networks      ResNet-18, -50, -152, training and inference: images/s, memory; and parity, errors against float64
    ops           every normalising op at the shapes of ResNet-50 and -18: GB/s, share of the copy's
    convolutions  every convolution of ResNet-50: cuDNN, its fused forms, our kernels: TFLOP/s, share of the product's
    algebraic     matrix products of the library for the algebraic batch norm, beside the ordinary way
    split         where the time of a training step goes: convolutions, normalising, the rest; the longest kernels

A stage has units. Each is written into one file, gpu-<device>.json, as soon as it is measured, with device, versions,
date and command; a run goes on with those that are missing. Needs PyTorch, Triton and NumPy only.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import gpu_networks
import gpu_ops
import gpu_plots
import gpu_products
import gpu_profile
import gpu_tables
import torch
from gpu_timing import Stopwatch, reason

from fastres.bench import machine, report
from fastres.bench.process import ContenderError
from fastres.errors import UserError
from fastres.kernels import table

HERE = Path(__file__).parent / "results"
STAGES = ("ceilings", "ops", "networks", "parity", "convolutions", "algebraic", "split")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Unit:
    """What is measured and written at once.

    Attributes:
        name: "<stage>/<what>".
        seconds: about how long it takes on a GPU; it is not started with less time left.
        run: run(say) -> its result.
        optional: only if it is named on the command line.
    """

    name: str
    seconds: float
    run: Callable[[Callable[[str], None]], dict[str, Any]]
    optional: bool = False

    @property
    def stage(self) -> str:
        return self.name.partition("/")[0]


class Results:
    """One file of results, which grows."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.device = path, device
        self.units: dict[str, Any] = {}
        if path.exists():
            try:
                self.units = json.loads(path.read_text())["units"]
            except (ValueError, KeyError) as error:
                raise UserError(f"{path} is no result file of this program: {reason(error)}") from error
        self.machine = machine.describe() | {"gpu": machine.gpu() if device == "cuda" else {}}

    def done(self, name: str) -> bool:
        return "failed" not in self.units.get(name, {"failed": ""})

    def write(self, name: str, result: dict[str, Any], seconds: float) -> None:
        about = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(["benchmarks/gpu.py", *sys.argv[1:]]),
            "seconds": round(seconds, 1),
            "machine": self.machine,
        }
        self.units[name] = about | result
        whole = self.path.with_suffix(".part")  # an interrupted run leaves the file as it was
        report.write_json({"schema": 1, "device": self.device, "units": self.units}, whole)
        whole.replace(self.path)


def slug(device: str) -> str:
    """How the result file of this device is called: "nvidia-h200"."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


def units(options: argparse.Namespace, results: Results) -> list[Unit]:
    """Every unit, in order of value."""
    quick, device = options.quick, options.device
    watch = Stopwatch(device, *((2, 0.001) if quick else ()))
    batch = 2 if quick else options.batch

    def needing(run: Callable[..., dict[str, Any]], *first: Any, images: int = batch) -> Callable[..., dict[str, Any]]:
        """A unit whose results are shares of the ceilings."""
        return lambda say: run(watch, *first, images, results.units["ceilings/all"], quick, say)

    def network(stage: str, point: gpu_networks.Point) -> Unit:
        run = partial(gpu_networks.measure, point, device, quick, options.timeout)
        return Unit(f"{stage}/{point.name}", point.seconds, run)

    if quick:
        points = gpu_networks.quick_points()
        parity, speed = ([p for p in points if p.parity is wanted] for wanted in (True, False))
    else:
        parity, speed = gpu_networks.parity_points(), gpu_networks.speed_points()
    ops = {
        name: Unit(f"ops/{name}", 80, needing(gpu_ops.ops, dtype), name == "fp16") for name, dtype in _DTYPES.items()
    }
    # Activations that fit on the chip.
    small = Unit("ops/small", 80, needing(gpu_ops.ops, torch.bfloat16, images=2 if quick else 32), optional=True)
    networks = [network("networks", point) for point in speed]
    return [
        Unit("ceilings/all", 15, lambda say: gpu_ops.ceilings(watch, quick)),
        *networks[:1],
        ops["bf16"],
        *networks[2:3],
        *(Unit(f"split/{point.name}", 30, partial(gpu_profile.split, point, device)) for point in speed[:1]),
        *networks[1:2],
        Unit("convolutions/bf16", 60, needing(gpu_products.convolutions)),
        Unit("algebraic/bf16", 20, needing(gpu_products.algebraic)),
        *networks[3:6],
        *(network("parity", point) for point in parity[:6]),
        ops["fp32"],
        *networks[6:],
        *(network("parity", point) for point in parity[6:]),
        ops["fp16"],
        small,
    ]


def chosen(all_: list[Unit], wanted: list[str]) -> list[Unit]:
    """The units whose names begin like one of `wanted`, and the ceilings, which most others need.

    Raises:
        UserError: for what fits no unit.
    """
    if not wanted:
        return [unit for unit in all_ if not unit.optional]
    for name in wanted:
        if not any(unit.name.startswith(name) for unit in all_):
            raise UserError(f"no unit begins with {name}; stages are {', '.join(STAGES)}, and --list names the units")
    return [unit for unit in all_ if unit.stage == "ceilings" or unit.name.startswith(tuple(wanted))]


def measure(pending: list[Unit], results: Results, minutes: float) -> list[str]:
    """Runs units until the time is up. Returns the names of those that failed."""
    start, failed, late = time.monotonic(), [], []
    for unit in pending:
        left = 60 * minutes - (time.monotonic() - start)
        if unit.seconds > left and unit is not pending[0]:
            late.append(unit.name)
            continue
        before = time.monotonic()
        print(f"\n== {unit.name}", flush=True)
        try:
            result = unit.run(partial(_say, before))
        except Exception as error:  # the other units may still be measured
            result = {"failed": reason(error)}
            failed.append(unit.name)
        if results.device == "cuda":
            torch.cuda.empty_cache()
        results.write(unit.name, result, time.monotonic() - before)
        print(gpu_tables.text(unit.stage, result), flush=True)
    if late:
        print(f"\n{len(late)} units do not fit into {minutes:g} minutes: run again. Next: {', '.join(late[:4])}")
    return failed


def _say(start: float, text: str) -> None:
    print(f"  {time.monotonic() - start:6.1f} s  {text}", file=sys.stderr, flush=True)


def run(options: argparse.Namespace) -> int:
    """Measures what is chosen. The exit code is 1 if a unit, or fastres in one, failed.

    Raises:
        UserError: for an unknown unit or device.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("this PyTorch sees no CUDA device; --device cpu --quick shows whether the program works")
    folder = options.out or (HERE / "local" if options.quick or options.device == "cpu" else HERE)
    quick = "-quick" if options.quick else ""
    results = Results(folder / f"gpu-{slug(options.device)}{quick}.json", options.device)
    every = units(options, results)
    picked = chosen(every, options.units)
    if options.list:
        for unit in picked:
            print(f"{'done' if results.done(unit.name) else '    '}  {unit.name}  (about {unit.seconds:.0f} s)")
        return 0
    again = [
        unit for unit in picked if options.again and (not options.units or unit.name.startswith(tuple(options.units)))
    ]
    pending = [unit for unit in picked if unit in again or not results.done(unit.name)]
    now = {"machine": results.machine, "date": datetime.now(timezone.utc).isoformat()}
    done = len(picked) - len(pending)
    print(f"{report.machine_line(now)}\n{done} of {len(picked)} units are done already", flush=True)
    if why := gpu_networks.why_synthetic():
        print(why)
    if why := table.no_fused_kernel("bn_act", options.device):
        print(f"fastres runs eager code here: {why}")
    failed = measure(pending, results, options.minutes)
    for path, why in gpu_plots.draw(results.units, results.path):
        print(f"{path}: {why}" if why else f"chart: {path}")
    print(f"results: {results.path}")
    ours = [name for name in results.units if gpu_tables.ours_failed(results.units[name])]
    for name in dict.fromkeys((*failed, *ours)):
        print(f"failed: {name}")
    return 1 if failed or ours else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "units", nargs="*", metavar="UNIT", help=f"beginnings of units' names: {', '.join(STAGES)}, ..."
    )
    parser.add_argument("--minutes", type=float, default=8.0, metavar="M", help="start no unit that ends later")
    parser.add_argument("--again", action="store_true", help="measure what is done already once more")
    parser.add_argument("--list", action="store_true", help="name the units and measure nothing")
    parser.add_argument("--batch", type=int, default=256, metavar="N", help="images, of ops and layers (default: 256)")
    parser.add_argument(
        "--timeout", type=float, default=150.0, metavar="S", help="of the set-up of a contender (default: 150)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: cuda)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few rounds: does it work?")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="(default: results, or results/local on a CPU)")
    options = parser.parse_args()
    # A terminated benchmark ends its contenders and removes its files, as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return run(options)
    except (UserError, ContenderError) as error:
        print(f"gpu.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gpu.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
