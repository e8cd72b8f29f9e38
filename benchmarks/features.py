"""Images/s of `fastres transfer --mode features`: the frozen backbone fused, and in eager PyTorch.

    python benchmarks/features.py                        ResNet-18 and -50, 224 px, batch 16
    python benchmarks/features.py resnet34 --batch 32 --json out.json

The network is what `fastres.transfer.feature_extractor` gives: without its head, frozen, in eval mode, under no_grad.
`fastres bench`'s harness measures it: every contender alone in a process of its own, in turns, with the same weights
and photographs; eager PyTorch in both layouts. Decoding images is left out: it is the same for all.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from fastres import models
from fastres.bench import command, harness, report
from fastres.errors import UserError
from fastres.transfer import feature_extractor

MODELS = ("resnet18", "resnet50")
CONTENDERS = ["eager", "channels_last", "fastres"]


def __getattr__(name: str) -> Callable[[], nn.Module]:
    """The backbone of any model, as "features:resnet18": what the contenders' processes build."""
    if name not in models.list_models():
        raise AttributeError(name)
    return lambda: feature_extractor(models.create_model(name, fused=False), fuse=False)


def run(names: list[str], batch: int, threads: int, size: int, rounds: int, seconds: float) -> dict[str, Any]:
    """The result of the harness, a table for each model.

    Raises:
        UserError: for an unknown model, or a value out of range.
    """
    for name in names:
        models.describe(name)  # its own error for an unknown name
    here = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    options = harness.Options(
        models=[f"features:{name}" for name in names],
        modes=["infer"],
        batches={"infer": [batch]},
        contenders=CONTENDERS,
        threads=threads,
        size=size or max(models.image_size(name) for name in names),
        rounds=rounds,
        seconds=seconds,
    )
    with command.progress("features.py") as say:
        return harness.run(options, say)


def summary(result: dict[str, Any]) -> list[str]:
    """A line for each model: images/s, and the ratio to the stronger layout of eager PyTorch."""
    lines = []
    for table in result["tables"]:
        rows = {row["name"]: row for row in table["contenders"] if row["status"] == "ok"}
        if len(rows) < len(CONTENDERS):
            lines.append(
                f"{table['title']}: " + "; ".join(row["reason"] for row in table["contenders"] if row["reason"])
            )
            continue
        speed = {name: row["images_per_second"] for name, row in rows.items()}
        eager = max(speed["eager"], speed["channels_last"])
        lines.append(
            f"{table['model'].partition(':')[2]}, batch {table['batch']}, {table['size']} px: fused "
            f"{speed['fastres']:.1f} images/s, eager {eager:.1f}: {speed['fastres'] / eager:.2f} times as fast"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"(default: {' '.join(MODELS)})")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="(default: 16)")
    parser.add_argument("--size", type=int, default=0, metavar="N", help="height and width (default: the models')")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="(default: one per core)")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="at most (default: 15)")
    parser.add_argument("--seconds", type=float, default=60, metavar="X", help="for each model's rounds (default: 60)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    given = parser.parse_args()
    try:
        names = given.models or list(MODELS)
        result = run(names, given.batch, given.threads, given.size, given.rounds, given.seconds)
    except UserError as error:
        print(f"features.py: error: {error}", file=sys.stderr)
        return 2
    console = Console(width=max(Console().width, report.WIDTH), highlight=False)
    for part in report.tables(result):
        console.print(part)
    console.print(report.machine_line(result))
    print("\n".join(summary(result)))
    if given.json:
        report.write_json(result, given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
