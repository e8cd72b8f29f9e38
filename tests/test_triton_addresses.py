"""Where Triton kernels read and write: nowhere outside of their tensors, every result once, and beyond 2^31 values."""

# ruff: noqa: E402 (what imports Triton follows importorskip)

from __future__ import annotations

import importlib
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from _addresses import Seen, run

pytest.importorskip("triton")

from fastres.kernels import table
from fastres.kernels.triton import gram, product, row_product, tiles
from fastres.kernels.triton.record import Launch, recording

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
kernel_report = importlib.import_module("kernel_report")
Layer = kernel_report.Layer

#: Written more than once, with the same values.
_TWICE = {("gram_kernel", "near")}


def layer(c: int, h: int, w: int, k: int, r: int, stride: int, then: str) -> Layer:
    return Layer("", c, h, w, k, r, stride, then, (1,) * 5)


#: Channels and sizes that divide into nothing, so that every bound of every kernel cuts a tile.
LAYERS = [
    layer(3, 9, 11, 17, 3, 2, "bn_relu_maxpool"),
    layer(17, 5, 7, 68, 1, 1, "bn_add_relu"),
    layer(3, 1, 1, 17, 1, 1, "bn_add_relu"),
    layer(33, 7, 5, 130, 1, 2, "bn"),
    layer(17, 7, 7, 65, 3, 2, "bn_relu"),
]
NORMS = ["batch_norm", "elementwise", "join", "pool"]  # what serves NCHW too
NCHW_LAYERS = [
    layer(3, 9, 11, 3, 3, 2, "bn_relu_maxpool"),
    layer(3, 7, 7, 9, 1, 1, "bn_add_relu"),
    layer(3, 5, 1, 5, 1, 1, "bn"),
]


def launches(batch: int, chosen: list[Layer], names: list[str] | None = None) -> list[Launch]:
    with recording() as found:
        for name in names or kernel_report.LAUNCHERS:
            # fp32 has arguments of its own in the algebraic batch norm only
            for dtype in (torch.bfloat16, torch.float32) if name == "algebraic" else (torch.bfloat16,):
                for one in chosen:
                    kernel_report.LAUNCHERS[name](one, batch, dtype)
    return found


def distinct(found: list[Launch], *, sizes: bool) -> list[Launch]:
    """One of each kind: the same kernel with the same arguments given, the same constants, and the same sizes if they
    matter."""
    kinds = {}
    for one in found:
        shapes = [(name, t.dtype, t.shape if sizes else None) for name, t in one.tensors().items()]
        words = [(k, v) for k, v in one.arguments.items() if k.isupper() or v is None or (sizes and isinstance(v, int))]
        kinds.setdefault(str((one.name, shapes, words)), one)
    return list(kinds.values())


def contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        kernel_report, "meta", lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device="meta")
    )


def check_results(one: Launch, seen: dict[str, Seen]) -> None:
    """Every value of a result is written once; activations and masks entirely."""
    for name, accesses in seen.items():
        written = accesses.all_written()
        if not written.size:
            continue
        values = np.unique(written)
        assert values.size == written.size or (one.name, name) in _TWICE, f"{one.name}: {name} written twice"
        partly = one.arguments.get("SCATTER") and name == "out"
        if (accesses.argument.is_activation or name in ("mask", "index")) and not partly:
            assert values.size == accesses.values, (
                f"{one.name}: {accesses.values - values.size} values of {name} not written"
            )


@pytest.mark.parametrize("order", ["channels_last", "contiguous"])
def test_every_result_is_written_once_and_nothing_outside(monkeypatch, order):
    chosen = LAYERS, None
    if order == "contiguous":
        contiguous(monkeypatch)
        chosen = NCHW_LAYERS, NORMS
    kernels = set()
    for one in distinct(launches(2, *chosen), sizes=True):
        check_results(one, run(one))
        kernels.add(one.name)
    assert kernels == {one.name for one in launches(2, *chosen)}
    assert len(kernels) > (12 if chosen[1] else 20)


#: Kernels that deal rows out along the second axis of their grid, others along the first; products along both.
_SECOND, _BOTH = ("row_product_kernel", "gram_kernel"), ("product_kernel", "convolution_kernel")


def ends(one: Launch, grid: tuple[int, ...]) -> set[tuple[int, ...]]:
    """The programs that get the first and the last tile of rows, in turn, of the first and the last columns."""
    rows, block = one.arguments.get("rows", 1), one.arguments.get("BLOCK_ROWS", 1)
    turns = {axis: {0, programs - 1} for axis, programs in enumerate(grid)}
    if "rows" in one.arguments and one.name not in _BOTH:
        axis = int(one.name in _SECOND)
        turns[axis] = {0, (-(-rows // block) - 1) % grid[axis]}
    return set(itertools.product(*turns.values()))


def check_ends(one: Launch) -> None:
    for name, accesses in run(one, lambda grid: ends(one, grid)).items():
        if accesses.argument.is_activation or name in ("mask", "index"):
            touched = accesses.touched()
            if not touched.size:  # as x for the gradient of a batch norm with running statistics
                continue
            assert touched.min() == 0, f"{one.name}: {name} from {touched.min()}"
            assert touched.max() >= accesses.values * 0.999, f"{one.name}: {name} to {touched.max()}"


@pytest.fixture
def many_programs(monkeypatch):
    """So many that each has a tile or two: it takes long to interpret one."""
    for module in (tiles, product):
        monkeypatch.setattr(module, "multiprocessors", lambda x: 32_000)
    for module in (row_product, gram):
        monkeypatch.setattr(module, "splits", lambda *args: 60_000)


#: Of batch LARGE: more than 2^31 values of the output, of the input, or of both.
LARGE = 2**15 + 8
LARGE_LAYERS = [
    layer(3, 64, 64, 64, 3, 2, "bn_relu_maxpool"),
    layer(256, 16, 16, 1024, 1, 1, "bn_add_relu"),
    layer(64, 64, 64, 64, 1, 2, "bn"),
    layer(64, 32, 32, 64, 3, 1, "bn_relu"),
]


def is_large(one: Launch) -> bool:
    """Whether an activation has more than 2^31 values."""
    return any(t.storage // t.dtype.itemsize > 2**31 for t in one.tensors().values() if t.is_activation)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["channels_last", "contiguous"])
def test_more_than_2_to_31_values(monkeypatch, many_programs, order):
    names = None
    if order == "contiguous":
        contiguous(monkeypatch)
        names = NORMS
    kernels = set()
    large = [one for one in launches(LARGE, LARGE_LAYERS, names) if is_large(one)]
    for one in distinct(large, sizes=False):
        check_ends(one)
        kernels.add(one.name)
    assert len(kernels) >= (10 if names else 15), kernels


def test_nearly_2_to_31_rows(many_programs):
    """The row behind the last tile does not fit into 32 bits, although all rows do."""
    found = launches(2**31 - 9, [layer(16, 1, 1, 16, 1, 1, "bn_add_relu")], ["batch_norm"])
    for one in distinct(found, sizes=False):
        if "rows" in one.arguments:
            assert one.arguments["rows"] == 2**31 - 9
            check_ends(one)


def test_pooling_of_larger_images_is_left_to_the_reference():
    """Their pixels do not fit into 32 bits, in which pooling counts them."""
    for kernel in (table.TABLE[op, "cuda"][0] for op in ("bn_act_maxpool", "bn_act_maxpool_backward")):
        for size, reason in ((2**16, "an image of 2^31 pixels or more"), (2**15, None)):
            x = torch.empty(1, 3, size, 2**15, dtype=torch.bfloat16, device="meta")
            assert kernel.why_not(x, x) == reason
