"""What each node of a traced forward is: a convolution, a batch norm, an activation, an addition, a pooling, nothing at
all, or something else."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from fastres import guard
from fastres.recipes import norms

Node = fx.Node

#: Activations of torch.nn; only ReLU is fused.
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish, nn.ELU, nn.SELU, nn.PReLU)

#: Modules that give their input back, always or where they are inactive.
_PASSES: dict[type, object] = {kind: kind.forward for kind in (nn.Identity, nn.Dropout, nn.Dropout2d)}

_RELU = (F.relu, torch.relu, torch.relu_)
_OTHER_ACTIVATIONS = (
    *(F.relu6, F.leaky_relu, F.silu, F.gelu, F.hardswish, F.mish, F.elu, F.selu, F.prelu, F.hardtanh),
    *(torch.clamp, torch.clamp_min),
)
_ADD = (operator.add, operator.iadd, torch.add)
_CONVOLUTIONS = (F.conv2d, torch.conv2d)
_IN_PLACE = (
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod),
    *(operator.ipow, operator.iand, operator.ior, operator.ixor, operator.imatmul, operator.setitem),
)


#: Functions whose result is a tensor of its own.
_FRESH = (
    *(operator.mul, operator.sub, operator.truediv, torch.mul, torch.sub, torch.div, torch.sigmoid, torch.cat),
    *(F.sigmoid, F.hardsigmoid, F.avg_pool2d, F.max_pool2d, torch.mean, torch.sum),
)
_FRESH_METHODS = ("mul", "sub", "div", "sigmoid", "mean", "sum", "clone")


@dataclass(eq=False)
class Operation:
    """One node.

    Attributes:
        kind: "conv", "bn", "act", "add", "pool", "skip" (gives its input back) or "other".
        module: whose call it is, or None.
        reason: why it cannot be part of a fused op, whatever is around it; or "".
        writes: whether it may write to one of its inputs.
        fresh: whether its result is a tensor of its own, if it does not write.
        norm: of a batch norm.
    """

    node: Node
    kind: str
    module: Any = None
    reason: str = ""
    writes: bool = False
    fresh: bool = False
    norm: norms.Norm | None = None


def operation(node: Node, modules: dict[str, nn.Module]) -> Operation:
    """What `node` is. `modules`: by target."""
    if node.op == "call_module":
        found = _call(node, modules[str(node.target)])
    elif node.op in ("call_function", "call_method"):
        found = _function(node, modules)
        known = _FRESH_METHODS if node.op == "call_method" else _FRESH
        found.fresh = node.target in known and not found.writes
    else:
        found = Operation(node, "other")
    found.fresh = found.fresh or found.kind in ("conv", "bn", "act", "add", "pool")
    return found


def _call(node: Node, module: nn.Module) -> Operation:
    kind = type(module)
    found = Operation(node, "other", module, writes=not kind.__module__.startswith("torch.nn.modules."))
    if bool(getattr(module, "inplace", False)):
        found.writes = True
    changed = guard.child_changed(str(node.target), module)
    plain = len(node.args) == 1 and isinstance(node.args[0], Node) and not node.kwargs
    if isinstance(module, nn.modules.conv._ConvNd):
        found.kind, found.reason, found.writes = "conv", _why_not_convolution(module) or "", False
    elif norms.is_norm(module):
        norm = norms.known(module)
        found.kind, found.reason = "bn", norm if isinstance(norm, str) else ""
        found.norm = None if isinstance(norm, str) else norm
        found.writes = found.norm is None and found.writes
    elif isinstance(module, ACTIVATIONS):
        found.kind = "act"
        found.reason = f"{kind.__name__}: of the activations only ReLU is fused"
        if kind is nn.ReLU:
            found.reason = guard.child_blocked("relu", module) or ""
    elif isinstance(module, nn.modules.pooling._MaxPoolNd):
        found.kind, found.reason = "pool", guard.child_blocked("maxpool", module) or ""
    elif kind in _PASSES and kind.forward is _PASSES[kind] and changed is None:
        inactive = kind is nn.Identity or not module.training or module.p == 0
        found.kind = "skip" if inactive else "other"
    if not plain and found.kind != "other":
        found.kind = "other" if found.kind == "skip" else found.kind
        found.reason = found.reason or "called with more than its input"
    return found


def _why_not_convolution(module: Any) -> str | None:
    kind = type(module)
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return f"a {kind.__name__}, whose parameters do not exist yet"
    if kind is nn.Conv2d or kind.forward is not nn.Conv2d.forward or kind._conv_forward is not nn.Conv2d._conv_forward:
        return guard.child_blocked("conv", module)
    if hasattr(kind, "weight") or "weight" not in module._parameters:
        return "parametrized: its weight is computed where it is read"
    return guard.child_changed("conv", module) or guard.padding_blocked(module)


def _function(node: Node, modules: dict[str, nn.Module]) -> Operation:
    target, args, kwargs = node.target, node.args, node.kwargs
    method = node.op == "call_method"
    name = str(target) if method else getattr(target, "__name__", "")
    found = Operation(node, "other")
    found.writes = (
        (name.endswith("_") and not name.endswith("__"))
        or target in _IN_PLACE
        or bool(kwargs.get("inplace"))
        or "out" in kwargs
        or (not method and len(args) > 1 and any(arg is True for arg in args[1:]))
    )
    tensor = len(args) >= 1 and isinstance(args[0], Node)
    if (target in _RELU if not method else name in ("relu", "relu_")) and tensor:
        found.kind = "act"
    elif not method and target in _OTHER_ACTIVATIONS or (method and name in ("clamp", "clamp_", "clamp_min")):
        found.kind, found.reason = "act", f"{name}: of the activations only ReLU is fused"
    elif (target in _ADD if not method else name in ("add", "add_")) and tensor and len(args) == 2:
        if isinstance(args[1], Node) and kwargs.get("alpha", 1) == 1 and kwargs.keys() <= {"alpha"}:
            found.kind = "add"
    elif not method and target in _CONVOLUTIONS and tensor:
        found.module = _module_of_conv2d(args, kwargs, modules)
        if found.module is not None:
            found.kind, found.reason = "conv", guard.padding_blocked(found.module) or ""
    elif method and name == "contiguous" and len(args) == 1 and not kwargs:
        found.writes = False
    return found


def _module_of_conv2d(args: Any, kwargs: Any, modules: dict[str, nn.Module]) -> Any:
    """The Conv2d of which F.conv2d(x, weight, ...) is the convolution: one that calls it itself; or None."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, args, strict=False)) | kwargs
    weight, bias = given.get("weight"), given.get("bias")
    if not isinstance(weight, Node) or weight.op != "get_attr" or not str(weight.target).endswith("weight"):
        return None
    path = str(weight.target).rpartition(".")[0]
    module: Any = modules.get(path)
    if not isinstance(module, nn.Conv2d):
        return None
    has_bias = isinstance(bias, Node) and bias.op == "get_attr" and str(bias.target).rpartition(".")[0] == path
    if has_bias != (module.bias is not None) or (bias is not None and not has_bias):
        return None
    for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)):
        value = given.get(name, default)
        if _pair(value) != _pair(getattr(module, name)):
            return None
    same = given.get("groups", 1) == module.groups and module.padding_mode == "zeros"
    return module if same and len(given) == len(args) + len(kwargs) else None


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, list | tuple) else value
