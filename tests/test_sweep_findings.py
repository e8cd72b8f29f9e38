"""What the sweep over models of other libraries found, at its smallest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres.testing import LAYOUTS, relative_error


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_result_of_an_op_may_be_written_to(layout: str, norm: bool, kernel: int) -> None:
    """Activations that are not fused write to what a fused convolution returned (MobileNetV3 of timm)."""
    x = torch.randn(2, 4, 5, 5).contiguous(memory_format=LAYOUTS[layout])
    weight = torch.randn(8, 4, kernel, kernel).contiguous(memory_format=LAYOUTS[layout])
    found = []
    for fused in (True, False):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = _output(leaf, weight, norm, fused)
        nn.functional.hardswish(y, inplace=True).sum().backward()
        found.append(leaf.grad)
    assert found[0] is not None and relative_error(*found) < 1e-5


def _output(x: Tensor, weight: Tensor, norm: bool, fused: bool) -> Tensor:
    padding = weight.shape[2] // 2
    if fused and norm:
        return fastres.functional.conv_bn_act(x, weight, None, None, training=True, padding=padding, act="identity")
    if fused:
        return fastres.functional.conv_bias_act(x, weight, padding=padding, act="identity")
    y = nn.functional.conv2d(x, weight, padding=padding)
    return nn.functional.batch_norm(y, None, None, training=True) if norm else y


def test_reasons_do_not_show_values() -> None:
    """A tensor where a block of DLA has its default: the reason names it, without its numbers."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
            if shortcut is None:
                shortcut = x
            return torch.relu(self.bn(self.conv(x)) + shortcut)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            shortcut = x if x.mean() > 0 else -x  # does not trace
            return self.block(x, shortcut)

    net = Net()
    fastres.fuse_(net)
    reasons = [row.reason for row in fastres.explain(net, torch.randn(1, 4, 8, 8)).rows]
    assert not any("tensor(" in reason for reason in reasons)


def test_modules_in_a_plain_list_too() -> None:
    """UperNet of transformers has its modules in a list besides: tracing the block calls units that are no children."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.bn(self.conv(x)))

    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.AvgPool2d(2), Layer()]
            for i, layer in enumerate(self.layers):
                self.add_module(str(i), layer)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    net, x = nn.Sequential(Pyramid(), Layer()).eval(), torch.randn(2, 4, 8, 8)
    before = net(x)
    fastres.fuse_(net)
    report = fastres.fuse_(net)  # would wait for itself
    assert relative_error(net(x), before.double()) < 1e-5 and report.fused >= 3
