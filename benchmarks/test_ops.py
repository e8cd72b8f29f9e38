"""Every op over the shapes of ResNet-50 (and the 3x3 layers of ResNet-18): eager PyTorch, channels_last, against
fastres.

pytest benchmarks
pytest benchmarks -k "conv_bias_act and 3x3" --batch 1 --benchmark-json=out.json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layers import Layer, activations, layers
from torch import Tensor

from fastres import functional

PROVIDERS = ("eager", "fastres")
RELU, ADD_RELU = activations(50, "bn_relu"), activations(50, "bn_add_relu")
CONVS = [layer for layer in layers(50) if layer.name != "stem"] + [
    x for x in layers(18) if x.r == 3 and x.then == "bn_add_relu"
]
providers = pytest.mark.parametrize("provider", PROVIDERS)


def shapes(found: dict[tuple[int, int, int], int]) -> Any:
    return pytest.mark.parametrize("shape", found, ids=lambda shape: "x".join(map(str, shape)))


def activation(batch: int, shape: tuple[int, int, int], dtype: torch.dtype, *, grad: bool = False) -> Tensor:
    x = torch.randn(batch, *shape).to(dtype, memory_format=torch.channels_last)
    return x.requires_grad_(grad)


class BatchNorm:
    """Parameters and statistics of a batch norm over `channels`, and the op of either provider."""

    def __init__(self, provider: str, channels: int, training: bool) -> None:
        self.provider, self.training = provider, training
        self.mean, self.var = torch.zeros(channels), torch.ones(channels)
        self.weight, self.bias = (torch.rand(channels).requires_grad_(training) for _ in range(2))

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.provider == "fastres":
            return functional.bn_act(x, self.mean, self.var, self.weight, self.bias, residual, training=self.training)
        y = F.batch_norm(x, self.mean, self.var, self.weight, self.bias, self.training)
        return F.relu_(y if residual is None else y + residual)

    def maxpool(self, x: Tensor) -> Tensor:
        if self.provider == "fastres":
            return functional.bn_act_maxpool(x, self.mean, self.var, self.weight, self.bias, training=self.training)
        return F.max_pool2d(self(x), 3, 2, 1)


def forward(call: Callable[[], Tensor]) -> Callable[[], Any]:
    """A forward that records gradients, as in training, and drops them."""
    return lambda: call().detach()


def forward_backward(call: Callable[[], Tensor]) -> Callable[[], Any]:
    grad = torch.ones_like(call())
    return lambda: torch.autograd.backward(call(), grad)


def evaluation(call: Callable[[], Tensor]) -> Callable[[], Any]:
    def run() -> Tensor:
        with torch.no_grad():
            return call()

    return run


#: How the batch-norm ops are run, and how many times each must read or write the activation at least: training reads x
#: for the statistics and again to apply them and writes y; backward reads x and dy for the sums and again for dx,
#: which it writes. A residual is one more read, and one more write of its gradient.
MODES = {"train_fwd": (forward, 3, 1), "train_fwd_bwd": (forward_backward, 3 + 5, 2), "eval": (evaluation, 2, 1)}
modes = pytest.mark.parametrize("mode", MODES)


@pytest.mark.benchmark(group="bn_act")
@providers
@modes
@shapes(RELU)
def test_bn_act(measure: Any, batch: int, dtype: torch.dtype, shape: Any, mode: str, provider: str) -> None:
    run, passes, _ = MODES[mode]
    x = activation(batch, shape, dtype, grad=mode != "eval")
    op = BatchNorm(provider, shape[0], mode != "eval")
    measure(run(lambda: op(x)), shape=shape, count=RELU[shape], bytes_=passes * x.nbytes)


@pytest.mark.benchmark(group="bn_act with residual")
@providers
@modes
@shapes(ADD_RELU)
def test_bn_add_act(measure: Any, batch: int, dtype: torch.dtype, shape: Any, mode: str, provider: str) -> None:
    run, passes, more = MODES[mode]
    x, residual = (activation(batch, shape, dtype, grad=mode != "eval") for _ in range(2))
    op = BatchNorm(provider, shape[0], mode != "eval")
    measure(run(lambda: op(x, residual)), shape=shape, count=ADD_RELU[shape], bytes_=(passes + more) * x.nbytes)


@pytest.mark.benchmark(group="add_act")
@providers
@pytest.mark.parametrize("mode", ("train_fwd_bwd", "eval"))
@shapes(ADD_RELU)
def test_add_act(measure: Any, batch: int, dtype: torch.dtype, shape: Any, mode: str, provider: str) -> None:
    run, passes = {"train_fwd_bwd": (forward_backward, 3 + 3), "eval": (evaluation, 3)}[mode]
    x, residual = (activation(batch, shape, dtype, grad=mode != "eval") for _ in range(2))
    call = (lambda: functional.add_act(x, residual)) if provider == "fastres" else (lambda: F.relu_(x + residual))
    measure(run(call), shape=shape, count=ADD_RELU[shape], bytes_=passes * x.nbytes)


@pytest.mark.benchmark(group="bn_act_maxpool")
@providers
@modes
def test_bn_act_maxpool(measure: Any, batch: int, dtype: torch.dtype, mode: str, provider: str) -> None:
    shape = (64, 112, 112)
    run, passes, _ = MODES[mode]
    x = activation(batch, shape, dtype, grad=mode != "eval")
    op = BatchNorm(provider, shape[0], mode != "eval")
    # The pooled output and its gradient are a quarter of the activation: all but one of the reads and writes of x and
    # dx stay.
    small = 0.25 * (2 if mode == "train_fwd_bwd" else 1)
    large = {"train_fwd": 2, "train_fwd_bwd": 5, "eval": 1}[mode]
    measure(run(lambda: op.maxpool(x)), shape=shape, count=1, bytes_=int((large + small) * x.nbytes))


@pytest.mark.benchmark(group="conv_bias_act")
@providers
@pytest.mark.parametrize("layer", CONVS, ids=lambda x: f"{x.name}-{x.c}x{x.h}x{x.w}-k{x.k}-{x.r}x{x.r}-s{x.stride}")
def test_conv_bias_act(measure: Any, batch: int, dtype: torch.dtype, layer: Layer, provider: str) -> None:
    x = activation(batch, (layer.c, layer.h, layer.w), dtype)
    weight = torch.randn(layer.k, layer.c, layer.r, layer.r).to(dtype, memory_format=torch.channels_last)
    bias = torch.randn(layer.k).to(dtype)
    residual = activation(batch, layer.out, dtype) if layer.then == "bn_add_relu" else None
    act = "identity" if layer.then == "bn" else "relu"
    stride, padding = layer.stride, layer.r // 2

    def eager() -> Tensor:
        y = F.conv2d(x, weight, bias, stride, padding)
        y = y if residual is None else y.add_(residual)
        return y if act == "identity" else F.relu_(y)

    def fused() -> Tensor:
        return functional.conv_bias_act(x, weight, bias, residual, stride=stride, padding=padding, act=act)

    count = max(layer.count(50), layer.count(18))
    call = evaluation(fused if provider == "fastres" else eager)
    measure(call, shape=(layer.c, layer.h, layer.w), count=count, flops=2 * batch * layer.macs)
