"""The networks without nn.Module as an oracle: same weights, same outputs, gradients and running statistics."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _compare import assert_same, image, off_the_kinks, randomise, some_kernels, step
from torch import Tensor, nn

import fastres
from fastres import models
from fastres.models import lowlevel
from fastres.models.lowlevel import Architecture

BLOCKS: dict[tuple[str, str], Any] = {
    ("basic", "v1.5"): models.BasicBlock,
    ("bottleneck", "v1.5"): models.Bottleneck,
    ("bottleneck", "v1"): models.Bottleneck,
    ("basic", "v2"): models.PreActBasicBlock,
    ("bottleneck", "v2"): models.PreActBottleneck,
    ("basic", "plain"): models.PlainBasicBlock,
    ("bottleneck", "plain"): models.PlainBottleneck,
}
#: Every block and shortcut on small images; the other stem once for each version.
ARCHITECTURES = [
    Architecture(block, (1, 2, 1), version, option, True, 10)
    for block, version in BLOCKS
    if version != "v1"
    for option in ("ABC" if version != "plain" else "A")
] + [
    Architecture("bottleneck", (1, 1), "v1", "B", False, 10),
    Architecture("basic", (1, 1), "v1.5", "C", False, 10),
    Architecture("bottleneck", (1, 1), "v2", "B", False, 10),
    Architecture("basic", (2, 1), "plain", "A", False, 10),
]


def name_of(net: Architecture) -> str:
    return "-".join([net.block, net.version, net.shortcut, "small" if net.small_images else "large"])


architectures = pytest.mark.parametrize("net", ARCHITECTURES, ids=name_of)
modes = pytest.mark.parametrize("mode", ["train", "eval"])


def modules(net: Architecture) -> nn.Module:
    """The same network as a module, plain. The large ones without their last two stages."""
    block = BLOCKS[net.block, net.version]
    options: dict[str, Any] = {} if net.version == "plain" else {"shortcut": net.shortcut}
    if net.version == "v1":
        options["stride_in_1x1"] = True
    small, large = (
        (models.PreActCifarResNet, models.PreActResNet) if net.version == "v2" else (models.CifarResNet, models.ResNet)
    )
    if net.small_images:
        return randomise(small(block, net.layers, net.num_classes, **options))
    model: Any = large(block, (*net.layers, 1, 1), net.num_classes, **options)
    model.layer3, model.layer4 = nn.Identity(), nn.Identity()
    model.fc = nn.Linear(128 * net.expansion, net.num_classes)
    if net.version == "v2":
        model.norm = models.BatchNormReLU(nn.BatchNorm2d(128 * net.expansion))
    return randomise(model)


def by_hand(net: Architecture, model: nn.Module, x: Tensor, mode: str) -> dict[str, Tensor | None]:
    """What `step` gives for a module: output, gradients, buffers."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    names = lowlevel.parameters(state)
    for name in names:
        state[name].requires_grad_()
    leaf = x.detach().clone().requires_grad_()
    y = lowlevel.forward(net, state, leaf, mode == "train")
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(y.dtype)
    grads = torch.autograd.grad(y, [leaf, *(state[name] for name in names)], grad_y)
    outcome: dict[str, Tensor | None] = {"y": y, "x.grad": grads[0]}
    outcome |= {f"{name}.grad": grad for name, grad in zip(names, grads[1:], strict=True)}
    return outcome | {name: state[name] for name in state if name not in names}


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with some_kernels():
        yield


@architectures
@modes
def test_same_as_the_modules_in_float64(net: Architecture, mode: str) -> None:
    model, x = modules(net).double(), image(3, n=2, size=16).double()
    want = by_hand(net, model, x, mode)
    for fused in (False, True):
        copied = copy.deepcopy(model)
        if fused:
            fastres.fuse_(copied)
        assert_same(step(copied, x, mode), want, 1e-11)


@architectures
@modes
def test_same_as_the_modules_in_float32(net: Architecture, mode: str) -> None:
    """Plain and fused modules, against the network by hand in float64."""
    model = modules(net)
    x = off_the_kinks(model, image(3, n=2, size=16), mode)
    truth = by_hand(net, copy.deepcopy(model).double(), x.double(), mode)
    fused = copy.deepcopy(model)
    fastres.fuse_(fused)
    for copied in (model, fused):
        got = step(copied, x, mode)
        assert got.keys() == truth.keys()
        for name, want in truth.items():
            assert relative_error(got[name], want, 1.0) <= 2e-5, name


def relative_error(got: Any, want: Any, least: float) -> float:
    """||got - want|| / (least + ||want||)."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / (least + want.norm()))


@pytest.mark.parametrize("options", [{"groups": 8, "width_per_group": 16}, {"width_per_group": 128}], ids=str)
def test_resnext_and_wide_resnet(options: dict[str, int]) -> None:
    model = randomise(models.ResNet(models.Bottleneck, (1, 1, 1, 1), 10, **options)).double()
    x = image(3, n=2, size=32).double()
    net = Architecture("bottleneck", (1, 1, 1, 1), num_classes=10)
    want = by_hand(net, model, x, "train")
    assert_same(step(model, x, "train"), want, 1e-11)


@architectures
def test_state_has_the_names_and_shapes_of_the_modules(net: Architecture) -> None:
    state = lowlevel.initial_state(net)
    expected = modules(net).state_dict()
    assert {name: value.shape for name, value in state.items()} == {n: v.shape for n, v in expected.items()}
    assert all(state[name].requires_grad for name in lowlevel.parameters(state))
    assert {name for name in state if not state[name].requires_grad} == {
        name for name in expected if name.endswith(lowlevel.STATISTICS)
    }


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet50_v1", "resnet34_v2", "resnet50_v2", "plain34"])
def test_state_of_the_papers_networks_loads_strictly(name: str) -> None:
    depth = name.removeprefix("resnet").removeprefix("plain").partition("_")[0]
    version = "plain" if name.startswith("plain") else name.partition("_")[2] or "v1.5"
    layers = {"18": (2, 2, 2, 2), "34": (3, 4, 6, 3), "50": (3, 4, 6, 3)}[depth]
    with torch.device("meta"):
        state = lowlevel.initial_state(Architecture("bottleneck" if depth == "50" else "basic", layers, version))
        model = models.create_model(name, fused=False)
    assert not any(model.load_state_dict(state, strict=True, assign=True))


def test_initialisation_is_hes() -> None:
    state = lowlevel.initial_state(Architecture("basic", (3, 3, 3), small_images=True))
    assert state["layer3.1.conv1.weight"].std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    assert state["fc.weight"].abs().max().item() <= 1 / 8
    again = lowlevel.initial_state(Architecture("basic", (3, 3, 3), small_images=True))
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_training_by_hand_is_training_by_modules() -> None:
    """Five steps of SGD with momentum and weight decay: the same weights and statistics as torch.optim.SGD's."""
    net = Architecture("basic", (1, 1, 1), small_images=True, shortcut="A", num_classes=10)
    state: dict[str, Tensor] = {}
    for name, value in lowlevel.initial_state(net).items():
        state[name] = value.detach().double() if value.is_floating_point() else value
        state[name].requires_grad_(value.requires_grad)
    model = models.CifarResNet(models.BasicBlock, (1, 1, 1)).double()
    model.load_state_dict(state)
    fastres.fuse_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    names, velocity = lowlevel.parameters(state), dict[str, Tensor]()
    for _ in range(5):
        x, labels = image(3, n=4, size=8).double(), torch.randint(10, (4,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        loss = nn.functional.cross_entropy(lowlevel.forward(net, state, x, training=True), labels)
        gradients = torch.autograd.grad(loss, [state[name] for name in names])
        lowlevel.sgd_step_(state, dict(zip(names, gradients, strict=True)), velocity, lr=0.1)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state[name].detach(), value, rtol=1e-9, atol=1e-9, msg=name)


def test_it_is_low_level() -> None:
    """No module, no ready-made batch norm, nothing of this library."""
    source = Path(lowlevel.__file__).read_text()
    imported = {name for node in ast.walk(ast.parse(source)) for name in _imports(node)}
    assert not [name for name in imported if name.startswith("fastres") or name == "torch.nn"]
    attributes = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    assert attributes.isdisjoint({"nn", "Module", "batch_norm", "native_batch_norm", "Parameter", "linear"})


def _imports(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom):
        yield node.module or ""
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
