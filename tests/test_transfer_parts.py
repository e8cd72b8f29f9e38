"""Heads, frozen parts, learning rates, loading: fastres.transfer's functions on small networks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from _train import tiny, without_batch_norm
from torch import nn

import fastres
from fastres import models, transfer
from fastres.errors import UserError
from fastres.kernels import extension
from fastres.recipes.residual import FusedModule


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    """The first words of the names whose bits changed."""
    now = model.state_dict()
    return {name.split(".")[0] for name in before if not torch.equal(before[name], now[name])}


# Heads


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "resnet50_v2", "resnext50_32x4d"])
def test_the_head_of_our_networks(name: str) -> None:
    with torch.device("meta"):
        assert transfer.head_name(models.create_model(name)) == "fc"


def test_other_heads() -> None:
    assert transfer.head_name(without_batch_norm(3)) == "4"
    nested = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Dropout(), nn.Linear(12, 3)))
    assert transfer.head_name(nested) == "1.1"
    with pytest.raises(UserError, match="ReLU has no linear layer"):
        transfer.head_name(nn.ReLU())


def test_replace_head() -> None:
    model = tiny(10).double().eval()
    before = state_of(model)
    assert transfer.replace_head(model, 3) is model
    assert model.fc.weight.shape == (3, 64) and model.fc.weight.dtype is torch.float64 and not model.fc.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items() if not k.startswith("fc."))
    transfer.replace_head(model, 4, hidden=5)
    assert [tuple(p.shape) for p in model.fc.parameters()] == [(5, 64), (5,), (4, 5), (4,)]
    assert transfer.head_name(model) == "fc"  # all of it
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    first, last = model.fc[0], model.fc[2]
    f = transfer.feature_extractor(model, fuse=False)(x)
    expected = (f @ first.weight.T + first.bias).clamp_min(0) @ last.weight.T + last.bias
    torch.testing.assert_close(model(x), expected)
    transfer.replace_head(model, 2)  # and a linear one again
    assert model(x).shape == (2, 2)
    with pytest.raises(UserError, match="at least one class"):
        transfer.replace_head(model, 0)


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "resnet20_v2"])
@pytest.mark.parametrize("fuse", [True, False])
def test_features_are_what_the_head_gets(name: str, fuse: bool) -> None:
    model = models.create_model(name, num_classes=7).eval()
    before, classes = state_of(model), {type(m) for m in model.modules()}
    backbone = transfer.feature_extractor(model, fuse=fuse)
    assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())
    assert any(isinstance(m, FusedModule) for m in backbone.modules()) == fuse
    assert not changed(before, model) and {type(m) for m in model.modules()} == classes
    assert all(p.requires_grad for p in model.parameters())
    x = torch.randn(3, 3, 32, 32)
    seen: list[torch.Tensor] = []
    handle = model.fc.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        model(x)
        for _ in range(3):  # the third time by replay
            features = backbone(x)
            torch.testing.assert_close(features, seen[0])
    handle.remove()


@pytest.mark.skipif(not extension.available(), reason=f"no compiled kernels: {extension.load_error()}")
def test_features_run_in_inference_form() -> None:
    """Every convolution has its batch norm folded in: packed weights are kept."""
    backbone = transfer.feature_extractor(tiny(2))
    assert fastres.packed_bytes(backbone) == 0
    with torch.no_grad():
        backbone(torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last))
    weights = sum(m.weight.nbytes for m in backbone.modules() if isinstance(m, nn.Conv2d))
    assert fastres.packed_bytes(backbone) >= weights


# Frozen parts


def forward_backward(model: nn.Module, steps: int = 3, **options: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        logits = model(torch.randn(6, 3, 8, 8))
        nn.functional.cross_entropy(logits, torch.arange(6) % logits.shape[1]).backward()
        optimizer.step()


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "eager"])
@pytest.mark.parametrize(
    ("names", "trained"),
    [
        ((), {"fc"}),
        (("layer3",), {"layer3", "fc"}),
        (("layer3", "layer2"), {"layer2", "layer3", "fc"}),
        (("layer2",), {"layer2", "layer3", "fc"}),
        (("all",), {"conv1", "bn1", "layer1", "layer2", "layer3", "fc"}),
    ],
    ids=str,
)
def test_frozen_parts_keep_every_bit(names: tuple[str, ...], trained: set[str], fused: bool) -> None:
    model = tiny(3)
    forward_backward(model.train(), 1)  # statistics that are not 0 and 1
    if fused:
        fastres.fuse_(model)
    model.train()
    transfer.freeze_until(model, names)
    before = state_of(model)
    forward_backward(model)
    assert changed(before, model) == trained
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            part = name.split(".")[0]
            assert module.training == (part in trained)
            now = model.state_dict()
            for statistic in ("running_mean", "running_var", "num_batches_tracked"):
                key = f"{name}.{statistic}"
                assert torch.equal(before[key], now[key]) == (part not in trained), key


def test_train_in_its_place_would_move_the_statistics() -> None:
    """What freeze_until is for: requires_grad alone does not keep them."""
    model = tiny(3)
    transfer.freeze_until(model)
    before = state_of(model)
    forward_backward(model.train(), 1)
    assert "bn1" in changed(before, model)
    transfer.freeze_until(model)
    before = state_of(model)
    forward_backward(model, 1)
    assert changed(before, model) == {"fc"}


def test_a_part_of_a_stage() -> None:
    model = models.CifarResNet(models.BasicBlock, (2, 2, 2), 3)
    transfer.freeze_until(model, ["layer3.1"])
    assert not model.layer3[0].training and model.layer3[1].training and model.layer3.training
    assert not model.layer3[0].conv2.weight.requires_grad and model.layer3[1].conv1.weight.requires_grad


def test_modules_without_parameters() -> None:
    """Dropout follows its parent, a batch norm that is not affine what is before it."""
    model = nn.Sequential()
    model.add_module("a", nn.Sequential(nn.Linear(4, 4), nn.Dropout()))
    model.add_module("norm", nn.BatchNorm1d(4, affine=False))
    model.add_module("b", nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.Dropout()))
    model.add_module("head", nn.Sequential(nn.Dropout(), nn.Linear(4, 2)))
    transfer.freeze_until(model, ["b"])
    assert [m.training for m in (model.a[1], model.norm, *model.b, *model.head)] == [False, False] + [True] * 5
    transfer.freeze_until(model)
    assert [m.training for m in (model.a[1], model.norm, *model.b, *model.head)] == [False] * 5 + [True] * 2


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (
            ["layer5"],
            "no part named 'layer5'; there are conv1, bn1, layer1, layer2, layer3, fc, the parts of these, and",
        ),
        ([""], "no part named ''"),
        (["relu"], "relu has no parameters"),
        (["fc"], "fc belongs to the head"),
        (["layer3", "layer3.0"], "layer3 and layer3.0 begin with the same parameters"),
        (["layer2", "layer2"], "layer2 and layer2 begin"),
    ],
)
def test_wrong_parts(names: list[str], says: str) -> None:
    model = tiny(3)
    with pytest.raises(UserError, match=re.escape(says)) as error:
        transfer.freeze_until(model, names)
    assert "\n" not in str(error.value)
    assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())


# Learning rates


def test_groups_from_the_head_to_the_input() -> None:
    model = tiny(3)
    groups = transfer.param_groups(model, ["layer1", "layer3", "layer2"], lr=0.1, backbone_lr=0.02, decay=0.5)
    assert [(g["name"], g["lr"]) for g in groups] == [
        ("head", 0.1),
        ("layer3", 0.02),
        ("layer2", 0.01),
        ("layer1", 0.005),
    ]
    for group in groups:
        part = getattr(model, "fc" if group["name"] == "head" else group["name"])
        assert [id(p) for p in group["params"]] == [id(p) for p in part.parameters()]
    (head, rest) = transfer.param_groups(model, ["layer2"], lr=0.1)  # everything behind it too
    assert rest["lr"] == pytest.approx(0.01)
    assert len(rest["params"]) == sum(1 for part in (model.layer2, model.layer3) for _ in part.parameters())
    everything = transfer.param_groups(model, ["all"], lr=0.1)
    assert sum(len(g["params"]) for g in everything) == len(list(model.parameters()))
    assert len(transfer.param_groups(model, lr=0.1)) == 1


def test_groups_are_what_an_optimizer_takes() -> None:
    """One step of SGD: every parameter moves by its group's rate times its gradient."""
    model = tiny(3)
    names = ["layer3", "layer2"]
    transfer.freeze_until(model, names)
    optimizer = torch.optim.SGD(transfer.param_groups(model, names, lr=0.5, backbone_lr=0.25, decay=0.5), lr=9.0)
    nn.functional.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.arange(4) % 3).backward()
    before = state_of(model)
    optimizer.step()
    for name, parameter in model.named_parameters():
        rate = {"fc": 0.5, "layer3": 0.25, "layer2": 0.125}.get(name.split(".")[0], 0.0)
        assert (parameter.grad is None) == (rate == 0.0)
        step = 0.0 if parameter.grad is None else rate * parameter.grad
        torch.testing.assert_close(parameter.detach(), before[name] - step, msg=name)


# Checkpoints


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_load_without_the_head(suffix: str, tmp_path: Path) -> None:
    source, path = tiny(7), tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(source.state_dict(), path)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, path)
    model = tiny(3)
    head = model.fc.weight.clone()
    assert sorted(transfer.load_backbone(model, path)) == ["fc.bias (7,)", "fc.weight (7, 64)"]
    assert torch.equal(model.fc.weight, head)
    assert changed(source.state_dict(), _with_head_of(model, source)) == set()


def _with_head_of(model: nn.Module, source: nn.Module) -> nn.Module:
    model.fc = source.fc
    return model


def test_torchvisions_and_timms_names(torchvision: Any, tmp_path: Path) -> None:
    theirs = torchvision.models.resnet18(num_classes=7)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    model = models.resnet18(num_classes=3)
    assert transfer.load_backbone(model, tmp_path / "theirs.pth") == ["fc.weight (7, 512)", "fc.bias (7,)"]
    assert changed(theirs.state_dict(), _with_head_of(model, theirs)) == set()


def test_other_forms_of_heads(tmp_path: Path) -> None:
    """A file without a head, and one whose head has a hidden layer."""
    path, model = tmp_path / "a.pth", tiny(3)
    torch.save({k: v for k, v in tiny(3).state_dict().items() if not k.startswith("fc.")}, path)
    assert transfer.load_backbone(model, path) == []
    torch.save(transfer.replace_head(tiny(3), 5, hidden=4).state_dict(), path)
    assert [key.split(" ")[0] for key in transfer.load_backbone(model, path)] == [
        "fc.0.weight",
        "fc.0.bias",
        "fc.2.weight",
        "fc.2.bias",
    ]


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    path, model = tmp_path / "a.pth", tiny(3)
    before = state_of(model)
    state = tiny(3).state_dict()
    state["layer3.0.conv2.weight"] = torch.zeros(64, 64, 1, 1)
    torch.save(state, path)
    with pytest.raises(UserError, match=r"other shape: layer3.0.conv2.weight \(64, 64, 1, 1\) for \(64, 64, 3, 3\)$"):
        transfer.load_backbone(model, path)
    torch.save(models.resnet18(num_classes=3, fused=False).state_dict(), path)
    with pytest.raises(UserError, match="unexpected: layer1.1.conv1.weight"):
        transfer.load_backbone(model, path)
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="corrupt, or not a checkpoint"):
        transfer.load_backbone(model, path)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        transfer.load_backbone(model, tmp_path / "nowhere.pth")
    assert not changed(before, model)


def test_code_of_the_document_runs() -> None:
    blocks = (Path(__file__).resolve().parents[1] / "docs" / "transfer.md").read_text().split("```python\n")[1:]
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(block.partition("```")[0], scope)
    assert len(blocks) == 1 and scope["features"].shape == (16, 64)
    assert not scope["model"].layer2.training and scope["model"].layer3.training
