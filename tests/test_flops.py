"""FLOP counters see the work of our ops, forward and backward; every op has a formula, or a reason to have none."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import fastres
from fastres import functional
from fastres.kernels import convolution, cpu, extension, program
from fastres.ops import conv1x1_bn_act

SUMS = "sums and values one by one: FlopCounterMode counts neither, in eager PyTorch or here"
BOOKS = "keeps or copies, computes nothing"
NETWORKS = "runs whole networks without their modules, which the hooks of a FlopCounterMode prevent"
INSIDE = "called by the kernel of the op of fastres:: with the same name, which is counted"
WITHOUT_FORMULA = {
    "fastres": {
        SUMS: "bn_act bn_act_backward bn_act_maxpool bn_act_maxpool_backward bn_add_bn_act bn_add_bn_act_backward "
        "add_act add_act_backward update_running_stats_ update_all_running_stats_",
    },
    "fastres_cpu": {
        SUMS: "bn_statistics bn_act bn_act_backward bn_act_backward_apply bn_act_maxpool bn_act_maxpool_backward "
        "add_act add_act_backward conv1x1_statistics",
        BOOKS: "isa empty_cache cached_bytes set_cache_limit guard_buffers fingerprint conv_method conv_pack",
        NETWORKS: "program_new program_delete program_conv program_zero_pad program_classify program_finish "
        "program_run",
        INSIDE: "conv1x1_bn_act conv1x1_bn_act_backward",
    },
}
GEOMETRIES = [(3, 1, 1, 1), (3, 2, 1, 1), (1, 1, 0, 1), (1, 2, 0, 1), (3, 1, 1, 4), (7, 2, 3, 1), (3, 1, 2, 1)]
compiled = pytest.mark.skipif(not extension.available(), reason=f"compiled kernels: {extension.load_error()}")


def flops(function, *args, **options):
    with FlopCounterMode(display=False) as counter:
        y = function(*args, **options)
        if isinstance(y, torch.Tensor) and y.requires_grad:
            y.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("namespace", WITHOUT_FORMULA)
def test_every_op_has_a_formula_or_a_reason(namespace):
    ours = {s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith(f"{namespace}::")}
    if namespace == "fastres_cpu" and not extension.available():
        pytest.skip(f"compiled kernels: {extension.load_error()}")
    counted = {name for name in ours if getattr(getattr(torch.ops, namespace), name) in flop_registry}
    listed = {name for names in WITHOUT_FORMULA[namespace].values() for name in names.split()}
    assert not listed & counted
    assert listed | counted == ours


def tensors(kernel, dilation=1, groups=1, channels=(16, 24), gradient=True):
    torch.manual_seed(0)
    c, k = channels
    x = torch.randn(2, c, 14, 12).to(memory_format=torch.channels_last).requires_grad_(gradient)
    weight = torch.randn(k, c // groups, kernel, kernel).requires_grad_(gradient)
    return x, weight


@pytest.mark.parametrize(("kernel", "stride", "padding", "groups"), GEOMETRIES)
@pytest.mark.parametrize("gradient", [True, False])
def test_functions_count_as_eager_convolutions(kernel, stride, padding, groups, gradient):
    geometry = {"stride": stride, "padding": padding, "dilation": 2 if padding == 2 else 1, "groups": groups}
    x, weight = tensors(kernel, groups=groups, gradient=gradient)
    want = flops(F.conv2d, x.detach(), weight.detach(), **geometry) * (3 if gradient else 1)
    statistics = torch.zeros(24), torch.ones(24)
    if groups == 1:  # with groups PyTorch's formula counts the weight's gradient that many times too often
        assert want == flops(F.conv2d, x, weight, **geometry) > 0
    assert flops(functional.conv_bias_act, x, weight, **geometry) == want
    assert flops(functional.conv_bn_act, x, weight, *statistics, training=True, **geometry) == want
    assert flops(functional.conv_bn_act, x, weight, *statistics, **geometry) == want


def test_what_needs_no_gradient_is_not_counted():
    x, weight = tensors(3)
    statistics = torch.zeros(24), torch.ones(24)
    for a, b in ((x.detach(), weight), (x, weight.detach())):
        want = flops(F.conv2d, a, b, padding=1)
        assert flops(functional.conv_bn_act, a, b, *statistics, training=True, padding=1) == want


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
def test_algebraic_batch_norm_counts_its_convolution(needed):
    x, weight = tensors(1, channels=(16, 64))
    x, weight = (t if need else t.detach() for t, need in zip((x, weight), needed, strict=True))
    affine = torch.ones(64, requires_grad=True), torch.zeros(64, requires_grad=True)
    args = (x, weight, *affine, None, None, None, True, 1e-5, True, True)
    assert flops(lambda: conv1x1_bn_act.call(*args)[0]) == flops(F.conv2d, x, weight)


def test_batch_norms_and_additions_count_as_in_eager():
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    norm = functional.BatchNorm(torch.zeros(8), torch.ones(8), training=True)
    assert flops(functional.bn_act, x, *norm[:2], training=True) == 0
    assert flops(functional.add_act, x, x) == 0
    assert flops(functional.bn_act_maxpool, x, *norm[:2], training=True) == 0
    assert flops(functional.bn_add_bn_act, x, norm, x, norm) == 0


@compiled
@pytest.mark.parametrize(("kernel", "stride", "padding", "groups"), GEOMETRIES)
def test_parts_of_synchronised_batch_norm(kernel, stride, padding, groups):
    """Called one by one, each process its own; where ours does not serve, ATen's is called and counted, once."""
    geometry = ([stride] * 2, [padding] * 2, [2 if padding == 2 else 1] * 2, groups)
    x, weight = tensors(kernel, groups=groups, gradient=False)
    want = flops(torch.ops.aten.convolution, x, weight, None, *geometry[:3], False, [0, 0], groups)
    assert flops(convolution.convolve_with_statistics, x, weight, None, geometry) == want
    y = convolution.convolve(x, weight, None, geometry)
    for needed in ((True, True, False), (True, False, False), (False, True, True)):
        found = flops(convolution.convolve_backward, y, x, weight, True, geometry, needed)
        assert found == sum(needed[:2]) * want


@compiled
def test_parts_of_synchronised_algebraic_batch_norm():
    x, weight = tensors(1, channels=(16, 64), gradient=False)
    want = flops(F.conv2d, x, weight)
    y = F.conv2d(x, weight)
    assert flops(cpu.conv1x1_statistics, x, weight) == 0
    mean, var, x_mean, covariance = cpu.conv1x1_statistics(x, weight)
    reduce = (y, x, weight, mean, x_mean, None)
    assert flops(cpu.conv1x1_backward_reduce, *reduce) == want
    g, grad_weight, products, sums = cpu.conv1x1_backward_reduce(*reduce)
    for need_x in (True, False):
        moments = (mean, var, x_mean, covariance, grad_weight, sums, products, sums, float(x.numel() // 16), 1e-5)
        assert flops(cpu.conv1x1_backward_apply, g, x, weight, None, *moments, need_x, True) == need_x * want


@compiled
def test_classifier_and_stem():
    x, weight = tensors(7, channels=(3, 64), gradient=False)
    packed = convolution.prepare(x, weight, None, [2, 2], [3, 3], [1, 1], 1)
    run = packed.then_maxpool(3, 2, 1)
    assert flops(run, x, None, True) == flops(F.conv2d, x, weight, stride=2, padding=3)
    fc = nn.Linear(16, 5)
    weight, bias = fc.weight.detach(), fc.bias.detach()
    x = torch.randn(2, 16, 3, 3)
    assert flops(program.Classify(weight, bias), x) == flops(F.linear, x.mean((2, 3)), weight, bias)


def test_networks_that_are_replayed_otherwise():
    """A counter around a network whose inference is one call of a program by now."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    model = fastres.models.resnet20().eval().to(memory_format=torch.channels_last)
    with torch.no_grad():
        for _ in range(3):
            model(x)
        found = flops(model, x)
        assert found == flops(fastres.unfuse_(model), x) > 0
