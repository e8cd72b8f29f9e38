"""Every kernel of every op against the float64 reference, with eager as second witness: outputs, gradients,
statistics."""

import pytest
import torch
import torch.nn.functional as F

import fastres
from fastres import functional
from fastres.kernels import extension, table
from fastres.testing import LAYOUTS, Case, budget, cases, relative_error

KERNELS = ("reference", "cpu")


@pytest.fixture(params=KERNELS)
def kernel(request):
    if request.param == "cpu" and not extension.available():
        pytest.skip(f"compiled kernels are not loaded: {extension.load_error()}")
    return request.param


def assert_parity(got, truth, eager, dtype, names, winograd=False):
    for name, a, t, e in zip(names, got, truth, eager, strict=True):
        limit = budget(relative_error(e, t), dtype, summed=name in ("grad_weight", "grad_bias"), winograd=winograd)
        error = relative_error(a, t)
        assert error <= limit, f"{name}: error {error:.2e}, budget {limit:.2e}"


def per_channel(channels):
    return torch.rand(channels) + 0.5, torch.randn(channels) * 0.5, torch.randn(channels), torch.rand(channels) + 0.2


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "identity"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("case", cases(), ids=str)
def test_bn_act(kernel, case, with_residual, training, relu):
    weight, bias, mean, var = per_channel(case.shape[1])
    x, grad_y = case.tensor(mean=0.3, std=1.5), case.tensor()
    residual = case.tensor() if with_residual else None

    def run(function, dtype):
        tensors = [t if t is None else t.detach().to(dtype).requires_grad_() for t in (x, residual)]
        affine = [
            t.clone().to(torch.float64 if dtype is torch.float64 else torch.float32).requires_grad_()
            for t in (weight, bias)
        ]
        running = [t.clone().to(affine[0].dtype) for t in (mean, var)]
        y = function(tensors[0], *running, *affine, tensors[1])
        inputs = [t for t in (*tensors, *affine) if t is not None]
        return [y, *torch.autograd.grad(y, inputs, grad_y.to(dtype)), *running]

    def eager(x, running_mean, running_var, weight, bias, residual):
        y = F.batch_norm(x, running_mean, running_var, weight, bias, training)
        y = y if residual is None else y + residual
        return F.relu(y) if relu else y

    def fused(x, running_mean, running_var, weight, bias, residual):
        act = "relu" if relu else "identity"
        return functional.bn_act(x, running_mean, running_var, weight, bias, residual, training=training, act=act)

    with fastres.use_kernels(kernel):
        got = run(fused, case.dtype)
    witness = run(eager, case.dtype)
    assert got[0].stride() == witness[0].stride()
    names = [
        "y",
        "grad_x",
        *(["grad_residual"] if with_residual else []),
        "grad_weight",
        "grad_bias",
        "running_mean",
        "running_var",
    ]
    assert_parity(got, run(eager, torch.float64), witness, case.dtype, names)


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "identity"])
@pytest.mark.parametrize("case", cases(), ids=str)
def test_add_act(kernel, case, relu):
    a, b, grad_y = case.tensor(), case.tensor(), case.tensor()

    def run(function, dtype):
        tensors = [t.detach().to(dtype).requires_grad_() for t in (a, b)]
        y = function(*tensors)
        return [y, *torch.autograd.grad(y, tensors, grad_y.to(dtype))]

    def eager(x, residual):
        return F.relu(x + residual) if relu else x + residual

    with fastres.use_kernels(kernel):
        got = run(lambda x, r: functional.add_act(x, r, act="relu" if relu else "identity"), case.dtype)
    assert_parity(got, run(eager, torch.float64), run(eager, case.dtype), case.dtype, ["y", "grad_x", "grad_residual"])


POOLS = [(3, 2, 1), (2, 2, 0), (3, 1, 1)]


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "identity"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("case", cases(((2, 17, 7, 5), (1, 64, 15, 16), (3, 3, 9, 11))), ids=str)
def test_bn_act_maxpool(kernel, case, pool, training, relu):
    weight, bias, mean, var = per_channel(case.shape[1])
    # Few different values: ties within a window are common, and have to go to the same element as in eager.
    x = case.tensor(std=2.0).round()
    kernel_size, stride, padding = pool

    def run(function, dtype):
        x_ = x.detach().to(dtype).requires_grad_()
        affine = [
            t.clone().to(torch.float64 if dtype is torch.float64 else torch.float32).requires_grad_()
            for t in (weight, bias)
        ]
        running = [t.clone().to(affine[0].dtype) for t in (mean, var)]
        y = function(x_, *running, *affine)
        grad_y = torch.linspace(-1, 1, y.numel(), dtype=torch.float32).reshape(y.shape).to(case.dtype).to(dtype)
        return [y, *torch.autograd.grad(y, [x_, *affine], grad_y), *running]

    def eager(x, running_mean, running_var, weight, bias):
        y = F.batch_norm(x, running_mean, running_var, weight, bias, training)
        return F.max_pool2d(F.relu(y) if relu else y, kernel_size, stride, padding)

    def fused(x, running_mean, running_var, weight, bias):
        options = {"training": training, "act": "relu" if relu else "identity"}
        windows = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
        return functional.bn_act_maxpool(x, running_mean, running_var, weight, bias, **options, **windows)

    with fastres.use_kernels(kernel):
        got = run(fused, case.dtype)
    witness = run(eager, case.dtype)
    assert got[0].stride() == witness[0].stride()
    names = ["y", "grad_x", "grad_weight", "grad_bias", "running_mean", "running_var"]
    assert_parity(got, run(eager, torch.float64), witness, case.dtype, names)


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
    """Mean 1e4, std 1e-2: sums of x and x^2 would cancel to nothing."""
    x = (torch.randn(8, 17, 14, 14, dtype=torch.float64) * 1e-2 + 1e4).float().contiguous(memory_format=LAYOUTS[layout])
    with fastres.use_kernels(kernel):
        y, mean, var, _ = torch.ops.fastres.bn_act(x, None, None, None, None, None, True, 1e-5, False, False)
    true_var, true_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert relative_error(mean, true_mean) < 1e-12
    assert relative_error(var, true_var) < 1e-6
    truth = F.batch_norm(x.double(), None, None, training=True)
    assert relative_error(y, truth) < 1e-6


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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nan_and_inf_as_in_eager(kernel, dtype, layout):
    x = torch.randn(2, 20, 6, 6)
    x[0, 3, 1, 1], x[1, 5, 2, 2], x[1, 18, 0, 0] = float("nan"), float("inf"), float("-inf")
    x = x.to(dtype).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    mean, var = torch.zeros(20), torch.ones(20)
    residual = torch.randn(2, 20, 6, 6).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    residual[0, 7, 3, 3] = float("nan")
    grad_y = torch.ones_like(residual)
    for training in (True, False):
        want = F.relu(F.batch_norm(x, mean.clone(), var.clone(), training=training) + residual)
        want_grad = torch.autograd.grad(want, x, grad_y)[0]
        with fastres.use_kernels(kernel):
            got = functional.bn_act(x, mean.clone(), var.clone(), residual=residual, training=training)
            got_grad = torch.autograd.grad(got, x, grad_y)[0]
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
        assert torch.equal(got_grad.isnan(), want_grad.isnan())
    with fastres.use_kernels(kernel):
        total = functional.add_act(x, residual)
        pooled = functional.bn_act_maxpool(x, mean.clone(), var.clone())
    assert torch.equal(total.isnan(), F.relu(x + residual).isnan())
    want = F.max_pool2d(F.relu(F.batch_norm(x, mean, var)), 3, 2, 1)
    assert torch.equal(pooled.isnan(), want.isnan()) and torch.equal(pooled.isinf(), want.isinf())


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
