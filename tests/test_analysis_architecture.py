"""Architecture: receptive fields against autograd and the literature, shortcuts, sizes, differences from the paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastres import models
from fastres.analysis import architecture, flow, parts
from fastres.errors import UserError


def on_meta(name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return models.create_model(name, fused=False, **options)


def take_apart(name: str, **options: Any) -> parts.Network:
    size = models.image_size(name)
    return parts.take_apart(on_meta(name, **options), (1, 3, size, size))


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        # Araujo et al. 2019: 483 and 1027 for ResNet-50 and -101 with the stride in the 1x1.
        *(("resnet50_v1", 483), ("resnet101_v1", 1027)),
        *(("resnet50", 427), ("resnet18", 435), ("resnet34", 899), ("resnext50_32x4d", 427), ("resnet18_v2", 435)),
    ],
)
def test_receptive_fields_of_the_literature(name: str, pixels: int) -> None:
    net = take_apart(name)
    last = net.blocks[-1].trace
    assert last is not None and last.field is not None and last.receptive_field == pixels
    assert last.field[0].step == 32 and net.depth == int(name.strip("resnxt").split("_")[0])
    assert net.output.receptive_field == float("inf")


class Odd(nn.Module):
    """Kernels that are not square, padding, slices, concatenation, dilation, pooling, functions."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 2, (1, 5), padding=(0, 2), bias=False)
        self.b = nn.Conv2d(1, 2, (3, 1), dilation=(2, 1), padding=(2, 0), bias=False)
        self.c = nn.Conv2d(4, 1, 3, stride=2, bias=False)
        self.pool = nn.AvgPool2d(2, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.a(x), self.b(x)], dim=1)
        y = self.c(F.pad(x, (2, 1, 3, 0)))[:, :, 1::2]
        return self.pool(y).abs() * 2


class Zeros(nn.Module):
    """A network for CIFAR without its head."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        m: Any = self.model
        return m.layer2(m.layer1(m.relu(m.bn1(m.conv1(x)))))


@pytest.mark.parametrize(
    "model",
    [
        Odd(),
        Zeros(models.CifarResNet(models.BasicBlock, (2, 1, 1))),
        Zeros(models.PreActCifarResNet(models.PreActBottleneck, (1, 1, 1), shortcut="B")),
        nn.Sequential(nn.Conv2d(1, 1, 3, bias=False), nn.MaxPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(6)),
    ],
    ids=["odd", "v1", "v2", "pools"],
)
def test_receptive_field_against_autograd(model: nn.Module) -> None:
    """With positive weights, what an output sees is where its gradient is not 0; at the borders, more would be."""
    model = model.double().eval()
    channels, size = (3 if isinstance(model, Zeros) else 1), (14 if isinstance(model, nn.Sequential) else 41)
    field = flow.watch(model, (channels, size, size)).output.field
    assert field is not None
    for p in model.parameters():
        nn.init.constant_(p, 0.1)
    x = torch.rand(1, channels, size, size, dtype=torch.float64).add_(1).requires_grad_()
    if isinstance(model, nn.Sequential):
        model[1] = nn.AvgPool2d(3, 2, 1)  # the maximum has a gradient at one pixel only
    y = model(x)
    i, j = y.shape[2] // 2, y.shape[3] // 2
    (seen,) = torch.autograd.grad(y[0, :, i, j].sum(), x)
    for axis, index, dims in ((field[0], i, (0, 1, 3)), (field[1], j, (0, 1, 2))):
        pixels = seen.abs().sum(dims).nonzero().flatten()
        first, last = axis.first + index * axis.step, axis.last + index * axis.step
        assert (pixels[0], pixels[-1]) == (max(0, first), min(size - 1, last))


def test_what_cannot_be_followed_is_said() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows = x.flatten(2)
            return (rows.transpose(1, 2) @ rows)[:, None]

    for model in (Attention(), nn.Upsample(scale_factor=2), nn.PixelUnshuffle(2), nn.ConvTranspose2d(4, 4, 2)):
        assert flow.watch(model, (4, 8, 8)).output.receptive_field is None
    assert flow.watch(nn.Linear(8, 8), (4, 8, 8)).output.receptive_field == 1  # of rows, pixel by pixel: no mixing seen
    gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Sigmoid())
    assert flow.watch(gate, (4, 8, 8)).output.receptive_field == float("inf")


@pytest.mark.parametrize(
    ("name", "options", "stays", "changes", "activated"),
    [
        ("resnet18", {}, "identity", "projection", True),
        ("resnet20", {}, "identity", "zero padding", True),
        ("resnet20_v2", {}, "identity", "zero padding", False),
        ("resnet20_v2", {"shortcut": "B"}, "identity", "projection", False),
        ("resnet20", {"shortcut": "C"}, "projection", "projection", True),
    ],
)
def test_shortcuts(name: str, options: dict[str, str], stays: str, changes: str, activated: bool) -> None:
    net = take_apart(name, **options)
    assert {block.shortcut for block in net.blocks if not block.changes_size} == {stays}
    assert {block.shortcut for block in net.blocks if block.changes_size} == {changes}
    assert {addition.activated for block in net.blocks for addition in block.additions} == {activated}


@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d", "resnet18_v2", "plain20", "resnet56"])
def test_the_parts_are_the_whole(name: str) -> None:
    net, model = take_apart(name), on_meta(name)
    assert sum(part.parameters for part in net.parts) == sum(p.numel() for p in model.parameters()) == net.parameters
    assert sum(part.multiply_adds for part in net.parts) == net.summary.multiply_adds
    assert all(row.trace is not None for row in net.rows)
    assert [block.name for block in net.blocks] == [
        f"{stage}.{i}"
        for stage, m in model.named_children()
        if "layer" in stage
        for i in range(len(list(m.children())))
    ]


def report_of(model: str, **options: Any) -> tuple[Any, dict[str, tuple[str, str, str]]]:
    report = architecture(model=model, **options)
    return report, {aspect: (paper, here, same) for aspect, paper, here, same in report.tables[0].rows}


@pytest.mark.parametrize("name", ["resnet50_v1", "resnet34", "resnet20", "resnet44"])
def test_networks_of_the_paper(name: str) -> None:
    report, aspects = report_of(name)
    assert report.verdict == "reproduced" and {same for _, _, same in aspects.values()} == {"yes"}


@pytest.mark.parametrize(
    ("name", "differ"),
    [
        ("resnet50", {"stride of 2", "multiply-adds"}),
        ("wide_resnet50_2", {"their channels", "stride of 2", "multiply-adds"}),
        ("resnext50_32x4d", {"their channels", "stride of 2", "groups of a convolution", "multiply-adds"}),
        ("resnet20_v2", {"after the addition", "a block starts with"}),
        ("plain20", {"shortcuts where sizes stay", "shortcuts where sizes change", "after the addition"}),
    ],
)
def test_differences_from_the_paper(name: str, differ: set[str]) -> None:
    report, aspects = report_of(name)
    assert {aspect for aspect, (_, _, same) in aspects.items() if same == "no"} == differ
    assert report.verdict == "partly reproduced"


def test_table_of_resnet50() -> None:
    report, aspects = report_of("resnet50")
    assert aspects["stride of 2"][1] == "in the only 3x3 convolution of a stage"
    table = next(table for table in report.tables if table.name == "architecture")
    rows = {row[0]: row for row in table.rows}
    assert rows["layer4.2"][2:8] == ("1x1 512, 3x3 512, 1x1 2048", "identity", "2048x7x7", 4_462_592, 218.365952, "427")
    assert rows["layer2.0"][3] == "projection: 1x1 512 /2" and "stride 2 in its 3x3" in rows["layer2.0"][-1]
    assert rows["conv1 .. maxpool"][2] == "7x7 64 /2, max-pool 3x3 /2"
    assert rows["total"][5] == 25_557_032 and "receptive field of 427 pixels" in report.measured


class Gated(nn.Module):
    """A network that no library has: a residual branch with a parameter of its own, SiLU, no head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(*(Scaled() for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.scale = nn.Conv2d(8, 8, 3, padding=1), nn.SiLU(), nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.scale * self.conv(x) + x)


def test_a_network_of_ones_own() -> None:
    report, aspects = report_of("test_analysis_architecture:Gated", size=16)
    assert report.verdict == "no claim" and "none of the paper's depths" in report.claim
    assert aspects["activations"][1] == "SiLU" and aspects["shortcuts where sizes stay"][1:] == ("identity", "yes")
    rows = next(table for table in report.tables if table.name == "architecture").rows
    assert [row[0] for row in rows] == ["stem", "body.0", "body.1", "-", "total"]
    assert rows[-2][5] == 16 and rows[-1][5] == sum(p.numel() for p in Gated().parameters())


@pytest.mark.slow
def test_torchvision(torchvision: Any) -> None:
    report, aspects = report_of("torchvision.models:resnet50")
    ours = report_of("resnet50")[1]
    assert aspects == ours
    dense, _ = report_of("torchvision.models:densenet121")
    assert dense.verdict == "no claim" and "7.98 million parameters" in dense.measured


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50d", "vit_tiny_patch16_224", "convnext_tiny"])
def test_timm(name: str, torchvision: Any) -> None:
    timm = pytest.importorskip("timm", exc_type=Exception)
    report, aspects = report_of(f"timm.models:{name}")
    expected = sum(p.numel() for p in timm.create_model(name).parameters())
    assert f"{expected / 1e6:.2f} million parameters" in report.measured
    if name == "resnet50d":
        assert aspects["stem"][1] == "3x3 32 /2, 3x3 32, 3x3 64, max-pool 3x3 /2"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model": "resnet51"}, "no model named 'resnet51'"),
        ({"model": "nowhere:net"}, "No module named 'nowhere'"),
        ({"model": "resnet50", "size": -1}, "--size must be at least 0"),
        ({"model": "torch.nn:ReLU"}, "has no parameters"),
        ({"model": "test_analysis_architecture:Rows"}, "does not take images of 3 x 224 x 224"),
    ],
)
def test_wrong_input(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        architecture(**options)
    assert "\n" not in str(caught.value)


class Rows(nn.Linear):
    def __init__(self) -> None:
        super().__init__(5, 5)
