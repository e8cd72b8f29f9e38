"""Fused blocks that run their original forward although they could run fused: because `fastres.tune_` measured that it
is faster for such inputs, or because a canary found that the fused one is wrong.

What was measured belongs to this machine, so it is kept outside of the modules: copies and pickles of a model carry
none of it (the file that tune_ writes does). That a block is wrong is an attribute of the block and goes with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastres import layout
from fastres.ops import registration
from fastres.reasons import because

TUNED = because("tuned", "eager is faster here (tuned)")
_OFF = "fastres_off"


class Kind(NamedTuple):
    """What calls have in common for which one decision holds.

    Attributes:
        mode: "eval", without gradients, or "train", with them.
        shape: of the block's input, [N, C, H, W].
        dtype: in which convolutions of it compute, "float32", ...: under autocast not the input's.
        layout: "channels_last" or "contiguous".
    """

    mode: str
    shape: tuple[int, ...]
    dtype: str
    layout: str


@dataclass(frozen=True)
class Decision:
    """Milliseconds of a block's original and of its fused forward (in training with backward), and which one runs."""

    eager_ms: float
    fused_ms: float
    choice: str


_decisions: WeakKeyDictionary[nn.Module, dict[Kind, Decision]] = WeakKeyDictionary()
_epoch = 0


def kind_of(block: nn.Module, x: Any) -> Kind | None:
    """The kind of the call block(x) now; None for evaluation with gradients and training without, which are not
    tuned."""
    if block.training != torch.is_grad_enabled() or not isinstance(x, Tensor) or x.dim() != 4:
        return None
    dtype = str(registration.autocast_dtype(x)).removeprefix("torch.")
    order = "channels_last" if layout.is_channels_last(x) else "contiguous"
    return Kind("train" if block.training else "eval", tuple(x.shape), dtype, order)


def reason(block: nn.Module, x: Any) -> str | None:
    """Why `block` is to run its original forward on `x`, or None.

    A decision holds for its kind of calls. Where a shape was not measured, that of the nearest number of values with
    the same number of channels decides. Under torch.compile, whose times are others, none does.
    """
    off = block.__dict__.get(_OFF)
    if off is not None or torch.compiler.is_compiling() or not _decisions:
        return off
    known = _decisions.get(block)
    kind = None if known is None else kind_of(block, x)
    if known is None or kind is None:
        return None
    found = known.get(kind) or _nearest(known, kind)
    return TUNED if found is not None and found.choice == "eager" else None


def _nearest(known: dict[Kind, Decision], kind: Kind) -> Decision | None:
    alike = [k for k in known if k._replace(shape=kind.shape) == kind and k.shape[1] == kind.shape[1]]
    size = _values(kind)
    if not alike or not size:
        return None
    return known[min(alike, key=lambda other: abs(math.log(_values(other) / size)))]


def _values(kind: Kind) -> int:
    return torch.Size(kind.shape).numel()


def decide(block: nn.Module, kind: Kind, decision: Decision) -> None:
    """From now on `decision` holds for calls of this kind."""
    _decisions.setdefault(block, {})[kind] = decision
    _changed()


def decisions(block: nn.Module) -> dict[Kind, Decision]:
    """All that was decided for `block`."""
    return dict(_decisions.get(block, {}))


def turn_off(block: nn.Module, why: str) -> None:
    """From now on `block` and its copies run the original forward, whatever the input."""
    block.__dict__[_OFF] = why
    _changed()


def forget(model: nn.Module) -> None:
    """Drops all that was decided for modules of `model`, and lets those that were turned off run fused again."""
    for module in model.modules():
        _decisions.pop(module, None)
        module.__dict__.pop(_OFF, None)
    _changed()


def epoch() -> int:
    """Another number after every change: recorded calls of fastres.replay are of one epoch."""
    return _epoch


def _changed() -> None:
    global _epoch
    _epoch += 1
