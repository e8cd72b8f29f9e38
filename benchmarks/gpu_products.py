"""Matrix products of a ResNet on a GPU: every convolution by cuDNN and by our kernels, and the products of which the
algebraic batch norm consists beside the ordinary way. Parts of benchmarks/gpu.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from floor import Ceilings, Layer, Shape, layers_of, work
from gpu_timing import Call, Stopwatch, ratio, reason
from torch import Tensor

from fastres import ops
from fastres.kernels import table

_QUICK = {"c": 8, "k": 8, "h": 8}


def _layers(quick: bool) -> list[Layer]:
    found = layers_of(["resnet50"])
    if not quick:
        return found
    few = {(layer.shape.r, layer.shape.stride): layer for layer in found[1:] if layer.shape.k != 4 * layer.shape.c}
    return [layer._replace(shape=layer.shape._replace(**_QUICK)) for layer in few.values()]


def ceilings_of(can: dict[str, Any]) -> Ceilings:
    """Of what `gpu_ops.ceilings` gave, which may have been read from a file; for bf16."""
    return Ceilings(can["flops"]["bfloat16"], {int(size): rate for size, rate in can["bandwidth"].items()})


class Convolution:
    """The sets of buffers of one layer, in channels_last, and the calls that are timed on them."""

    def __init__(self, shape: Shape, batch: int, dtype: torch.dtype, watch: Stopwatch) -> None:
        c, h, k, r, stride, groups = shape
        self.shape, out = shape, -(-h // stride)
        self.geometry = [stride] * 2, [r // 2] * 2, [1, 1], groups
        self.sets = watch.sets(batch * (c * h * h + k * out * out) * dtype.itemsize)

        def random(*size: int) -> Tensor:
            values = torch.randn(*size, device=watch.device, dtype=dtype)
            return values.contiguous(memory_format=torch.channels_last)

        self.x = [random(batch, c, h, h) for _ in range(self.sets)]
        self.grad, self.residual = ([random(batch, k, out, out) for _ in range(self.sets)] for _ in range(2))
        self.weight = random(k, c // groups, r, r) / (c // groups * r * r) ** 0.5
        self.bias = torch.randn(k, device=watch.device, dtype=dtype)

    def calls(self) -> dict[str, Call]:
        """What ATen has: on a GPU all of it is cuDNN's."""
        stride, padding, dilation, groups = self.geometry
        rest = (stride, padding, dilation, False, [0, 0], groups)
        aten = torch.ops.aten

        def backward(index: int, mask: list[bool]) -> Any:
            return aten.convolution_backward(self.grad[index], self.x[index], self.weight, None, *rest, mask)

        fused = (self.bias, stride, padding, dilation, groups)
        return {
            "forward": lambda i: aten.convolution(self.x[i], self.weight, None, *rest),
            "grad_input": partial(backward, mask=[True, False, False]),
            "grad_weight": partial(backward, mask=[False, True, False]),
            "relu": lambda i: aten.cudnn_convolution_relu(self.x[i], self.weight, *fused),
            "add_relu": lambda i: aten.cudnn_convolution_add_relu(
                self.x[i], self.weight, self.residual[i], 1.0, *fused
            ),
        }

    def our_calls(self) -> dict[str, Call]:
        """Our Triton kernels: 1x1 convolutions and their gradients, other convolutions forward; those of the stem not.

        Raises:
            ImportError: if they are not there.
        """
        kernels = importlib.import_module("fastres.kernels.triton.convolution")
        options: dict[str, Any] = {"stride": (self.shape.stride,) * 2}
        run = kernels.conv1x1_forward
        if self.shape.r > 1:
            run = importlib.import_module("fastres.kernels.triton.implicit").convolution_forward
            options["padding"] = (self.shape.r // 2,) * 2
        found: dict[str, Call] = {
            "ours forward": lambda i: run(self.x[i], self.weight, **options),
            "ours with statistics": lambda i: run(self.x[i], self.weight, statistics=True, **options),
            "ours add_relu": lambda i: run(self.x[i], self.weight, self.bias, self.residual[i], relu=True, **options),
        }
        if self.shape.r == 1:
            found["ours grad_input"] = lambda i: kernels.conv1x1_grad_input(
                self.grad[i], self.weight, self.x[i].shape, **options
            )
            found["ours grad_weight"] = lambda i: kernels.conv1x1_grad_weight(self.grad[i], self.x[i], **options)
            found |= self._calls_behind_a_batch_norm(kernels, options)
        return found

    def _calls_behind_a_batch_norm(self, kernels: Any, options: dict[str, Any]) -> dict[str, Call]:
        """The gradients from that of a batch norm's output, whose own gradient has no pass then: worth it if both
        together take less time more than "bn backward" takes more than "bn sums"."""
        batch_norm, operands = (
            importlib.import_module(f"fastres.kernels.triton.{name}") for name in ("batch_norm", "operands")
        )
        k, device = self.shape.k, self.weight.device
        vector, double = torch.ones(k, device=device), torch.ones(k, device=device, dtype=torch.float64)
        norm = (vector, vector, double, double)

        def sums(i: int) -> Any:
            return operands.norm_gradient_of(self.grad[i], self.residual[i], *norm, True, 1e-5, True)

        behind = [sums(i)[0] for i in range(self.sets)]
        mode = (None, True, 1e-5, True, True, True, False)
        return {
            "bn sums": sums,
            "bn backward": lambda i: batch_norm.bn_act_backward(self.grad[i], self.residual[i], *norm, *mode),
            "ours grad_input behind bn": lambda i: kernels.conv1x1_grad_input(
                self.grad[i], self.weight, self.x[i].shape, behind=behind[i], **options
            ),
            "ours grad_weight behind bn": lambda i: kernels.conv1x1_grad_weight(
                self.grad[i], self.x[i], behind=behind[i], **options
            ),
        }


def convolutions(
    watch: Stopwatch, batch: int, can: dict[str, Any], quick: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """Every convolution of ResNet-50 in bf16. can: what `gpu_ops.ceilings` gave."""
    dtype = torch.bfloat16
    limits = ceilings_of(can)
    torch.backends.cudnn.benchmark = True
    rows, why_not_ours = [], "" if watch.device == "cuda" else "our kernels need a CUDA device"
    for layer in _layers(quick):
        say(str(layer.shape))
        conv = Convolution(layer.shape, batch, dtype, watch)
        calls = conv.calls()
        if layer.shape.c == 3:
            del calls["grad_input"]  # images have no gradient
        if layer.shape.c > 3 and not why_not_ours:
            try:
                calls |= conv.our_calls()
            except Exception as error:  # not there, or not as this file knows it
                why_not_ours = reason(error)
        times = watch.measure(calls, conv.sets)
        needs = work(layer.shape, batch, 1, dtype.itemsize)
        floor, limit = limits.floor(needs)
        rates = {name: needs.direct_flops / found["seconds"] for name, found in times.items() if "seconds" in found}
        rows.append(
            {
                "layer": layer.name,
                "shape": str(layer.shape),
                "counts": layer.counts,
                "flops": needs.direct_flops,
                "bytes": needs.bytes,
                "floor_seconds": floor,
                "limit": limit,
                "times": times,
                "rates": rates,
                "of_peak": {name: rate / limits.flops for name, rate in rates.items()},
                "ours_vs_cudnn": {
                    name: ratio(times, f"ours {name}", name)
                    for name in ("forward", "add_relu", "grad_input", "grad_weight")
                },
            }
        )
        del conv, calls
    return {"batch": batch, "dtype": "bfloat16", "why_not_ours": why_not_ours, "rows": rows}


#: What the algebraic batch norm computes with library products, and the ordinary way, in both directions.
ALGEBRAIC = {"forward": ("gram", "addmm"), "backward": ("mask", "grad_weight", "grad_input")}


class Expansion:
    """A 1x1 convolution from w to 4 w channels with batch norm, residual and ReLU: y = relu(bn(x W^T) + residual).

    Matrices: x [M, w], g [M, 4 w], W [4 w, w] (research: algebraic batch norm). With G = x^T x and D = g^T x no pass
    over the raw output is needed: its statistics follow from G, dW from D and G, dx = g W' + x Q with small W', Q.
    """

    def __init__(self, shape: Shape, batch: int, dtype: torch.dtype, watch: Stopwatch) -> None:
        self.conv = Convolution(shape, batch, dtype, watch)
        c, k = shape.c, shape.k
        self.rows = [t.permute(0, 2, 3, 1).reshape(-1, c) for t in self.conv.x]  # views: channels_last
        self.grad = [t.permute(0, 2, 3, 1).reshape(-1, k) for t in self.conv.grad]
        self.residual = [t.permute(0, 2, 3, 1).reshape(-1, k) for t in self.conv.residual]
        self.weight = self.conv.weight.flatten(1)
        self.square = torch.randn(c, c, device=watch.device, dtype=dtype)
        self.affine = [torch.rand(k, device=watch.device).requires_grad_() for _ in range(2)]
        self.statistics = torch.zeros(k, device=watch.device), torch.ones(k, device=watch.device)
        # What takes part in the ordinary way and in our op, with gradients.
        self.leaves = [t.detach().requires_grad_() for t in self.conv.x]
        self.shortcuts = [t.detach().requires_grad_() for t in self.conv.residual]
        self.filter = self.conv.weight.detach().requires_grad_()
        self.outputs: dict[tuple[str, int], Tensor] = {}

    def calls(self) -> dict[str, Call]:
        """Matrix products of the library, its fused convolution, the ordinary way; our op where a kernel has it."""
        found: dict[str, Call] = {
            "gram": lambda i: _sums(self.rows[i], self.rows[i]),
            "addmm": lambda i: torch.addmm(self.residual[i], self.rows[i], self.weight.T),
            "conv_add_relu": self.conv.calls()["add_relu"],
            "mask": lambda i: torch.ops.fastres.add_act_backward(self.conv.grad[i], self.conv.residual[i]),
            "grad_weight": lambda i: _sums(self.grad[i], self.rows[i]),
            "grad_input": lambda i: torch.addmm(torch.mm(self.rows[i], self.square), self.grad[i], self.weight),
            "ordinary forward": partial(self.forward, "ordinary"),
            "ordinary backward": partial(self.backward, "ordinary"),
        }
        if self.filter.is_cuda and importlib.util.find_spec("fastres.kernels.triton.gram"):
            gram = importlib.import_module("fastres.kernels.triton.gram").gram
            found["our gram"] = lambda i: gram(self.conv.x[i])
        kernels = table.kernels("conv1x1_bn_act", self.filter.device.type)
        if any(kernel.name != "reference" and kernel.unavailable() is None for kernel in kernels):
            found["op forward"] = partial(self.forward, "op")
            found["op backward"] = partial(self.backward, "op")
        return found

    def forward(self, way: str, index: int) -> Tensor:
        x, residual = self.leaves[index], self.shortcuts[index]
        normalise = (*self.affine, *self.statistics, residual)
        if way == "op":
            return ops.conv1x1_bn_act.call(x, self.filter, *normalise, True, 1e-5, True, True)[0]
        options = (*self.conv.geometry, True, 1e-5, True, True)
        return ops.conv_bn_act.call(x, self.filter, None, *normalise, *options)[0]

    def backward(self, way: str, index: int) -> Any:
        if (way, index) not in self.outputs:  # in the warm-up
            self.outputs[way, index] = self.forward(way, index)
        inputs = [self.leaves[index], self.shortcuts[index], self.filter, *self.affine]
        return torch.autograd.grad(self.outputs[way, index], inputs, self.conv.grad[index], retain_graph=True)


def _sums(a: Tensor, b: Tensor) -> Tensor:
    """a^T b in fp32, where the library gives that of half-precision factors."""
    if a.is_cuda and a.dtype is not torch.float32:
        return torch.mm(a.T, b, out_dtype=torch.float32)
    return torch.mm(a.T, b)


def algebraic(
    watch: Stopwatch, batch: int, can: dict[str, Any], quick: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """Every expanding 1x1 convolution of ResNet-50 in bf16: products of the library, the ordinary way, our op."""
    dtype = torch.bfloat16
    torch.backends.cudnn.benchmark = True
    rows = []
    found = [x for x in layers_of(["resnet50"]) if (x.shape.r, x.shape.stride) == (1, 1) and x.shape.k >= 4 * x.shape.c]
    if quick:
        found = [found[0]._replace(shape=found[0].shape._replace(c=8, k=32, h=8))]
    for layer in found:
        say(str(layer.shape))
        expansion = Expansion(layer.shape, batch, dtype, watch)
        times = watch.measure(expansion.calls(), expansion.conv.sets)
        needs = work(layer.shape, batch, 1, dtype.itemsize)
        square = needs.direct_flops * layer.shape.c // layer.shape.k  # a product [M, w] by [w, w]; G is one
        flops = {"gram": square, "grad_weight": needs.direct_flops}
        flops |= {"addmm": needs.direct_flops, "grad_input": needs.direct_flops + square}
        rows.append(
            {
                "layer": layer.name,
                "shape": str(layer.shape),
                "counts": layer.counts,
                "times": times,
                "of_peak": {
                    name: value / times[name]["seconds"] / can["flops"]["bfloat16"]
                    for name, value in flops.items()
                    if "seconds" in times[name]
                },
                **{f"{way}_ratio": _gain(times, way) for way in ALGEBRAIC},
            }
        )
        del expansion
    return {"batch": batch, "dtype": "bfloat16", "rows": rows}


def _gain(times: dict[str, Any], way: str) -> float | None:
    """How many times as fast the library's products are as the ordinary way; the forward by the faster of its two."""
    parts = [[times[name].get("seconds") for name in ALGEBRAIC[way]]]
    if way == "forward":
        parts.append([times[name].get("seconds") for name in ("gram", "conv_add_relu")])
    sums = [sum(seconds) for seconds in parts if None not in seconds]
    ordinary = times[f"ordinary {way}"].get("seconds")
    return None if ordinary is None or not sums else ordinary / min(sums)
