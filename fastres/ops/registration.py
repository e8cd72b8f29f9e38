"""How an op is registered: schema, kernel choice, fake, gradient, autocast. One file of this package per op uses it.

An op `fastres::<name>` is functional: it returns new tensors, and a separate op updates running statistics. Below
autograd it asks the kernel table (fastres/kernels/table.py) who serves this call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastres.kernels import table

_AUTOCAST_DEVICES = ("cpu", "cuda")
_LIBRARY = torch.library.Library("fastres", "DEF")


def define(schema: str, fake: Callable[..., Any]) -> Any:
    """Registers `fastres::<schema>` with its fake and returns the op."""
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    _LIBRARY.impl(name, lambda *args: table.select(name, args).run(*args), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastres::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fastres, name).default


def differentiable(op: Any, setup_context: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Gives `op` its gradient. Returns the function to call: op itself for tracing and without gradients, and for
    eager training an autograd.Function around it, which costs half of what a registered formula costs."""
    torch.library.register_autograd(op.name(), backward, setup_context=setup_context, lib=_LIBRARY)
    eager: Any = type(
        op.name().split("::")[1],
        (torch.autograd.Function,),
        {
            "forward": staticmethod(lambda *args: op(*args)),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(backward),
        },
    )

    def call(*args: Any) -> Any:
        if (
            not torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or autocast_enabled(args[0].device.type)  # the autocast kernel has to run before gradients are recorded
            or not any(isinstance(a, Tensor) and a.requires_grad for a in args)
        ):
            return op(*args)
        return eager.apply(*args)

    return call


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a device type that has autocast kernels here."""
    return device_type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type)


def autocast(op: Any, cast: Callable[..., Sequence[Any]]) -> None:
    """Under autocast `op` runs with `cast(dtype, *args)` as its arguments, and autocast off."""
    name = op.name().split("::")[1]
    for device in _AUTOCAST_DEVICES:
        key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

        def run(*args: Any, device: str = device, key: Any = key) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(key):
                return op(*cast(torch.get_autocast_dtype(device), *args))

        _LIBRARY.impl(name, run, f"Autocast{device.upper()}")


def to_dtype(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`t` in `dtype`; float64 and integers are left as they are, which is autocast's rule."""
    return t if t is None or t.dtype is torch.float64 or not t.is_floating_point() else t.to(dtype)


def second_order(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], needed: Sequence[bool], grad_y: Tensor
) -> list[Tensor | None]:
    """Gradients that can be differentiated again (`create_graph=True`): those of the reference formula."""
    wanted = [t for t, need in zip(inputs, needed, strict=True) if need and t is not None]
    y = function(*inputs)
    grads = iter(torch.autograd.grad(y, wanted, grad_y.to(y.dtype), create_graph=True, allow_unused=True))
    return [next(grads) if need and t is not None else None for t, need in zip(inputs, needed, strict=True)]
