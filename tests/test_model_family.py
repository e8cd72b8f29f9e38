"""The residual networks of the papers: their sizes, versions, shortcuts and blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from _compare import check, check_error, image, randomise, some_kernels, step
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastres
from fastres import models
from fastres.errors import UserError

DEPTHS = (18, 34, 50, 101, 152)

#: In millions. The table of the seeds (torchvision's counts), and for v2 and plain networks 2 * channels less for each
#: batch norm, and the projections less, that they do not have.
MILLIONS = {18: 11.7, 34: 21.8, 50: 25.6, 101: 44.5, 152: 60.2}
#: In 1e9, of the paper's table 1, whose "FLOPs" are multiply-adds of v1 (and of the plain twins of ResNet-18 and -34).
MULTIPLY_ADDS = {18: 1.8, 34: 3.6, 50: 3.8, 101: 7.6, 152: 11.3}
#: Of ResNet-50 after conv1, maxpool and each stage: (channels, height and width).
SHAPES_50 = [(64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7)]


def on_meta(name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return models.create_model(name, fused=False, **options)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def multiply_adds(model: nn.Module, size: int = 224) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() // 2


def small(network: type[nn.Module], block: Any, **options: Any) -> nn.Module:
    """The stem and two of four stages (or two of three)."""
    if issubclass(network, models.CifarResNet):
        model: Any = network(block, (2, 1, 1), **options)
        model.layer3, width = nn.Identity(), 32 * block.expansion
    else:
        model = network(block, (2, 1, 1, 1), num_classes=10, **options)
        model.layer3, model.layer4, width = nn.Identity(), nn.Identity(), 128 * block.expansion
    if isinstance(model, (models.PreActResNet, models.PreActCifarResNet)):
        model.norm = models.BatchNormReLU(nn.BatchNorm2d(width))
    model.fc = nn.Linear(width, 10)
    return randomise(model)


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with some_kernels():
        yield


# Sizes ---------------------------------------------------------------------------------------------------------------


def test_every_model_of_the_mission_is_there() -> None:
    names = [f"{prefix}{depth}{suffix}" for prefix, suffix in KINDS for depth in DEPTHS]
    assert {*names, "resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2"} == {
        name for name in models.list_models() if models.image_size(name) == 224
    }
    assert all(getattr(models, name).__name__ == name for name in models.list_models())


KINDS = (("resnet", ""), ("resnet", "_v1"), ("resnet", "_v2"), ("plain", ""))


@pytest.mark.parametrize("name", [name for name in models.list_models() if not name.endswith(("1202", "1202_v2"))])
def test_documented_parameters(name: str) -> None:
    assert f": {parameters(on_meta(name)):,} parameters" in models.describe(name)


@pytest.mark.parametrize("depth", DEPTHS)
def test_parameters_of_the_table(depth: int) -> None:
    v15 = on_meta(f"resnet{depth}")
    assert round(parameters(v15) / 1e6, 1) == MILLIONS[depth]
    projections = [m for name, m in v15.named_modules() if ".downsample" in name and isinstance(m, nn.Conv2d)]
    norms = sum(2 * m.out_channels for m in projections)
    less = {"_v1": 0, "_v2": norms, "plain": norms + sum(m.weight.numel() for m in projections)}
    for kind, difference in less.items():
        name = f"plain{depth}" if kind == "plain" else f"resnet{depth}{kind}"
        assert parameters(v15) - parameters(on_meta(name)) == difference


@pytest.mark.parametrize("depth", DEPTHS)
def test_multiply_adds_of_table_1(depth: int) -> None:
    assert multiply_adds(on_meta(f"resnet{depth}_v1")) / 1e9 == pytest.approx(MULTIPLY_ADDS[depth], rel=0.02)
    if depth < 50:
        assert multiply_adds(on_meta(f"plain{depth}")) / 1e9 == pytest.approx(MULTIPLY_ADDS[depth], rel=0.02)


def test_v1_strides_in_the_1x1() -> None:
    v1, v15 = on_meta("resnet50_v1"), on_meta("resnet50")
    assert multiply_adds(v15) / multiply_adds(v1) == pytest.approx(1.06, abs=0.01)
    assert (v1.layer2[0].conv1.stride, v1.layer2[0].conv2.stride) == ((2, 2), (1, 1))
    assert (v15.layer2[0].conv1.stride, v15.layer2[0].conv2.stride) == ((1, 1), (2, 2))
    assert [(n, p.shape) for n, p in v1.named_parameters()] == [(n, p.shape) for n, p in v15.named_parameters()]


@pytest.mark.parametrize("name", ["resnet50", "resnet50_v1", "resnet50_v2", "plain50"])
def test_stage_shapes_of_resnet50(name: str) -> None:
    model, shapes = on_meta(name), []
    for part in ("conv1", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        model.get_submodule(part).register_forward_hook(lambda _, args, y: shapes.append((y.shape[1], *y.shape[2:])))
    assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)
    assert shapes == [(channels, size, size) for channels, size in SHAPES_50]


# Shortcuts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "resnet34_v2", "resnet56", "resnet20_v2"])
def test_shortcut_options(name: str) -> None:
    found = {option: on_meta(name, shortcut=option) for option in "ABC"}
    blocks = [m for m in found["A"].modules() if hasattr(m, "downsample")]
    changes = [m for m in blocks if m.downsample is not None]
    projections = {
        option: [m for n, m in model.named_modules() if ".downsample" in n and isinstance(m, nn.Conv2d)]
        for option, model in found.items()
    }
    assert {option: len(p) for option, p in projections.items()} == {"A": 0, "B": len(changes), "C": len(blocks)}
    assert all(type(m.downsample) is models.ZeroPadShortcut for m in changes)
    norms = 0 if name.endswith("_v2") else 2
    for option, convs in projections.items():
        extra = sum(conv.weight.numel() + norms * conv.out_channels for conv in convs)
        assert parameters(found[option]) == parameters(found["A"]) + extra
    default = parameters(on_meta(name))
    assert default == parameters(found["A" if models.image_size(name) == 32 else "B"])


def test_identity_path_of_v2_is_clean() -> None:
    """With branches that give 0, blocks without a change of size are the identity, for values below 0 too."""
    model = models.PreActCifarResNet(models.PreActBasicBlock, (3, 1, 1), zero_init_residual=True)
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(model.layer1(x), x)
    v1 = models.CifarResNet(models.BasicBlock, (3, 1, 1), zero_init_residual=True)
    assert torch.equal(v1.layer1(x), x.relu())


def test_v2_activates_once_before_the_first_split_and_after_the_last_block() -> None:
    for model in (on_meta("resnet50_v2"), on_meta("resnet20_v2")):
        bn1 = [m.bn1 for m in model.modules() if isinstance(m, (models.PreActBasicBlock, models.PreActBottleneck))]
        assert bn1[0] is None and all(isinstance(bn, nn.BatchNorm2d) for bn in bn1[1:])
        names = list(dict(model.named_children()))
        assert names[-3:] == ["norm", "avgpool", "fc"]


# Initialisation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [models.CifarResNet, models.PreActCifarResNet])
def test_zero_init_residual_starts_as_the_shortcuts_and_still_learns(network: Any) -> None:
    block = models.PreActBottleneck if network.preactivation else models.Bottleneck
    model = network(block, (1, 1, 1), zero_init_residual=True)
    last = [m.conv3 if network.preactivation else m.bn3 for m in model.modules() if isinstance(m, block)]
    assert not any(m.weight.any() for m in last)
    model(image(3, n=4, size=8)).square().sum().backward()
    assert all(m.weight.grad.any() for m in last)


def test_he_initialisation() -> None:
    model: Any = models.resnet20_v2(fused=False)
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 9000):
        assert conv.weight.std().item() == pytest.approx((2 / (9 * conv.out_channels)) ** 0.5, rel=0.04)


# Blocks alone --------------------------------------------------------------------------------------------------------

BLOCKS = (
    *(models.BasicBlock, models.Bottleneck, models.PlainBasicBlock, models.PlainBottleneck),
    *(models.PreActBasicBlock, models.PreActBottleneck),
)


@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
@pytest.mark.parametrize(
    ("kind", "option"), [(kind, option) for kind in BLOCKS for option in ("ABC" if kind.residual else "A")]
)
def test_blocks_alone(kind: Any, option: str, mode: str) -> None:
    """By themselves, eager and fused; with strides and more channels, a shortcut from make_shortcut."""
    planes = 32 // kind.expansion
    options: dict[str, Any] = {}
    if kind.residual:
        options["downsample"] = models.make_shortcut(option, 16, 32, 2, preactivation=kind.preactivation)
    fused = check(randomise(kind(16, planes, 2, **options)), image(16), mode)
    assert step(fused, image(16), mode)["y"].shape == (3, 32, 4, 4)
    check(randomise(kind(32, planes)), image(32), mode)


def test_plain_blocks_take_no_shortcut() -> None:
    with pytest.raises(TypeError, match="downsample"):
        models.PlainBasicBlock(16, 16, downsample=nn.Identity())


# Options -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 4, "width_per_group": 16},
        {"shortcut": "C"},
        {"replace_stride_with_dilation": [True, False, False]},
        {"norm_layer": lambda channels: nn.BatchNorm2d(channels, eps=1e-3)},
        {"stride_in_1x1": True},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("network", [models.ResNet, models.PreActResNet])
def test_options_fused(network: Any, options: dict[str, Any]) -> None:
    block = models.PreActBottleneck if network.preactivation else models.Bottleneck
    for mode in ("train", "inference"):
        check(small(network, block, **options), image(3, n=2, size=32), mode, tolerance=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("resnet50", {"shortcut": "D"}, 'shortcut must be "A", "B" or "C"'),
        ("resnet20_v2", {"shortcut": "b"}, 'shortcut must be "A", "B" or "C"'),
        ("plain34", {"shortcut": "A"}, "a plain network, without shortcuts"),
        ("plain20", {"zero_init_residual": True}, "not a plain network"),
        ("resnet34", {"stride_in_1x1": True}, "BasicBlock has no 1x1 convolution"),
        ("resnet18_v2", {"groups": 2}, "PreActBasicBlock only supports"),
        ("resnet50_v2", {"num_classes": 0}, "num_classes must be at least 1"),
    ],
)
def test_unknown_options(name: str, options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        models.create_model(name, fused=False, **options)


def test_networks_of_the_wrong_blocks() -> None:
    with pytest.raises(ValueError, match="ResNet cannot be made of PreActBottlenecks"):
        models.ResNet(models.PreActBottleneck, (1, 1, 1, 1))
    with pytest.raises(ValueError, match="PreActCifarResNet cannot be made of BasicBlocks"):
        models.PreActCifarResNet(models.BasicBlock, (1, 1, 1))
    with pytest.raises(ValueError, match="four stages"):
        models.ResNet(models.BasicBlock, (1, 1, 0, 1))


def test_unknown_depth_and_option_name() -> None:
    with pytest.raises(UserError, match="no model named 'resnet51_v2'; did you mean resnet"):
        models.create_model("resnet51_v2")
    with pytest.raises(TypeError, match="short"):
        models.create_model("resnet50", short="A")


@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize(
    ("network", "block"),
    [
        (models.ResNet, models.PlainBasicBlock),
        (models.PreActResNet, models.PreActBasicBlock),
        (models.CifarResNet, models.BasicBlock),
        (models.PreActCifarResNet, models.PreActBottleneck),
    ],
)
def test_images_the_stem_does_not_allow(network: Any, block: Any, mode: str) -> None:
    model = small(network, block)
    check_error(model, torch.randn(2, 3, 0, 5), mode, same_message=False)
    check_error(model, torch.randn(2, 1, 16, 16), mode, same_message=False)  # one channel
    check_error(model, torch.randn(3, 16, 16), mode, same_message=False)  # no batch


# Checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet20_v2", "plain20", "resnet18_v2", "resnet18_v1"])
def test_checkpoint_round_trip(name: str, tmp_path: Any) -> None:
    """From the fused model through a file into the plain one and back; the classes that do not fit are named."""
    torch.manual_seed(1)
    first, second = models.create_model(name, num_classes=5), models.create_model(name, num_classes=5, fused=False)
    randomise(first)
    torch.save(first.state_dict(), tmp_path / "a.pth")
    models.load_checkpoint(second, tmp_path / "a.pth")
    torch.save(second.state_dict(), tmp_path / "b.pth")
    state, again = first.state_dict(), torch.load(tmp_path / "b.pth")
    assert list(state) == list(again) and all(torch.equal(state[key], again[key]) for key in state)
    with pytest.raises(UserError, match=r"other shape: fc\.weight .*, fc\.bias \(5,\) for \(7,\)"):
        models.load_checkpoint(models.create_model(name, num_classes=7), tmp_path / "a.pth")


def test_plain_and_residual_twins_share_checkpoints() -> None:
    plain, residual = models.plain20(), models.resnet20()
    assert not any(plain.load_state_dict(residual.state_dict(), strict=True))
    with pytest.raises(RuntimeError, match="norm"):
        plain.load_state_dict(models.resnet20_v2().state_dict(), strict=True)


def test_fused_by_default() -> None:
    for name in ("resnet18", "resnet18_v2", "plain18", "resnet20", "resnet20_v2", "plain20"):
        swapped = [m for m in models.create_model(name).modules() if isinstance(m, fastres.fuse.FusedModule)]
        assert len(swapped) >= 9
        assert not [m for m in on_meta(name).modules() if isinstance(m, fastres.fuse.FusedModule)]
