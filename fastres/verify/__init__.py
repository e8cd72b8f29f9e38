"""verify: proof that fusing did not change a model's numbers, with float64 as the judge and eager as the witness.

Fused code rounds differently from eager code, so the two never agree to the last bit, and where they differ neither is
right by itself. So three copies of the model run on the same weights and input: plain in float64 (the truth), plain in
the dtype asked for, and fused in that dtype. Errors are L2 norms relative to the truth's (that of a running mean
relative to the standard deviation, if that is larger). What is compared:

- every site: each block, projection shortcut and stem alone, on the activations that enter it in the float64 run;
  outputs, the gradient of every parameter and of the input, running statistics, counters;
- the whole model: the same in training; in eval mode the output of inference, and the class of every image.

The budget of a fused value is twice eager's error, and at least a few roundings u of the dtype it is stored in, where
luck decides: 16 u in float32 (9.5e-7; running statistics 4 u, 2.4e-7), 4 u in bfloat16 (1.6e-2) and float16 (2.0e-3).
Where Winograd convolutions may serve (float32 on a CPU, unless `fastres.config.winograd` is False) it is 5e-6 at least.
Counters, and statistics in eval mode, have to be exact. The float32 output of the whole model in eval mode may be off
by 1e-5, or by twice eager's error if eager itself is beyond that.

Gradients jump at the kinks of ReLU and max-pooling (see `kinks`). In float32 the inputs of sites are moved off them, so
that gradients are compared to rounding error. In lower precision kinks cannot be avoided, so a gradient outside its
budget gets two more tries on inputs that are a few per cent off; a fault fails them all. The same holds for gradients
of the whole model, where even in float32 some value lies on the wrong side of a kink, in eager as in fused code; they
may always be off by 2e-2. With random weights and low precision eager's error there is about 1, and the comparison
says little: the sites are the proof.
"""

from __future__ import annotations

import platform
import time
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor, nn

from fastres.kernels import extension
from fastres.verify.certificate import Certificate, Fault, Row, Site
from fastres.verify.compare import Comparison

__all__ = ["Certificate", "Fault", "Row", "Site", "verify"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def verify(
    model: nn.Module,
    x: Tensor | tuple[Any, ...],
    *,
    mode: str = "eval",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Certificate:
    """Compares the fused model with eager, both against float64. `model` is not changed: copies run.

    Args:
        model: plain or fused by `fuse_`, on the device of x. Copies are put into `mode` as a whole, and their dropout
            is off.
        x: an input batch, [N, C, H, W], floating point, or a tuple of the model's positional arguments, one of them
            such a tensor. Real images: on noise a network's activations say little.
        mode: "eval": inference (no gradients) of sites and model, and gradients of sites with running statistics.
            "train": forward and backward with batch statistics.
        dtype: float32, bfloat16 or float16. A lower precision is used as people use it: in eval mode the model is
            converted, `model.to(dtype)`, batch norms too, and the oracle starts from the rounded weights; in train mode
            it runs under `torch.autocast` with fp32 parameters.
        seed: of the gradients that are sent backward.

    Returns:
        A Certificate: `.ok`, a table as text, `.to_json()`, `.save(path)`. It is not ok if nothing ran fused.

    Raises:
        TypeError: if model is not an nn.Module or x has no floating-point tensor.
        ValueError: for an unknown mode or dtype; UserError, a subclass, if the model does not run on x in eager.
    """
    inputs = x if isinstance(x, tuple) else (x,)
    first = _check(model, inputs, mode, dtype)
    start = time.monotonic()
    certificate = Certificate(
        model._get_name(), mode, str(dtype).removeprefix("torch."), first.device.type, tuple(first.shape), seed
    )
    certificate.versions, certificate.machine, certificate.date = _environment(first.device)
    with torch.inference_mode(False), torch.autocast(first.device.type, enabled=False):
        Comparison(model, inputs, dtype, certificate).run()
    certificate.seconds = round(time.monotonic() - start, 1)
    return certificate


def _check(model: Any, inputs: tuple[Any, ...], mode: str, dtype: torch.dtype) -> Tensor:
    """The first floating-point tensor among the inputs."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"verify takes an nn.Module, got {type(model).__name__}")
    tensors = [x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
    if not tensors:
        got = ", ".join(str(getattr(x, "dtype", type(x).__name__)) for x in inputs)
        raise TypeError(f"verify takes a floating-point input tensor, got {got}")
    if mode not in ("eval", "train"):
        raise ValueError(f'mode must be "eval" or "train", got {mode!r}')
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    return tensors[0]


def _environment(device: torch.device) -> tuple[dict[str, str], dict[str, Any], str]:
    """Versions, machine and date."""
    import fastres
    from fastres.bench import machine

    versions = {"python": platform.python_version(), "torch": torch.__version__, "fastres": fastres.__version__}
    where: dict[str, Any] = {"cpu": machine.cpu()["model"], "isa": extension.isa() if extension.available() else None}
    where["threads"] = torch.get_num_threads()
    if device.type == "cuda":
        where["gpu"] = torch.cuda.get_device_name(device)
    return versions, where, datetime.now(timezone.utc).isoformat(timespec="seconds")
