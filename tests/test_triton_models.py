"""Fused blocks whose kernels are Triton's: on the GPU if there is one, else interpreted."""

import copy

import pytest
import torch
from _compare import assert_path, block, check_numbers, image, kinds, layouts, modes, network, step, watched
from _triton import triton_kernels

import fastres
from fastres.testing import LAYOUTS


@pytest.fixture(autouse=True)
def kernels():
    with triton_kernels():
        yield


@modes
@kinds
@pytest.mark.parametrize("stride", [1, 2])
def test_blocks(kind, mode, stride):
    check_numbers(block(kind=kind, stride=stride), image(size=5), mode)


@layouts
def test_stem(layout):
    x = torch.randn(1, 3, 12, 12).contiguous(memory_format=LAYOUTS[layout])
    check_numbers(network(), x, "train")


@kinds
def test_autocast(kind):
    model, x = block(kind=kind, width=32), image(32, size=5)
    fused = copy.deepcopy(model)
    fastres.fuse_(fused)
    truth = step(copy.deepcopy(model).double(), x.double(), "train")
    with torch.autocast(x.device.type, torch.bfloat16):
        eager = step(model, x, "train")
        with watched() as seen:
            got = step(fused, x, "train")
    assert_path(seen, "fast")
    for name, want in truth.items():
        if want is not None and want.is_floating_point():
            error, witness = ((t[name].double() - want).norm() for t in (got, eager))
            assert error <= 2 * witness + 1e-3 * want.norm(), name
