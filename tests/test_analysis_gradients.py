"""The analysis of gradient flow: norms against the low-level build, the identity of a residual block."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from _analysis import SHORT, check_files, run, small_data
from torch import Tensor
from torch.nn import functional as F

from fastres.analysis import families, gradient_flow, identity, training
from fastres.analysis.gradient_flow import Flow, WeightGradients, _judge
from fastres.models import lowlevel
from fastres.train.sampler import global_batches

__all__ = ["small_data"]

VERSIONS = {"plain": "plain", "resnet": "v1", "resnet_v2": "v2"}


def normalised(data: Any, indices: list[int]) -> tuple[Tensor, Tensor]:
    x, y = data.train.images[indices], data.train.labels[indices]
    return (x / 255 - 0.5) / 0.25, y


def low_level(family: str, blocks: int) -> lowlevel.Architecture:
    return lowlevel.Architecture("basic", (blocks,) * 3, VERSIONS[family], "A", small_images=True, num_classes=3)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_norms_of_the_first_step_are_those_of_the_low_level_build(family: str, small_data: Any) -> None:
    report = gradient_flow(**SHORT, depths=(8,), families=(family,), probe=4, seed=5)
    layers = {name: (first, trained) for _, _, name, first, trained in report.tables[1].rows}

    state = {name: value.detach().clone() for name, value in families.build(family, 8, 3, seed=5).state_dict().items()}
    names = [name for name in state if name.endswith(".weight") and "conv" in name]
    for name in lowlevel.parameters(state):
        state[name].requires_grad_()
    x, labels = normalised(small_data, global_batches(32, 16, seed=5, epoch=0)[0].tolist())
    loss = F.cross_entropy(lowlevel.forward(low_level(family, 1), state, x, training=True), labels)
    gradients = torch.autograd.grad(loss, [state[name] for name in names])
    assert set(layers) == {name.removesuffix(".weight") for name in names}
    for name, gradient in zip(names, gradients, strict=True):
        assert layers[name.removesuffix(".weight")][0] == pytest.approx(gradient.norm().item(), rel=1e-3)


def test_a_norm_for_every_step(small_data: Any) -> None:
    model = families.build("resnet", 14, 3, seed=0)
    gradients = WeightGradients(model)
    training.train(model, "net", small_data, epochs=2, batch=16)
    assert len(gradients.names) == 13 and gradients.names[:2] == ["conv1", "layer1.0.conv1"]
    assert all(len(norms) == 4 and all(norms) for norms in gradients.steps)
    two = gradients.steps[3][-2:]
    assert gradients.at_last(2)[3] == pytest.approx(math.sqrt(two[0] * two[1]))
    assert gradients.at_first()[3] == gradients.steps[3][0]


def probe(family: str, depth: int, small_data: Any, **change: Any) -> list[identity.Block]:
    return identity.blocks(families.build(family, depth, 3, seed=1), *normalised(small_data, list(range(6))), **change)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_identity_in_float64(family: str, small_data: Any) -> None:
    found = probe(family, 20, small_data)
    assert [block.name for block in found] == [f"layer{i}.{j}" for i in (1, 2, 3) for j in range(i > 1, 3)]
    assert max(block.error for block in found) < 1e-13
    assert max(block.difference_error for block in found) < 1e-6
    assert all((block.through_shortcut == 0) == (family == "plain") for block in found)
    if family == "resnet_v2":  # nothing but the addition is on the way: g is dL/dy
        assert all(block.through_shortcut == block.of_output for block in found)
    for this, following in zip(found, found[1:], strict=False):
        if this.name[:6] == following.name[:6]:
            assert this.of_output == following.of_input


@pytest.mark.parametrize("family", families.FAMILIES)
def test_gradients_of_blocks_are_those_of_the_low_level_build(family: str, small_data: Any) -> None:
    """Norms of dL/dx at the first block, and of dL/dy at the last, through the network that is written out by hand."""
    found = probe(family, 14, small_data)
    net = low_level(family, 2)
    state = {name: value.clone() for name, value in families.build(family, 14, 3, seed=1).double().state_dict().items()}
    images, labels = normalised(small_data, list(range(6)))
    stem = lowlevel.relu(lowlevel.batch_norm(lowlevel.conv(images.double(), state, "conv1"), state, "bn1", True))
    x = stem.requires_grad_()
    block = lowlevel.pre_activation if family == "resnet_v2" else lowlevel.post_activation
    y = x
    for name, width, stride in lowlevel.stages(net):
        y = block(net, y, state, name, width, stride, True)
    y.retain_grad()
    last = lowlevel.relu(lowlevel.batch_norm(y, state, "norm.bn", True)) if family == "resnet_v2" else y
    F.cross_entropy(last.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"], labels).backward()
    assert x.grad is not None and y.grad is not None
    assert found[0].of_input == pytest.approx(x.grad.norm().item(), rel=1e-9)
    assert found[-1].of_output == pytest.approx(y.grad.norm().item(), rel=1e-9)


def test_a_wrong_branch_is_noticed(small_data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        identity, "branch", lambda block, x: block.bn2(block.conv2(block.bn1(block.conv1(x))))
    )  # no ReLU
    found = probe("resnet", 14, small_data)
    assert min(block.error for block in found) > 0.01 and min(block.difference_error for block in found) > 1e-3


@pytest.mark.parametrize("family", ["resnet", "resnet_v2"])
def test_through_a_branch_of_zeros_the_gradient_passes_unchanged(family: str, small_data: Any) -> None:
    model = families.build(family, 14, 3, seed=1, zero_init_residual=True)
    first, *_ = identity.blocks(model, *normalised(small_data, list(range(6))))
    assert first.through_branch == first.difference_error == first.error == 0
    assert first.of_input == first.through_shortcut
    assert first.growth == 1 or family == "resnet"  # whose ReLU drops dL/dy where y = 0


def test_report(small_data: Any, tmp_path: Path) -> None:
    report = gradient_flow(**SHORT, depths=(14, 8), probe=6)
    check_files(report, tmp_path / "report")
    summary, layers, blocks = report.tables
    names = ["plain-8", "ResNet-8", "ResNet-8 v2", "plain-14", "ResNet-14", "ResNet-14 v2"]
    assert [row[0] for row in summary.rows] == names
    assert len(layers.rows) == 3 * (7 + 13) and len(blocks.rows) == 3 * (1 + 4)
    v2 = [row for row in blocks.rows if row[0] == "ResNet-14 v2"]
    name, whole, growth = summary.rows[-1][:3]
    assert whole == pytest.approx(v2[0][3] / v2[-1][2])
    assert growth == pytest.approx(math.prod(row[3] / row[2] for row in v2) ** (1 / len(v2)))
    assert f"{name}: the gradient stays within 1000" in report.measured and "in 15 blocks" in report.measured


def flow(name: str, growth: float, error: float = 1e-12) -> Any:
    blocks = [identity.Block("", growth**i, growth ** (i + 1), 1.0, 1.0, 1e-15, error) for i in (2, 1, 0)]
    return Flow(name, [], [], [], blocks)


@pytest.mark.parametrize(
    ("plain", "v1", "error", "verdict", "says"),
    [
        (2.0, 1.1, 1e-9, "reproduced", "plain-8: the gradient stays within 1000: before the first block 8 times"),
        (20.0, 1.1, 1e-9, "partly reproduced", "plain-8: the gradient explodes"),
        (0.05, 1.1, 1e-9, "partly reproduced", "plain-8: the gradient vanishes"),
        (1.1, 2.0, 1e-9, "partly reproduced", "2 times a block"),
        (20.0, 0.04, 1e-4, "not reproduced", "ResNet-8: the gradient vanishes"),
    ],
)
def test_verdict(plain: float, v1: float, error: float, verdict: str, says: str) -> None:
    flows = {"plain": flow("plain-8", plain, error), "resnet": flow("ResNet-8", v1, error)}
    measured, found = _judge(flows, list(flows.values()))
    assert found == verdict and says in measured and f"{error:.0e}" in measured


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--depths", "9"), "no network has depth 9: it must be 6n + 2"),
        (("--families", "plain", "densenet"), "no family of networks is named 'densenet'; there are plain, resnet"),
        (("--probe", "1"), "--probe must be from 2 to 32 images, not 1"),
        (("--probe", "33"), "--probe must be from 2 to 32 images, not 33"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_input_is_one_line(arguments: tuple[str, ...], says: str, small_data: Any, capsys: Any) -> None:
    code, said, error = run(capsys, "gradient-flow", *arguments)
    assert (code, said) == (2, "") and error.count("\n") == 1 and error.startswith(f"fastres: error: {says}")
