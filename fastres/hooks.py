"""Hooks on modules: a fused block steps aside for those that look at what runs inside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

Hook = TypeVar("Hook", bound=Callable[..., Any])

#: The attributes of a module that hold its hooks.
KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def harmless(hook: Hook) -> Hook:
    """Marks a hook of our own that fused code need not step aside for: it looks at no value."""
    hook.looks_at_nothing = True  # type: ignore[attr-defined]
    return hook


def hooked(module: nn.Module) -> bool:
    """Whether a call of `module` does more than its forward: hooks are on it, other than harmless ones of ours."""
    if not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks):
        return False
    found = (hook for kind in KINDS for hook in getattr(module, kind).values())
    return any(not getattr(hook, "looks_at_nothing", False) for hook in found)
