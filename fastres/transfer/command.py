"""What `fastres transfer` does around a transfer: options, exit codes."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from fastres.errors import UserError
from fastres.train import Stopped
from fastres.train.options import AUGMENTATIONS, DATA
from fastres.transfer.options import MODES, Options
from fastres.transfer.run import resume, transfer

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """

Without --checkpoint it runs an example: a network learns the digits 0 to 4, then 5 to 9 from a few images of each,
beside one that starts from scratch; it prints a table and writes CSV, PNG and one HTML page into runs/transfer.

With --checkpoint it puts weights to work on your images (train/CLASS/*.jpg and val/CLASS/*.jpg in the folder --root).
features: a head is trained on features that the frozen, fused network computes once; they are kept on the disk.
finetune: a new head and the last stages are trained; the rest is frozen, with its batch-norm statistics.

Examples:
  fastres transfer                                         the example: some minutes
  fastres transfer --shots 1 3 10 --seeds 0 1 2 3 4
  fastres transfer --checkpoint resnet50.pth --model resnet50 --root photos
  fastres transfer --checkpoint resnet50.pth --model resnet50 --root photos --hidden 256 --patience 10
  fastres transfer --checkpoint weights.safetensors --root photos --mode finetune --unfreeze layer4,layer3 --patience 5
  fastres transfer --resume runs/transfer-folder-resnet18-finetune"""

#: Of the example; it knows no other options.
_EXAMPLE = ("shots", "seeds", "mode", "out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastres transfer`. One that is not given is not in the result: `Options.of` has the defaults."""

    def add(to: Any, name: str, help: str, **more: Any) -> None:
        to.add_argument(name, help=help, default=argparse.SUPPRESS, **more)

    number, real = {"type": int, "metavar": "N"}, {"type": float, "metavar": "X"}
    add(
        parser,
        "--checkpoint",
        "weights: .pth, .pt or .safetensors, with torchvision's, timm's or our names",
        metavar="FILE",
    )
    add(
        parser,
        "--model",
        "a model of fastres.models, or package.module:callable (default: resnet18; for small images resnet20)",
        metavar="NAME",
    )
    add(parser, "--mode", "features or finetune (default: features; in the example both)", choices=tuple(MODES))
    add(parser, "--data", f"{', '.join(DATA)} (default: folder)", metavar="NAME")
    add(parser, "--root", "where the files of the data are", metavar="FOLDER")
    add(parser, "--size", "height and width of the images of folders (default: the model's)", **number)
    add(parser, "--epochs", "passes over the images (default: 60; finetune 15)", **number)
    add(parser, "--batch", "images a step (default: 64; finetune 32)", **number)
    add(parser, "--lr", "highest learning rate of the head (default: 0.05; finetune 0.02)", **real)
    add(parser, "--weight-decay", "of what is trained (default: 1e-4)", **real)
    add(parser, "--patience", "end when the error has not fallen for N epochs, with the best weights (default: 0, off)",
        **number)  # fmt: skip
    add(parser, "--hidden", "a hidden layer of this width in the new head (default: 0, none)", **number)
    add(parser, "--no-fuse", "run in eager PyTorch", dest="fused", action="store_false")
    add(parser, "--seed", "of head, order of the images, augmentation (default: 0)", **number)
    add(parser, "--device", "cpu or cuda (default: cpu)", metavar="NAME")
    add(parser, "--workers", "processes that load images (default: for folders 2, else 0)", **number)
    add(parser, "--out", "the folder of the run (default: runs/transfer-DATA-MODEL-MODE)", metavar="FOLDER")
    parser.add_argument("--overwrite", action="store_true", help="also where another run has left its files")
    features = parser.add_argument_group("with --mode features")
    add(features, "--cache", "where features are kept (default: runs/features)", metavar="FOLDER")
    finetune = parser.add_argument_group("with --mode finetune")
    parser.add_argument("--resume", metavar="FOLDER", help="continue the fine-tuning in this folder, with its options")
    add(finetune, "--unfreeze", "parts that are trained, with all behind them: layer4,layer3; all; none (default: the "
        "last stage)", type=_names, metavar="LIST")  # fmt: skip
    add(finetune, "--gradual", "epochs between unfreezings, from the head to the input; 0: all at once (default: 1)",
        **number)  # fmt: skip
    add(finetune, "--backbone-lr", "learning rate of the last part (default: a tenth of --lr)", **real)
    add(finetune, "--lr-decay", "from each part to the one before it (default: 0.5)", **real)
    add(finetune, "--augment", f"{', '.join(AUGMENTATIONS)}", metavar="NAME")
    add(finetune, "--amp", "autocast to bfloat16", action="store_true")
    add(finetune, "--keep-head", "load the head too: the classes are the checkpoint's", action="store_true")
    example = parser.add_argument_group("in the example")
    add(example, "--shots", "images a class to learn from (default: 1 5 20)", type=int, nargs="+", metavar="N")
    add(example, "--seeds", "repeat with other images and heads (default: 1 2 3)", type=int, nargs="+", metavar="N")


def _names(text: str) -> list[str]:
    return [] if text == "none" else [name.strip() for name in text.split(",") if name.strip()]


def run(given: argparse.Namespace) -> int:
    """Transfers, continues, or runs the example. The exit code is 1 if a run diverged or a file could not be written,
    and 128 and the signal's number if one ended it."""
    names = {field.name for field in dataclasses.fields(Options)} | set(_EXAMPLE)
    options = {name: value for name, value in vars(given).items() if name in names}
    try:
        if given.resume is not None:
            if given.overwrite:
                raise UserError("--overwrite starts a run anew, --resume continues one: give one of them")
            resume(given.resume, **options)
        elif set(options) <= set(_EXAMPLE) and not given.overwrite:
            _example(**options)
        elif wrong := [name for name in ("shots", "seeds") if name in options]:
            raise UserError(f"--{wrong[0]} is for the example, which has only --{', --'.join(_EXAMPLE)}")
        else:
            transfer(Options.of(**options), overwrite=given.overwrite)
    except Stopped as stop:
        print(f"fastres transfer: {stop}", file=sys.stderr)
        return 128 + stop.signal if stop.signal else 1
    return 0


def _example(mode: str | None = None, out: str = "runs/transfer", **given: Any) -> None:
    from fastres.transfer import example

    methods = example.METHODS if mode is None else ("scratch", mode)
    report = example.digits(example.Setting(**given), methods)
    print(report)
    print("\nwritten: " + " ".join(map(str, report.write(Path(out)))))
