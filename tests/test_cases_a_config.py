"""Cases A1 to A9: how convolutions and batch norms may be configured. A fused block does what the eager one does."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from _compare import (
    assert_path,
    assert_same,
    batch_norms,
    biased,
    block,
    buffers,
    check,
    check_error,
    image,
    kinds,
    layouts,
    libraries,
    modes,
    network,
    some_kernels,
    step,
    watched,
)
from torch import nn

import fastres
from fastres import functional, reference
from fastres.nn import BnAct2d
from fastres.testing import LAYOUTS, relative_error


@pytest.fixture(autouse=True)
def _kernels():
    with some_kernels():
        yield


@libraries
@kinds
@modes
def test_a1_conv_bias(library, kind, mode):
    check(biased(block(library, kind, stride=2)), image(), mode)


@kinds
def test_a1_conv_bias_in_training(kind):
    """The output does not depend on the bias, the running mean does; the gradient is there, zero but for rounding."""
    plain = block(kind=kind)
    fused = copy.deepcopy(plain)
    biased(fused)
    fastres.fuse_(fused)
    x = image()
    want, got = step(plain, x, "train"), step(fused, x, "train")
    assert relative_error(got["y"], want["y"]) < 1e-5
    shift = 0.1 * fused.conv1.bias
    torch.testing.assert_close(got["bn1.running_mean"], want["bn1.running_mean"] + shift)
    gradient = got["conv1.bias.grad"]
    assert gradient is not None and gradient.abs().max() < 1e-4


@libraries
@kinds
@modes
def test_a2_affine_false(library, kind, mode):
    model = block(library, kind, stride=2, norm_layer=partial(nn.BatchNorm2d, affine=False))
    fused = check(model, image(), mode)
    assert fused.bn1.weight is None and not any("bn" in name for name, _ in fused.named_parameters())


@kinds
@modes
@pytest.mark.parametrize("absent", ["weight", "bias"])
def test_a3_weight_or_bias_none(kind, mode, absent):
    model = block(kind=kind, stride=2)
    for bn in batch_norms(model):
        setattr(bn, absent, None)
    check(model, image(), mode)


@libraries
@kinds
@modes
def test_a4_track_running_stats_false(library, kind, mode):
    model = block(library, kind, stride=2, norm_layer=partial(nn.BatchNorm2d, track_running_stats=False))
    check(model, image(), mode, steps=2)


@modes
def test_a4_buffers_none(mode):
    """Batch statistics, in eval too; a tracking batch norm still counts its batches."""
    model = block(stride=2)
    for bn in batch_norms(model):
        bn.running_mean = bn.running_var = None
    check(model, image(), mode, steps=2)


@modes
def test_a4_tracking_switched_off_on_a_live_module(mode):
    """Running statistics stay and serve in eval; training uses batch statistics and updates nothing."""

    def switch_off(model):
        for bn in batch_norms(model):
            bn.track_running_stats = False

    check(block(stride=2), image(), mode, after=switch_off, steps=2)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("absent", ["running_mean", "running_var"])
def test_a4_one_buffer_none_is_eagers_error(mode, absent):
    model = block()
    setattr(model.bn2, absent, None)
    check_error(model, image(), mode)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("absent", [0, 1], ids=["running_mean", "running_var"])
def test_a4_one_buffer_none_in_the_functions(training, absent):
    running = [torch.zeros(4), torch.ones(4)]
    running[absent] = None
    errors = []
    for function in (F.batch_norm, functional.bn_act):
        with pytest.raises((RuntimeError, ValueError)) as info:
            function(image(4), *running, training=training)
        errors.append(info.value)
    assert type(errors[0]) is type(errors[1])


@libraries
@kinds
def test_a5_momentum_none(library, kind):
    """The cumulative average over several batches, from wherever the counter stands."""
    model = block(library, kind, stride=2, norm_layer=partial(nn.BatchNorm2d, momentum=None))
    fused = check(model, image(), "train", steps=3)
    assert [int(bn.num_batches_tracked) for bn in batch_norms(fused)] == [3] * len(batch_norms(fused))
    for bn in batch_norms(model):
        bn.num_batches_tracked += 7
    check(model, image(), "train", steps=2)


def test_a5_momentum_none_in_the_stem():
    check(network(norm_layer=partial(nn.BatchNorm2d, momentum=None)), image(3, size=32), "train", steps=2)


def test_a5_momentum_none_reads_nothing_back_to_the_host():
    model = network(norm_layer=partial(nn.BatchNorm2d, momentum=None))
    fastres.fuse_(model)
    x = image(3, size=32)
    with torch.profiler.profile() as profile, watched() as seen:
        model(x).sum().backward()
    assert_path(seen, "fast")
    synchronising = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero"}
    assert synchronising.isdisjoint(event.key for event in profile.key_averages())
    meta = [torch.zeros(4, device="meta", dtype=torch.float64) for _ in range(4)]  # has no values to read
    reference.update_running_stats_(*meta, torch.ones((), dtype=torch.int64, device="meta"), 0.0, 12)


@pytest.mark.parametrize("momentum", [0.0, 1.0, 0.37])
def test_a6_momentum(momentum):
    check(block(stride=2, norm_layer=partial(nn.BatchNorm2d, momentum=momentum)), image(), "train", steps=2)


def test_a6_momentum_changed_later():
    eager = block(stride=2)
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    for momentum in (0.1, None, 0.9, 0.0, 1):
        x = image()
        for model in (eager, fused):
            for bn in batch_norms(model):
                bn.momentum = momentum
        want = step(eager, x, "train")
        with watched() as seen:
            got = step(fused, x, "train")
        assert_path(seen, "fast")
        assert_same(got, want)


def test_a6_update_bn():
    """It sets momentum to None and resets the statistics of live modules."""
    eager = network()
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    images = [image(3, size=32) for _ in range(3)]
    with watched() as seen:
        torch.optim.swa_utils.update_bn(images, fused)
    assert_path(seen, "fast")
    torch.optim.swa_utils.update_bn(images, eager)
    assert_same(buffers(fused), buffers(eager))
    assert {bn.momentum for bn in batch_norms(fused)} == {0.1}


@modes
def test_a7_num_batches_tracked(mode):
    fused = check(block(stride=2), image(), mode, steps=3)
    for bn in batch_norms(fused):
        assert bn.num_batches_tracked.dtype is torch.int64
        assert int(bn.num_batches_tracked) == (3 if mode == "train" else 0)


@modes
@pytest.mark.parametrize("momentum", [0.1, None], ids=str)
def test_a7_num_batches_tracked_none(mode, momentum):
    """As after loading an old checkpoint by hand; with momentum None nothing moves."""
    model = block(stride=2, norm_layer=partial(nn.BatchNorm2d, momentum=momentum))
    for bn in batch_norms(model):
        bn.num_batches_tracked = None
    check(model, image(), mode, steps=2)


def test_a7_counter_is_changed_in_place():
    model = block()
    fastres.fuse_(model)
    counters = [bn.num_batches_tracked for bn in batch_norms(model)]
    step(model, image(), "train")
    assert all(bn.num_batches_tracked is counter for bn, counter in zip(batch_norms(model), counters, strict=True))
    assert [int(counter) for counter in counters] == [1] * len(counters)


@kinds
@modes
@pytest.mark.parametrize("eps", [1e-12, 1e-3, 0.5, 100.0])
def test_a8_eps(kind, mode, eps):
    check(block(kind=kind, stride=2, norm_layer=partial(nn.BatchNorm2d, eps=eps)), image(), mode)


@pytest.mark.parametrize("mode", ["eval", "inference"])
def test_a8_eps_zero_in_eval(mode):
    check(block(stride=2, norm_layer=partial(nn.BatchNorm2d, eps=0.0)), image(), mode)


@pytest.mark.parametrize("eps", [0.0, -1e-5])
@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
def test_a8_eps_that_eager_refuses(mode, eps):
    model = block(norm_layer=partial(nn.BatchNorm2d, eps=eps))
    try:
        step(copy.deepcopy(model), image(), mode)
    except Exception:
        check_error(model, image(), mode)
    else:
        check(model, image(), mode)


@modes
def test_a8_eps_changed_later(mode):
    eager = block(stride=2)
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    x = image()
    for eps in (1e-5, 1e-1, 1e-3):
        for model in (eager, fused):
            for bn in batch_norms(model):
                bn.eps = eps
        assert_same(step(fused, x, mode), step(eager, x, mode))


@layouts
@pytest.mark.parametrize("shape", [(2, 16, 1, 1), (1, 16, 1, 2), (3, 16, 5, 5)], ids=str)
def test_a9_running_var_is_unbiased(layout, shape):
    """With two values a channel the factor n / (n - 1) is 2; the output uses the biased variance."""
    x = torch.randn(shape).contiguous(memory_format=LAYOUTS[layout])
    bn = BnAct2d(nn.BatchNorm2d(16, momentum=1.0), act="identity")
    with watched() as seen:
        y = bn(x)
    assert_path(seen, "fast")
    biased_var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    count = x.numel() // 16
    torch.testing.assert_close(bn.bn.running_var.double(), biased_var * count / (count - 1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(bn.bn.running_mean.double(), mean, rtol=1e-6, atol=1e-7)
    want = (x.double() - mean.reshape(1, -1, 1, 1)) / (biased_var.reshape(1, -1, 1, 1) + 1e-5).sqrt()
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
