"""fastres_cpu::conv_maxpool: a convolution with bias and ReLU whose output only exists in parts, pooled."""

import pytest
import torch
import torch.nn.functional as F
from _convolution import GEMM, INF, NAN, NHWC, OPS, Conv, nhwc, square

from fastres.testing import relative_error

STEM = square(3, 64, 7, 2, 3, 40, batch=3)
CONVS = [
    STEM,
    square(3, 64, 7, 2, 3, 224),
    square(3, 17, 3, 1, 1, 9, batch=2),
    square(17, 5, 3, 2, 1, 12),
    square(65, 24, 1, 1, 0, 6, batch=2),
    Conv((2, 3, 11, 30), (8, 3, 5, 3), (2, 1), (0, 1)),
    Conv((1, 4, 9, 8), (16, 4, 3, 3), padding=(2, 2), dilation=(2, 2)),
]
POOLS = [(3, 2, 1), (2, 2, 0), (3, 1, 1), (1, 1, 0), (2, 3, 1), (1, 3, 0), (5, 2, 2)]


def run(conv, x, weight, bias, relu, pool):
    packed = OPS.conv_pack(weight, conv.x, *conv.geometry, GEMM)
    return OPS.conv_maxpool(x, packed, conv.weight, bias, *conv.geometry[:3], relu, GEMM, *pool)


def eager(conv, x, weight, bias, relu, pool):
    y = F.conv2d(x, weight, bias, *conv.geometry)
    return F.max_pool2d(F.relu(y) if relu else y, *pool)


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "identity"])
@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_against_float64(conv, pool, relu):
    x, weight, bias, *_ = conv.tensors()
    if min(conv.y[2:]) + 2 * pool[2] < pool[0]:
        pytest.skip("the window is larger than the image")
    y = run(conv, x, weight, bias, relu, pool)
    want = eager(conv, x.double(), weight.double(), bias.double(), relu, pool)
    assert y.shape == want.shape and relative_error(y, want) < 1e-6
    assert y.is_contiguous(memory_format=NHWC)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_for_all_numbers_of_threads(threads):
    x, weight, bias, *_ = STEM.tensors()
    want = run(STEM, x, weight, bias, True, (3, 2, 1))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(run(STEM, x, weight, bias, True, (3, 2, 1)), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_values_that_are_not_finite(value):
    conv = square(3, 16, 3, 2, 1, 24)
    x, weight, bias, *_ = conv.tensors()
    x[0, 1, 5, 7] = value
    got = run(conv, x, weight, None, True, (3, 2, 1))
    want = eager(conv, x, weight, None, True, (3, 2, 1))
    torch.testing.assert_close(got, want, equal_nan=True)
    assert not got.isfinite().all()


def test_empty_batch():
    conv = square(3, 16, 3, 2, 1, 24, batch=0)
    x, weight, bias, *_ = conv.tensors()
    assert run(conv, x, weight, bias, True, (3, 2, 1)).shape == (0, 16, 6, 6)


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        ((0, 2, 0), "window"),
        ((3, 0, 1), "window"),
        ((3, 2, 2), "window"),
        ((3, 2, -1), "window"),
        ((50, 2, 1), "empty"),
    ],
)
def test_bad_window(pool, message):
    x, weight, bias, *_ = STEM.tensors()
    with pytest.raises(RuntimeError, match=message):
        run(STEM, x, weight, bias, True, pool)


def test_bad_input():
    x, weight, bias, *_ = STEM.tensors()
    packed = OPS.conv_pack(weight, STEM.x, *STEM.geometry, GEMM)
    rest = (True, GEMM, 3, 2, 1)
    for bad, message in (
        ((x.double(), packed, STEM.weight, bias), "float32"),
        ((x.contiguous(), packed, STEM.weight, bias), "dense"),
        ((x, packed[:-1], STEM.weight, bias), "does not fit"),
        ((x, packed.double(), STEM.weight, bias), "does not fit"),
        ((x, packed, STEM.weight, bias[:3].clone()), "values"),
        ((nhwc(1, 4, 40, 40), packed, STEM.weight, bias), "channels"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OPS.conv_maxpool(*bad, *STEM.geometry[:3], *rest)
