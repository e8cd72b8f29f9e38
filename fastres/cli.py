"""The `fastres` command: bench, verify, explain, models, tune, train, transfer, analyze, doctor.

Wrong input is one line on stderr and exit code 2; a check that fails is exit code 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastres import cli_models, cli_tune, cli_verify
from fastres.cli_verify import MODEL
from fastres.errors import UserError


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
    cli_verify.add_commands(add)
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
    bench.add_argument("models", nargs="*", metavar="MODEL", help=f"{MODEL} (default: resnet18 resnet50)")
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
