"""Triton kernels compiled for GPUs that are not there: ours are as they should be, and what is not is found."""

# ruff: noqa: E402 (what imports Triton follows importorskip)

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl
from triton.runtime.jit import JITFunction

import fastres.kernels.triton as package
from fastres.kernels.triton import offline
from fastres.kernels.triton.launch import launch
from fastres.kernels.triton.record import recording

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
kernel_report = importlib.import_module("kernel_report")
TARGETS = list(offline.TARGETS)

#: Of a layer in each network, so of every kernel one launch with most of its arguments.
LAUNCHES = kernel_report.launches(kernel_report.LAUNCHERS, (50,), 256, ("bf16",))


def fullest(name):
    """The launch of a kernel that leaves out least."""
    mine = [one for one in LAUNCHES if one.name == name]
    return max(mine, key=lambda one: sum(value is not None for value in one.arguments.values()))


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name", sorted({one.name for one in LAUNCHES}))
def test_our_kernels(name, target):
    one = offline.specialise(fullest(name), target)
    code = offline.compiled(one)
    assert offline.faults(one, code) == []
    assert code.registers > 0 and code.accesses
    if target == "sm_90":  # in AMD's code of Triton 3.6 some pointers cannot be traced back to their argument
        assert "?" not in {argument for argument, _, _ in code.accesses}


def test_every_kernel_is_in_the_report():
    kernels = set()
    for module in pkgutil.iter_modules(package.__path__):
        found = vars(importlib.import_module(f"{package.__name__}.{module.name}"))
        kernels |= {n for n, value in found.items() if isinstance(value, JITFunction) and n.endswith("_kernel")}
    assert kernels == {one.name for one in LAUNCHES}


def test_what_tuning_may_choose_compiles_without_faults():
    """At the end of a bottleneck; `make kernel-report ARGS=--candidates` does it for all layers and GPUs."""
    (layer,) = (one for one in kernel_report.layers_of((50,)) if one.name == "2.expand")
    names = ("statistics_kernel", "apply_kernel", "gram_kernel", "row_product_kernel", "product_kernel")
    found = kernel_report.candidates(("batch_norm", "algebraic"), [layer], 256, ("bf16",))
    tiles = {name: set() for name in names}
    for one in kernel_report.specialisations((one for one in found if one.name in names), ["sm_90"]):
        blocks = tuple(v for k, v in one.launch.arguments.items() if k.startswith("BLOCK"))
        if (blocks, one.options["num_stages"]) in tiles[one.launch.name]:
            continue  # the same tile with other arguments
        tiles[one.launch.name].add((blocks, one.options["num_stages"]))
        assert offline.faults(one, offline.compiled(one)) == [], f"{one.launch.name} {blocks}"
    assert [len(found) for found in tiles.values()] == [3, 3, 4, 5, 5]


# What a good kernel looks like, and what is wrong with others


@triton.jit
def copy_kernel(x, y, rows, channels, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    row, channel = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_CHANNELS)
    offset = row.to(tl.int64)[:, None] * channels + channel[None, :]
    exists = (row < rows)[:, None] & (channel < channels)[None, :]
    tl.store(y + offset, tl.load(x + offset, exists), exists)


@triton.jit
def scattered_kernel(x, y, rows, channels, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """Its mask changes from value to value, so they are loaded one by one."""
    row, channel = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_CHANNELS)
    offset = row[:, None] * channels + channel[None, :]
    exists = (row < rows)[:, None] & (channel % 3 != 0)[None, :]
    tl.store(y + offset, tl.load(x + offset, exists, other=0.0), row[:, None] < rows)


@triton.jit
def hungry_kernel(x, y, rows, channels, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """Holds a tile while it is summed up."""
    row, channel = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_CHANNELS)
    offset = row[:, None] * channels + channel[None, :]
    values = tl.load(x + offset)
    tl.store(y + offset, values / tl.sum(values))


@triton.jit
def product_kernel(x, y, weight, rows, channels, BLOCK: tl.constexpr, PRECISE: tl.constexpr):
    """A 1x1 convolution with BLOCK outputs."""
    row, column, k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, 32)
    a, b = x + row[:, None] * channels + k[None, :], weight + column[None, :] * channels + k[:, None]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in range(0, channels, 32):
        left, right = tl.load(a, row[:, None] < rows, other=0.0), tl.load(b)
        if PRECISE:
            total += tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
        else:
            total = tl.dot(left, right, total)
        a += 32
        b += 32
    tl.store(y + row[:, None] * BLOCK + column[None, :], total.to(y.dtype.element_ty), row[:, None] < rows)


def activation(channels, dtype=torch.bfloat16):
    return kernel_report.meta(16, channels, 8, 8, dtype=dtype)


def one_launch(kernel, x, y, *, num_warps=4, num_stages=3, **arguments):
    with recording() as launches:
        sizes = {"rows": 1024, "channels": x.shape[1]}
        launch(kernel, (16,), num_warps=num_warps, num_stages=num_stages, x=x, y=y, **sizes, **arguments)
    return launches[0]


def tile_launch(kernel, channels, rows, *, num_warps=4, dtype=torch.bfloat16):
    x, block = activation(channels, dtype), triton.next_power_of_2(channels)
    return one_launch(kernel, x, x, num_warps=num_warps, BLOCK_ROWS=rows, BLOCK_CHANNELS=block)


def product_launch(precise=False, dtype=torch.bfloat16):
    block = 32 if precise else 64
    weight = kernel_report.meta(block, 128, 1, 1, dtype=dtype)
    return one_launch(
        product_kernel, activation(128, dtype), activation(block, dtype), weight=weight, BLOCK=block, PRECISE=precise
    )


def judged(launch, target):
    one = offline.specialise(launch, target)
    code = offline.compiled(one)
    return code, offline.faults(one, code)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_good_kernel_has_no_faults(target, dtype):
    code, faults = judged(tile_launch(copy_kernel, 64, 64, dtype=dtype), target)
    assert faults == [] and code.spills == 0 and not code.dot
    assert {(name, kind) for name, kind, _ in code.accesses} == {("x", "load"), ("y", "store")}
    assert min(width for _, _, width in code.accesses) >= 16


@pytest.mark.parametrize("target", TARGETS)
def test_scalar_loads_are_found(target):
    _, faults = judged(tile_launch(scattered_kernel, 64, 64), target)
    assert faults == ["loads x 2 bytes at a time"]


def test_channels_that_do_not_divide_by_16_may_be_loaded_one_by_one():
    code, faults = judged(tile_launch(copy_kernel, 65, 64), "sm_90")
    assert faults == [] and ("x", "load", 2) in code.accesses


@pytest.mark.parametrize("target", TARGETS)
def test_spills_are_found(target):
    if target == "gfx942":  # 16 warps have 128 registers for each thread, which is the number of its values
        small, large = (
            tile_launch(hungry_kernel, 128, rows, dtype=torch.float32, num_warps=16) for rows in (256, 1024)
        )
    else:
        small = tile_launch(hungry_kernel, 128, 64, dtype=torch.float32)
        large = dataclasses.replace(small, options={**small.options, "maxnreg": 32})
    assert judged(small, target)[1] == []
    code, faults = judged(large, target)
    assert faults == [f"spills {code.spills}"] and code.spills > 0


@pytest.mark.parametrize("target", TARGETS)
def test_matrix_instructions_are_found(target):
    code, faults = judged(product_launch(), target)
    assert faults == [] and code.dot and code.matrix
    assert {name for name, _, _ in code.accesses} == {"x", "weight", "y"}  # through pointers that move in a loop


@pytest.mark.parametrize("target", TARGETS)
def test_their_absence_is_found(target):
    _, faults = judged(product_launch(precise=True), target)
    assert "no matrix instructions of 16-bit values" in faults
    _, faults = judged(product_launch(precise=True, dtype=torch.float32), target)
    assert not [fault for fault in faults if "matrix" in fault]


def test_too_much_shared_memory_is_found():
    one = offline.specialise(tile_launch(copy_kernel, 64, 64), "sm_80")
    code = offline.compiled(one)
    limit = 163 * 1024
    assert offline.faults(one, dataclasses.replace(code, shared=limit)) == []
    faults = offline.faults(one, dataclasses.replace(code, shared=limit + 1))
    assert faults == ["166913 bytes of shared memory, sm_80 has 166912"]


def test_an_allocation_is_found():
    one = offline.specialise(tile_launch(copy_kernel, 64, 64), "sm_90")
    code = offline.compiled(one)
    assert code.scratch == 0 and offline.faults(one, dataclasses.replace(code, scratch=64)) == ["allocates 64 bytes"]


def test_accesses_are_told_apart():
    llir = """
define ptx_kernel void @f(ptr addrspace(1) %0, ptr addrspace(1) %1, i32 %2, ptr addrspace(1) readonly %3) {
  %5 = getelementptr bfloat, ptr addrspace(1) %0, i64 %9
loop:
  %6 = phi ptr addrspace(1) [ %7, %loop ], [ %5, %0 ]
  %7 = getelementptr i8, ptr addrspace(1) %6, i64 64
  %8 = call { i32, i32 } asm "mov.u32 $0, 0;\\0A\\09ld.global.v2.b32 { $0, $1 }, [ $2 ];", "=r"(ptr addrspace(1) %6)
  call void asm "cp.async.cg.shared.global [ $0 + 0 ], [ $1 + 0 ], 0x10, $2;"(ptr addrspace(3) %p, ptr addrspace(1) %7)
  call void asm sideeffect "@$5 st.global.v4.b32 [ $4 + 0 ], { $0, $1 };", "r"(i32 %2, ptr addrspace(1) %1, i1 %x)
  %10 = tail call ptr addrspace(8) @llvm.amdgcn.make.buffer.rsrc.p8.p1(ptr addrspace(1) %3, i16 0, i64 9, i32 9)
  tail call void @llvm.amdgcn.raw.ptr.buffer.store.v8i16(<8 x i16> %v, ptr addrspace(8) %10, i32 %2, i32 0, i32 0)
  %11 = load <8 x bfloat>, ptr addrspace(1) %7, align 16
  store float %y, ptr addrspace(1) %unknown, align 4
}
declare void @llvm.amdgcn.raw.ptr.buffer.store.v8i16(<8 x i16>, ptr addrspace(8), i32, i32, i32)
"""
    assert offline.accesses(llir, ["a", "b", "n", "c"]) == Counter(
        {
            ("a", "load", 8): 1,
            ("a", "load", 16): 2,
            ("b", "store", 16): 1,
            ("c", "store", 16): 1,
            ("?", "store", 4): 1,
        }
    )


# Specialisation, and the report


def test_specialisation_is_that_of_the_jit():
    """By the definition in Triton's documentation: dtypes, divisibility by 16, ones and None as constants."""
    odd = torch.empty(100, device="meta")[1:]
    with recording() as launches:
        launch(copy_kernel, (1,), x=odd, y=None, rows=17, channels=1, BLOCK_ROWS=16, BLOCK_CHANNELS=16)
        launch(copy_kernel, (1,), x=odd[3:], y=odd, rows=2**31, channels=32, BLOCK_ROWS=16, BLOCK_CHANNELS=16)
    first, second = (offline.specialise(one, "sm_90") for one in launches)
    constants = {"BLOCK_ROWS": "constexpr", "BLOCK_CHANNELS": "constexpr"}
    assert first.signature == {"x": "*fp32", "y": "constexpr", "rows": "i32", "channels": "constexpr", **constants}
    assert second.signature == {"x": "*fp32", "y": "*fp32", "rows": "i64", "channels": "i32", **constants}
    divisible = [["tt.divisibility", 16]]
    assert {k: v for k, v in first.attributes.items() if v} == {}
    assert {k: v for k, v in second.attributes.items() if v} == {(0,): divisible, (2,): divisible, (3,): divisible}
    assert first.key != second.key


def test_launches_that_share_code_are_compiled_once(capsys):
    launches = [tile_launch(copy_kernel, c, rows) for c in (64, 48) for rows in (64, 32)] * 3
    assert len(list(kernel_report.specialisations(launches, ["sm_90", "gfx942"]))) == 4
    assert kernel_report.report(launches[:1] * 2, ["sm_90"]) == 0
    table = capsys.readouterr().out
    assert table.count("copy_kernel") == 1 and "1 compiled" in table and "<x 4x16, >y 4x16" in table


def test_the_report_fails_on_faults(capsys, monkeypatch):
    monkeypatch.setattr(kernel_report, "launches", lambda *args: [tile_launch(scattered_kernel, 64, 64)])
    monkeypatch.setattr(sys, "argv", ["kernel_report.py", "--targets", "sm_90", "--kernel", "scattered"])
    with pytest.raises(SystemExit) as stopped:
        kernel_report.main()
    assert stopped.value.code
    assert "FAULT: loads x 2 bytes at a time" in capsys.readouterr().out
