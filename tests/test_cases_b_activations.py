"""Cases B8 and B9: what may stand between batch norm and addition, and other activations."""

import copy

import _torchvision
import pytest
import torch
import torch.nn.functional as F
from _compare import (
    assert_path,
    assert_same,
    block,
    check,
    image,
    libraries,
    modes,
    randomise,
    resnet,
    some_kernels,
    step,
    watched,
)
from torch import nn

import fastres
from fastres.nn import AddAct, BnAct2d, ConvBnAct2d


@pytest.fixture(autouse=True)
def _kernels():
    with some_kernels():
        yield


@pytest.fixture
def vision():
    module, reason = _torchvision.load()
    if module is None:
        pytest.skip(reason)
    return module


def drop_path_block(library):
    """A Bottleneck as timm writes it: something between bn3 and the addition."""

    class DropPathBottleneck(resnet(library).Bottleneck):
        def __init__(self, between, *args, **options):
            super().__init__(*args, **options)
            self.between = between

        def forward(self, x):
            y = self.relu(self.bn1(self.conv1(x)))
            y = self.relu(self.bn2(self.conv2(y)))
            y = self.bn3(self.conv3(y))
            if self.between is not None:
                y = self.between(y)
            return self.relu(y + (x if self.downsample is None else self.downsample(x)))

    return DropPathBottleneck


class SqueezeExcite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gate = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()


@modes
@pytest.mark.parametrize("between", ["none", "identity", "dropout", "squeeze_excite", "stochastic_depth"])
def test_b8_module_between_batch_norm_and_add(vision, between, mode):
    modules = {
        "none": None,
        "identity": nn.Identity(),
        "dropout": nn.Dropout2d(0.5),
        "squeeze_excite": SqueezeExcite(16),
        "stochastic_depth": vision.ops.StochasticDepth(0.5, "row"),
    }
    eager = randomise(drop_path_block("torchvision")(modules[between], 16, 4))
    fused = copy.deepcopy(eager)
    report = fastres.fuse_(fused)
    active = between in ("squeeze_excite",) or (between in ("dropout", "stochastic_depth") and mode == "train")
    x = image()
    outcomes = []
    for model in (fused, eager):
        torch.manual_seed(4)
        outcomes.append(step(model, x, mode))
    assert_same(*outcomes)
    assert report.fused > 0
    last = fastres.recipes.units.plan_of(fused).matched.groups[-1]
    assert (last.norm is None or last.residual is None) == active  # else the addition is part of batch norm's op


@modes
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_b8_block_of_timm(rate, mode):
    """timm's own BasicBlock, with its DropPath and squeeze-and-excitation."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    kind = timm.models.resnet.BasicBlock
    squeeze = timm.layers.SEModule if rate else None
    eager = randomise(kind(16, 16, drop_path=timm.layers.DropPath(rate), attn_layer=squeeze))
    fused = copy.deepcopy(eager)
    report = fastres.fuse_(fused)
    assert all(row.fused for row in report.rows if row.kind in ("bn", "act", "add"))
    x = image()
    outcomes = []
    for model in (fused, eager):
        torch.manual_seed(4)
        outcomes.append(step(model, x, mode))
    assert_same(*outcomes)


@modes
@libraries
def test_b8_module_put_behind_a_known_blocks_batch_norm(library, mode):
    """bn3 is no longer a plain batch norm: the block's own forward runs, dropout and all."""

    def put(model):
        model.bn3 = nn.Sequential(model.bn3, nn.Dropout2d(0.5))

    eager = block(library, stride=2)
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    put(eager), put(fused)
    x = image()
    torch.manual_seed(4)
    want = step(eager, x, mode)
    torch.manual_seed(4)
    with watched() as seen:
        got = step(fused, x, mode)
    assert_path(seen, "eager", "Sequential")
    assert_same(got, want)


@libraries
@modes
@pytest.mark.parametrize(
    "act", [nn.ReLU6(), nn.LeakyReLU(0.1), nn.SiLU(), nn.GELU(), nn.Hardswish(), nn.PReLU()], ids=repr
)
def test_b9_other_activations(library, act, mode):
    kind = "BasicBlock" if library == "fastres" else "Bottleneck"

    def replace(model):
        model.relu = copy.deepcopy(act)

    check(block(library, kind, stride=2), image(), mode, after=replace, path="eager", reason=type(act).__name__)
    before = block(library, kind, stride=2)
    replace(before)
    check(before, image(), mode)  # up to the activation, which is called
    assert any(type(act).__name__ in row.reason for row in fastres.fuse_(before).rows)


@modes
@pytest.mark.parametrize("inplace", [True, False])
def test_b9_relu_in_place_or_not(inplace, mode):
    check(block(stride=2), image(), mode, after=lambda model: setattr(model.relu, "inplace", inplace))


class FunctionalRelu(nn.Module):
    """The ways in which people write a ReLU without the module."""

    def __init__(self, relu):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), relu

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)) + x)


RELUS = {
    "F.relu": F.relu,
    "F.relu_": F.relu_,
    "clamp": lambda y: y.clamp(min=0),
    "clamp_min": lambda y: y.clamp_min_(0),
    "max": lambda y: y.maximum(y * 0),
}


@modes
@pytest.mark.parametrize("relu", RELUS)
def test_b9_relu_without_a_module(relu, mode):
    eager = randomise(FunctionalRelu(RELUS[relu]))
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    assert_same(step(fused, x := image(), mode), step(eager, x, mode))


def test_b9_unknown_activation_of_the_modules():
    conv, bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    for make in (
        lambda: ConvBnAct2d(conv, bn, act="silu"),
        lambda: BnAct2d(bn, act="silu"),
        lambda: AddAct(act="silu"),
    ):
        with pytest.raises(ValueError, match="'relu', 'identity'"):
            make()
