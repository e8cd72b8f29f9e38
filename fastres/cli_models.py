"""The `fastres models` command: which models there are, and the layers of one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from fastres.errors import UserError


def add_command(add: Callable[..., argparse.ArgumentParser]) -> None:
    models = add(
        "models",
        run,
        "list the models, or print the layers of one: shapes, parameters, multiply-adds, bytes, what is fused",
        """

Nothing is computed: a model is taken apart on PyTorch's meta device.

Examples:
  fastres models                                           the names, with blocks and parameters
  fastres models resnet50                                  its layers at 224 x 224
  fastres models resnet20_v2 --batch 128 --json layers.json
  fastres models torchvision.models:resnext50_32x4d --size 96""",
    )
    models.add_argument("model", nargs="?", metavar="MODEL", help="a name of the list, or package.module:callable")
    models.add_argument("--batch", type=int, default=1, metavar="N", help="images in the batch (default: 1)")
    models.add_argument(
        "--size", type=int, metavar="N", help="height and width of the images (default: the model's, 224 or 32)"
    )
    models.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")


def run(options: argparse.Namespace) -> int:
    import json

    text, found = _list() if options.model is None else _layers(options)
    print(text)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _list() -> tuple[str, object]:
    from fastres import models

    names = models.list_models()
    width, lines = max(map(len, names)), []
    for size in (224, 32):
        lines.append(f"for images of {size} x {size}:")
        lines += [f"  {n:<{width}}  {models.describe(n)}" for n in names if models.image_size(n) == size]
    lines.append("fastres models NAME prints the layers of one.")
    return "\n".join(lines), {name: models.describe(name) for name in names}


def _layers(options: argparse.Namespace) -> tuple[str, object]:
    from dataclasses import asdict

    import torch

    from fastres import models
    from fastres.bench.task import build_model
    from fastres.summary import summarise

    size = models.image_size(options.model) if options.size is None else options.size
    for what, value in (("batch", options.batch), ("size", size)):
        if value < 1:
            raise UserError(f"--{what} must be at least 1, not {value}")
    with torch.device("meta"):
        model = build_model(options.model)
    shape = (options.batch, 3, size, size)
    try:
        summary = summarise(model, shape)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the model does not take images of {shape[1:]}: {str(error).splitlines()[0]}") from error
    if not summary.parameters:
        raise UserError(f"{options.model} has no parameters")
    found = {
        "input_shape": list(shape),
        "parameters": summary.parameters,
        "multiply_adds": summary.multiply_adds,
        "bytes": summary.bytes,
        "layers": [asdict(layer) for layer in summary.layers],
    }
    return str(summary), found
