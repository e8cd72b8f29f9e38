"""The residual networks for CIFAR: the paper's sizes, both shortcuts, and the same numbers fused."""

import copy

import pytest
import torch
from _compare import assert_same, image, off_the_kinks, randomise, step
from torch import nn

import fastres
from fastres import models
from fastres.errors import UserError
from fastres.kernels import extension
from fastres.recipes.residual import FusedModule

#: Parameters; the paper's table 6 says 0.27, 0.46, 0.66, 0.85, 1.7 and 19.4 million.
PARAMETERS = {
    20: 269_722,
    32: 464_154,
    44: 658_586,
    56: 853_018,
    110: 1_727_962,
    1202: 19_421_274,
}
#: After the stem and after each stage.
SHAPES = [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]


def small(block=models.BasicBlock, **options):
    return randomise(models.CifarResNet(block, (1, 2, 1), **options))


def image32(n=2, size=32, **options):
    return image(3, n=n, size=size, **options)


#: Residual, pre-activation and plain twins have the same convolutions and batch norms, in another order.
TWINS = ("resnet{}", "resnet{}_v2", "plain{}")


def test_all_are_listed():
    assert [name for name in models.list_models() if models.image_size(name) == 32] == [
        twin.format(depth) for twin in TWINS for depth in PARAMETERS
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [twin.format(depth) for depth in PARAMETERS for twin in TWINS[: 3 if depth < 1000 else 1]]
)
def test_sizes_are_the_papers(name):
    depth = int("".join(filter(str.isdigit, name.removesuffix("_v2"))))
    with torch.device("meta"):
        model = models.create_model(name, fused=False)
        x, shapes = torch.empty(1, 3, 32, 32), []
        for stage in (nn.Sequential(model.conv1, model.bn1, model.relu), model.layer1, model.layer2, model.layer3):
            x = stage(x)
            shapes.append(x.shape[1:])
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) + 1 == depth  # and the linear layer; the shortcuts have none
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[depth]
    assert shapes == SHAPES


def test_shortcut_without_parameters():
    x = torch.randn(2, 16, 9, 7)
    y = models.ZeroPadShortcut(40, 2)(x)
    assert y.shape == (2, 40, 5, 4) and torch.equal(y[:, :16], x[:, :, ::2, ::2]) and not y[:, 16:].any()
    assert torch.equal(models.ZeroPadShortcut(16, 1)(x), x)
    a, b = (models.resnet20(fused=False, shortcut=option) for option in "AB")
    extra = [name for name in b.state_dict() if name not in a.state_dict()]
    assert len(extra) == 12 and all("downsample" in name for name in extra)
    assert sum(p.numel() for p in b.parameters()) - PARAMETERS[20] == 16 * 32 + 32 * 64 + 2 * (32 + 64)


def test_initialisation():
    torch.manual_seed(0)
    model = models.resnet56(fused=False, zero_init_residual=True)
    weight = model.layer3[4].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    assert not model.layer2[3].bn2.weight.any() and bool((model.layer2[3].bn1.weight == 1).all())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"num_classes": 0}, "num_classes"),
        ({"shortcut": "D"}, "shortcut must be"),
        ({"layers": (1, 1)}, "three stages"),
    ],
)
def test_bad_arguments(options, error):
    with pytest.raises(ValueError, match=error):
        models.CifarResNet(models.BasicBlock, **{"layers": (1, 1, 1), **options})


def test_unknown_depth():
    with pytest.raises(UserError, match="did you mean resnet11"):
        models.create_model("resnet111")


def test_fuse_covers_the_whole_network():
    for options in ({}, {"shortcut": "B"}):
        report = fastres.fuse_(models.resnet20(fused=False, **options))
        assert report.fused == len(report.rows) > 50
    assert isinstance(models.resnet20(), FusedModule) and isinstance(models.resnet20(), models.CifarResNet)


@pytest.mark.skipif(not extension.available(), reason="no compiled kernels")
@pytest.mark.parametrize("shortcut", "AB")
@pytest.mark.parametrize("block", [models.BasicBlock, models.Bottleneck])
@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
def test_fused_is_the_same_model(block, shortcut, mode):
    eager = small(block, shortcut=shortcut)
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    x = off_the_kinks(eager, image32(), mode)
    assert_same(step(fused, x, mode), step(eager, x, mode), 1e-4)
    report = fastres.explain(fused, x)
    assert not [row for row in report.rows if not row.fused]


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_hook_on_the_stem(mode):
    eager = small()
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    x, seen = image32(), []
    for model in (eager, fused):
        model.bn1.register_forward_hook(lambda module, args, y: seen.append(y))
    assert_same(step(fused, x, mode), step(eager, x, mode), 1e-4)
    assert len(seen) == 2
