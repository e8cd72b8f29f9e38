"""Cases A10 to A18: few values, other convolutions, wrong inputs, extreme weights and statistics."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from _compare import (
    assert_parity,
    assert_path,
    assert_same,
    batch_norms,
    biased,
    block,
    check,
    check_error,
    check_numbers,
    image,
    kinds,
    layouts,
    libraries,
    modes,
    network,
    randomise,
    some_kernels,
    step,
    watched,
)
from torch import nn

import fastres
from fastres import functional
from fastres.nn import ConvBnAct2d
from fastres.testing import LAYOUTS, budget, relative_error


@pytest.fixture(autouse=True)
def _kernels():
    with some_kernels():
        yield


@libraries
@kinds
def test_a10_one_value_per_channel_in_training(library, kind):
    error = check_error(block(library, kind), image(n=1, size=1), "train")
    assert isinstance(error, ValueError) and "Expected more than 1 value per channel when training" in str(error)


@pytest.mark.parametrize("size", [8, 4, 1])
@libraries
def test_a10_one_value_per_channel_deep_in_a_model(library, size):
    """Eager has updated what came before, and counted the batch in the layer that raises."""
    check_error(network(library), image(3, n=1, size=size), "train")


@pytest.mark.parametrize("momentum", [0.1, None], ids=str)
def test_a10_one_value_per_channel_without_tracking(momentum):
    norm_layer = partial(nn.BatchNorm2d, momentum=momentum, track_running_stats=False)
    for mode in ("train", "eval", "inference"):  # batch statistics in eval too, where eager raises as well
        check_error(block(norm_layer=norm_layer), image(n=1, size=1), mode)


@kinds
@pytest.mark.parametrize("mode", ["eval", "inference"])
def test_a10_one_value_per_channel_in_eval(kind, mode):
    check(block(kind=kind), image(n=1, size=1), mode)


@libraries
@kinds
@modes
def test_a11_empty_batch(library, kind, mode):
    fused = check(block(library, kind, stride=2), image(n=0), mode, steps=2)
    assert all(int(bn.num_batches_tracked) == (2 if mode == "train" else 0) for bn in batch_norms(fused))


@modes
def test_a11_empty_batch_in_a_model(mode):
    fused = check(network(), image(3, n=0, size=32), mode)
    if mode == "train":
        assert all(p.grad is not None and not p.grad.any() for p in fused.parameters())


@modes
@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular"])
def test_a12_padding_mode(mode, padding_mode):
    model = block()
    model.conv2 = nn.Conv2d(4, 4, 3, padding=1, padding_mode=padding_mode, bias=False)
    check(model, image(), mode)  # the other convolutions and all batch norms run fused
    rows = [row for row in fastres.fuse_(model).rows if not row.fused]
    assert [row.name for row in rows] == ["conv2"] and padding_mode in rows[0].reason


@modes
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_a12_padding_as_a_word(mode, padding):
    model = block()
    model.conv2 = nn.Conv2d(4, 4, 3 if padding == "same" else 1, padding=padding)
    check(model, image(), mode)
    rows = [row for row in fastres.fuse_(model).rows if not row.fused]
    assert [row.name for row in rows] == ["conv2"] and padding in rows[0].reason


GEOMETRIES = {
    "groups": {"kernel_size": 3, "padding": 1, "groups": 4},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 16},
    "depth_multiplier": {"kernel_size": 3, "padding": 1, "groups": 16, "out_channels": 32},
    "dilation": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "stride": {"kernel_size": 3, "padding": 1, "stride": 2},
    "even_kernel": {"kernel_size": 2, "padding": 1},
    "odd_shapes": {"kernel_size": (3, 1), "padding": (1, 0), "stride": (1, 2), "dilation": (2, 1)},
    "kernel_7x7": {"kernel_size": 7, "padding": 3, "stride": 2},
    "large_padding": {"kernel_size": 1, "padding": 2},
}


@layouts
@modes
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a13_geometry(geometry, mode, layout):
    conv = nn.Conv2d(
        **{"in_channels": 16, "out_channels": 24 if geometry != "depthwise" else 16, **GEOMETRIES[geometry]}
    )
    module = randomise(ConvBnAct2d(conv, nn.BatchNorm2d(conv.out_channels)))
    eager = nn.Sequential(copy.deepcopy(module.conv), copy.deepcopy(module.bn), nn.ReLU())
    x = image().contiguous(memory_format=LAYOUTS[layout])
    with watched() as seen:
        got = step(module, x, mode)
    assert_path(seen, "fast")
    want = step(eager, x, mode)
    assert_same(got, dict(zip(got, want.values(), strict=True)))


@libraries
@modes
def test_a13_geometry_in_a_block(library, mode):
    check(block(library, "Bottleneck", 32, groups=4, base_width=32, stride=2), image(32), mode)
    check(block(library, "Bottleneck", 16, dilation=2), image(), mode)


@pytest.mark.filterwarnings("ignore:.*quantize.*:UserWarning")
def test_a14_other_modules_are_left_alone():
    torchvision = pytest.importorskip("_torchvision").load()[0]
    others = [
        nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4), nn.ReLU()),
        nn.Sequential(nn.Conv3d(4, 4, 3), nn.BatchNorm3d(4), nn.ReLU()),
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()),
        nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU()),
        nn.Sequential(torch.ao.nn.quantized.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
    ]
    if torchvision is not None:
        others.append(nn.Sequential(torchvision.ops.DeformConv2d(4, 4, 3), nn.BatchNorm2d(4)))
    model = nn.ModuleList(others)
    report = fastres.fuse_(model)
    fused = {row.name for row in report.rows if row.fused}
    assert fused <= {"0.1", "0.2", "6.1"}  # the batch norms behind convolutions of other kinds, and a ReLU
    assert all(row.reason for row in report.rows if not row.fused)
    for i in (1, 2, 3, 4, 5):
        assert type(others[i]) is nn.Sequential
    names = {row.name for row in report.rows}
    assert {"0.0", "0.1", "1.0", "1.1", "2.0", "2.1", "3.1", "4.0", "4.1"} <= names


@pytest.mark.filterwarnings("ignore:.*quantize.*:UserWarning")
@modes
@pytest.mark.parametrize("child", ["transposed", "quantized", "group_norm"])
def test_a14_other_module_in_a_known_block(child, mode):
    model = block()
    if child == "transposed":
        model.conv2 = nn.ConvTranspose2d(4, 4, 3, padding=1)
    elif child == "group_norm":
        model.bn2 = nn.GroupNorm(2, 4)
    else:
        model.conv2 = torch.ao.nn.quantized.Conv2d(4, 4, 3, padding=1)
        assert check_error(model, image(), mode) is not None
        return
    check(model, image(), mode)
    reasons = " ".join(row.reason for row in fastres.fuse_(model).rows if not row.fused)
    assert "ConvTranspose2d" in reasons or "GroupNorm" in reasons


@modes
def test_a14_lazy_children(mode):
    """Their first call makes them plain modules of the right size; from then on the block runs fused."""

    def lazy_block():
        torch.manual_seed(1)
        model = block()
        model.conv1, model.bn1 = nn.LazyConv2d(4, 1, bias=False), nn.LazyBatchNorm2d()
        return model

    eager, fused = lazy_block(), lazy_block()
    report = fastres.fuse_(fused)
    assert "Lazy" in next(row.reason for row in report.rows if row.name == "conv1")
    x = image()
    for model in (eager, fused):
        torch.manual_seed(1)
        with torch.no_grad():
            model.eval()(x)
    assert type(fused.conv1) is nn.Conv2d and type(fused.bn1) is nn.BatchNorm2d
    want = step(eager, x, mode)
    with watched() as seen:
        got = step(fused, x, mode)
    assert_path(seen, "fast")
    assert_same(got, want)


@libraries
@modes
def test_a15_channel_mismatch(library, mode):
    error = check_error(block(library), image(12), mode)
    assert isinstance(error, RuntimeError)
    assert isinstance(check_error(network(library), image(4, size=32), mode), RuntimeError)


@modes
def test_a15_channel_mismatch_between_conv_and_batch_norm(mode):
    model = block(stride=2)
    model.bn2 = nn.BatchNorm2d(5)
    check_error(model, image(), mode, same_message=False)


@libraries
@modes
def test_a15_unbatched_input(library, mode):
    """A convolution takes it, BatchNorm2d does not."""
    error = check_error(block(library), image()[0], mode)
    assert isinstance(error, ValueError) and "expected 4D input (got 3D input)" in str(error)
    check_error(network(library), image(3, size=32)[0], mode)
    check_error(block(library), image()[None], mode)


@kinds
@modes
@pytest.mark.parametrize("gamma", ["zero", "negative", "mixed"])
def test_a16_gamma(kind, mode, gamma):
    """All channels of the last batch norm 0 (Goyal et al. 2017), all of all negative, or a third of all 0."""
    model = block(kind=kind, stride=2)
    last = model.bn3 if kind == "Bottleneck" else model.bn2
    with torch.no_grad():
        for bn in [last] if gamma == "zero" else batch_norms(model):
            if gamma == "mixed":
                bn.weight.copy_(torch.randn(bn.num_features)).mul_(torch.arange(bn.num_features) % 3 != 0)
            else:
                bn.weight.mul_(0.0 if gamma == "zero" else -1.0)
    check_numbers(model, image(), mode)


@libraries
@modes
def test_a16_zero_init_residual(library, mode):
    model = network(library, zero_init_residual=True)
    last = [m.bn2 for m in model.modules() if hasattr(m, "bn2")]
    for bn in last:
        nn.init.zeros_(bn.weight)
    check(model, image(3, size=32), mode)


@kinds
@pytest.mark.parametrize("mode", ["eval", "inference"])
@pytest.mark.parametrize("variance", [1e-12, 1e-30, 1e30])
def test_a17_tiny_or_huge_running_var(kind, mode, variance):
    model = block(kind=kind, stride=2)
    with torch.no_grad():
        model.bn1.running_var[::2] = variance
        model.bn2.running_var[1::2] = variance
    check_numbers(model, image(), mode)


@pytest.mark.parametrize("mode", ["eval", "inference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a17_fold_that_overflows(mode, dtype):
    """weight / sqrt(var) is past the dtype's largest finite value, times the convolution's output it is not."""
    model = block()
    huge = math.sqrt(torch.finfo(dtype).max) * 4
    with torch.no_grad():
        for conv, bn in ((model.conv1, model.bn1), (model.conv2, model.bn2), (model.conv3, model.bn3)):
            bn.eps = 0.0
            bn.weight.fill_(huge if dtype is torch.float32 else 32.0)
            bn.running_var.fill_(1e-38 if dtype is torch.float32 else 1e-7)
            conv.weight.copy_(torch.where(conv.weight > 0, 1.0, -1.0) * (1.0 if bn is model.bn1 else 1e-4))
            bn.running_mean.zero_()
    if dtype is not torch.float32:
        model = model.to(dtype)
        model.bn1.weight.data.fill_(60.0)
    x = (torch.randn(2, 16, 5, 5) * (1e-30 if dtype is torch.float32 else 1e-3)).to(dtype)
    eager = step(copy.deepcopy(model), x, mode)
    fused = copy.deepcopy(model)
    fastres.fuse_(fused)
    with watched() as seen:
        got = step(fused, x, mode)
    assert_path(seen, "fast")
    truth = step(copy.deepcopy(model).double(), x.double(), mode)
    finite = eager["y"].isfinite()
    assert torch.equal(got["y"].isfinite() | ~finite, torch.ones_like(finite)), (
        "the fold overflowed where eager did not"
    )
    if bool(finite.all()) and bool(truth["y"].isfinite().all()):
        limit = budget(relative_error(eager["y"], truth["y"]), dtype)
        assert relative_error(got["y"], truth["y"]) <= limit


@pytest.mark.parametrize("mode", ["eval", "inference"])
def test_a17_zero_variance_without_eps(mode):
    """x / 0 shows in the result, as in eager; what is Inf and what NaN depends on the order of the arithmetic."""
    model = block(norm_layer=partial(nn.BatchNorm2d, eps=0.0))
    with torch.no_grad():
        model.bn1.running_var[0] = 0.0
        model.bn3.running_var[5] = 0.0
    fused = copy.deepcopy(model)
    fastres.fuse_(fused)
    x = image()
    want, got = step(model, x, mode)["y"], step(fused, x, mode)["y"]
    assert not bool(want.isfinite().all()) and not bool(got.isfinite().all())


@layouts
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_a18_large_mean_small_variance(layout, residual):
    """Mean 1e4, std 1e-2: E[x^2] - E[x]^2 would have no right digit."""
    x = (torch.randn(8, 16, 9, 9, dtype=torch.float64) * 1e-2 + 1e4).float().contiguous(memory_format=LAYOUTS[layout])
    shortcut = torch.randn(8, 16, 9, 9) if residual else None
    grad_y = torch.randn(8, 16, 9, 9)

    def outcome(function, dtype):
        leaf = x.detach().to(dtype).requires_grad_()
        running = [torch.zeros(16, dtype=dtype), torch.ones(16, dtype=dtype)]
        affine = [torch.full((16,), v, dtype=dtype, requires_grad=True) for v in (1.5, 0.2)]
        y = function(leaf, *running, *affine, None if shortcut is None else shortcut.to(dtype))
        y.backward(grad_y.to(dtype))
        return {"y": y, "x.grad": leaf.grad, "weight.grad": affine[0].grad, "bias.grad": affine[1].grad} | dict(
            zip(("running_mean", "running_var"), running, strict=True)
        )

    def eager(x, mean, var, weight, bias, shortcut):
        y = F.batch_norm(x, mean, var, weight, bias, training=True)
        return F.relu(y if shortcut is None else y + shortcut)

    fused = partial(functional.bn_act, training=True)
    assert_parity(
        outcome(fused, torch.float32), outcome(eager, torch.float32), outcome(eager, torch.float64), torch.float32
    )


@kinds
def test_a18_large_mean_in_a_block(kind):
    """The mean comes from a bias of the convolution, as far from 0 as float32 leaves digits for."""
    model = biased(block(kind=kind, stride=2))
    with torch.no_grad():
        for conv in model.modules():
            if isinstance(conv, nn.Conv2d):
                conv.bias += 300.0
    check_numbers(model, image(), "train")
