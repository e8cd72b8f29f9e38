"""summarise and `fastres models`: layers, shapes, parameters, work, bytes, what is fused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastres
from fastres import cli, models
from fastres.summary import Layer, summarise


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return models.create_model(name, fused=False)


@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d", "resnet18_v2", "plain34", "resnet20", "resnet56_v2"])
def test_totals(name: str) -> None:
    model, size = on_meta(name), models.image_size(name)
    found = summarise(model, (2, 3, size, size))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(2, 3, size, size, device="meta"))
    assert 2 * found.multiply_adds == counter.get_total_flops()
    assert str(found.parameters // 10**6) in str(found) and str(fastres.fuse_(model)) in str(found)


def test_layers_of_a_block() -> None:
    found = summarise(on_meta("resnet18"), (1, 3, 64, 64)).layers
    block = [
        (layer.name.removeprefix("layer2.0").lstrip("."), layer.kind) for layer in found if "layer2.0" in layer.name
    ]
    assert block == [
        *[("conv1", "Conv2d"), ("bn1", "BatchNorm2d"), ("relu", "ReLU"), ("conv2", "Conv2d"), ("bn2", "BatchNorm2d")],
        *[("downsample.0", "Conv2d"), ("downsample.1", "BatchNorm2d"), ("", "add"), ("relu", "ReLU")],
    ]
    assert found[0] == Layer("conv1", "Conv2d", (1, 64, 32, 32), 9408, 9408 * 32 * 32, 4 * 64 * 32 * 32, False)
    assert found[-1] == Layer("fc", "Linear", (1, 1000), 513_000, 512_000, 4000, None)
    assert {layer.fused for layer in found[1:-2]} == {True}


def test_additions_of_v2_come_last_and_plain_networks_have_none() -> None:
    found = [layer for layer in summarise(on_meta("resnet20_v2"), (1, 3, 32, 32)).layers if "layer1.1" in layer.name]
    assert (found[0].kind, found[-2].name, found[-1].kind) == ("BatchNorm2d", "layer1.1.conv2", "add")
    assert not [layer for layer in summarise(on_meta("plain20"), (1, 3, 32, 32)).layers if layer.kind == "add"]


def test_the_model_is_not_changed_and_may_be_fused_and_of_any_dtype() -> None:
    model = models.resnet20().to(torch.bfloat16).train()
    before = {name: (type(module), module.training) for name, module in model.named_modules()}
    found = summarise(model, (1, 3, 32, 32))
    assert {name: (type(module), module.training) for name, module in model.named_modules()} == before
    assert all(p.device.type == "cpu" for p in model.parameters())
    assert found.layers[0].bytes == 2 * 16 * 32 * 32
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    assert hooks == 0


def test_modules_it_does_not_know() -> None:
    shared = nn.Linear(4, 4)
    found = summarise(nn.Sequential(nn.Flatten(), shared, nn.Tanh(), shared), (3, 1, 2, 2))
    assert [layer.parameters for layer in found.layers] == [0, 20, 0, 0]
    assert found.multiply_adds == 2 * 3 * 16 and {layer.fused for layer in found.layers} == {None}


def test_command_lists_every_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["models", "--json", str(tmp_path / "new" / "list.json")]) == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert lines == models.list_models() == list(json.loads((tmp_path / "new" / "list.json").read_text()))


def test_command_prints_layers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["models", "resnet50", "--json", str(tmp_path / "layers.json")]) == 0
    out = capsys.readouterr().out
    assert "25.56 M parameters, 4.09 G multiply-adds" in out and "139 of 140 operations fused" in out
    assert max(map(len, out.splitlines())) <= 120
    found = json.loads((tmp_path / "layers.json").read_text())
    assert found["parameters"] == 25_557_032 and found["layers"][0]["shape"] == [1, 64, 112, 112]


DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "models.md"


def test_table_of_the_document() -> None:
    rows = [line.strip("| \n").split(" | ") for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    found = {row[0]: row[2:] for row in rows if row[0] in ("18", "50")}
    for depth, cells in found.items():
        names = (f"resnet{depth}_v1", f"resnet{depth}", f"resnet{depth}_v2", f"plain{depth}")
        for name, cell in zip(names, cells, strict=True):
            s = summarise(on_meta(name), (1, 3, 224, 224))
            assert cell == f"{s.parameters / 1e6:.2f}, {s.multiply_adds / 1e9:.2f}"
    assert len(found) == 2
