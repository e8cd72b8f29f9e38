"""What holds for our own convolutions besides their numbers: threads, memory, the choice of the method, bad input."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch
from _convolution import (
    GEMM,
    GROUPED,
    NAMES,
    NAN,
    NHWC,
    OPS,
    WINOGRAD,
    WINOGRAD2,
    Conv,
    forward,
    fused,
    grad_weight,
    grad_x,
    nhwc,
    square,
)

import fastres
from fastres import functional, models
from fastres.kernels import extension
from fastres.testing import relative_error


@pytest.mark.parametrize("winograd", [True, False], ids=["winograd", "direct"])
@pytest.mark.parametrize(
    "conv",
    [
        square(64, 64, 3, 1, 1, 28, batch=2),
        square(128, 144, 3, 1, 1, 7),
        square(3, 64, 7, 2, 3, 64),
        square(64, 128, 1, 2, 0, 28),
        square(48, 48, 3, 1, 1, 30, batch=3, groups=48),
        square(64, 64, 3, 2, 1, 28, batch=2, groups=16),
        square(128, 128, 3, 1, 1, 7, groups=4),
    ],
    ids=str,
)
def test_bitwise_repeatable_for_any_number_of_threads(conv, winograd):
    tensors = conv.tensors()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(fused(conv, tensors, winograd))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, a, b in zip(NAMES, results[0], other, strict=True):
            assert torch.equal(a, b), name


def embedded(t, offset=13):
    """A copy of t with its strides, in the middle of a buffer of NaN; and the buffer."""
    buffer = torch.full((t.numel() + 2 * offset + 4096,), NAN)
    inner = buffer.as_strided(t.shape, t.stride(), offset)
    inner.copy_(t)
    return inner, buffer


@pytest.mark.parametrize(
    "conv",
    [
        square(16, 32, 3, 1, 1, 9, batch=2),
        square(64, 80, 3, 1, 1, 14),
        square(17, 21, 3, 2, 1, 9, batch=2),
        square(3, 5, 7, 2, 3, 11, batch=2),
        square(65, 33, 1, 1, 0, 5),
        square(5, 3, 3, 1, 2, 8, dilation=2),
        *(square(51, 51, 3, 1, 1, 6, batch=2, groups=groups) for groups in (51, 17)),
        square(48, 48, 3, 1, 1, 6, batch=2, groups=3),
        *(square(72, 72, 3, 2, 1, 7, groups=groups) for groups in (36, 18, 9)),
        square(20, 40, 3, 1, 1, 6, groups=20),
        square(40, 20, 3, 1, 1, 6, groups=20),
    ],
    ids=str,
)
def test_touches_nothing_outside_of_its_tensors(conv):
    tensors = conv.tensors()
    inner, buffers = zip(*map(embedded, tensors), strict=True)
    before = [buffer.clone() for buffer in buffers]
    method = conv.method()
    packed = OPS.conv_pack(inner[1], conv.x, *conv.geometry, method)
    packed, packed_buffer = embedded(packed.nan_to_num())  # nan_to_num: of lanes between the planes that none reads
    y = OPS.conv(inner[0], packed, conv.weight, *inner[2:4], *conv.geometry, True, method)
    got = (y, grad_x(conv, inner[4], inner[1]), grad_weight(conv, inner[4], inner[0]))
    for name, a, b in zip(NAMES, got, fused(conv, tensors), strict=True):
        assert torch.equal(a, b), name
    for buffer, same in zip(buffers, before, strict=True):
        assert torch.equal(buffer.view(torch.int32), same.view(torch.int32))
    assert packed_buffer[:13].isnan().all() and packed_buffer[13 + packed.numel() :].isnan().all()


def test_method():
    lanes = 8 if extension.isa() in ("base", "avx2") else 16
    fits = square(2 * lanes, lanes, 3, 1, 1, 14)
    assert fits.method() == WINOGRAD and fits.method(winograd=False) == GEMM
    for c, k in ((2 * lanes + 1, lanes), (2 * lanes, lanes + 1), (lanes // 2, lanes), (3, 64)):
        assert square(c, k, 3, 1, 1, 14).method() == GEMM
    others = [(1, 1, 0, 1), (5, 1, 2, 1), (3, 2, 1, 1), (3, 1, 2, 2)]
    for size, stride, padding, dilation in others:
        assert square(64, 64, size, stride, padding, 14, dilation).method() == GEMM
    assert square(64, 64, 3, 1, 1, 2).method() == WINOGRAD2  # most of a larger tile would be thrown away
    assert square(64, 64, 3, 1, 1, 1).method() == GEMM
    assert square(512, 512, 3, 1, 1, 7).method() == WINOGRAD2  # fewer weights to read
    assert square(512, 512, 3, 1, 1, 7, batch=16).method() == WINOGRAD
    for groups in (2, 4, 8, 16, 32, 64):
        for winograd in (True, False):
            assert square(64, 64, 3, 1, 1, 14, groups=groups).method(winograd) == GROUPED
    for c, k, size, groups in ((4, 8, 3, 4), (8, 4, 3, 4), (36, 36, 3, 3), (96, 96, 1, 3), (512, 512, 3, 2)):
        assert square(c, k, size, 1, size // 2, 14, groups=groups).method() == 0
    depthwise = [square(64, 64, 3, 1, 1, 14, batch=batch, groups=64) for batch in (1, 64)]
    for conv in (depthwise[0], square(64, 64, 3, 2, 1, 14, groups=16), square(64, 64, 3, 1, 1, 14, groups=2)):
        assert all(t.numel() for t in fused(conv, conv.tensors()))
    assert [t.numel() > 0 for t in fused(depthwise[1], depthwise[1].tensors())] == [True, False, False]


def test_config_winograd_of_a_function(monkeypatch):
    conv = square(16, 16, 3, 1, 1, 14, batch=2)
    x, weight, bias, residual, grad = conv.tensors()
    x.requires_grad_()
    for winograd in (True, False, True):
        monkeypatch.setattr(fastres.config, "winograd", winograd)
        with fastres.use_kernels("cpu"):
            y = functional.conv_bias_act(x.detach(), weight, bias, residual, padding=1)
            out = functional.conv_bn_act(x, weight, None, None, training=True, padding=1)
            got = torch.autograd.grad(out, x, grad)[0]
        assert torch.equal(y, forward(conv, x.detach(), weight, bias, residual, True, winograd))
        assert not torch.equal(y, forward(conv, x.detach(), weight, bias, residual, True, not winograd))
        if winograd:
            by_winograd = got
        else:
            assert not torch.equal(got, by_winograd) and relative_error(got, by_winograd) < 2e-5


def block(channels=32):
    block = models.BasicBlock(channels, channels).eval().to(memory_format=NHWC)
    for bn in (block.bn1, block.bn2):
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
    return block


def test_config_winograd_of_a_fused_model(monkeypatch):
    plain = block()
    model = deepcopy(plain)
    fastres.fuse_(model)
    x = nhwc(2, 32, 14, 14)
    results = []
    with torch.no_grad():
        truth = deepcopy(plain).double()(x.double())
        for winograd in (True, False, True, False):
            monkeypatch.setattr(fastres.config, "winograd", winograd)
            results.append(model(x))
        fresh = deepcopy(plain)
        fastres.fuse_(fresh)
        assert torch.equal(fresh(x), results[1])  # the weights kept for Winograd were left
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
    assert not torch.equal(results[0], results[1])
    assert relative_error(results[0], truth) < 5e-6 and relative_error(results[1], truth) < 1e-6


def test_one_layer_with_shapes_that_need_different_methods():
    plain = block()
    model = deepcopy(plain)
    fastres.fuse_(model)
    exact = deepcopy(plain).double()
    shapes = [(2, 32, 2, 2), (2, 32, 14, 14), (1, 32, 1, 1), (3, 32, 14, 13), (1, 32, 3, 3), (2, 32, 2, 2)]
    methods = {Conv(shape, (32, 32, 3, 3), padding=(1, 1)).method() for shape in shapes}
    assert methods == {GEMM, WINOGRAD, WINOGRAD2}
    with torch.no_grad():
        for shape in shapes * 2:
            x = nhwc(*shape)
            assert relative_error(model(x), exact(x.double())) < 5e-6, shape


def test_several_threads_at_once():
    jobs = []
    grouped = square(64, 64, 3, 1, 1, 28, batch=2, groups=16)
    for conv in (square(64, 64, 3, 1, 1, 28, batch=2), square(3, 64, 7, 2, 3, 64), grouped) * 4:
        tensors = conv.tensors()
        jobs.append((conv, tensors, fused(conv, tensors)))

    def again(job):
        conv, tensors, alone = job
        return all(torch.equal(a, b) for _ in range(3) for a, b in zip(fused(conv, tensors), alone, strict=True))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(again, jobs))


def bad_calls():
    conv = square(16, 32, 3, 1, 1, 14, batch=2)
    other = square(16, 32, 3, 1, 1, 13, batch=2)
    x, weight, bias, residual, grad = conv.tensors()
    where = conv.geometry
    packed = {m: OPS.conv_pack(weight, conv.x, *where, m) for m in (GEMM, WINOGRAD)}

    def run(x=x, packed=packed[GEMM], weight=conv.weight, bias=bias, residual=residual, where=where, method=GEMM):
        return lambda: OPS.conv(x, packed, weight, bias, residual, *where, True, method)

    def back(grad=grad, weight=weight, x=conv.x, where=where):
        return lambda: OPS.conv_backward_input(grad, weight, x, *where, True)

    def back_weight(grad=grad, x=x, weight=conv.weight, where=where):
        return lambda: OPS.conv_backward_weight(grad, x, weight, *where, True)

    def pack(weight=weight, where=where, method=GEMM, x=conv.x):
        return lambda: OPS.conv_pack(weight, x, *where, method)

    few = square(4, 4, 3, 1, 1, 14, batch=2, groups=2)
    few_x, few_weight, _, _, few_grad = few.tensors()
    not_dense, no_shape = "dense in channels_last", "must have the shape of"
    no_dtype = "serves float32, bfloat16 and float16"
    return {
        "float64 x": (run(x=x.double()), no_dtype),
        "bfloat16 x, float32 residual": (run(x=x.bfloat16(), residual=residual), "residual must have the dtype"),
        "NCHW x": (run(x=x.contiguous()), f"x must be {not_dense}"),
        "x with gaps": (run(x=nhwc(2, 32, 14, 14)[:, :16]), f"x must be {not_dense}"),
        "3D x": (run(x=x[0]), "4 dimensions|[Dd]imension out of range"),
        "channels of x": (run(x=nhwc(2, 17, 14, 14)), "channels do not match"),
        "short packed": (run(packed=packed[GEMM][:-1]), "packed weight does not fit"),
        "packed for Winograd": (run(packed=packed[WINOGRAD]), "packed weight does not fit"),
        "packed for larger tiles": (run(packed=packed[WINOGRAD], method=WINOGRAD2), "packed weight does not fit"),
        "packed for the matrix product": (run(packed=packed[GEMM], method=WINOGRAD), "packed weight does not fit"),
        "float16 packed": (run(packed=packed[GEMM].half()), "packed weight"),
        "packed with gaps": (run(packed=packed[GEMM][:1].expand(packed[GEMM].numel())), "packed weight"),
        "unknown method": (run(method=7), "method"),
        "bias of another size": (run(bias=bias[:-1].clone()), "bias must be .* of 32 values"),
        "float64 bias": (run(bias=bias.double()), "bias must be a contiguous float32"),
        "residual of another size": (run(residual=nhwc(2, 32, 13, 14)), f"residual {no_shape}"),
        "float64 residual": (run(residual=residual.double()), "residual must have the dtype"),
        "NCHW residual": (run(residual=residual.contiguous()), f"residual must be {not_dense}"),
        "float16 weight": (pack(weight.half()), "weight must be a 4D float32"),
        "3D weight": (pack(weight[0]), "weight must be a 4D float32"),
        "channels of the weight": (pack(torch.randn(32, 17, 3, 3)), "channels do not match"),
        "Winograd of 1x1": (pack(torch.randn(32, 16, 1, 1), method=WINOGRAD), "Winograd does not serve"),
        "stride 0": (pack(where=((0, 1), (1, 1), (1, 1), 1)), "unsupported convolution"),
        "negative padding": (pack(where=((1, 1), (1, -1), (1, 1), 1)), "unsupported convolution"),
        "no output": (pack(where=((1, 1), (0, 0), (7, 7), 1)), "output would be empty"),
        "no output with a stride": (pack(x=(1, 16, 2, 2), where=((2, 2), (0, 0), (1, 1), 1)), "output would be empty"),
        "float64 grad": (back(grad.double()), no_dtype),
        "NCHW grad": (back(grad.contiguous()), f"grad_y must be {not_dense}"),
        "grad of another size": (back(nhwc(*other.y)), f"grad_y {no_shape} the output"),
        "grad of another batch": (back(grad[:1].contiguous(memory_format=NHWC)), f"grad_y {no_shape} the output"),
        "float64 weight": (back(weight=weight.double()), "weight must be a 4D float32"),
        "packed for groups": (run(packed=packed[GEMM][:-1], method=GROUPED), "packed weight does not fit"),
        "few channels": (pack(few_weight, few.geometry, GROUPED, few.x), "does not serve"),
        "grad_x of few channels": (back(few_grad, few_weight, few.x, few.geometry), "not served"),
        "grad for the weight": (back_weight(nhwc(*other.y)), f"grad_y {no_shape} the output"),
        "float64 grad for the weight": (back_weight(grad.double()), no_dtype),
        "float64 x for the weight": (back_weight(x=x.double()), no_dtype),
        "bfloat16 grad for the weight": (back_weight(grad.bfloat16()), "grad_y must have the dtype of x"),
        "NCHW x for the weight": (back_weight(x=x.contiguous()), f"x must be {not_dense}"),
        "channels of the gradient's weight": (back_weight(weight=(32, 17, 3, 3)), "channels do not match"),
        "grad_weight of few channels": (back_weight(few_grad, few_x, few.weight, few.geometry), "not served"),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_input(name):
    call, message = bad_calls()[name]
    with pytest.raises(RuntimeError, match=message):
        call()


def test_empty_batch():
    """In a process of its own: a division by zero would end this one."""
    code = f"""if True:
        import torch
        from fastres.kernels import convolution, extension
        ops, where = torch.ops.fastres_cpu, ([1, 1], [1, 1], [1, 1], 1)
        x = torch.empty(0, 16, 14, 14, memory_format=torch.channels_last)
        w = torch.randn(16, 16, 3, 3)
        for method in ({GEMM}, {WINOGRAD}):
            packed = ops.conv_pack(w, [1, 16, 14, 14], *where, method)
            assert ops.conv(x, packed, w.shape, None, None, *where, False, method).shape == x.shape
            winograd = method == {WINOGRAD}
            assert ops.conv_backward_input(x, w, x.shape, *where, winograd).shape == x.shape
            assert ops.conv_backward_weight(x, x, w.shape, *where, winograd).eq(0).all()
        where = (*where[:3], 16)
        packed = ops.conv_pack(w[:, :1], [1, 16, 14, 14], *where, {GROUPED})
        assert ops.conv(x, packed, [16, 1, 3, 3], None, None, *where, False, {GROUPED}).shape == x.shape
        assert ops.conv_backward_input(x, w[:, :1], x.shape, *where, True).shape == x.shape
        assert ops.conv_backward_weight(x, x, [16, 1, 3, 3], *where, True).eq(0).all()
    """
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, f"exit status {process.returncode}\n{process.stderr}"
