#!/usr/bin/env python3
"""What the compiler makes of the Triton kernels at the shapes of ResNets, without a GPU: `make kernel-report`.

Every launcher runs on tensors without data, at the layers of ResNet-18 and -50, batch 256, channels_last, bf16, fp16
and fp32. Every specialisation that the launches ask for is compiled once for each target. The table says for each:
registers of a thread, spills, shared memory, how many programs a multiprocessor holds, matrix instructions, and for
each argument how it is accessed ("<x 4x16": loaded, by 4 instructions of 16 bytes; ">": stored). Faults, which fail the
report, stand below their row: spills, activations accessed less than 16 bytes at a time, 16-bit matrix products without
matrix instructions, too much shared memory.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from layers import Layer, layers  # noqa: E402

from fastres.kernels.triton import (  # noqa: E402
    algebraic,
    batch_norm,
    convolution,
    elementwise,
    implicit,
    join,
    offline,
    operands,
    pool,
    statistics,
    tuning,
)
from fastres.kernels.triton.record import Launch, recording  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEPTHS, BATCH = (18, 50), 256


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without data, channels_last if it has 4 axes."""
    order = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=order)


def batch_norms(layer: Layer, batch: int, dtype: torch.dtype) -> None:
    """bn_act behind a convolution: training, forward and backward, and inference."""
    x, c = meta(batch, *layer.out, dtype=dtype), layer.out[0]
    weight, bias, tracked = meta(c), meta(c), meta(1, dtype=torch.int64)
    relu, residual = layer.then != "bn", x if layer.then == "bn_add_relu" else None
    save = residual is not None
    y, mean, var, mask = batch_norm.bn_act(x, weight, bias, None, None, residual, True, 1e-5, relu, save)
    statistics.update_running_stats_(weight, bias, mean, var, tracked, 0.1, batch)
    batch_norm.bn_act_backward(
        y, x, weight, bias, mean, var, mask if save else None, True, 1e-5, relu, True, True, save
    )
    batch_norm.bn_act(x, weight, bias, weight, bias, residual, False, 1e-5, relu, False)


def additions(layer: Layer, batch: int, dtype: torch.dtype) -> None:
    """add_act behind a convolution that ends a block."""
    if layer.then == "bn_add_relu":
        x = meta(batch, *layer.out, dtype=dtype)
        elementwise.add_act_backward(x, elementwise.add_act(x, x, True))


def joins(layer: Layer, batch: int, dtype: torch.dtype) -> None:
    """bn_add_bn_act behind the last convolution of a block and that of its shortcut: training, and frozen."""
    if layer.then == "bn":
        x, c = meta(batch, *layer.out, dtype=dtype), meta(layer.k)
        for training in (True, False):
            branch = (x, c, c, c, c)
            y, mean, var, other_mean, other_var, mask = join.bn_add_bn_act(
                *branch, *branch, training, training, 1e-5, 1e-5, True, True
            )
            saved = (mean, var, x, c, other_mean, other_var, mask)
            join.bn_add_bn_act_backward(y, x, c, *saved, training, training, 1e-5, 1e-5, True, True, True, True)


def pools(layer: Layer, batch: int, dtype: torch.dtype) -> None:
    """bn_act_maxpool behind the stem's convolution."""
    if layer.then == "bn_relu_maxpool":
        x, vector, window = meta(batch, *layer.out, dtype=dtype), meta(layer.k), (3, 2, 1)
        y, mean, var, index = pool.bn_act_maxpool(x, vector, vector, None, None, True, 1e-5, True, *window)
        options = (True, 1e-5, True, *window, True, True)
        pool.bn_act_maxpool_backward(y, x, vector, vector, mean, var, index, *options)


def expansions(layer: Layer, batch: int, dtype: torch.dtype) -> None:
    """The algebraic batch norm of a 1x1 convolution to four times the channels."""
    if layer.r == layer.stride == 1 and layer.k >= 4 * layer.c:
        x, y = meta(batch, layer.c, layer.h, layer.w, dtype=dtype), meta(batch, *layer.out, dtype=dtype)
        weight, vector = meta(layer.k, layer.c, 1, 1, dtype=dtype), meta(layer.k)
        relu = layer.then == "bn_add_relu"
        residual = y if relu else None
        _, mean, var, x_mean, covariance, mask = algebraic.conv1x1_bn_act(
            x, weight, vector, vector, None, None, residual, True, 1e-5, relu, relu
        )
        kept = (mean, var, x_mean, covariance, mask if relu else None)
        algebraic.conv1x1_bn_act_backward(y, x, weight, vector, vector, *kept, True, 1e-5, True, True, True)


def convolutions(layer: Layer, batch: int, dtype: torch.dtype) -> None:
    """A convolution whose input may be normalised on the way and whose output's statistics are taken."""
    if layer.c < 16:
        return  # the stem is left to cuDNN
    x, y = meta(batch, layer.c, layer.h, layer.w, dtype=dtype), meta(batch, *layer.out, dtype=dtype)
    weight, vector = meta(layer.k, layer.c, layer.r, layer.r, dtype=dtype), meta(layer.c)
    stride = (layer.stride, layer.stride)
    norm = operands.norm_of(vector.double(), vector.double(), vector, vector, 1e-5)
    if layer.r == 1:
        convolution.conv1x1_forward(x, weight, stride=stride, norm=norm, statistics=True)
        convolution.conv1x1_grad_input(y, weight, x.shape, stride=stride)
        convolution.conv1x1_grad_weight(y, x, stride=stride, norm=norm)
        k, options = meta(layer.k), (True, 1e-5, layer.then != "bn")
        behind, *_ = operands.norm_gradient_of(y, y, k, k, k.double(), k.double(), *options)
        convolution.conv1x1_grad_input(y, weight, x.shape, stride=stride, behind=behind)
        # A shortcut with a stride reads the block's input, which no batch norm stands before.
        before = norm if layer.stride == 1 else None
        convolution.conv1x1_grad_weight(y, x, stride=stride, norm=before, behind=behind)
    else:
        padding = (layer.r // 2, layer.r // 2)
        implicit.convolution_forward(x, weight, stride=stride, padding=padding, norm=norm, statistics=True)


#: Name and launchers; a function is given a layer, the batch and the dtype of activations.
LAUNCHERS: dict[str, Callable[[Layer, int, torch.dtype], None]] = {
    "batch_norm": batch_norms,
    "elementwise": additions,
    "join": joins,
    "pool": pools,
    "algebraic": expansions,
    "convolution": convolutions,
}


def layers_of(depths: Iterable[int]) -> list[Layer]:
    """The layers of these networks, each once."""
    return list(dict.fromkeys(layer for depth in depths for layer in layers(depth)))


def launches(
    names: Iterable[str], depths: Iterable[int] = DEPTHS, batch: int = BATCH, dtypes: Iterable[str] = tuple(DTYPES)
) -> list[Launch]:
    """All launches of these launchers over the layers of these networks."""
    with recording() as found:
        for name, dtype, layer in itertools.product(names, dtypes, layers_of(depths)):
            LAUNCHERS[name](layer, batch, DTYPES[dtype])
    return found


def candidates(names: Iterable[str], table: Iterable[Layer], batch: int, dtypes: Iterable[str]) -> list[Launch]:
    """The launches of everything that tuning.tune() may choose at these layers."""
    found: list[Launch] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, dtype, layer in itertools.product(names, dtypes, table):
            launch = functools.partial(LAUNCHERS[name], layer, batch, DTYPES[dtype])

            def keep(run: Callable[[], object]) -> float:
                with recording() as some:
                    run()
                found.extend(some)
                return 0.0

            with recording():
                tuning.tune(launch, Path(folder) / "choices.json", keep)
    return found


def specialisations(found: Iterable[Launch], targets: Iterable[str]) -> Iterator[offline.Specialisation]:
    """What has to be compiled for these launches, each once."""
    found = list(found)
    for target in targets:
        seen = set()
        for launch in found:
            one = offline.specialise(launch, target)
            if (launch.name, one.key) not in seen:
                seen.add((launch.name, one.key))
                yield one


def describe(one: offline.Specialisation) -> str:
    """dtypes of the activations, and the constants, shortly: bf16 RELU=1 BLOCK=64 8w."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    dtypes = {names[t.dtype] for t in one.launch.tensors().values() if t.is_activation and t.dtype in names}
    constants = [f"{k}={v if isinstance(v, str) else int(v)}" for k, v in one.launch.arguments.items() if k.isupper()]
    left_out = [f"-{k}" for k, v in one.launch.arguments.items() if v is None]
    ragged = [
        k
        for k, v in one.launch.arguments.items()
        if k.islower() and one.signature[k] in ("i32", "i64") and isinstance(v, int) and v % 16
    ]
    options = one.launch.options
    words = [*sorted(dtypes), *constants, *left_out, *(f"{k}%16" for k in ragged)]
    return " ".join([*words, f"warps={options['num_warps']}", f"stages={options['num_stages']}"])


def widths(code: offline.Compiled) -> str:
    """x 4x16, y 4x16, ...: loads of arguments, then stores."""
    words = []
    for kind, sign in (("load", "<"), ("store", ">")):
        for name in dict.fromkeys(name for name, k, _ in code.accesses if k == kind):
            counts = sorted((w, n) for (a, k, w), n in code.accesses.items() if (a, k) == (name, kind))
            words.append(f"{sign}{name} " + "+".join(f"{n}x{w}" for w, n in reversed(counts)))
    return ", ".join(words)


def report(found: Iterable[Launch], targets: Iterable[str]) -> int:
    """Prints the table, and returns the number of faults."""
    start, rows, failed = time.monotonic(), 0, 0
    print("target  kernel                           regs spills  shared holds  matrix; accesses; specialisation")
    for one in sorted(specialisations(found, targets), key=lambda one: (one.launch.name, one.target)):
        code = offline.compiled(one)
        matrix = ", ".join(f"{n} {name.replace('.sync.aligned', '')}" for name, n in code.matrix.items()) or "-"
        print(
            f"{one.target:8}{one.launch.name:32}{code.registers:5}{code.spills:7}{code.shared:8}"
            f"{offline.resident(one, code):6}  "
            f"{matrix}; {widths(code)}; {describe(one)}"
        )
        faults = offline.faults(one, code)
        for fault in faults:
            print(f"        FAULT: {fault}", flush=True)
        rows, failed = rows + 1, failed + len(faults)
    print(f"{rows} compiled in {time.monotonic() - start:.0f} s, {failed} faults")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=list(LAUNCHERS))
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--targets", nargs="+", choices=offline.TARGETS, default=list(offline.TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--depths", nargs="+", type=int, default=list(DEPTHS), help="of the ResNets")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument(
        "--candidates", action="store_true", help="what tuning may choose too, in the place of the rest"
    )
    chosen = parser.parse_args()
    if chosen.candidates:
        found = candidates(chosen.launchers, layers_of(chosen.depths), chosen.batch, chosen.dtypes)
    else:
        found = launches(chosen.launchers, chosen.depths, chosen.batch, chosen.dtypes)
    found = [launch for launch in found if chosen.kernel in launch.name]
    if not found:
        sys.exit(f"no kernel has {chosen.kernel!r} in its name")
    sys.exit(report(found, chosen.targets) > 0)


if __name__ == "__main__":
    main()
