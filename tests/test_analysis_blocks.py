"""Blocks taken apart, lesions, and the gradient along single paths."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from _compare import randomise, some_kernels
from torch import Tensor, nn

import fastres
from fastres import models
from fastres.analysis import blocks
from fastres.analysis.lesion import kendall_tau, lesion
from fastres.analysis.paths import central, counts, paths
from fastres.analysis.unravelled import Paths
from fastres.errors import UserError

NETWORKS: dict[str, Any] = {
    "v1, A": lambda: models.CifarResNet(models.BasicBlock, (1, 2, 1)),
    "v1, C": lambda: models.CifarResNet(models.Bottleneck, (1, 1, 1), shortcut="C"),
    "v2, A": lambda: models.PreActCifarResNet(models.PreActBasicBlock, (1, 2, 1)),
    "v2, B": lambda: models.PreActCifarResNet(models.PreActBottleneck, (1, 1, 1), shortcut="B"),
    "plain": lambda: models.CifarResNet(models.PlainBasicBlock, (1, 2, 1)),
    "plain bottleneck": lambda: models.CifarResNet(models.PlainBottleneck, (1, 1, 1)),
}
residual = pytest.mark.parametrize("name", [name for name in NETWORKS if "plain" not in name])


def network(name: str) -> nn.Module:
    """Fused, with random batch norms."""
    model = randomise(NETWORKS[name]())
    fastres.fuse_(model)
    return model.eval()


def batch(n: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, 16, 16).contiguous(memory_format=torch.channels_last), torch.arange(n)


def test_find_names_every_block() -> None:
    found = blocks.find(network("v1, A"))
    assert [block.name for block in found] == ["layer1.0", "layer2.0", "layer2.1", "layer3.0"]
    assert [block.changes_size for block in found] == [False, True, False, True]
    with pytest.raises(UserError, match="no blocks"):
        blocks.find(nn.Sequential(nn.Conv2d(3, 3, 1)))


def test_blocks_of_torchvision(torchvision: Any) -> None:
    model = torchvision.models.resnet18(num_classes=4)
    fastres.fuse_(model)
    x = torch.randn(2, 64, 8, 8)
    block = blocks.find(model.eval())[2]
    assert (block.name, block.plain, block.preactivation, block.changes_size) == ("layer2.0", False, False, True)
    torch.testing.assert_close(block.after(block.branch(x) + block.shortcut(x)), block.module(x))


@residual
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_block_is_its_parts(name: str, training: bool) -> None:
    model = network(name).train(training)
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    found = blocks.find(model)
    for block in found:
        block.module.register_forward_hook(lambda m, inputs, y: seen.update({m: (inputs[0].clone(), y.clone())}))
    model(batch()[0])
    for block in found:
        x, y = seen[block.module]
        torch.testing.assert_close(block.after(block.branch(x) + block.shortcut(x)), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_left_of_a_block(name: str) -> None:
    """A residual block whose branch gives 0 is its shortcut; a plain one keeps what its sizes force."""
    model, (x, _) = network(name), batch()
    for block in blocks.find(model):
        with torch.no_grad(), blocks.replaced(model, {block.name: block.without_branch()}):
            assert type(model.get_submodule(block.name)) is not type(block.module)
            found = model(x)
        assert model.get_submodule(block.name) is block.module
        if block.plain:
            first, last = block.convolutions[0], block.convolutions[-1]
            kept = block.without_branch()(x16 := torch.randn(2, first.in_channels, 8, 8))
            stride = 2 if block.changes_size and block.name[-2:] == ".0" and block.name > "layer2" else 1
            assert kept.shape == (2, last.out_channels, 8 // stride, 8 // stride)
            assert torch.equal(kept[:, : first.in_channels], x16[:, :, ::stride, ::stride])
            assert not kept[:, first.in_channels :].any()
            continue
        last_layer: Any = block.convolutions[-1] if block.preactivation else block.norms[-1]
        kept_values = {name: p.detach().clone() for name, p in last_layer.named_parameters()}
        with torch.no_grad():
            for p in last_layer.parameters():
                p.zero_()
            expected = model(x)
            for key, p in last_layer.named_parameters():
                p.copy_(kept_values[key])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_plain_block_without_one_layer() -> None:
    block = blocks.find(network("plain"))[2]  # 32 to 32 channels
    m: Any = block.module
    x = torch.randn(2, 32, 8, 8)
    torch.testing.assert_close(block.without_layer(0)(x), m.bn2(m.conv2(x)).relu())
    torch.testing.assert_close(block.without_layer(1)(x), m.bn1(m.conv1(x)).relu())
    narrow = blocks.find(network("plain bottleneck"))[1]  # 64 to 32, 32, 128 channels
    assert [narrow.without_layer(i)(torch.randn(1, 64, 8, 8)).shape[1:] for i in range(3)] == [(128, 4, 4)] * 3


@pytest.mark.parametrize("name", ["v1, A", "v2, B", "plain"])
def test_a_lesioned_network_is_the_same_fused_and_eager(name: str) -> None:
    """Folded weights and recorded calls of the whole network must not answer for the lesioned one."""
    model, (x, _) = network(name), batch()
    other = copy.deepcopy(model)
    with torch.no_grad(), some_kernels():
        whole = [model(x) for _ in range(4)][-1]
        for block, plain in zip(blocks.find(model), blocks.find(other), strict=True):
            with blocks.replaced(model, {block.name: block.without_branch()}):
                found = [model(x) for _ in range(4)]
            with blocks.replaced(other, {plain.name: plain.without_branch()}), fastres.disabled(other):
                torch.testing.assert_close(found[0], other(x), rtol=1e-4, atol=1e-4)
            for y in found[1:]:
                assert torch.equal(found[0], y)
            assert not torch.allclose(found[0], whole)
        assert torch.equal(model(x), whole)


def test_kendall_tau() -> None:
    assert kendall_tau([0, 1, 2, 3]) == 1 and kendall_tau([3, 2, 1, 0]) == -1
    assert kendall_tau([1, 0, 2, 3]) == pytest.approx(1 - 2 * 1 / 6)
    assert kendall_tau([0]) == 1


def test_number_of_paths() -> None:
    """Counted one by one, and the paper's 54 blocks: more than 95 % of the paths have 19 to 35."""
    lengths = [sum(path) for path in itertools.product((0, 1), repeat=5)]
    assert counts(5) == [lengths.count(length) for length in range(6)]
    shares = [count / 2**54 for count in counts(54)]
    assert sum(shares[19:36]) > 0.95
    assert central(shares) == (20, 34)
    assert central([0.0, 0.01, 0.98, 0.01]) == (2, 2) and central([0.5, 0.5]) == (0, 1)


@residual
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_all_paths_together_are_the_gradient(name: str, training: bool) -> None:
    model, (x, y) = network(name).double().train(training), batch()
    x = x.double()
    whole = x.clone().requires_grad_()
    nn.functional.cross_entropy(model(whole), y).backward()
    unravelled = Paths(model, x, y)
    n = len(unravelled)
    each = {path: unravelled.gradient(path) for k in range(n + 1) for path in itertools.combinations(range(n), k)}
    assert len(each) == 2**n
    torch.testing.assert_close(sum(each.values()), whole.grad)
    sums = unravelled.sums()
    assert len(sums) == n + 1
    for length, found in enumerate(sums):
        torch.testing.assert_close(found, sum(g for path, g in each.items() if len(path) == length))


@residual
def test_a_path_stops_the_gradient_elsewhere(name: str) -> None:
    """Against autograd: detached is what the path does not take."""
    model, (x, y) = network(name).double(), batch()
    x = x.double().requires_grad_()
    found = blocks.find(model)
    path = {0, 2}

    class Cut(nn.Module):
        def __init__(self, i: int) -> None:
            super().__init__()
            self.i = i

        def forward(self, x: Tensor) -> Tensor:
            block = found[self.i]
            branch, shortcut = block.branch(x), block.shortcut(x)
            taken = branch + shortcut.detach() if self.i in path else branch.detach() + shortcut
            return block.after(taken)

    unravelled = Paths(model, x, y)
    with blocks.replaced(model, {block.name: Cut(i) for i, block in enumerate(found)}):
        nn.functional.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(unravelled.gradient(path), x.grad)


def test_paths_refuses_plain_networks() -> None:
    with pytest.raises(UserError, match="without shortcuts there is only one path"):
        paths(model="plain20", data="synthetic", checkpoint="", epochs=1, images=2, batches=1, samples=1)


def test_lesion_wants_a_checkpoint_for_each_network() -> None:
    with pytest.raises(UserError, match="a file for each of 2 networks, got 1"):
        lesion(models=("resnet20", "plain20"), checkpoint=("one",), data="synthetic")
