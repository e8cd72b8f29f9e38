"""The `fastres verify` and `fastres explain` commands: a model is made, runs fused, and is judged."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastres.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fastres.explain import ExplainReport

MODEL = "a model of fastres.models (resnet18, resnet50, ...), or package.module:callable for your own"


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds both to the command line."""
    verify = add(
        "verify",
        _verify,
        "prove that fusing did not change a model's numbers: eager and fused, both against float64",
        """

Compares every fused site and the whole model: outputs, gradients, running statistics and counters. Prints a table;
the exit code is 1 if anything lies outside its budget. A callable may return (model, inputs): these are used as they
are.

Examples:
  fastres verify resnet50                                  evaluation mode, then training mode
  fastres verify resnet50 --mode train --dtype bfloat16
  fastres verify resnet18 --checkpoint mine.pth --json certificate.json
  fastres verify mynet.models:make_model --junit parity.xml
  fastres verify torchvision.models:resnext50_32x4d --mode eval""",
    )
    _add_workload(verify)
    verify.add_argument("--mode", choices=("eval", "train", "both"), default="both", help="(default: both)")
    verify.add_argument("--junit", type=Path, metavar="FILE", help="also write JUnit XML there, a test case a site")
    explain = add(
        "explain",
        _explain,
        "say what of a model runs fused, by which kernel, and why the rest does not",
        """

Counts the activations that each block reads and writes and what it keeps for backward, in eager and as it runs.

Examples:
  fastres explain resnet50
  fastres explain resnet50 --mode train --time --html report.html
  fastres explain mynet.models:make_model --require 95%
  fastres explain torchvision.models:densenet121 --mode train --all""",
    )
    _add_workload(explain)
    explain.add_argument("--mode", choices=("eval", "train"), default="eval", help="(default: eval)")
    explain.add_argument("--time", action="store_true", help="also measure how long each block takes, eager and fused")
    explain.add_argument("--all", action="store_true", help="a line for every operation, also for those that are fused")
    explain.add_argument("--html", type=Path, metavar="FILE", help="also write a page there")
    explain.add_argument(
        "--require",
        type=_percent,
        metavar="PERCENT",
        help="exit code 1 if fewer of the operations run fused, with a line for each that does not",
    )


def _add_workload(command: argparse.ArgumentParser) -> None:
    """The options that say which model on which input."""
    command.add_argument("model", metavar="MODEL", help=MODEL)
    command.add_argument("--batch", type=int, metavar="N", help="images in the batch (default: 2)")
    command.add_argument(
        "--size", type=int, metavar="N", help="height and width of the images (default: the model's, 224 or 32)"
    )
    command.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default: float32)")
    command.add_argument(
        "--layout",
        choices=("channels_last", "contiguous"),
        help="memory order of model and images (default: channels_last, which the kernels are for)",
    )
    command.add_argument(
        "--checkpoint", metavar="FILE", help="weights, .pth or .safetensors (default: seeded, calibrated)"
    )
    command.add_argument("--images", metavar="FOLDER", help="photographs (default: those that scikit-learn ships)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and gradients (default: 0)")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")


def _percent(text: str) -> float:
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no percentage, such as 95%")
    return value


def _workload(options: argparse.Namespace) -> tuple[nn.Module, tuple[Any, ...], torch.dtype]:
    """The model in float32 eval mode, its inputs, and the dtype that was asked for."""
    import torch

    from fastres import factory, models
    from fastres import images as photographs
    from fastres.bench.task import DTYPES, prepare_

    if options.dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, not {options.dtype}")
    size = models.image_size(options.model) if options.size is None else options.size
    batch = 2 if options.batch is None else options.batch
    for what, value in (("batch", batch), ("size", size)):
        if value < 1:
            raise UserError(f"--{what} must be at least 1, not {value}")
    torch.manual_seed(options.seed)
    model, inputs = factory.make(options.model)
    dtype = getattr(torch, options.dtype)
    if inputs is not None:
        if given := [name for name in ("batch", "size", "images", "layout") if getattr(options, name) is not None]:
            raise UserError(f"--{given[0]} has no meaning: {options.model} comes with inputs of its own")
        if options.checkpoint is not None:
            models.load_checkpoint(model, options.checkpoint)
        return model, inputs, dtype
    images = photographs.photographs(max(8, batch), size, folder=options.images)
    model = prepare_(model, images, options.checkpoint)
    order = torch.contiguous_format if options.layout == "contiguous" else torch.channels_last
    as_module: Any = model  # whose stub wants channels_last only
    return as_module.to(memory_format=order), (images[:batch].contiguous(memory_format=order),), dtype


def _write_json(found: Any, path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")


def _verify(options: argparse.Namespace) -> int:
    model, inputs, dtype = _workload(options)
    from fastres.verify import junit, verify

    modes = ("eval", "train") if options.mode == "both" else (options.mode,)
    certificates = {}
    for mode in modes:
        certificates[mode] = verify(model, inputs, mode=mode, dtype=dtype, seed=options.seed)
        print(certificates[mode], flush=True)
    found = {mode: certificate.to_json() for mode, certificate in certificates.items()}
    _write_json(found if len(found) > 1 else found[modes[0]], options.json)
    if options.junit is not None:
        junit.write(certificates.values(), options.junit)
    return 0 if all(certificate.ok for certificate in certificates.values()) else 1


def _explain(options: argparse.Namespace) -> int:
    import torch

    import fastres

    model, inputs, dtype = _workload(options)
    fastres.fuse_(model)
    inputs = tuple(x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)
    report = fastres.explain(model.to(dtype).train(options.mode == "train"), inputs, time=options.time)
    print(f"{options.model}, {options.mode} mode, {options.dtype}, on {report.device}: ", end="")
    _print(report)
    if options.all:
        for row in report.rows:
            how = f"fused, {row.op} {row.kernel} {row.method}".rstrip() if row.fused else f"{row.code}: {row.reason}"
            print(f"  {row.name or '(model)':<32} {row.kind:<5} {how}")
    _write_json(report.to_json(), options.json)
    if options.html is not None:
        report.to_html(options.html)
    if options.require is None or 100 * report.fused_share >= options.require:
        return 0
    for row in report.lost:
        print(f"lost: {row.name or '(model)'} [{row.kind}]: {row.code}: {row.reason}")
    print(f"{report.fused_share:.1%} of the operations run fused, {options.require:g} % are required")
    return 1


def _print(report: ExplainReport) -> None:
    """As text; on a terminal with colours, where rich is installed."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
            from rich.text import Text
        except ImportError:
            pass
        else:
            console = Console(highlight=False)
            for line in report.headline():
                console.print(Text(line))
            titles, lines = report.table()
            table = Table(box=None, pad_edge=False, header_style="bold")
            for i, title in enumerate(titles):
                table.add_column(title, justify="left" if i in (0, 2) else "right", no_wrap=i != 2)
            for cells in lines:
                fused, total = cells[1].split(" of ")
                style = "green" if fused == total else "yellow" if int(fused) else "red"
                table.add_row(*(Text(cell, style=style if i < 2 else "") for i, cell in enumerate(cells)))
            console.print(table)
            for line in (*(f"not fused, {line}" for line in report.not_fused()), *report.notes()):
                console.print(Text(line))
            return
    print(report)
