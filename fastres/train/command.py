"""What `fastres train` does around a run: options, exit codes."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from typing import Any

from fastres.errors import UserError
from fastres.train.loop import Stopped
from fastres.train.options import AUGMENTATIONS, DATA, Options
from fastres.train.run import resume, train
from fastres.train.schedule import SCHEDULES

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """

Writes last.pt (a checkpoint after every epoch), log.csv, curves.png and weights.pt into the folder of the run. Ctrl-C
ends it after the current step, with a checkpoint; --resume continues it as if nothing had happened. Under torchrun all
processes train together. Defaults depend on the data set; those of CIFAR are the paper's.

Examples:
  fastres train                                            ResNet-20 on scikit-learn's digits: some minutes
  fastres train --model resnet56 --ema 0.99 --seed 1
  fastres train --resume runs/digits-resnet20-0            go on where it was left
  fastres train --data cifar10 --root data --model resnet110
  fastres train --data folder --root photos --model resnet50 --device cuda --amp
  fastres train --data synthetic --epochs 1 --no-fuse"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastres train`. One that is not given is not in the result: `Options.of` has the defaults."""

    def add(name: str, help: str, **more: Any) -> None:
        parser.add_argument(name, help=help, default=argparse.SUPPRESS, **more)

    number, real = {"type": int, "metavar": "N"}, {"type": float, "metavar": "X"}
    parser.add_argument("--resume", metavar="FOLDER", help="continue the run in this folder, with its options")
    parser.add_argument("--overwrite", action="store_true", help="also where another run has left a checkpoint")
    add("--data", f"{', '.join(DATA)} (default: digits)", metavar="NAME")
    add("--root", "where the files of the data are", metavar="FOLDER")
    add(
        "--model",
        "a model of fastres.models, or package.module:callable for your own (default: resnet20, for folders resnet18)",
        metavar="NAME",
    )
    add("--no-fuse", "train in eager PyTorch", dest="fused", action="store_false")
    add("--epochs", "passes over the images", **number)
    add("--batch", "images a step, over all processes and micro-batches", **number)
    add("--accumulate", "micro-batches a step, to save memory (default: 1)", **number)
    add("--lr", "highest learning rate (default: 0.1)", **real)
    add("--momentum", "of SGD (default: 0.9)", **real)
    add("--weight-decay", "of all parameters (default: 1e-4)", **real)
    add("--schedule", f"of the learning rate: {' or '.join(SCHEDULES)}", metavar="NAME")
    add("--milestones", "epochs at which the rate of --schedule step falls", type=int, nargs="*", metavar="EPOCH")
    add("--gamma", "the factor by which it falls (default: 0.1)", **real)
    add("--warmup", "steps in which the rate rises, or paper: a tenth until the training error is below 80 %%",
        type=_warmup, metavar="N")  # fmt: skip
    add("--label-smoothing", "share of the target that goes to all classes alike (default: 0)", **real)
    add("--ema", "decay of a moving average of the weights, such as 0.999 (default: none)", **real)
    add("--amp", "autocast to bfloat16", action="store_true")
    add("--sync-bn", "batch norm with the statistics of all processes", action="store_true")
    add("--augment", f"{', '.join(AUGMENTATIONS)}", metavar="NAME")
    add("--size", "height and width of the images of folders (default: 224) and synthetic ones (default: 32)", **number)
    add("--seed", "of weights, order of the images, augmentation (default: 0)", **number)
    add("--device", "cpu or cuda (default: cpu)", metavar="NAME")
    add("--workers", "processes that load images (default: for folders 2, else 0)", **number)
    add("--checkpoint-every", "also a checkpoint every N steps (default: at the end of epochs)", **number)
    add("--tensorboard", "also log for TensorBoard", action="store_true")
    add("--out", "the folder of the run (default: runs/DATA-MODEL-SEED)", metavar="FOLDER")


def _warmup(text: str) -> int | str:
    if text == "paper":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'a number of steps or "paper", not {text!r}') from None


def run(given: argparse.Namespace) -> int:
    """Trains, or continues. The exit code is 1 if the run diverged or a file could not be written, and 128 and the
    signal's number if one ended it."""
    names = {field.name for field in dataclasses.fields(Options)}
    options = {name: value for name, value in vars(given).items() if name in names}
    try:
        if given.resume is None:
            train(Options.of(**options), overwrite=given.overwrite)
        elif given.overwrite:
            raise UserError("--overwrite starts a run anew, --resume continues one: give one of them")
        else:
            resume(given.resume, **options)
    except Stopped as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"fastres train: {stop}", file=sys.stderr)
        return 128 + stop.signal if stop.signal else 1
    return 0
