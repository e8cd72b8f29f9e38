#!/usr/bin/env python3
"""Fuses every model of convolutions and batch norms that timm, torchvision, Hugging Face transformers and
segmentation_models_pytorch build without a download, and checks that numbers and models stay what they were.

    python scripts/sweep.py                         all models up to 30 million parameters; goes on where it was stopped
    python scripts/sweep.py timm smp --only resnet  those of two libraries whose names contain "resnet"
    python scripts/sweep.py --write                 also writes benchmarks/results/sweep.json and docs/sweep.md

What is checked: sweep_check.py. Every model runs in a process of its own, with one thread and a time limit. Each result
is a line of build/sweep.jsonl; what passed is not run again until `--again`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]

import _torchvision  # noqa: E402
import sweep_check  # noqa: E402
import sweep_models  # noqa: E402
import sweep_table  # noqa: E402

#: Sides of images that are tried, and images in a batch.
SIDES, BATCH = (64, 96, 128, 192, 224, 256), 2


def main() -> int:
    options = _options()
    torch.set_num_threads(1)
    if reason := _torchvision.load()[1]:
        print(f"no torchvision, and so no timm and no segmentation_models_pytorch either: {reason}")
    models, missing = [], []
    for library in options.libraries or sweep_models.LIBRARIES:
        try:
            models += sweep_models.all_models((library,))
        except ImportError as error:
            missing.append(f"{library}: {error}")
    done = {} if options.again else _load(options.log)
    models = [model for model in models if all(part in model.key for part in options.only)]
    for model in models:
        before = done.get(model.key, {"verdict": "fail"})
        large = before["verdict"] == "too large" and before["parameters"] <= options.parameters * 1e6
        if (before["verdict"] == "fail" or large) and not options.table:
            done[model.key] = _one(model, options)
            _append(options.log, done[model.key])
            print(sweep_table.line(done[model.key]), flush=True)
    found = [done[model.key] for model in models if model.key in done]
    sweep_table.show(found, missing)
    if options.write:
        sweep_table.write(found, missing, ROOT, len(models))
    return int(any(entry["verdict"] == "fail" for entry in found))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("libraries", nargs="*", help=f"of {', '.join(sweep_models.LIBRARIES)}; default all")
    parser.add_argument("--only", action="append", default=[], help="models whose library and name contain this")
    parser.add_argument("--parameters", type=float, default=30, help="millions a model may have (default 30)")
    parser.add_argument("--seconds", type=float, default=300, help="time limit of one model (default 300)")
    parser.add_argument("--again", action="store_true", help="do not read earlier results")
    parser.add_argument("--table", action="store_true", help="run nothing: the table of what was run before")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/sweep.json and docs/sweep.md")
    parser.add_argument("--log", type=Path, default=ROOT / "build" / "sweep.jsonl", help="results, line by line")
    return parser.parse_args()


def _load(log: Path) -> dict[str, dict[str, Any]]:
    lines = log.read_text().splitlines() if log.is_file() else []
    return {f"{entry['library']} {entry['name']}": entry for entry in map(json.loads, lines)}


def _append(log: Path, entry: dict[str, Any]) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def _one(model: sweep_models.Model, options: argparse.Namespace) -> dict[str, Any]:
    """Checks one model; where that ends the process, finds out whether it is eager that does."""
    entry = _in_a_process(model, options, examine)
    if entry.pop("died", False):
        alone = _in_a_process(model, options, run_eager)
        if alone.get("died"):
            entry |= {"verdict": "not built", "problems": [f"in eager, without fastres, {alone['problems'][0]}"]}
    return entry


def _in_a_process(
    model: sweep_models.Model, options: argparse.Namespace, what: Callable[[sweep_models.Model, float], dict[str, Any]]
) -> dict[str, Any]:
    """what(model, most parameters) in a process of its own, which has all libraries loaded."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_worker, args=(what, model, options.parameters * 1e6, send))
    start = time.monotonic()
    process.start()
    send.close()
    entry: dict[str, Any] = {"library": model.library, "name": model.name}
    try:
        if receive.poll(options.seconds):
            entry |= receive.recv()
        else:
            entry |= {"verdict": "fail", "problems": [f"took more than {options.seconds:.0f} s"]}
    except EOFError:
        process.join()
        reason = f"the process ended with status {process.exitcode}"
        entry |= {"verdict": "fail", "problems": [reason], "died": True}
    process.kill()
    process.join()
    return entry | {"seconds": round(time.monotonic() - start, 1)}


def _worker(what: Any, model: sweep_models.Model, most: float, send: Any) -> None:
    torch.manual_seed(0)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    send.send(what(model, most))


def examine(model: sweep_models.Model, most: float) -> dict[str, Any]:
    """Builds and checks a model: its result, with "verdict": "pass", "fail", "too large" or "not built"."""
    try:
        with torch.device("meta"):
            count = sum(p.numel() for p in model.build().parameters())
        if count > most:
            return {"verdict": "too large", "parameters": count}
    except Exception:  # does not build without data: building it tells how large it is
        count = 0
    try:
        network = model.build()
        count = sum(p.numel() for p in network.parameters())
        if count > most:
            return {"verdict": "too large", "parameters": count}
        x = sample_input(network)
    except Exception as error:  # whatever the library raises is the reason
        return {"verdict": "not built", "problems": [_short(error)]}
    try:
        result = sweep_check.check(network, x)
    except sweep_check.NoOracle as error:
        return {"verdict": "not built", "problems": [str(error).splitlines()[0][:200]]}
    except Exception as error:
        return {
            "verdict": "fail",
            "problems": [_short(error)],
            "traceback": traceback.format_exc(),
            "parameters": count,
        }
    return {"verdict": "fail" if result.problems else "pass", "side": x.shape[-1], **dataclasses.asdict(result)}


def run_eager(model: sweep_models.Model, most: float) -> dict[str, Any]:
    """The eager part of `examine` alone."""
    network = model.build()
    sweep_check.run_eager(network, sample_input(network))
    return {}


def sample_input(network: torch.nn.Module) -> torch.Tensor:
    """The smallest images that the network takes in both modes."""
    for side in SIDES:
        x = torch.nn.functional.interpolate(
            torch.randn(BATCH, 3, side // 8, side // 8), scale_factor=8, mode="bilinear"
        )
        x = x + 0.5 * torch.randn_like(x)
        try:
            with torch.no_grad():
                network.eval()(x)
                network.train()(x)
            return x
        except Exception as error:
            last = error
    raise last


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"


if __name__ == "__main__":
    sys.exit(main())
