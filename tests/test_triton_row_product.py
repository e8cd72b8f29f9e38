"""Triton's products over the rows of activations against float64: weight gradients, and Gram matrices."""

import pytest
import torch
from _products import SHAPES, activation, assert_as_exact, vector
from _triton import DEVICE, running

from fastres import layout
from fastres.kernels.triton import batch_norm
from fastres.kernels.triton.gram import gram
from fastres.kernels.triton.operands import norm_of
from fastres.kernels.triton.row_product import row_product
from fastres.testing import DTYPES, relative_error

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def without_tf32(monkeypatch):
    """On a GPU: sums of fp32 products are judged as such."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def rows(x):
    return x.permute(0, 2, 3, 1).flatten(0, 2)


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_and_sums_behind_a_mask(shape, dtype):
    n, c, h, w, k = shape
    g, x = activation(n, k, h, w, dtype), activation(n, c, h, w, dtype, mean=0.5)
    keep = activation(n, k, h, w, dtype) > 0
    masked = torch.full_like(g, 7.0)
    with running():
        got = [
            row_product(g, x, k, c, dtype=torch.float32, mask=layout.pack_mask(keep, True), masked=masked, sums=True)
            for _ in range(2)
        ]
    want = torch.where(keep, g, 0.0)
    truth, witness = (rows(want).to(dtype).T @ rows(x).to(dtype) for dtype in (torch.float64, dtype))
    assert torch.equal(masked, want)
    assert_as_exact(got[0][0], truth, witness, dtype, summed=True)
    assert relative_error(got[0][1], rows(want).double().sum(0)) < 1e-6
    assert all(torch.equal(a, b) for a, b in zip(*got, strict=True)), "the same bits each time"


def test_centre():
    n, c, h, w, k = 2, 17, 9, 9, 65
    g, x = activation(n, k, h, w, torch.float32), activation(n, c, h, w, torch.float32, mean=1e3)
    centre = rows(x).mean(0)
    with running():
        got, sums = row_product(g, x, k, c, dtype=torch.float64, centre=centre)
    assert relative_error(got, rows(g).double().T @ (rows(x).double() - centre.double())) < 1e-6
    assert sums.numel() == 0


@dtypes
def test_prologue(dtype):
    n, c, h, w, k = 1, 33, 9, 8, 17
    g, x = activation(n, k, h, w, dtype), activation(n, c, h, w, dtype, mean=0.5, std=2.0)
    gamma, beta = vector(c), vector(c)
    with running():
        y, mean, var, _ = batch_norm.bn_act(x, gamma, beta, None, None, None, True, 1e-5, True, False)
        norm = norm_of(mean, var, gamma, beta, 1e-5)
        stored, _ = row_product(g, y, k, c, dtype=dtype)
        fused, _ = row_product(g, x, k, c, dtype=dtype, norm=norm)
        assert torch.equal(stored, fused)
        assert all(torch.equal(a, b) for a, b in zip(gram(y), gram(x, norm), strict=True))


def covariance(x):
    values = rows(x).double()
    mean = values.mean(0)
    return mean, (values - mean).T @ (values - mean) / len(values)


@dtypes
@pytest.mark.parametrize("channels", [3, 17, 64, 65, 130])
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_gram(channels, mean, dtype):
    """With a mean of 1000 deviations as exact as without (fp16 and bf16 then have a few different values only)."""
    x = activation(1, channels, 9, 8, dtype, mean=mean)
    x = x.relu() if mean == 0 else x
    with running():
        got_mean, got = gram(x)
    true_mean, truth = covariance(x)
    assert relative_error(got_mean, true_mean) < 1e-7
    assert relative_error(got, truth) < (1e-6 if dtype is torch.float32 else 1e-5)
    assert torch.equal(got, got.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mean", [1.0, 5.0, 50.0])
def test_gram_of_short_values_with_some_mean(mean, dtype):
    """What has to be rounded once the point near the mean is subtracted is little."""
    x = activation(4, 17, 16, 16, dtype, mean=mean)
    with running():
        got_mean, got = gram(x)
    true_mean, truth = covariance(x)
    assert relative_error(got_mean, true_mean) < 1e-5 and relative_error(got, truth) < 1e-4


@pytest.mark.filterwarnings("ignore:invalid value")
@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_gram_of_what_is_not_finite(value, dtype):
    x = activation(1, 65, 9, 9, dtype)
    x[0, 3, 0, 0] = x[0, 64, 8, 8] = value
    with running():
        mean, got = gram(x)
    bad = torch.zeros(65, dtype=torch.bool, device=DEVICE)
    bad[3] = bad[64] = True
    assert torch.equal(mean.isfinite(), ~bad)
    assert torch.equal(got.isfinite(), ~(bad[:, None] | bad[None, :]))
