"""What of a network is trained, and how fast.

A part is a module by its name ("layer4", "layer3.1"), and everything behind it up to the next part: networks are cut at
the first parameters of the named modules, in the order in which the modules were made, which is that of the forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastres.errors import UserError
from fastres.transfer.heads import head_name

__all__ = ["ALL", "freeze_until", "later_first", "param_groups"]

#: Names the whole network.
ALL = "all"


def freeze_until(model: nn.Module, names: Sequence[str] = ()) -> None:
    """Freezes a network from its input to the first of the named parts; what follows is in train mode, and trained.

    Frozen parts take no gradient and are in eval mode: their batch norms keep the running statistics, to the bit, and
    blocks that are fused run in inference form, with folded weights. `model.train()` would put them into train mode:
    call this in its place.

    Args:
        model: in place. names: of modules, or "all"; none: only the head is trained.

    Raises:
        UserError: if there is no such part. The model is as it was before.
    """
    cut = min(_starts(model, names).values())
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i >= cut)
    _set_modes(model, False, [False])


def _set_modes(module: nn.Module, parent: bool, begun: list[bool]) -> None:
    """Train mode for modules with parameters that are trained. Without parameters, those with buffers (a batch norm
    that is not affine) follow what was before them, others (dropout) their parent.

    Args:
        parent: whether the parent is in train mode. begun: [whether a trained parameter has been seen].
    """
    parameters = list(module.parameters())
    if parameters:
        module.training = any(p.requires_grad for p in parameters)
    else:
        module.training = begun[0] if any(True for _ in module.buffers()) else parent
    begun[0] = begun[0] or any(p.requires_grad for p in module.parameters(recurse=False))
    for child in module.children():
        _set_modes(child, module.training, begun)


def later_first(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The names in the order in which they are unfrozen: from the head to the input. Raises UserError."""
    starts = _starts(model, names)
    return sorted(names, key=lambda name: -starts[name])


def param_groups(
    model: nn.Module, names: Sequence[str] = (), *, lr: float, backbone_lr: float | None = None, decay: float = 0.5
) -> list[dict[str, Any]]:
    """Groups for an optimizer, whose learning rates fall from the head to the input (Howard and Ruder 2018, section
    3.2: discriminative fine-tuning).

    Args:
        model: the network. names: its parts that are trained beside the head.
        lr: of the head. backbone_lr: of the part before the head; lr / 10 by default.
        decay: each part before that one has the rate of the one behind it times this.

    Returns:
        A group for the head and for each part, from the head on: {"name", "params", "lr"}.

    Raises:
        UserError: if there is no such part.
    """
    parameters = list(model.parameters())
    starts = _starts(model, names)
    rate, end = (lr / 10 if backbone_lr is None else backbone_lr), starts[""]
    groups: list[dict[str, Any]] = [{"name": "head", "params": parameters[end:], "lr": lr}]
    for name in later_first(model, names):
        groups.append({"name": name, "params": parameters[starts[name] : end], "lr": rate})
        rate, end = rate * decay, starts[name]
    return groups


def _starts(model: nn.Module, names: Sequence[str]) -> dict[str, int]:
    """The position of each part's first parameter among the model's; the head's name is ""."""
    positions = {id(p): i for i, p in enumerate(model.parameters())}
    head = positions[id(next(model.get_submodule(head_name(model)).parameters()))]
    modules = dict(model.named_modules())
    starts: dict[str, int] = {}
    for name in names:
        module = model if name == ALL else modules.get(name) if name else None
        if module is None:
            known = ", ".join(name for name, child in model.named_children() if any(True for _ in child.parameters()))
            raise UserError(f"the model has no part named {name!r}; there are {known}, the parts of these, and {ALL}")
        first = next(module.parameters(), None)
        if first is None:
            raise UserError(f"{name} has no parameters that could be trained")
        if positions[id(first)] >= head:
            raise UserError(f"{name} belongs to the head, which is always trained")
        if other := next((known for known, start in starts.items() if start == positions[id(first)]), None):
            raise UserError(f"{other} and {name} begin with the same parameters: name one of them")
        starts[name] = positions[id(first)]
    return {**starts, "": head}
