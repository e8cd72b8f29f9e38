"""The statistics that our own convolutions take of their output on the way: those of the output as it is stored."""

import pytest
import torch
from _convolution import GEMM, GROUPED, INF, NAN, NHWC, OPS, WINOGRAD, WINOGRAD2, Conv, square

import fastres
from fastres import functional
from fastres.kernels import convolution
from fastres.testing import DTYPES, relative_error

#: Each with the methods that serve it.
CONVS = [
    # the matrix product: whole and cut panels, one block and many, few pixels and many weights, rows as taps
    (square(64, 64, 1, 1, 0, 14), (GEMM,)),
    (square(64, 32, 1, 1, 0, 30, batch=3), (GEMM,)),
    (square(65, 33, 1, 1, 0, 5, batch=3), (GEMM,)),
    (square(512, 200, 1, 2, 0, 7), (GEMM,)),
    (square(17, 21, 3, 2, 1, 9, batch=2), (GEMM,)),
    (square(5, 3, 3, 1, 2, 8, dilation=2), (GEMM,)),
    (square(3, 24, 7, 2, 3, 31), (GEMM,)),
    (square(1, 1, 2, 1, 0, 2), (GEMM,)),  # one output
    # Winograd: tiles cut on all sides, one group of tiles and many, large weights
    (square(16, 24, 3, 1, 1, 13, batch=3), (GEMM, WINOGRAD, WINOGRAD2)),
    (square(64, 80, 3, 1, 1, 14), (GEMM, WINOGRAD, WINOGRAD2)),
    (square(64, 64, 3, 1, 0, 23, batch=2), (GEMM, WINOGRAD, WINOGRAD2)),
    (Conv((1, 16, 23, 3), (48, 16, 3, 3), padding=(1, 1)), (GEMM, WINOGRAD, WINOGRAD2)),
    (Conv((3, 16, 1, 6), (16, 16, 3, 3), padding=(1, 2)), (GEMM, WINOGRAD, WINOGRAD2)),
    (square(512, 512, 3, 1, 1, 7), (WINOGRAD,)),
    (square(24, 24, 3, 1, 1, 9, batch=2, groups=3), (GEMM, GROUPED)),
]
METHODS = [pytest.param(conv, method, id=f"{conv}-{method}") for conv, methods in CONVS for method in methods]


def run(conv, method, x, weight, bias=None):
    """y, mean, var; the same y as without statistics."""
    packed = OPS.conv_pack(weight, conv.x, *conv.geometry, method)
    y, mean, var = OPS.conv_with_statistics(x, packed, conv.weight, bias, *conv.geometry, method)
    plain = OPS.conv(x, packed, conv.weight, bias, None, *conv.geometry, False, method)
    assert torch.equal(y.isnan(), plain.isnan()) and torch.equal(y.nan_to_num(), plain.nan_to_num())
    return y, mean, var


def check(y, mean, var):
    true_var, true_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    assert mean.dtype is torch.float64 and var.dtype is torch.float64
    assert float(((mean - true_mean).abs() / true_var.sqrt().clamp(min=1e-30)).max()) < 1e-6 or y.numel() == len(mean)
    torch.testing.assert_close(var, true_var, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("conv", "method"), METHODS)
def test_against_float64(conv, method, dtype):
    if method == GROUPED and dtype is not torch.float32:
        pytest.skip("grouped convolutions are float32 only")
    x, weight, bias, *_ = conv.tensors()
    for b in (None, bias):
        check(*run(conv, method, x.to(dtype), weight, b))


@pytest.mark.parametrize(("conv", "method"), METHODS)
def test_same_for_any_number_of_threads(conv, method):
    """How work is cut into tasks, and by what, depends on the number of threads; the sums must not."""
    x, weight, bias, *_ = conv.tensors()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 16, 2):
            torch.set_num_threads(count)
            results.append(run(conv, method, x, weight, bias))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, a, b in zip(("y", "mean", "var"), results[0], other, strict=True):
            assert torch.equal(a, b), name


#: A convolution of several blocks for each way of taking sums.
SEVERAL = [
    pytest.param(square(16, 16, 3, 1, 1, 44, batch=2), WINOGRAD, id="4x4"),
    pytest.param(square(16, 16, 3, 1, 1, 22, batch=2), WINOGRAD2, id="2x2"),
    pytest.param(square(16, 16, 3, 2, 1, 44, batch=2), GEMM, id="gemm"),
]


@pytest.mark.parametrize(("conv", "method"), SEVERAL)
def test_large_mean(conv, method):
    """Mean 1e4, std 1e-2: sums of y and y^2 would cancel to nothing."""
    x, weight, *_ = conv.tensors()
    y, mean, var = run(conv, method, x, weight * 1e-2, torch.full((conv.weight[0],), 1e4))
    true_var, true_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    assert 5e-3 < float(true_var.sqrt().mean()) < 2e-2
    assert relative_error(mean, true_mean) < 1e-12
    assert relative_error(var, true_var) < 1e-6


@pytest.mark.parametrize(("conv", "method"), SEVERAL)
def test_outlier_in_the_first_pixel(conv, method):
    """Which may be what the sums are shifted by."""
    x, weight, *_ = conv.tensors()
    x = x * 1e-3
    x[0, :, 0, 0] = 1e3
    y, mean, var = run(conv, method, x, weight)
    true_var, true_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(var, true_var, rtol=2e-5, atol=0)
    assert float(((mean - true_mean).abs() / true_var.sqrt()).max()) < 1e-6


@pytest.mark.parametrize("values", [(NAN,), (INF,), (-INF,), (INF, -INF), (NAN, INF)], ids=str)
@pytest.mark.parametrize("place", [(0, 0), (20, 21)], ids=["first pixel", "inside"])
@pytest.mark.parametrize(("conv", "method"), SEVERAL)
def test_not_finite(conv, method, place, values):
    """Winograd's are those of the direct way, which does not spread an infinity over a tile."""
    x, weight, *_ = conv.tensors()
    weight[1::2] = 0  # these channels have NaN only
    x = x.clone(memory_format=torch.preserve_format)
    for i, value in enumerate(values):
        x[i, 3 * i, place[0], place[1]] = value
    y, mean, var = run(conv, method, x, weight)
    true_mean = y.double().mean((0, 2, 3))
    assert not true_mean.isfinite().any()
    assert torch.equal(mean.isnan(), true_mean.isnan()) and torch.equal(mean.nan_to_num(), true_mean.nan_to_num())
    assert var.isnan().all()


@pytest.mark.parametrize(("conv", "method"), SEVERAL)
def test_infinite_bias(conv, method):
    x, weight, bias, *_ = conv.tensors()
    bias[3], bias[5] = INF, NAN
    _, mean, var = run(conv, method, x, weight, bias)
    assert mean[3] == INF and mean[5].isnan() and var[3].isnan() and var[5].isnan()
    assert int(mean.isfinite().sum()) == int(var.isfinite().sum()) == len(bias) - 2


@pytest.mark.parametrize(("conv", "method"), SEVERAL)
def test_overflow_of_float16(conv, method):
    """Outputs that are finite in float32 and infinite where they are stored."""
    x, weight, *_ = conv.tensors()
    bias = torch.zeros(conv.weight[0])
    bias[2] = 65519.0
    y, mean, var = run(conv, method, x.half(), weight * 10, bias)
    assert y[:, 2].isinf().any() and mean[2] == INF and var[2].isnan()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("conv", "method"), SEVERAL)
def test_the_op_uses_them(conv, method, training, monkeypatch):
    monkeypatch.setattr(convolution, "method", lambda *_: method)
    x, weight, *_ = conv.tensors()
    channels = conv.weight[0]
    running = torch.zeros(channels), torch.ones(channels)
    with fastres.use_kernels("cpu"):
        y, raw, mean, var, _ = torch.ops.fastres.conv_bn_act(
            x, weight, None, None, None, *running, None, *conv.geometry, training, 1e-5, False, False
        )
    _, want_mean, want_var = run(conv, method, x, weight) if training else (None, *(t.double() for t in running))
    assert torch.equal(mean, want_mean) and torch.equal(var, want_var)
    want = torch.nn.functional.batch_norm(raw.double(), want_mean, want_var, eps=1e-5)
    assert relative_error(y, want) < 3e-7 and y.is_contiguous(memory_format=NHWC)


def test_frozen_statistics_are_not_replaced():
    conv, _ = CONVS[0]
    x, weight, *_ = conv.tensors()
    mean, var = torch.full((conv.weight[0],), 0.5), torch.full((conv.weight[0],), 2.0)
    weight.requires_grad_()
    functional.conv_bn_act(x, weight, mean, var, training=False, act="identity").sum().backward()
    assert (mean == 0.5).all() and (var == 2.0).all()


@pytest.mark.parametrize(
    ("shape", "message"), [((0, 16, 8, 8), "x is empty"), ((16, 8, 8), "4 dimensions"), ((1, 8, 8, 8), "channels")]
)
def test_bad_input(shape, message):
    conv = square(16, 16, 3, 1, 1, 8)
    packed = OPS.conv_pack(torch.randn(conv.weight), conv.x, *conv.geometry, GEMM)
    x = torch.randn(shape)
    x = x.contiguous(memory_format=NHWC) if x.dim() == 4 else x
    with pytest.raises(RuntimeError, match=message):
        OPS.conv_with_statistics(x, packed, conv.weight, None, *conv.geometry, GEMM)
