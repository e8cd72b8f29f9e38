"""Every kernel of every op against the float64 reference, with eager as second witness: outputs, gradients,
statistics."""

import pytest
import torch
import torch.nn.functional as F
from _kernels import (
    assert_parity,
    check_add_act,
    check_bn_act,
    check_bn_act_maxpool,
    check_large_mean,
    check_nan_and_inf,
    per_channel,
)

import fastres
from fastres import functional
from fastres.kernels import extension, table
from fastres.testing import LAYOUTS, Case, cases

KERNELS = ("reference", "cpu")


@pytest.fixture(params=KERNELS)
def kernel(request):
    if request.param == "cpu" and not extension.available():
        pytest.skip(f"compiled kernels are not loaded: {extension.load_error()}")
    return request.param


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "identity"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("case", cases(), ids=str)
def test_bn_act(kernel, case, with_residual, training, relu):
    with fastres.use_kernels(kernel):
        check_bn_act(case, with_residual, training, relu)


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "identity"])
@pytest.mark.parametrize("case", cases(), ids=str)
def test_add_act(kernel, case, relu):
    with fastres.use_kernels(kernel):
        check_add_act(case, relu)


POOLS = [(3, 2, 1), (2, 2, 0), (3, 1, 1)]


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "identity"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("case", cases(((2, 17, 7, 5), (1, 64, 15, 16), (3, 3, 9, 11))), ids=str)
def test_bn_act_maxpool(kernel, case, pool, training, relu):
    with fastres.use_kernels(kernel):
        check_bn_act_maxpool(case, pool, training, relu)


#: What serves a convolution under each name: our own kernels do not take NCHW.
CONVOLUTION_KERNELS = {"reference": ("reference",), "cpu": ("cpu", "onednn"), "onednn": ("onednn",)}


#: channels in, out, kernel, stride, padding, dilation, groups, height, width
CONVOLUTIONS = [
    (64, 64, 3, 1, 1, 1, 1, 14, 14),
    (3, 64, 7, 2, 3, 1, 1, 30, 31),
    (64, 17, 1, 1, 0, 1, 1, 7, 7),
    (32, 65, 1, 2, 0, 1, 1, 9, 8),
    (16, 32, 3, 2, 1, 1, 4, 11, 7),
    (24, 24, 3, 1, 2, 2, 24, 8, 8),
    (4, 8, 3, 1, 1, 1, 4, 8, 8),
    (5, 3, 2, 1, 0, 1, 1, 4, 3),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("kernel", CONVOLUTION_KERNELS, indirect=True)
def test_conv_bias_act(kernel, convolution, dtype, with_residual, layout):
    c, k, size, stride, padding, dilation, groups, h, w = convolution
    case = Case((2, c, h, w), dtype, layout)
    x, weight, bias = case.tensor(), case.tensor(shape=(k, c // groups, size, size), std=0.2), torch.randn(k).to(dtype)

    def eager(x, weight, bias, residual):
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return F.relu(y if residual is None else y + residual)

    out = eager(x, weight, bias, None)
    residual = case.tensor(shape=tuple(out.shape)) if with_residual else None
    witness = eager(x, weight, bias, residual)
    truth = eager(*(t if t is None else t.double() for t in (x, weight, bias, residual)))
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    with fastres.use_kernels(*CONVOLUTION_KERNELS[kernel]):
        got = functional.conv_bias_act(x, weight, bias, residual, **geometry)
    assert got.dtype is dtype and got.stride() == witness.stride()
    assert_parity([got], [truth], [witness], dtype, ["y"], winograd=kernel == "cpu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("convolution", CONVOLUTIONS[:7], ids=str)
def test_conv_bn_act(kernel, convolution, dtype, with_residual, training, layout):
    c, k, size, stride, padding, dilation, groups, h, w = convolution
    case = Case((2, c, h, w), dtype, layout)
    x, conv_weight, conv_bias = (
        case.tensor(),
        case.tensor(shape=(k, c // groups, size, size), std=0.2),
        torch.randn(k).to(dtype),
    )
    weight, bias, mean, var = per_channel(k)
    geometry = (stride, padding, dilation, groups)
    out = F.conv2d(x, conv_weight, conv_bias, *geometry)
    residual = case.tensor(shape=tuple(out.shape)) if with_residual else None
    grad_y = case.tensor(shape=tuple(out.shape))

    def run(function, dtype):
        tensors = [
            t if t is None else t.detach().to(dtype).requires_grad_() for t in (x, conv_weight, conv_bias, residual)
        ]
        affine = [
            t.clone().to(torch.float64 if dtype is torch.float64 else torch.float32).requires_grad_()
            for t in (weight, bias)
        ]
        running = [t.clone().to(affine[0].dtype) for t in (mean, var)]
        y = function(*tensors, *running, *affine)
        # Without conv_bias, whose gradient is zero but for rounding when batch statistics are used.
        inputs = [t for t in (tensors[0], tensors[1], tensors[3], *affine) if t is not None]
        return [y, *torch.autograd.grad(y, inputs, grad_y.to(dtype)), *running]

    def eager(x, conv_weight, conv_bias, residual, running_mean, running_var, weight, bias):
        y = F.conv2d(x, conv_weight, conv_bias, *geometry)
        y = F.batch_norm(y, running_mean, running_var, weight, bias, training)
        return F.relu(y if residual is None else y + residual)

    def fused(x, conv_weight, conv_bias, residual, running_mean, running_var, weight, bias):
        keys = dict(zip(("stride", "padding", "dilation", "groups"), geometry, strict=True))
        args = (x, conv_weight, running_mean, running_var, weight, bias, residual)
        return functional.conv_bn_act(*args, conv_bias=conv_bias, training=training, **keys)

    with fastres.use_kernels(kernel):
        got = run(fused, dtype)
    witness = run(eager, dtype)
    names = [
        "y",
        "grad_x",
        "grad_conv_weight",
        *(["grad_residual"] if with_residual else []),
        "grad_weight",
        "grad_bias",
        "mean",
        "var",
    ]
    assert_parity(got, run(eager, torch.float64), witness, dtype, names, winograd=kernel == "cpu")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_a_large_mean(kernel, layout):
    with fastres.use_kernels(kernel):
        check_large_mean(layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nan_and_inf_as_in_eager(kernel, dtype, layout):
    with fastres.use_kernels(kernel):
        check_nan_and_inf(dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_are_bitwise_repeatable_for_any_number_of_threads(layout):
    if not extension.available():
        pytest.skip(f"compiled kernels are not loaded: {extension.load_error()}")
    x, residual, grad_y = (torch.randn(8, 64, 28, 28).contiguous(memory_format=LAYOUTS[layout]) for _ in range(3))
    weight, bias, *_ = per_channel(64)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y, mean, var, mask = torch.ops.fastres.bn_act(x, weight, bias, None, None, residual, True, 1e-5, True, True)
            grads = torch.ops.fastres.bn_act_backward(
                grad_y, x, weight, bias, mean, var, mask, True, 1e-5, True, True, True, True
            )
            results.append((y, mean, var, mask, *grads))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 17, 7, 5), (2, 64, 6, 6), (1, 3, 5, 5)], ids=str)
def test_mask_format_is_the_references(shape, layout):
    if not extension.available():
        pytest.skip(f"compiled kernels are not loaded: {extension.load_error()}")
    case = Case(shape, torch.float32, layout)
    args = (case.tensor(), None, None, None, None, case.tensor(), True, 1e-5, True, True)
    masks = []
    for name in KERNELS:
        with fastres.use_kernels(name):
            masks.append(torch.ops.fastres.bn_act(*args)[3])
    assert torch.equal(*masks)


def test_half_conversions_of_every_value():
    """add_act with 0 is a load and a store: every fp16 and bf16 bit pattern must come back, NaN as NaN."""
    if not extension.available():
        pytest.skip(f"compiled kernels are not loaded: {extension.load_error()}")
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(1, 64, 32, 32)
        if extension.isa() == "avx512_bf16" and dtype is torch.bfloat16:
            x = x[(x.abs() >= torch.finfo(dtype).tiny) | (x == 0) | x.isnan()][: 65024 // 64 * 64].reshape(1, 64, -1, 1)
        y = torch.ops.fastres_cpu.add_act(x.contiguous(), torch.zeros_like(x), False)
        assert torch.equal(y.isnan(), x.isnan())
        assert torch.equal(y[~x.isnan()], x[~x.isnan()])
        wide = torch.randn(4, 16, 32, 32) * torch.logspace(-12, 6, 16).reshape(1, -1, 1, 1)
        zero = torch.zeros_like(wide, dtype=dtype)
        half = torch.ops.fastres_cpu.bn_act(
            wide.to(dtype),
            None,
            None,
            torch.zeros(16).double(),
            torch.full((16,), 9.0).double(),
            zero,
            False,
            0.0,
            False,
            False,
            False,
        )[0]
        truth = (wide.to(dtype).double() / 3).to(dtype)
        assert (half != truth).float().mean() < 1e-3  # fp32 division by multiplication may round a tie the other way


def test_no_kernel_serves_float64_but_the_reference():
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    assert table.select("bn_act", (x,)).name == "reference"
    reason = "float64" if extension.available() else "fastres._C|FASTRES_NO_EXT"
    with fastres.use_kernels("cpu"), pytest.raises(RuntimeError, match=reason):
        functional.add_act(x, x)
    with pytest.raises(ValueError, match="no kernel is named warp"), fastres.use_kernels("warp"):
        pass
