"""Activations of more than 2^31 values, on a CUDA device."""

import pytest
import torch
import torch.nn.functional as F
from _gpu import DEVICE, kernels_fixture, needs_device

from fastres import functional
from fastres.layout import is_channels_last, mask_bytes, unpack_mask
from fastres.testing import LAYOUTS, budget, relative_error

pytestmark = needs_device
kernels = kernels_fixture()
LARGE = (2**15 + 8, 64, 32, 32)  # more than 2^31 values
LAST = 8  # images at the end, behind the 2^31st value


@pytest.fixture
def large():
    """large(layout): a bf16 activation of more than 2^31 values, where there is memory for eight of them."""
    size = 2 * LARGE[0] * LARGE[1] * LARGE[2] * LARGE[3]
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 9 * size:
        pytest.skip(f"less than {9 * size / 2**30:.0f} GiB of free device memory")
    yield lambda layout: torch.empty(LARGE, device=DEVICE, dtype=torch.bfloat16, memory_format=LAYOUTS[layout]).normal_(
        0.3, 1.5
    )
    torch.cuda.empty_cache()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_add_act_of_more_than_2_to_31_values(kernels, large, layout):
    x, residual = large(layout), large(layout)
    y = functional.add_act(x, residual)
    for part in (slice(0, LAST), slice(-LAST, None)):
        assert torch.equal(y[part], F.relu(x[part] + residual[part]))
    del residual
    grad = torch.ops.fastres.add_act_backward(x, y)
    for part in (slice(0, LAST), slice(-LAST, None)):
        assert torch.equal(grad[part], torch.where(y[part] <= 0, 0.0, x[part]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bn_act_of_more_than_2_to_31_values(kernels, large, layout):
    x, residual = large(layout), large(layout)
    weight, bias = (torch.rand(LARGE[1], device=DEVICE) + 0.5 for _ in range(2))
    bn_act, backward = torch.ops.fastres.bn_act, torch.ops.fastres.bn_act_backward
    y, mean, var, mask = bn_act(x, weight, bias, None, None, residual, True, 1e-5, True, True)
    sums, squares, count = 0.0, 0.0, LARGE[0] * LARGE[2] * LARGE[3]
    for part in x.split(1024):
        sums = sums + part.double().sum((0, 2, 3))
        squares = squares + part.double().square().sum((0, 2, 3))
    assert relative_error(mean, sums / count) < 1e-5
    assert relative_error(var, squares / count - (sums / count) ** 2) < 1e-5
    bytes_ = mask_bytes(x) // LARGE[0] * LAST
    for part, bits in ((slice(0, LAST), slice(0, bytes_)), (slice(-LAST, None), slice(-bytes_, None))):
        some = bn_act(x[part], weight, bias, mean, var, residual[part], False, 1e-5, True, True)
        assert torch.equal(y[part], some[0]) and torch.equal(mask[bits], some[3])
    del residual
    # y, which is not negative, serves as the gradient.
    options = (True, 1e-5, True, True, True, True)
    grad_x, grad_weight, grad_bias, masked = backward(y, x, weight, bias, mean, var, mask, *options)
    bias_sum, weight_sum = 0.0, 0.0
    for some_x, g in zip(x.split(1024), y.split(1024), strict=True):  # behind the ReLU y is its own masked gradient
        bias_sum = bias_sum + g.double().sum((0, 2, 3))
        weight_sum = weight_sum + (g.double() * (some_x.double() - mean.view(1, -1, 1, 1))).sum((0, 2, 3))
    inverse = (var + 1e-5).rsqrt()
    assert relative_error(grad_bias, bias_sum) < 1e-4
    assert relative_error(grad_weight, weight_sum * inverse) < 1e-4
    c = (1, -1, 1, 1)
    for part in (slice(0, LAST), slice(-LAST, None)):
        assert torch.equal(masked[part], y[part])
        centred = (x[part].double() - mean.view(c)) * (inverse**2 * weight_sum / count).view(c)
        truth = (y[part].double() - (bias_sum / count).view(c) - centred) * (weight * inverse).view(c)
        assert relative_error(grad_x[part], truth) < budget(0.0, torch.bfloat16)
    keep = unpack_mask(mask[-bytes_:], y[-LAST:].shape, is_channels_last(y))
    assert torch.equal(keep, y[-LAST:] > 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bn_add_bn_act_of_more_than_2_to_31_values(kernels, large, layout):
    x, other = large(layout), large(layout)
    weight, bias = (torch.rand(LARGE[1], device=DEVICE) + 0.5 for _ in range(2))
    mean, var = x[:LAST].double().mean((0, 2, 3)), torch.full((LARGE[1],), 2.0, device=DEVICE)
    affine, mode, bytes_ = (weight, bias, mean, var), (False, False, 1e-5, 1e-5), mask_bytes(x) // LARGE[0] * LAST
    parts = ((slice(0, LAST), slice(0, bytes_)), (slice(-LAST, None), slice(-bytes_, None)))
    forward, backward = torch.ops.fastres.bn_add_bn_act, torch.ops.fastres.bn_add_bn_act_backward
    y, mean, var, _, _, mask = forward(x, *affine, other, *affine, *mode, True, True)
    for part, bits in parts:
        some = forward(x[part], *affine, other[part], *affine, *mode, True, True)
        assert torch.equal(y[part], some[0]) and torch.equal(mask[bits], some[5])
    branches, need = (x, weight, mean, var, other, weight, mean, var), (True, False, True, False)
    grad_x, _, _, grad_other, _, _ = backward(y, *branches, mask, *mode, *need)
    for part, bits in parts:
        some = (t[part] if t.dim() == 4 else t for t in branches)
        want = backward(y[part], *some, mask[bits], *mode, *need)
        assert torch.equal(grad_x[part], want[0]) and torch.equal(grad_other[part], want[3])
