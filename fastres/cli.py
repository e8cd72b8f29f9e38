"""The `fastres` command: bench, verify, explain, models, tune, train, transfer, analyze, doctor.

Wrong input is one line on stderr and exit code 2; a check that fails is exit code 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastres import cli_models, cli_tune
from fastres.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

_MODEL = "a model of fastres.models (resnet18, resnet50, ...), or package.module:callable for your own"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 fine, 1 a check failed, 2 wrong input, 130 interrupted."""
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:  # argparse has printed its message, or the help
        return int(stop.code or 0)
    try:
        code = int(options.run(options))
        sys.stdout.flush()
        return code
    except (UserError, FileNotFoundError) as error:
        message = " ".join(str(error).split())
        print(f"fastres: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastres: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) has seen enough; nothing is to be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


class _Parser(argparse.ArgumentParser):
    """Argparse's parser, whose errors are one line too."""

    def error(self, message: str) -> Any:
        self.exit(2, f"fastres: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastres",
        description="Residual networks in PyTorch, faster and with the same numbers.",
        epilog="fastres COMMAND --help says more about a command.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and stop")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], summary: str, more: str) -> argparse.ArgumentParser:
        description = f"{summary[0].upper()}{summary[1:]}.{more}"
        description, _, examples = description.partition("Examples:")
        command = commands.add_parser(
            name,
            help=summary,
            description=description,
            epilog=f"examples:{examples.rstrip()}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    _add_bench(add)
    _add_verify(add)
    _add_explain(add)
    cli_models.add_command(add)
    cli_tune.add_command(add)
    _add_train(add)
    _add_transfer(add)
    _add_analyze(add)
    _add_doctor(add)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        import fastres

        print(f"fastres {fastres.__version__}")
        parser.exit(0)


def _add_bench(add: Callable[..., argparse.ArgumentParser]) -> None:
    bench = add(
        "bench",
        _bench,
        "measure whole networks against PyTorch eager, torch.compile, ONNX Runtime, OpenVINO and ncnn",
        """

Every contender lives in a process of its own, with the same threads, weights and images, and they take turns.
Contenders that are not installed are named and left out. A machine that does other work gives wrong numbers.

Examples:
  fastres bench                                            ResNet-18 and -50, inference and training: some minutes
  fastres bench resnet34 --mode infer --batch 1 8 32       latency and throughput of one network
  fastres bench resnet50 --mode train --peers none         only eager and fastres
  fastres bench resnet20 --mode infer --batch 1            a small network for CIFAR, 32 x 32
  fastres bench resnet50 --checkpoint mine.pth --images photos/ --json out.json --plot out.png
  fastres bench torchvision.models:wide_resnet50_2         any classifier that can be imported""",
    )
    bench.add_argument("models", nargs="*", metavar="MODEL", help=f"{_MODEL} (default: resnet18 resnet50)")
    bench.add_argument(
        "--mode", choices=("infer", "train", "both"), default="both", help="what to measure (default: both)"
    )
    bench.add_argument("--batch", type=int, nargs="+", metavar="N", help="batch sizes (default: 1 and 16, training 16)")
    bench.add_argument(
        "--dtype", default="float32", help="float32, bfloat16, float16 (inference: cast, training: autocast) or tf32"
    )
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    bench.add_argument(
        "--threads", type=int, default=0, metavar="N", help="threads of every contender (default: one per core)"
    )
    bench.add_argument(
        "--peers",
        metavar="LIST",
        help="contenders beside fastres and eager channels_last, comma-separated: eager, compile, onnxruntime, "
        "openvino, ncnn; or none (default: all)",
    )
    bench.add_argument("--rounds", type=int, default=15, metavar="N", help="rounds at most (default: 15)")
    bench.add_argument(
        "--seconds",
        type=float,
        default=8.0,
        metavar="S",
        help="time for the rounds of one table; three run at least (default: 8)",
    )
    bench.add_argument("--timeout", type=float, default=300.0, metavar="S", help="time for one set-up (default: 300)")
    bench.add_argument(
        "--size",
        type=int,
        default=0,
        metavar="N",
        help="height and width of the images (default: the model's, 224 or 32)",
    )
    bench.add_argument(
        "--checkpoint", metavar="FILE", help="weights, .pth or .safetensors (default: seeded, calibrated)"
    )
    bench.add_argument("--images", metavar="FOLDER", help="photographs (default: those that scikit-learn ships)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="where everything measured goes")
    bench.add_argument("--plot", type=Path, metavar="FILE", help="where the bar chart goes (.png)")


def _bench(options: argparse.Namespace) -> int:
    from fastres.bench import command

    return command.run(options)


def _add_workload(command: argparse.ArgumentParser) -> None:
    """The options of verify and explain that say which model on which input."""
    command.add_argument("model", metavar="MODEL", help=_MODEL)
    command.add_argument("--batch", type=int, default=2, metavar="N", help="images in the batch (default: 2)")
    command.add_argument(
        "--size", type=int, metavar="N", help="height and width of the images (default: the model's, 224 or 32)"
    )
    command.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default: float32)")
    command.add_argument(
        "--checkpoint", metavar="FILE", help="weights, .pth or .safetensors (default: seeded, calibrated)"
    )
    command.add_argument("--images", metavar="FOLDER", help="photographs (default: those that scikit-learn ships)")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")


def _workload(options: argparse.Namespace) -> tuple[nn.Module, torch.Tensor, torch.dtype]:
    """The model in float32 eval mode, the images, and the dtype that was asked for."""
    import torch

    from fastres import images as photographs
    from fastres import models
    from fastres.bench.task import DTYPES, prepared_model

    if options.dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, not {options.dtype}")
    size = models.image_size(options.model) if options.size is None else options.size
    for what, value in (("batch", options.batch), ("size", size)):
        if value < 1:
            raise UserError(f"--{what} must be at least 1, not {value}")
    images = photographs.photographs(max(8, options.batch), size, folder=options.images)
    model = prepared_model(options.model, images, options.checkpoint)
    return model, images[: options.batch], getattr(torch, options.dtype)


def _write_json(text: str, path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if text.endswith("\n") else text + "\n")


def _add_verify(add: Callable[..., argparse.ArgumentParser]) -> None:
    verify = add(
        "verify",
        _verify,
        "prove that fusing did not change a model's numbers: eager and fused, both against float64",
        """

Compares every fused site and the whole model: outputs, gradients, running statistics and counters. Prints a table;
the exit code is 1 if anything lies outside its budget.

Examples:
  fastres verify resnet50                                  evaluation mode, then training mode
  fastres verify resnet50 --mode train --dtype bfloat16
  fastres verify resnet18 --checkpoint mine.pth --json certificate.json
  fastres verify torchvision.models:resnext50_32x4d --mode eval""",
    )
    _add_workload(verify)
    verify.add_argument("--mode", choices=("eval", "train", "both"), default="both", help="(default: both)")


def _verify(options: argparse.Namespace) -> int:
    import json

    model, images, dtype = _workload(options)
    from fastres.verify import verify

    modes = ("eval", "train") if options.mode == "both" else (options.mode,)
    certificates = {}
    for mode in modes:
        certificates[mode] = verify(model, images, mode=mode, dtype=dtype)
        print(certificates[mode], flush=True)
    found = {mode: certificate.to_json() for mode, certificate in certificates.items()}
    _write_json(json.dumps(found if len(found) > 1 else found[modes[0]], indent=1), options.json)
    return 0 if all(certificate.ok for certificate in certificates.values()) else 1


def _add_explain(add: Callable[..., argparse.ArgumentParser]) -> None:
    explain = add(
        "explain",
        _explain,
        "say what of a model runs fused, by which kernel, and why the rest does not",
        """

Examples:
  fastres explain resnet50
  fastres explain torchvision.models:densenet121 --mode train --all""",
    )
    _add_workload(explain)
    explain.add_argument("--mode", choices=("eval", "train"), default="eval", help="(default: eval)")
    explain.add_argument("--all", action="store_true", help="a line for every operation, also for those that are fused")


def _explain(options: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    import fastres

    model, images, dtype = _workload(options)
    fastres.fuse_(model)
    report = fastres.explain(model.to(dtype).train(options.mode == "train"), images.to(dtype))
    print(f"{options.model}, {options.mode} mode, {options.dtype}, on {images.device.type}: {report}")
    if options.all:
        for row in report.rows:
            print(f"  {row.name or '(model)':<32} {row.kind:<5} {f'fused, {row.kernel}' if row.fused else row.reason}")
    _write_json(json.dumps([asdict(row) for row in report.rows], indent=1), options.json)
    return 0


def _add_train(add: Callable[..., argparse.ArgumentParser]) -> None:
    from fastres.train import command

    train = add("train", command.run, "train a residual network, fused, on one process or several", command.EXAMPLES)
    command.add_arguments(train)


def _add_transfer(add: Callable[..., argparse.ArgumentParser]) -> None:
    from fastres.transfer import command

    summary = "put trained weights to work on other images: as features, or fine-tuned"
    transfer = add("transfer", command.run, summary, command.EXAMPLES)
    command.add_arguments(transfer)


def _add_analyze(add: Callable[..., argparse.ArgumentParser]) -> None:
    from fastres.analysis import command

    analyze = add("analyze", command.run, "measure what the papers claim about residual networks", command.EXAMPLES)
    command.add_arguments(analyze)


def _add_doctor(add: Callable[..., argparse.ArgumentParser]) -> None:
    doctor = add(
        "doctor",
        _doctor,
        "print versions, devices, and which kernel serves which operation here, with the reasons",
        """

Put its output into a bug report.

Examples:
  fastres doctor
  fastres doctor --json""",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON instead of text")


def _doctor(options: argparse.Namespace) -> int:
    import json

    from fastres import doctor

    found = doctor.examine()
    print(json.dumps(found, indent=1) if options.json else doctor.text(found))
    return 0
