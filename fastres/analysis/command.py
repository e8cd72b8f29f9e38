"""What `fastres analyze` does: the keyword arguments of an analysis are its options."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastres.analysis import ANALYSES
from fastres.analysis.report import Report
from fastres.train import Stopped

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """

Each analysis prints the paper's claim beside what it measured, and writes CSV, PNG and one HTML page. With its defaults
each takes minutes on two cores, on the digits of scikit-learn; options make it larger.

Examples:
  fastres analyze architecture --model resnet50            layer by layer, and where it differs from the paper
  fastres analyze gradient-flow                            norms of gradients through plain and residual networks
  fastres analyze degradation --depths 20 56 --seeds 0 1 2
  fastres analyze lesion --help                            the options of one analysis"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command for each analysis, one option for each keyword argument of its function."""
    kinds = parser.add_subparsers(title="analyses", metavar="ANALYSIS", required=True)
    for name, analysis in ANALYSES.items():
        text = inspect.getdoc(analysis) or ""
        summary = text.partition("\n")[0]
        command = kinds.add_parser(name, help=summary, description=summary)
        helps, types = _argument_docs(text), typing.get_type_hints(analysis)
        for parameter in inspect.signature(analysis).parameters.values():
            _add_option(command, parameter, types[parameter.name], helps[parameter.name])
        command.add_argument(
            "--out", type=Path, metavar="FOLDER", default=Path("runs/analyses") / name,
            help="where CSV, PNG and HTML go (default: %(default)s)",
        )  # fmt: skip
        command.add_argument("--threads", type=int, default=0, metavar="N", help="(default: one per core)")
        command.set_defaults(analysis=analysis)


def _add_option(command: argparse.ArgumentParser, parameter: inspect.Parameter, kind: Any, help: str) -> None:
    default = parameter.default
    flag = f"--{parameter.name.replace('_', '-')}"
    if kind is bool:
        command.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=help)
        return
    many = typing.get_origin(kind) is tuple
    element = typing.get_args(kind)[0] if many else kind
    shown = " ".join(map(str, default)) if many else default
    command.add_argument(
        flag,
        type=element,
        nargs="+" if many else None,
        default=default,
        metavar={int: "N", float: "X"}.get(element, "NAME"),
        help=f"{help} (default: {shown})" if shown not in ("", None) else help,
    )


def _argument_docs(text: str) -> dict[str, str]:
    """The "Args:" of a docstring, one argument a paragraph: {name: what it is}."""
    section = re.search(r"^Args:\n((?: {4}.*\n?|\n)*)", text, re.MULTILINE)
    found = re.findall(r"^ {4}(\w+): ((?:.*\n?(?: {8}.*\n?)*))", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(words.split()).rstrip(".").replace("%", "%%") for name, words in found}


def run(given: argparse.Namespace) -> int:
    """Runs the analysis that was asked for, prints its report, writes its files. The exit code is 1 if a training
    diverged, and 128 and the signal's number if one ended it."""
    import torch

    if given.threads:
        torch.set_num_threads(given.threads)
    analysis: Callable[..., Report] = given.analysis
    options = {name: getattr(given, name) for name in inspect.signature(analysis).parameters}
    try:
        report = analysis(**options)
    except Stopped as stop:
        print(f"fastres analyze: {stop}", file=sys.stderr)
        return 128 + stop.signal if stop.signal else 1
    print(report)
    print("\nwritten: " + " ".join(map(str, report.write(given.out))))
    return 0
