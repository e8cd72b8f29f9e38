"""Why something does not run fused: a text for people, with a short code that stays the same, for programs.

A reason is made where the text is: `because("hook", f"hooks on {role}")`. A plain string is a reason too; its code is
"other". A new code is one line in CODES.
"""

from __future__ import annotations

import torch

#: What each code means; the legend of a report, and of docs/explain.md.
CODES: dict[str, str] = {
    "not-swapped": "fuse_ has not been called, or unfuse_ has",
    "not-run": "the forward did not come through this block",
    "unknown-block": "no recipe covers the module that this operation is part of",
    "outside-block": "part of a known block, before or after what is fused",
    "not-traceable": "the forward of a module of this class cannot be taken apart into calls",
    "no-pattern": "nothing beside this operation that one kernel could do together with it",
    "unknown-forward": "the block's forward is not the one that its recipe was written for",
    "own-forward": "a forward was replaced, on the instance or on its class",
    "missing-child": "the block lacks a module that its recipe takes over",
    "shared-module": "one module does two things in the block, in an order that fusing would change",
    "managed": "FSDP or an offload hook holds the parameters",
    "hook": "a hook on a module that fused code would not call, or on all modules",
    "unknown-module": "a child is not of the type that fused code stands in for",
    "geometry": "padding of a convolution, or windows of a pooling, that no kernel has",
    "batch-norm": "settings or tensors of a batch norm that leave the work to eager, with its errors",
    "sync-bn": "a batch norm that is to synchronise with other processes on this device",
    "tensor": "an input or a parameter is no plain dense tensor: a subclass, sparse, nested, quantized",
    "shape": "shapes that fused code does not take",
    "dtype": "dtypes that fused code does not take, or not together",
    "device": "input and parameters are on different devices",
    "tuned": "fastres.tune_ measured that the original forward is faster for such inputs",
    "canary": "fastres.canary found the fused block off, and switched it off",
    "no-kernel": "no fused kernel works on this device; fastres doctor says why",
    "functorch": "inside a transform of torch.func (grad, vmap, jvp)",
    "forward-ad": "inside forward-mode differentiation",
    "tracing": "inside torch.jit.trace",
    "other": "see the reason's text",
}


class Reason(str):
    """A reason's text that knows its code."""

    __slots__ = ("code",)
    code: str

    def __new__(cls, code: str, text: str) -> Reason:
        reason = super().__new__(cls, text)
        reason.code = code
        return reason

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]  # copies and pickles
        return self.code, str(self)


def because(code: str, text: str) -> str:
    """The reason `text` with its code, one of CODES; a text that has one keeps it."""
    if isinstance(text, Reason) or torch.compiler.is_compiling():  # dynamo traces plain strings
        return text
    return Reason(code, text)


def code_of(reason: str) -> str:
    """The code of a reason, "other" of a plain string; "" if there is none."""
    return getattr(reason, "code", "other") if reason else ""
