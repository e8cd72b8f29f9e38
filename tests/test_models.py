"""fastres.models against torchvision, and checkpoints."""

from __future__ import annotations

import builtins
import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastres import models
from fastres.errors import UserError
from fastres.fuse import fuse_
from fastres.recipes.residual import FusedModule

#: The models that torchvision has too.
NAMES = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2"),
)


def seeded(constructor: Callable[..., nn.Module], **kwargs: Any) -> nn.Module:
    torch.manual_seed(1)
    return constructor(**kwargs)


def assert_same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    assert not [key for key in a if not torch.equal(a[key], b[key])]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# The models ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_same_modules_keys_and_seeded_weights_as_torchvision(torchvision: Any, name: str) -> None:
    ours = seeded(models.create_model, name=name, fused=False)
    theirs = seeded(getattr(torchvision.models, name))
    assert [(n, type(m).__name__) for n, m in ours.named_modules()] == [
        (n, type(m).__name__) for n, m in theirs.named_modules()
    ]
    assert_same_state(ours.state_dict(), theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert set(vars(ours)) == set(vars(theirs))


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_loads_both_ways(torchvision: Any, name: str) -> None:
    with torch.device("meta"):  # shapes and keys; the values are the test above
        ours, theirs = models.create_model(name, fused=False), getattr(torchvision.models, name)()
    assert not any(ours.load_state_dict(theirs.state_dict(), strict=True, assign=True))
    assert not any(theirs.load_state_dict(ours.state_dict(), strict=True, assign=True))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_plain_forward_is_torchvisions_bit_for_bit(torchvision: Any, name: str, training: bool) -> None:
    ours = seeded(models.create_model, name=name, fused=False).train(training)
    theirs = seeded(getattr(torchvision.models, name)).train(training)
    x = torch.randn(2, 3, 64, 64)
    y, expected = ours(x), theirs(x)
    assert torch.equal(y, expected)
    assert_same_state(ours.state_dict(), theirs.state_dict())  # the running statistics too
    if training:
        y.square().sum().backward()
        expected.square().sum().backward()
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


OPTIONS = [{"zero_init_residual": True}, {"replace_stride_with_dilation": [False, True, True]}]


@pytest.mark.parametrize("options", OPTIONS, ids=["zero_init", "dilated"])
def test_options_are_torchvisions(torchvision: Any, options: dict[str, Any]) -> None:
    ours = seeded(models.resnet50, num_classes=7, fused=False, **options)
    theirs = seeded(torchvision.models.resnet50, num_classes=7, **options)
    assert str(ours) == str(theirs)  # strides, dilations, paddings
    assert_same_state(ours.state_dict(), theirs.state_dict())


def test_norm_layer() -> None:
    model = models.resnet18(fused=False, norm_layer=lambda channels: nn.GroupNorm(8, channels))
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 1000)


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_fused_is_the_same_model(name: str, training: bool) -> None:
    plain = seeded(models.create_model, name=name, fused=False).train(training)
    fused = seeded(models.create_model, name=name).train(training)
    assert isinstance(fused, FusedModule) and isinstance(fused, models.ResNet)
    assert_same_state(fused.state_dict(), plain.state_dict())
    exact = copy.deepcopy(plain).double()
    x = torch.randn(4, 3, 96, 96)
    expected = exact(x.double())
    assert distance(fused(x), expected) <= 2 * distance(plain(x), expected)
    for key, value in fused.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[key], rtol=1e-4, atol=1e-4, msg=key)


def test_fuse_covers_the_whole_network() -> None:
    report = fuse_(models.resnet50(fused=False))
    assert [row.name for row in report.rows if not row.fused] == ["conv1"]


def test_unknown_model_lists_what_exists() -> None:
    with pytest.raises(UserError, match="no model named 'ResNet-50'; did you mean resnet50") as error:
        models.create_model("ResNet-50")
    assert all(name in str(error.value) for name in models.list_models()) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"replace_stride_with_dilation": [True]}, "3-element tuple"),
        ({"groups": 2}, "BasicBlock only supports"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        models.resnet18(fused=False, **arguments)


# Checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    torch.manual_seed(2)
    return models.resnet18(num_classes=10, fused=False)


@pytest.fixture
def target() -> nn.Module:
    torch.manual_seed(3)
    return models.resnet18(num_classes=10, fused=False)


def wrapped(key: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: {key: state, "epoch": 90, "best_acc1": 69.8}


def prefixed(prefix: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: {prefix + key: value for key, value in state.items()}


CONTENTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda state: state,
    "state_dict": wrapped("state_dict"),
    "model": wrapped("model"),
    "ddp": prefixed("module."),
    "wrapped_ddp": lambda state: wrapped("state_dict")(prefixed("module.")(state)),
    "compiled_ddp": prefixed("_orig_mod.module."),
    "double": lambda state: {k: v.double() if v.is_floating_point() else v for k, v in state.items()},
}


@pytest.mark.parametrize("content", CONTENTS)
def test_load_checkpoint(resnet18: nn.Module, target: nn.Module, tmp_path: Path, content: str) -> None:
    path = tmp_path / "weights.pth"
    torch.save(CONTENTS[content](resnet18.state_dict()), path)
    assert models.load_checkpoint(target, path) is target
    assert_same_state(target.state_dict(), resnet18.state_dict())


def test_load_torchvisions_checkpoint(torchvision: Any, target: nn.Module, tmp_path: Path) -> None:
    theirs = torchvision.models.resnet18(num_classes=10)
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    assert_same_state(models.load_checkpoint(target, str(tmp_path / "a.pth")).state_dict(), theirs.state_dict())


def test_load_safetensors(resnet18: nn.Module, target: nn.Module, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    safetensors.save_file(resnet18.state_dict(), tmp_path / "weights.safetensors")
    models.load_checkpoint(target, tmp_path / "weights.safetensors")
    assert_same_state(target.state_dict(), resnet18.state_dict())


def test_missing_safetensors_names_the_extra(
    target: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_safetensors(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    real_import = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", no_safetensors)
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"pip install 'fastres\[safetensors\]'"):
        models.load_checkpoint(target, tmp_path / "a.safetensors")


def test_old_checkpoint_without_batch_counters(resnet18: nn.Module, target: nn.Module, tmp_path: Path) -> None:
    state = {key: value for key, value in resnet18.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    models.load_checkpoint(target, tmp_path / "old.pth")
    assert_same_state(target.state_dict(), resnet18.state_dict())


def test_load_into_a_fused_model_changes_its_output(resnet18: nn.Module, target: nn.Module, tmp_path: Path) -> None:
    torch.save(resnet18.state_dict(), tmp_path / "a.pth")
    fuse_(target)
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        target.eval()(x)  # folds the weights that are about to change
        y = models.load_checkpoint(target, tmp_path / "a.pth")(x)
        assert distance(y, copy.deepcopy(resnet18).eval()(x)) < 1e-5


class Trap:
    """A pickle of this makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def rejected(model: nn.Module, path: Path, match: str) -> str:
    """Loads, expects a one-line UserError and an untouched model; returns the message."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=match) as error:
        models.load_checkpoint(model, path)
    assert_same_state(model.state_dict(), before)
    message = str(error.value)
    assert "\n" not in message and path.name in message and "weights_only" not in message
    return message


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_malicious_pickle_does_not_run(resnet18: nn.Module, target: nn.Module, tmp_path: Path, form: str) -> None:
    path, folder = tmp_path / "trap.pth", tmp_path / "made"
    content = {"state_dict": resnet18.state_dict(), "trap": Trap(folder)}
    if form == "pickle":
        path.write_bytes(pickle.dumps({"trap": Trap(folder)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    assert "mkdir" in rejected(target, path, "can run code")
    assert not folder.exists()
    if form != "pickle":
        torch.load(path, weights_only=False)
        assert folder.exists()  # the trap is a real one


def test_pickled_module_is_refused(resnet18: nn.Module, target: nn.Module, tmp_path: Path) -> None:
    torch.save(resnet18, tmp_path / "module.pth")
    rejected(target, tmp_path / "module.pth", "holds Python objects .*ResNet")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", ["empty", "text", "truncated"])
def test_corrupt_file(resnet18: nn.Module, target: nn.Module, tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
        safetensors.save_file(resnet18.state_dict(), path)
    else:
        torch.save(resnet18.state_dict(), path)
    good = path.read_bytes()
    bad = {"empty": b"", "text": b"<html>404 not found</html>\n" * 9, "truncated": good[: len(good) // 2]}
    path.write_bytes(bad[damage])
    rejected(target, path, "corrupt, or not a checkpoint")


def test_missing_file_and_folder(target: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such checkpoint.*nowhere\.pth"):
        models.load_checkpoint(target, tmp_path / "nowhere.pth")
    rejected(target, tmp_path, "directory")


@pytest.mark.parametrize("content", [[1, 2], {}, 3, {"epoch": 3}, {"state_dict": {"conv1.weight": 1.0}}], ids=str)
def test_no_state_dict(target: nn.Module, tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pth")
    rejected(target, tmp_path / "a.pth", "holds no state dict")


def test_mismatch_names_the_keys_and_changes_nothing(resnet18: nn.Module, target: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    state = resnet18.state_dict()
    torch.save({**state, "fc.weight": torch.zeros(7, 512), "fc.bias": torch.zeros(7)}, path)
    rejected(target, path, r"other shape: fc\.weight \(7, 512\) for \(10, 512\), fc\.bias \(7,\) for \(10,\)")
    torch.save({key: value for key, value in state.items() if "layer4" not in key}, path)
    rejected(target, path, r"missing: layer4\.0\.conv1\.weight, layer4\.0\.bn1\.weight, .* and \d+ more")
    torch.save({**state, "ema": torch.zeros(1)}, path)
    rejected(target, path, "unexpected: ema$")
    torch.save(models.resnet34(fused=False).state_dict(), path)
    rejected(target, path, "unexpected: .*; other shape: fc")
