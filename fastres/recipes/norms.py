"""Batch norms that fused code may stand for: PyTorch's, timm's with an activation, and frozen ones, which many
libraries have of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastres import batch_norm, guard

_BUFFERS = ["weight", "bias", "running_mean", "running_var"]
#: What timm's BatchNormAct2d.forward uses; a version of timm in which it is another is left alone.
_ACT_NAMES = frozenset(
    {"ndim", "momentum", "training", "track_running_stats", "num_batches_tracked", "add_", "float", "running_mean"}
    | {"running_var", "F", "batch_norm", "weight", "bias", "eps", "drop", "act"}
)


@dataclass(frozen=True)
class Norm:
    """A batch norm, and what it does besides.

    Attributes:
        module: the batch norm.
        stands: what fastres.sites takes for it.
        after: names of the children that it calls afterwards, one after the other.
        plain: its batch norm alone.
    """

    module: nn.Module
    stands: Any
    after: tuple[str, ...]
    plain: Callable[[Tensor], Tensor]


def is_norm(module: nn.Module) -> bool:
    """Whether this is a batch norm of activations of any kind, whether known or not."""
    return isinstance(module, nn.modules.batchnorm._NormBase) or "FrozenBatchNorm" in type(module).__name__


def known(module: nn.Module) -> Norm | str:
    """The batch norm that `module` is, or why fused code may not stand for it."""
    kind = type(module)
    if kind in batch_norm.FORWARDS:
        return guard.child_blocked("bn", module) or Norm(module, module, (), module)
    if reason := guard.child_changed(kind.__name__, module):
        return reason
    if _is_norm_act(kind):
        return Norm(module, module, ("drop", "act"), lambda x: nn.BatchNorm2d.forward(module, x))  # type: ignore[arg-type]
    if "FrozenBatchNorm" in kind.__name__:
        return _frozen(module)
    return f"a {kind.__name__}, not a plain BatchNorm2d"


def _is_norm_act(kind: type) -> bool:
    names = getattr(getattr(kind.forward, "__code__", None), "co_names", ())  # type: ignore[attr-defined]
    return (
        kind.__name__ == "BatchNormAct2d"
        and kind.__mro__[1] is nn.BatchNorm2d
        and set(names) - {"_assert", "torch"} == _ACT_NAMES
    )


def _frozen(module: nn.Module) -> Norm | str:
    name = type(module).__name__
    after = tuple(module._modules)
    if [*module._buffers] != _BUFFERS or module._parameters or after not in ((), ("drop", "act")):
        return f"a {name} with other tensors than a frozen batch norm's"
    eps = _eps(module)
    if eps is None:
        return f"a {name} that does not compute a frozen batch norm"
    stands = batch_norm.Frozen(module, eps)
    return Norm(module, stands, after, (lambda x: _scaled(stands, x)) if after else module)


def _scaled(norm: batch_norm.Frozen, x: Tensor) -> Tensor:
    """As in all of these libraries."""
    weight, bias, mean, var = (t.reshape(1, -1, 1, 1) for t in batch_norm.tensors(norm))  # type: ignore[arg-type, union-attr]
    scale = weight * (var + norm.eps).rsqrt()
    return x * scale + (bias - mean * scale)


#: What a class was found to compute: its forward then, and the eps by the attributes that it may have from.
_probed: WeakKeyDictionary[type, tuple[Any, dict[Any, float | None]]] = WeakKeyDictionary()
_INTERNAL = nn.Module().__dict__.keys()


def _eps(module: nn.Module) -> float | None:
    """The eps with which this module computes a frozen batch norm, found by letting a copy of it do so; or None."""
    kind: Any = type(module)
    wanted = module.__dict__.get("eps", 1e-5)  # Hugging Face's have 1e-5 in the code
    if not isinstance(wanted, float | int):
        return None
    known = _probed.get(kind)
    if known is None or known[0] is not kind.forward:
        known = _probed[kind] = (kind.forward, {})
    own = [(name, value) for name, value in module.__dict__.items() if name not in _INTERNAL or name == "training"]
    if not all(isinstance(value, (bool, int, float, str, type(None))) for _, value in own):
        return wanted if _computes(module, float(wanted)) else None
    key = tuple(own)
    if key not in known[1]:
        known[1][key] = wanted if _computes(module, float(wanted)) else None
    return known[1][key]


def _computes(module: nn.Module, eps: float) -> bool:
    copy: Any = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    values = ([1.5, -0.5, 2.0], [0.25, -1.0, 0.5], [0.5, -0.25, 1.0], [1e-5, 1.0, 3e-4])
    copy.__dict__["_buffers"] = {
        name: torch.tensor(value, dtype=torch.float64) for name, value in zip(_BUFFERS, values, strict=True)
    }
    copy.__dict__["_modules"] = {name: nn.Identity() for name in module._modules}
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(2, 3, 1, 2)
    try:
        with torch.no_grad():
            y = copy(x)
            return bool(torch.allclose(y, _scaled(batch_norm.Frozen(copy, eps), x), rtol=1e-9, atol=1e-9))
    except Exception:  # whatever it raises, it is not what was expected
        return False
