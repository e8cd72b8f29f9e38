"""A forward pass watched: which pixels every result can see, through which layers it came, where shortcuts are added.

Works for any network, whatever it calls: operators are seen below nn.Module. Along one axis, output i of an operator
sees the input pixels first + i * step .. last + i * step. A window of k inputs, d apart, moved by s behind a padding p:

    first' = first - p * step,  last' = last + (d * (k - 1) - p) * step,  step' = s * step

Where results join, what they see is united. The receptive field is last - first + 1 (Araujo et al. 2019,
doi 10.23915/distill.00021). Views are taken to keep the places of pixels, and normalisation to be of each pixel.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastres import fuse

__all__ = ["Addition", "Axis", "Flow", "Trace", "watch"]


class Axis(NamedTuple):
    """What output 0 sees along one axis, first..last, and by how many pixels output 1 sees further on."""

    first: float
    last: float
    step: float

    def window(self, kernel: int, stride: int, padding: int, dilation: int = 1) -> Axis:
        reach = dilation * (kernel - 1) - padding
        return Axis(self.first - padding * self.step, self.last + reach * self.step, stride * self.step)


WHOLE = Axis(float("-inf"), float("inf"), 1.0)
#: Rows, columns; None: it cannot be followed.
Field = tuple[Axis, Axis] | None


@dataclass(frozen=True)
class Trace:
    """Where a result comes from.

    Attributes:
        field: what it sees. layers: the convolutions and linear layers on the longest way to it, by module.
        made_by: the last operator.
    """

    field: Field
    layers: tuple[str, ...]
    made_by: str = ""

    @property
    def receptive_field(self) -> float | None:
        """Pixels along the longer axis, inf for the whole image, None if it cannot be followed."""
        return None if self.field is None else max(axis.last - axis.first + 1 for axis in self.field)


@dataclass(frozen=True)
class Addition:
    """Two results of one shape are added.

    Attributes:
        block: the module in which it happens. trace: of the sum.
        shortcut: what was added to the longer way: "identity", "projection", "zero padding", "pooling" or an operator.
        layers: on the shortcut, within the block. activated: the block goes on with an activation.
    """

    block: str
    trace: Trace
    shortcut: str
    layers: tuple[str, ...]
    activated: bool = False


@dataclass
class Flow:
    """What was seen of a forward pass.

    Attributes:
        calls: for every module without children, the traces of its results, in order. additions: in order.
        output: of the network.
    """

    calls: dict[str, list[Trace]]
    additions: list[Addition]
    output: Trace


def watch(model: nn.Module, shape: tuple[int, ...]) -> Flow:
    """Watches a copy of a model in eval mode, on PyTorch's meta device: nothing is computed.

    Args:
        model: takes images (N, C, H, W), gives a tensor. shape: of an image, (C, H, W).
    """
    plain = fuse.unfuse_(copy.deepcopy(model)).to("meta").eval()
    watcher = _Watcher()
    for name, module in plain.named_modules():
        module.register_forward_pre_hook(lambda m, inputs, name=name: watcher.enter(name, m, inputs))
        module.register_forward_hook(lambda m, _, y, name=name: watcher.leave(name, m, y))
    dtype = next((p.dtype for p in plain.parameters()), torch.float32)
    x = torch.empty((_IMAGES, *shape), device="meta", dtype=dtype)
    watcher.note(x, Trace((Axis(0, 0, 1), Axis(0, 0, 1)), ()))
    with torch.no_grad(), watcher:
        y = plain(x)
    return Flow(watcher.calls, watcher.additions, watcher.trace(y) or Trace(None, ()))


#: More than one image, to tell a row of features for each image from a row for each pixel.
_IMAGES = 2
_ACTIVATIONS = ("relu", "silu", "gelu", "hardswish", "leaky_relu", "elu", "mish", "hardtanh", "clamp_min", "prelu")
#: Operators that only move or regroup values.
_VIEWS: tuple[str, ...] = (
    "view",
    "_unsafe_view",
    "reshape",
    "permute",
    "transpose",
    "t",
    "expand",
    "squeeze",
    "unsqueeze",
    "clone",
)
_VIEWS += ("alias", "detach", "_to_copy", "contiguous", "unbind", "select", "_reshape_alias", "unsafe_split", "split")
_REDUCTIONS = ("mean", "sum", "amax", "amin", "var", "std", "var_mean")


class _Watcher(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[Trace]] = {}
        self.additions: list[Addition] = []
        self._known: dict[int, tuple[Tensor, Trace]] = {}  # the tensor too: while it lives nothing else has its id
        self._sums: dict[int, int] = {}  # results of additions
        self._inside: list[tuple[str, bool, Trace | None, list[int]]] = []  # name, has children, input, its ids

    def note(self, x: Tensor, trace: Trace) -> None:
        self._known[id(x)] = x, trace

    def trace(self, x: Any) -> Trace | None:
        found = self._known.get(id(x))
        return None if found is None else found[1]

    def enter(self, name: str, module: nn.Module, inputs: Any) -> None:
        known = [x for x in tree_leaves(inputs) if self.trace(x)]
        has_children = next(module.children(), None) is not None
        self._inside.append((name, has_children, self.trace(known[0]) if known else None, [id(x) for x in known]))

    def leave(self, name: str, module: nn.Module, y: Any) -> None:
        self._inside.pop()
        trace = self.trace(y)
        if trace is not None and next(module.children(), None) is None:
            self.calls.setdefault(name, []).append(trace)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and self.trace(x)]
        traces = [trace for x in inputs if (trace := self.trace(x))]
        shapes = [x.shape for x in inputs]  # before an operator that works in place
        y = func(*args, **kwargs)
        if not inputs:
            return y
        name = func.overloadpacket.__name__
        base = name.removesuffix("_")
        results = [t for t in tree_leaves(y) if isinstance(t, Tensor)]
        layers = max((trace.layers for trace in traces), key=len)
        weighted = base in ("convolution", "addmm", "mm", "bmm", "linear") and len(inputs) < sum(
            isinstance(x, Tensor) for x in tree_leaves((args, kwargs))
        )  # with a weight: not the products of attention
        if weighted:
            layers = (*layers, self._inside[-1][0] if self._inside else "")
        field = _field(base, args, kwargs, traces, shapes, results[0]) if results else None
        trace = Trace(field, layers, base)
        if base == "add" and len(inputs) == 2 and shapes[0] == shapes[1] and len(shapes[0]) in (3, 4):
            self._add(inputs, traces, trace, results[0])
        elif base in _ACTIVATIONS and (number := self._sums.get(id(inputs[0]))) is not None:
            addition = self.additions[number]
            if any(inside == addition.block for inside, *_ in self._inside):
                self.additions[number] = replace(addition, activated=True)
        for result in results:
            self.note(result, trace)
        return y

    def _add(self, inputs: Sequence[Tensor], traces: Sequence[Trace], trace: Trace, result: Tensor) -> None:
        block, _, start, ids = next((m for m in reversed(self._inside) if m[1]), ("", True, None, []))
        given = [id(x) in ids for x in inputs]
        # The shorter way is the shortcut; of two equally long ones, the block's input.
        i = min((0, 1), key=lambda i: (len(traces[i].layers), not given[i]))
        before = () if start is None else start.layers
        layers = traces[i].layers[len(before) :]
        if given[i] or traces[i].made_by == "add":
            kind, layers = "identity", ()
        elif layers:
            kind = "projection"
        else:
            made_by = traces[i].made_by
            kind = "pooling" if "pool" in made_by else {"constant_pad_nd": "zero padding"}.get(made_by, made_by)
        self._sums[id(result)] = len(self.additions)
        self.additions.append(Addition(block, trace, kind, layers))


# What an operator's results see --------------------------------------------------------------------------------------


def _field(
    name: str, args: Any, kwargs: Any, traces: Sequence[Trace], shapes: Sequence[torch.Size], y: Tensor
) -> Field:
    joined = _union([trace.field for trace in traces])
    if joined is None:
        return None
    shape = shapes[0]
    if name == "convolution":
        _, weight, _, stride, padding, dilation, transposed, *_ = args
        if transposed or weight.dim() != 4:
            return None
        return _windows(joined, weight.shape[2:], stride, padding, dilation)
    if name in ("max_pool2d_with_indices", "max_pool2d", "avg_pool2d"):
        kernel = _two(args[1])
        stride = _two(args[2]) if len(args) > 2 and args[2] else kernel
        padding = _two(args[3]) if len(args) > 3 else (0, 0)
        dilation = _two(args[4]) if len(args) > 4 and name != "avg_pool2d" else (1, 1)
        return _windows(joined, kernel, stride, padding, dilation)
    if name in ("_adaptive_avg_pool2d", "adaptive_max_pool2d"):
        ratios = [into / out for into, out in zip(shape[-2:], y.shape[-2:], strict=True)]
        if y.shape[-2:] == (1, 1):
            return WHOLE, WHOLE
        if any(ratio != int(ratio) for ratio in ratios):
            return None
        return _windows(joined, [int(r) for r in ratios], [int(r) for r in ratios], (0, 0), (1, 1))
    if name in _REDUCTIONS:
        given = args[1] if len(args) > 1 else kwargs.get("dim")
        dims = {d % len(shape) for d in (given if isinstance(given, (list, tuple)) else [given]) if d is not None}
        if not dims or (len(shape) == 4 and dims >= {2, 3}):
            return WHOLE, WHOLE
        return joined if dims == {1} and len(shape) == 4 else None
    if name in ("addmm", "mm", "linear"):
        return (WHOLE, WHOLE) if len(shape) == 2 and shape[0] == _IMAGES else joined
    if name == "slice":
        return _sliced(joined, shape, *args[1:])
    if name == "constant_pad_nd":
        left = [args[1][2] if len(args[1]) > 2 else 0, args[1][0]]
        rows, columns = (axis.window(1, 1, pad) for axis, pad in zip(joined, left, strict=True))
        return rows, columns
    if name == "cat":
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        return joined if dim % len(shape) == 1 else None
    if name in _VIEWS:
        return joined
    # Of each pixel by itself: all others that keep rows and columns. The rest cannot be followed.
    return joined if "attention" not in name and name != "bmm" and any(s[-2:] == y.shape[-2:] for s in shapes) else None


def _union(fields: Sequence[Field]) -> Field:
    if any(field is None for field in fields):
        return None
    rows, columns = (
        Axis(min(a.first for a in axes), max(a.last for a in axes), max(a.step for a in axes))
        for axes in zip(*(field for field in fields if field is not None), strict=True)
    )
    return rows, columns


def _windows(field: tuple[Axis, Axis], kernel: Any, stride: Any, padding: Any, dilation: Any) -> Field:
    rows, columns = (axis.window(*parts) for axis, *parts in zip(field, kernel, stride, padding, dilation, strict=True))
    return rows, columns


def _sliced(
    field: tuple[Axis, Axis], shape: torch.Size, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Field:
    dim, start = dim % len(shape), start or 0
    if len(shape) != 4 or dim < 2:
        return field if step == 1 else None
    if start < 0:
        return None
    axes = list(field)
    axis = axes[dim - 2]
    axes[dim - 2] = Axis(axis.first + start * axis.step, axis.last + start * axis.step, step * axis.step)
    return axes[0], axes[1]


def _two(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[-1])
