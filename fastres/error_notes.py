"""Says of an error which block of the model it comes from: `in layer1.0 (Bottleneck), fused by fastres`.

The path is looked up when the error happens, in the outermost module whose call is under way: blocks that were moved,
renamed or copied are named by where they are, and no module keeps anything. Type and arguments of the error stay; the
text is a note (PEP 678), which tracebacks show from Python 3.11 on.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import nn

__all__ = ["named"]

Method = TypeVar("Method", bound=Callable[..., Any])

_CALL = nn.Module._call_impl.__code__
_END = ", fused by fastres"


def named(forward: Method, instead: Callable[[Any], Callable[..., Any] | None] | None = None) -> Method:
    """A forward of a fused module, whose errors name the module.

    Args:
        instead: says what to call in the place of `forward`, of a module; None: nothing. Not asked under torch.compile.
    """

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # whose errors show the line; and a graph cannot break inside `try`
            return forward(self, *args, **kwargs)
        try:
            other = None if instead is None else instead(self)
            return forward(self, *args, **kwargs) if other is None else other(*args, **kwargs)
        except Exception as error:
            _add_note(error, self, sys._getframe(1))
            raise

    return run  # type: ignore[return-value]


def _add_note(error: Exception, block: nn.Module, frame: FrameType | None) -> None:
    """Adds the note, unless a block inside this one has."""
    notes = list(getattr(error, "__notes__", ()))
    if not any(str(note).endswith(_END) for note in notes):
        # Not add_note, which Python 3.10 lacks; other programs look for the attribute there too.
        error.__notes__ = [*notes, f"in {_path(block, frame)} ({block._get_name()}){_END}"]


def _path(block: nn.Module, frame: FrameType | None) -> str:
    """Where the block is in the outermost module that is being called in this thread."""
    outermost = block
    while frame is not None:
        if frame.f_code is _CALL and isinstance(module := frame.f_locals.get("self"), nn.Module):
            outermost = module
        frame = frame.f_back
    name = next((name for name, module in outermost.named_modules() if module is block), "")
    return name or "the model"
