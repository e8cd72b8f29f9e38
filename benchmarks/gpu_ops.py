"""Ceilings of a GPU, and every normalising op beside eager PyTorch and torch.compile: parts of benchmarks/gpu.py.
"fastres" is what the kernel table chooses, "cuda" the CUDA C++ kernels, where they can run, "persistent" those that
keep the activation on the chip, where it fits.

The shapes are those of the activations of ResNet-50 and -18 (layers.py). GB/s count the bytes that the op cannot avoid
to move, whoever computes it: so they compare contenders, and their share of the copy's is what is left to win.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
import torch.nn.functional as F
from gpu_timing import Call, Stopwatch, ratio
from layers import activations
from torch import Tensor

import fastres
from fastres import functional
from fastres.kernels import cuda, persistent

DEPTHS = (50, 18)
PROVIDERS = ("eager", "compile", "fastres", "cuda", "persistent")
_COMPILE_SECONDS = 40  # torch.compile takes part so long: the other times are worth more on a lent machine
_PRODUCT = 8192
_COPIES = tuple(1 << exponent for exponent in range(24, 34))  # bytes that a copy moves: read and written


def ceilings(watch: Stopwatch, quick: bool) -> dict[str, Any]:
    """GB/s of copies by the bytes that they move, FLOP/s of large matrix products of random values by dtype."""
    sizes = _COPIES[:2] if quick else _COPIES
    n = 256 if quick else _PRODUCT
    bandwidth, samples = {}, {}
    for size in sizes:
        sets = watch.sets(size)
        pairs = [torch.randint(256, (2, size // 2), dtype=torch.uint8, device=watch.device) for _ in range(sets)]
        times = watch.measure({"copy": partial(_copy, pairs)}, sets)["copy"]
        bandwidth[size], samples[f"copy {size}"] = size / times["seconds"], times["samples"]
        del pairs
    calls: dict[str, Call] = {}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16), ("tf32", torch.float32)):
        factors = [[torch.randn(n, n, device=watch.device, dtype=dtype) for _ in range(2)] for _ in range(2)]
        calls[name] = partial(_product, factors, "high" if name == "tf32" else "highest")
    times = watch.measure(calls, 2)
    flops = {name: 2 * n**3 / found["seconds"] for name, found in times.items() if "seconds" in found}
    samples |= {f"product {name}": found.get("samples") for name, found in times.items()}
    return {"bandwidth": bandwidth, "copy": bandwidth[sizes[-1]], "flops": flops, "size": n, "samples": samples}


def _copy(pairs: list[Tensor], index: int) -> Tensor:
    source, target = pairs[index]
    return target.copy_(source)


def _product(factors: list[list[Tensor]], precision: str, index: int) -> Tensor:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        return torch.mm(*factors[index])
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class Case:
    """An op in one direction at one shape.

    Attributes:
        op: "bn_act", "bn_add_act" (with a residual), "bn_add_bn_act" (with a residual behind a batch norm of its own),
            "add_act", "bn_act_maxpool".
        mode: "forward" and "backward" of training, "eval".
        shape: C, H, W.
        counts: how often it occurs in each network.
    """

    op: str
    mode: str
    shape: tuple[int, int, int]
    counts: dict[str, int]

    @property
    def normalises(self) -> bool:
        return self.op != "add_act"

    def bytes(self, batch: int, itemsize: int) -> int:
        """What cannot but be read and written: the activation so many times, and masks or indices.

        Training forward reads x for the statistics and again to apply them; backward reads x and the gradient for the
        sums and again for the result. With a residual it writes the gradient behind the ReLU, which is the residual's,
        and reads it back in place of the gradient and the mask. With two batch norms it reads all of them twice.
        """
        c, h, w = self.shape
        values = batch * c * h * w
        mask = values // 8 if self.op in ("bn_add_act", "bn_add_bn_act") and self.mode != "eval" else 0
        if (self.op, self.mode) == ("bn_add_bn_act", "backward"):
            mask *= 2
        if self.op == "bn_act_maxpool":  # a quarter of the values is left, with a byte for the place of each
            pooled = values // 4
            index = 0 if self.mode == "eval" else pooled
            large, small = {"forward": (2, 1), "backward": (3, 2), "eval": (1, 1)}[self.mode]
            return large * values * itemsize + small * pooled * itemsize + (2 if self.mode == "backward" else 1) * index
        passes = {
            "bn_act": {"forward": 3, "backward": 5, "eval": 2},
            "bn_add_act": {"forward": 4, "backward": 6, "eval": 3},
            "bn_add_bn_act": {"forward": 5, "backward": 8},
            "add_act": {"forward": 3, "backward": 3},
        }
        return passes[self.op][self.mode] * values * itemsize + mask


def cases() -> Iterator[Case]:
    """Every case, the cases of one op and shape after each other."""
    modes = ("forward", "backward", "eval")
    for op, then, directions in (
        ("bn_act", "bn_relu", modes),
        ("bn_add_act", "bn_add_relu", modes),
        ("bn_add_bn_act", "bn", modes[:2]),
        ("add_act", "bn_add_relu", modes[:2]),
        ("bn_act_maxpool", "bn_relu_maxpool", modes),
    ):
        counts: dict[tuple[int, int, int], dict[str, int]] = {}
        for depth in DEPTHS:
            for shape, count in activations(depth, then).items():
                counts.setdefault(shape, {})[f"resnet{depth}"] = count
        for shape in sorted(counts, key=lambda shape: -shape[0] * shape[1] * shape[2]):
            for mode in directions:
                yield Case(op, mode, shape, counts[shape])


def _eager(op: str, training: bool, x: Tensor, mean: Any, var: Any, weight: Any, bias: Any, residual: Any) -> Tensor:
    if op == "add_act":
        return F.relu_(x + residual)
    y = F.batch_norm(x, mean, var, weight, bias, training)
    if op == "bn_add_bn_act":
        residual = F.batch_norm(residual, None, None, weight, bias, training)
    if residual is not None:
        y += residual
    y = F.relu_(y)
    return F.max_pool2d(y, 3, 2, 1) if op == "bn_act_maxpool" else y


def _fused(op: str, training: bool, x: Tensor, mean: Any, var: Any, weight: Any, bias: Any, residual: Any) -> Tensor:
    if op == "add_act":
        return functional.add_act(x, residual)
    if op == "bn_act_maxpool":
        return functional.bn_act_maxpool(x, mean, var, weight, bias, training=training)
    if op == "bn_add_bn_act":
        norms = (functional.BatchNorm(*running, weight, bias, training) for running in ((mean, var), (None, None)))
        return functional.bn_add_bn_act(x, next(norms), residual, next(norms))
    return functional.bn_act(x, mean, var, weight, bias, residual, training=training)


class Operands:
    """The sets of buffers of one case: activations in channels_last, batch norm in fp32 as under AMP."""

    def __init__(self, case: Case, batch: int, dtype: torch.dtype, device: str, sets: int) -> None:
        c, h, w = case.shape
        training = case.mode != "eval"

        def activation() -> Tensor:
            x = torch.randn(batch, c, h, w, device=device, dtype=dtype)
            return x.contiguous(memory_format=torch.channels_last).requires_grad_(training)

        self.x = [activation() for _ in range(sets)]
        adds = "add" in case.op
        self.residual = [activation() if adds else None for _ in range(sets)]
        self.statistics = torch.zeros(c, device=device), torch.ones(c, device=device)
        self.affine = [torch.rand(c, device=device).requires_grad_(training) for _ in range(2)]
        self.normalises = case.normalises

    def arguments(self, index: int) -> tuple[Any, ...]:
        return self.x[index], *self.statistics, *self.affine, self.residual[index]

    def inputs(self, index: int) -> list[Tensor]:
        """Those that have gradients."""
        affine = self.affine if self.normalises else []
        return [t for t in (self.x[index], self.residual[index], *affine) if t is not None]


def call(case: Case, function: Callable[..., Tensor], operands: Operands) -> Call:
    """What is timed: the function under no_grad, or recording gradients, or its gradients alone."""
    if case.mode == "backward":
        outputs: dict[int, Tensor] = {}
        grads: dict[int, Tensor] = {}

        def backward(index: int) -> Any:
            if index not in outputs:  # in the warm-up; the graph is kept, so that only backward is timed
                x, mean, var, *rest = operands.arguments(index)
                # Statistics of its own: eager's backward refuses to run once another forward has updated them.
                outputs[index] = function(x, mean.clone(), var.clone(), *rest)
                grads[index] = torch.randn_like(outputs[index])
            return torch.autograd.grad(outputs[index], operands.inputs(index), grads[index], retain_graph=True)

        return backward

    def forward(index: int) -> Tensor:
        with torch.set_grad_enabled(case.mode == "forward"):
            return function(*operands.arguments(index))

    return forward


def by(call: Call, *kernels: str) -> Call:
    """The call with these kernels wherever they serve, in forward and in backward."""

    def run(index: int) -> Any:
        with fastres.use_kernels(*kernels, "reference"):
            return call(index)

    return run


def serves_on_chip(case: Case, x: Tensor) -> bool:
    """Whether the kernels that keep x on the chip serve the case."""
    if case.op not in ("bn_act", "bn_add_act") or case.mode == "eval" or cuda.unavailable():
        return False
    if case.mode == "forward":
        return persistent.why_not(x, *[None] * 5, True) is None
    return persistent.backward_why_not(x, x, *[None] * 5, True, 0.0, True, True) is None


def ops(
    watch: Stopwatch, dtype: torch.dtype, batch: int, can: dict[str, Any], quick: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """The table of one dtype. can: what `ceilings` gave."""
    # torch.compile would free what backward reads, and could not be timed again and again.
    torch._functorch.config.donated_buffer = False
    rows = []
    left_out = {"cuda": why} if (why := cuda.unavailable()) else {}
    compile_until = time.monotonic() + _COMPILE_SECONDS
    compiled: tuple[Any, Any] = (None, None)
    for case in cases():
        if quick:
            case = Case(case.op, case.mode, (8, 8, 8), case.counts)
        if quick and any((row["op"], row["mode"]) == (case.op, case.mode) for row in rows):
            continue
        say(f"{case.op} {case.mode} {case.shape}")
        training = case.mode != "eval"
        key = (case.op, training, case.shape)
        if compiled[0] != key:
            torch._dynamo.reset()  # or it would stop compiling after a few shapes
            eager = partial(_eager, case.op, training)
            compiled = key, torch.compile(eager, dynamic=False, backend="aot_eager" if quick else "inductor")
        sets = watch.sets(2 * batch * case.shape[0] * case.shape[1] * case.shape[2] * dtype.itemsize)
        operands = Operands(case, batch, dtype, watch.device, sets)
        functions = {
            "eager": partial(_eager, case.op, training),
            "compile": compiled[1],
            "fastres": partial(_fused, case.op, training),
            "cuda": partial(_fused, case.op, training),
        }
        if serves_on_chip(case, operands.x[0]):
            functions["persistent"] = functions["cuda"]
        if time.monotonic() > compile_until:
            del functions["compile"]
        calls = {name: call(case, function, operands) for name, function in functions.items() if name not in left_out}
        if "cuda" in calls:
            calls["cuda"] = by(calls["cuda"], "cuda")
        if "persistent" in calls:
            calls["persistent"] = by(calls["persistent"], "cuda_persistent", "cuda")
        times = watch.measure(calls, sets)
        times.setdefault("compile", {"failed": f"left out: {_COMPILE_SECONDS} s are over"})
        rows.append(row(case, batch, dtype, times, can))
        del operands
    return {"batch": batch, "dtype": str(dtype).removeprefix("torch."), "rows": rows, "left_out": left_out}


def row(case: Case, batch: int, dtype: torch.dtype, times: dict[str, Any], can: dict[str, Any]) -> dict[str, Any]:
    """A case as it goes into the result file."""
    moved = case.bytes(batch, dtype.itemsize)
    bandwidths = {name: moved / found["seconds"] for name, found in times.items() if "seconds" in found}
    shares = {name: rate / can["copy"] for name, rate in bandwidths.items()}
    return {
        "op": case.op,
        "mode": case.mode,
        "shape": list(case.shape),
        "counts": case.counts,
        "bytes": moved,
        "times": times,
        "bandwidth": bandwidths.get("fastres"),
        "of_copy": shares.get("fastres"),
        "shares": shares,
        "vs_eager": ratio(times, "fastres", "eager"),
        "vs_compile": ratio(times, "fastres", "compile"),
        "cuda_vs_fastres": ratio(times, "cuda", "fastres"),
        "persistent_vs_cuda": ratio(times, "persistent", "cuda"),
    }


def totals(table: dict[str, Any]) -> list[dict[str, Any]]:
    """For each network and mode the seconds of all its ops together, by contender; where every case has a time."""
    found: dict[tuple[str, str], dict[str, float | None]] = {}
    for one in table["rows"]:
        if one["op"] in ("add_act", "bn_add_bn_act"):  # in bn_add_act's place: other networks, some blocks
            continue
        for network, count in one["counts"].items():
            sums = found.setdefault((network, one["mode"]), dict.fromkeys(PROVIDERS, 0.0))
            for name in PROVIDERS:
                seconds, before = one["times"].get(name, {}).get("seconds"), sums[name]
                sums[name] = None if seconds is None or before is None else before + count * seconds
    return [{"network": network, "mode": mode, **sums} for (network, mode), sums in found.items()]
