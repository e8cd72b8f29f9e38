"""No kernel writes outside of its outputs and scratch memory, or reads a value of them that it did not write."""

import ctypes

import pytest
import torch
from _convolution import GEMM, NAMES, OPS, WINOGRAD, WINOGRAD2, Conv, fused, nhwc, square

from fastres import functional
from fastres.testing import DTYPES, LAYOUTS

CONVS = [
    # the matrix product: whole and cut panels and tiles, few pixels and many weights, rows as taps
    square(64, 64, 1, 1, 0, 14),
    square(65, 33, 1, 1, 0, 5, batch=3),
    square(512, 200, 1, 2, 0, 7),
    square(17, 21, 3, 2, 1, 9, batch=2),
    square(5, 3, 3, 1, 2, 8, dilation=2),
    square(1, 1, 3, 1, 1, 7),
    square(3, 64, 7, 2, 3, 64),
    square(3, 5, 7, 2, 0, 7, batch=3),
    square(17, 3, 1, 1, 2, 4),
    square(5, 17, 2, 3, 0, 10),
    Conv((3, 5, 9, 7), (3, 5, 5, 3), (1, 1), (2, 1)),
    # Winograd: tiles cut on all sides, large weights, many tiles
    square(16, 24, 3, 1, 1, 13, batch=3),
    square(64, 80, 3, 1, 1, 14),
    square(64, 64, 3, 1, 1, 56, batch=2),
    square(512, 512, 3, 1, 1, 7),
    square(512, 512, 3, 1, 1, 7, batch=5),
    Conv((1, 16, 23, 3), (48, 16, 3, 3), padding=(1, 1)),
]


@pytest.fixture
def guards():
    """Calls in guarded buffers: run(call) is what call() returns, checked."""

    def run(call):
        assert OPS.guard_buffers(True) == 0
        try:
            copies = [t.clone() for t in call()]  # in ordinary memory: the results are given back, and looked at
        finally:
            damaged = OPS.guard_buffers(False)
        assert damaged == 0, f"{damaged} buffers were written past their ends"
        return copies

    yield run
    OPS.guard_buffers(False)


def assert_same(got, want, names):
    for name, a, b in zip(names, got, want, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("winograd", [True, False], ids=["winograd", "direct"])
@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_convolutions(guards, conv, winograd):
    tensors = conv.tensors()
    assert_same(guards(lambda: fused(conv, tensors, winograd)), fused(conv, tensors, winograd), NAMES)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_winograd_repeated_the_direct_way(guards, value):
    conv = square(16, 32, 3, 1, 1, 14, batch=2)
    assert conv.methods() == (WINOGRAD,) * 3
    tensors = conv.tensors()
    tensors[0][1, 2, 5, 6] = tensors[4][1, 2, 5, 6] = value
    for name, a, b in zip(NAMES, guards(lambda: fused(conv, tensors)), fused(conv, tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("size", [(7, 7), (5, 18), (2, 3)], ids=str)
def test_small_tiles_of_winograd(guards, size):
    conv = Conv((2, 64, *size), (48, 64, 3, 3), padding=(1, 1))
    x, weight, bias, residual, _ = conv.tensors()

    def run():
        packed = OPS.conv_pack(weight, conv.x, *conv.geometry, WINOGRAD2)
        return [OPS.conv(x, packed, conv.weight, bias, residual, *conv.geometry, True, WINOGRAD2)]

    assert_same(guards(run), run(), ["y"])


@pytest.mark.parametrize("pool", [(3, 2, 1), (2, 2, 0), (5, 2, 2), (1, 3, 0)], ids=str)
@pytest.mark.parametrize("conv", [square(3, 64, 7, 2, 3, 40, batch=3), square(17, 5, 3, 2, 1, 12)], ids=str)
def test_conv_maxpool(guards, conv, pool):
    x, weight, bias, *_ = conv.tensors()
    methods = {GEMM, conv.method()}
    packed = {method: OPS.conv_pack(weight, conv.x, *conv.geometry, method) for method in methods}

    def run():
        where = conv.geometry[:3]
        return [OPS.conv_maxpool(x, packed[m], conv.weight, bias, *where, True, m, *pool) for m in methods]

    assert_same(guards(run), run(), methods)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 17, 7, 5), (4, 64, 14, 14), (1, 1, 3, 3), (2, 130, 9, 11)], ids=str)
def test_batch_norm_and_sums(guards, shape, dtype, layout):
    x, residual, grad = (nhwc(*shape).to(dtype).contiguous(memory_format=layout) for _ in range(3))
    weight, bias = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    statistics = torch.zeros(shape[1]), torch.ones(shape[1])

    def gradients(function, *tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad[..., : y.shape[2], : y.shape[3]])]

    def run():
        found = []
        for training in (True, False):
            settings = {"running_mean": statistics[0].clone(), "running_var": statistics[1].clone()}
            settings |= {"weight": weight, "bias": bias, "training": training}
            found += gradients(lambda x, r, s=settings: functional.bn_act(x, residual=r, **s), x, residual)
            found += gradients(lambda x, s=settings: functional.bn_act(x, **s), x)
            found += gradients(lambda x, s=settings: functional.bn_act_maxpool(x, **s), x)
        return found + gradients(functional.add_act, x, residual)

    want = run()
    assert_same(guards(run), want, range(len(want)))


@pytest.mark.parametrize("place", [-4096, -1, 0, 4095])
def test_damage_is_found(place):
    """Of a byte before or after the output, up to the ends of the guards."""
    OPS.guard_buffers(True)
    y = OPS.add_act(nhwc(1, 3, 5, 5), nhwc(1, 3, 5, 5), True)
    assert OPS.guard_buffers(False) == 0
    ctypes.memset(y.data_ptr() + place + (y.nbytes if place >= 0 else 0), 0, 1)
    del y
    assert OPS.guard_buffers(False) == 1


def test_new_buffers_are_full_of_nan():
    """Seen where a kernel leaves gaps: between the planes of Winograd's weights."""
    conv = square(16, 16, 3, 1, 1, 14)
    weight = conv.tensors()[1]
    OPS.guard_buffers(True)
    packed = OPS.conv_pack(weight, conv.x, *conv.geometry, WINOGRAD)
    assert OPS.guard_buffers(False) == 0
    assert 0 < packed.isnan().sum() < packed.numel() / 2
