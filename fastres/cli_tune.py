"""The `fastres tune` command: which blocks of a model are faster fused here, as a table and as a file."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from fastres.errors import UserError


def add_command(add: Callable[..., argparse.ArgumentParser]) -> None:
    tune = add(
        "tune",
        run,
        "measure every fused block beside PyTorch's, and save which of them is to run",
        """

fastres.load_tuning_(model, FILE) applies what is saved. A machine that does other work gives wrong numbers.

Examples:
  fastres tune resnet50 --batch 16 --save resnet50.tune.json
  fastres tune resnet20 --batch 1 --mode eval
  fastres tune torchvision.models:resnext50_32x4d --mode train --dtype bfloat16 --seconds 60""",
    )
    tune.add_argument("model", metavar="MODEL", help="a model of fastres.models, or package.module:callable")
    tune.add_argument("--batch", type=int, default=8, metavar="N", help="images in the batch (default: 8)")
    tune.add_argument(
        "--size", type=int, metavar="N", help="height and width of the images (default: the model's, 224 or 32)"
    )
    tune.add_argument("--mode", choices=("eval", "train", "both"), default="both", help="(default: both)")
    tune.add_argument(
        "--dtype",
        default="float32",
        help="float32, bfloat16 or float16 (eval: cast, train: autocast; default: float32)",
    )
    tune.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    tune.add_argument("--seconds", type=float, default=20.0, metavar="S", help="time for one mode (default: 20)")
    tune.add_argument("--save", type=Path, metavar="FILE", help="where the decisions go")
    tune.add_argument("--json", type=Path, metavar="FILE", help="where all that was measured goes")


def run(options: argparse.Namespace) -> int:
    import json

    import torch

    import fastres
    from fastres import models
    from fastres.bench.task import DTYPES, build_model

    size = models.image_size(options.model) if options.size is None else options.size
    for what, value in (("batch", options.batch), ("size", size), ("seconds", options.seconds)):
        if not value > 0:
            raise UserError(f"--{what} must be above zero, not {value}")
    if options.dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, not {options.dtype}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here")
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    model = build_model(options.model)
    fastres.fuse_(model)
    model = model.to(options.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(options.batch, 3, size, size, device=options.device).to(memory_format=torch.channels_last)
    found = {}
    for mode in ("eval", "train") if options.mode == "both" else (options.mode,):
        cast = mode == "train" and dtype is not torch.float32
        model.to(torch.float32 if mode == "train" else dtype)
        x = images if mode == "train" else images.to(dtype)
        with torch.autocast(options.device, dtype if cast else torch.bfloat16, enabled=cast):
            try:
                report = fastres.tune_(model, x, mode=mode, seconds=options.seconds, save=options.save)
            except (RuntimeError, ValueError) as error:
                raise UserError(f"{options.model}: {str(error).splitlines()[0]}") from error
        print(f"{options.model}, {mode}: {report}", flush=True)
        found[mode] = report.to_json()
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0
