"""Fused blocks whose kernels are Triton's: on the GPU if there is one, else interpreted."""

import copy

import pytest
import torch
from _compare import assert_path, block, check_numbers, image, kinds, layouts, modes, network, step, watched
from _triton import triton_kernels
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import fastres
from fastres.testing import LAYOUTS, relative_error


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
def test_several_steps(kind):
    """Of a block with a projection, by SGD: weights, momenta and statistics stay as near to float64 as eager's."""

    def train(model, dtype):
        x, model = source.to(dtype), copy.deepcopy(model).to(dtype).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for i in range(3):
            optimizer.zero_grad()
            (model(x + i) - 1).square().mean().backward()
            optimizer.step()
        return model.state_dict()

    model, source = block(kind=kind, stride=2), image(size=5)
    truth, eager = train(model, torch.float64), train(model, torch.float32)
    fastres.fuse_(model)
    for name, got in train(model, torch.float32).items():
        if name.endswith("num_batches_tracked"):
            assert got == 3
        else:
            limit = max(2 * relative_error(eager[name], truth[name]), 2e-5)
            assert relative_error(got, truth[name]) <= limit, name


@pytest.mark.parametrize(("reentrant", "early"), [(True, True), (False, False), (False, True)], ids=str)
def test_running_statistics_under_checkpointing(reentrant, early):
    """A block that is computed again in backward changes its statistics as often as in eager. But where PyTorch stops
    that as soon as it has all saved tensors: then the last op has not changed its own again."""
    eager = block(kind="BasicBlock", width=8, stride=2).train()
    fused, x = copy.deepcopy(eager), image(8, size=5)
    fastres.fuse_(fused)
    for model in (eager, fused):
        with set_checkpoint_early_stop(early):
            y = checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant)
            y.sum().backward()
    for (name, got), want in zip(fused.named_buffers(), eager.buffers(), strict=True):
        if reentrant or not early or name.startswith("bn1") or name.endswith("num_batches_tracked"):
            torch.testing.assert_close(got, want, msg=name)
    assert fused.bn2.num_batches_tracked == fused.downsample[1].num_batches_tracked == 2


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
