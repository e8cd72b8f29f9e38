"""Triton's matrix product against float64, with eager as witness: prologue, epilogue, mask, statistics."""

import pytest
import torch
import torch.nn.functional as F
from _products import NHWC, SHAPES, activation, assert_as_exact, conv, matrix, vector
from _triton import DEVICE, running

from fastres import layout
from fastres.kernels.triton import batch_norm
from fastres.kernels.triton.operands import norm_of, sampling_of
from fastres.kernels.triton.product import Pair, product
from fastres.kernels.triton.statistics import combine_statistics
from fastres.testing import DTYPES, relative_error

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_epilogue(shape, dtype):
    n, c, h, w, k = shape
    x, weight, residual = activation(n, c, h, w, dtype), matrix(k, c, dtype), activation(n, k, h, w, dtype)
    scale, bias = vector(k), vector(k)
    y, mask = torch.empty_like(residual), torch.empty(layout.mask_bytes(residual), dtype=torch.uint8, device=DEVICE)
    with running():
        product(Pair(x, weight.T), y, scale=scale, bias=bias, residual=residual, mask=mask, relu=True)
    per_channel = [v[None, :, None, None] for v in (scale, bias)]

    def eager(dtype):
        factor, shift = (v.to(dtype) for v in per_channel)
        return F.relu(conv(x.to(dtype), weight.to(dtype)) * factor + shift + residual.to(dtype))

    assert_as_exact(y, eager(torch.float64), eager(dtype), dtype)
    assert torch.equal(mask, layout.pack_mask(~(y <= 0), True))


@dtypes
def test_two_products(dtype):
    """As of a data gradient: B is the weight itself, and another product is added to the first."""
    n, c, h, w, k = 2, 65, 7, 9, 130
    g, x = activation(n, k, h, w, dtype), activation(n, c, h, w, dtype)
    weight, square, bias = matrix(k, c, dtype), matrix(c, c, dtype), vector(c)
    out = torch.empty_like(x)
    with running():
        product(Pair(g, weight), out, Pair(x, square), bias=bias)

    def eager(dtype):
        first = conv(g.to(dtype), weight.T.to(dtype))
        return first + conv(x.to(dtype), square.T.to(dtype)) + bias.to(dtype)[None, :, None, None]

    assert_as_exact(out, eager(torch.float64), eager(dtype), dtype)


@dtypes
def test_two_products_as_of_a_projection_block(dtype):
    """Some pixels of the block's input, and the batch norm and ReLU of the convolution before."""
    n, c, h, w, k = 1, 33, 9, 11, 65
    before, x = activation(n, c, h, w, dtype), activation(n, 17, 5, 6, dtype)
    shortcut, weight = matrix(k, c, dtype), matrix(k, 17, dtype)
    gamma, beta = vector(17), vector(17)
    got, want = (torch.empty(n, k, 5, 6, device=DEVICE, dtype=dtype).contiguous(memory_format=NHWC) for _ in "ab")
    with running():
        y, mean, var, _ = batch_norm.bn_act(x, gamma, beta, None, None, None, True, 1e-5, True, False)
        normed = Pair(x, weight.T, norm_of(mean, var, gamma, beta, 1e-5))
        product(Pair(before, shortcut.T), got, normed, gather=sampling_of(before.shape, (2, 2)))
        product(Pair(before[:, :, ::2, ::2].contiguous(memory_format=NHWC), shortcut.T), want, Pair(y, weight.T))
    assert torch.equal(got, want)


@dtypes
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_prologue_computes_the_bits_that_bn_act_stores(shape, dtype):
    """Times the identity, so that sums round nothing."""
    n, c, h, w, _ = shape
    x, gamma, beta = activation(n, c, h, w, dtype, mean=0.5, std=2.0), vector(c), vector(c)
    out = torch.empty_like(x)
    with running():
        y, mean, var, _ = batch_norm.bn_act(x, gamma, beta, None, None, None, True, 1e-5, True, False)
        product(Pair(x, torch.eye(c, device=DEVICE, dtype=dtype), norm_of(mean, var, gamma, beta, 1e-5)), out)
    assert torch.equal(out, y)


@dtypes
@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize("shape", SHAPES[2:4], ids=str)
def test_statistics(shape, mean, dtype):
    """Those of the values as they are stored."""
    n, c, h, w, k = shape
    x, weight, bias = activation(n, c, h, w, dtype), matrix(k, c, dtype), vector(k) + mean
    y = torch.empty(n, k, h, w, device=DEVICE, dtype=dtype).contiguous(memory_format=NHWC)
    with running():
        got = combine_statistics(product(Pair(x, weight.T), y, bias=bias, statistics=True), n * h * w)
    var, mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    assert relative_error(got[0], mean) < 1e-7 and relative_error(got[1], var) < 1e-6


def test_statistics_of_many_programs():
    """They are folded first; with a large mean, and counts that are not equal."""
    programs, c = 300, 37
    values = (torch.randn(programs, 8, c) * 0.01 + 1e4).double().to(DEVICE)
    count = torch.full((programs, 1), 8.0, dtype=torch.float64, device=DEVICE)
    count[-1] = 3
    exists = torch.arange(8, device=DEVICE)[None, :, None] < count[:, :, None]
    mean = (values * exists).sum(1) / count
    squares = ((values - mean[:, None]).square() * exists).sum(1)
    k = mean.float()
    partial = torch.stack([k, (mean - k).float(), squares.float(), count.float().expand(-1, c)]).contiguous()
    rows = values.reshape(-1, c)[exists.expand(-1, -1, c).reshape(-1, c)].reshape(-1, c)
    with running():
        got = combine_statistics(partial, rows.shape[0])
    var, mean = torch.var_mean(rows, 0, correction=0)
    assert relative_error(got[0], mean) < 1e-12 and relative_error(got[1], var) < 1e-6


@pytest.mark.filterwarnings("ignore:invalid value")
@dtypes
def test_what_is_not_finite_stays_in_its_row(dtype):
    n, c, h, w, k = 1, 17, 9, 16, 65
    x, weight, residual = activation(n, c, h, w, dtype), matrix(k, c, dtype), activation(n, k, h, w, dtype)
    x[0, 3, 0, 1], x[0, 4, 8, 15], residual[0, 5, 2, 2] = float("nan"), float("inf"), float("nan")
    y, mask = torch.empty_like(residual), torch.empty(layout.mask_bytes(residual), dtype=torch.uint8, device=DEVICE)
    with running():
        product(Pair(x, weight.T), y, residual=residual, mask=mask, relu=True)
        _, var = combine_statistics(product(Pair(x, weight.T), torch.empty_like(y), statistics=True), h * w)
    want = F.relu(conv(x.double(), weight.double()) + residual.double())
    assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.isinf(), want.isinf())
    assert torch.equal(mask, layout.pack_mask(~(y <= 0), True))
    assert var.isnan().all()
