"""How an op is registered: schema, kernel choice, fake, gradient, autocast. One file of this package per op uses it.

An op `fastres::<name>` is functional: it returns new tensors, and a separate op updates running statistics. Below
autograd it asks the kernel table (fastres/kernels/table.py) who serves this call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastres.kernels import table

#: What is to be done with an op's results as soon as they are there, or None.
Then = Callable[[Any], None] | None

_AUTOCAST_DEVICES = ("cpu", "cuda")
_LIBRARY = torch.library.Library("fastres", "DEF")
_casts: dict[Any, Callable[..., Sequence[Any]]] = {}


def define(schema: str, fake: Callable[..., Any]) -> Any:
    """Registers `fastres::<schema>` with its fake and returns the op."""
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    _LIBRARY.impl(name, lambda *args: table.run(name, args), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastres::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fastres, name).default


def differentiable(
    op: Any,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    eager_backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Gives `op` its gradient. Returns the function to call: op itself for tracing and without gradients, and for
    eager training an autograd.Function around it, which costs half of what a registered formula costs.

    The function's `then` gets the results, before any is saved for backward: there the second forward of
    torch.utils.checkpoint ends.

    eager_backward: of eager training, where it is not `backward`: what it calls need not be traceable."""
    torch.library.register_autograd(op.name(), backward, setup_context=setup_context, lib=_LIBRARY)
    eager = _function(op, lambda *args: _no_view(op(*args)), setup_context, eager_backward or backward)

    def call(*args: Any, then: Then = None) -> Any:
        if _records(args):
            return apply(op, eager, args, then)
        results = op(*args)
        if then is not None:
            then(results)
        return results

    return call


def served_by(op: Any, *args: Any) -> str:
    """The name of the kernel that serves this call."""
    return table.select(op.name().split("::")[1], args).name


def variant(
    op: Any, call: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """`call`, the differentiable op, which in eager training saves something else."""
    eager = _function(op, lambda *args: _no_view(op(*args)), setup_context, backward)

    def call_variant(*args: Any, then: Then = None) -> Any:
        return apply(op, eager, args, then) if _records(args) else call(*args, then=then)

    return call_variant


def forked(
    op: Any, call: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """`call`, the differentiable op, with its first argument as one more result. In eager training `backward` gets the
    gradient of that one too, as its last argument, and has to add it to that of the argument."""
    eager = _function(
        op,
        lambda *args: (*_no_view(op(*args)), args[0].view_as(args[0])),
        lambda ctx, inputs, output: setup_context(ctx, inputs, output[:-1]),
        backward,
    )

    def call_forked(*args: Any, then: Then = None) -> Any:
        x = args[0]
        if not may_fork(x) or not _records(args):
            return (*call(*args, then=then), x)
        return apply(op, eager, args, then)

    return call_forked


def may_fork(x: Tensor) -> bool:
    """Whether an op's input x may be one of its results: it has a gradient, and autocast makes no copy of it."""
    return x.requires_grad and x.dtype is autocast_dtype(x)


def _function(
    op: Any, forward: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Any:
    def run(*args: Any) -> Any:
        *inputs, then = args
        results = forward(*inputs)
        if then is not None:
            then(results)
        return results

    methods: dict[str, Callable[..., Any]] = {
        "forward": run,
        "setup_context": lambda ctx, inputs, output: setup_context(ctx, inputs[:-1], output),
        "backward": lambda ctx, *grads: (*backward(ctx, *grads), None),
    }
    return type(
        op.name().split("::")[1],
        (torch.autograd.Function,),
        {name: staticmethod(method) for name, method in methods.items()},
    )


def _no_view(results: Any) -> Any:
    """What an op returned, so that the next operation may write to it in place: autograd refuses that for views made
    inside a Function, as kernels do that permute their result. Detached inside of it they are none."""
    if isinstance(results, Tensor):
        return results.detach() if results._is_view() else results
    return tuple(_no_view(t) if isinstance(t, Tensor) else t for t in results)


def _records(args: tuple[Any, ...]) -> bool:
    """Whether a call is one of eager training, for an autograd.Function."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    )


def apply(op: Any, eager: Any, args: tuple[Any, ...], then: Then) -> Any:
    """eager.apply(*args, then), with what autocast asks for `op` done before: it has to be recorded. `args`: those of
    op first."""
    device_type = args[0].device.type
    if op not in _casts or not autocast_enabled(device_type):
        return eager.apply(*args, then)
    args = tuple(_casts[op](torch.get_autocast_dtype(device_type), *args))
    with torch._C._ExcludeDispatchKeyGuard(_autocast_keys(device_type)):
        return eager.apply(*args, then)


@functools.cache
def _autocast_keys(device_type: str) -> Any:
    return torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}"))


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a device type that has autocast kernels here."""
    return device_type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a convolution of x computes now."""
    if x.dtype is torch.float64 or not autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def autocast(op: Any, cast: Callable[..., Sequence[Any]]) -> None:
    """Under autocast `op` runs with `cast(dtype, *args)` as its arguments, and autocast off."""
    name = op.name().split("::")[1]
    _casts[op] = cast
    for device in _AUTOCAST_DEVICES:

        def run(*args: Any, device: str = device) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(_autocast_keys(device)):
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
