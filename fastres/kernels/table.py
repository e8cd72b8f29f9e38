"""Which kernel serves which op on which device, in order of preference, and why one does not.

The first kernel of the list that has no reason against a call serves it. The reference is the last of every list: it
serves everything, in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from fastres import reference, reference_algebraic, reference_join, reference_pool, synchronised_reference
from fastres.kernels import choices, convolution, cpu, cuda, cudnn, onednn, persistent, triton


class PackedConvolution(Protocol):
    """A convolution with folded, packed weights."""

    @property
    def nbytes(self) -> int:
        """Bytes that its weights take."""

    @property
    def kernel(self) -> tuple[str, str] | None:
        """Name and method of the kernel that a call runs; None if a call asks the table."""

    def __call__(self, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor: ...


@dataclass(frozen=True)
class Kernel:
    """One implementation of an op.

    Attributes:
        name: "reference", "cpu", "onednn", ...
        run: takes the arguments of the raw op.
        unavailable: why it cannot run in this process at all, or None.
        why_not: why it does not serve a call with these arguments, or None.
        method: how it would do a call with these arguments, in a word or two, where it has several ways.
        prepare: conv_bias_act only: packs a weight once, prepare(x, weight, bias, *geometry).
    """

    name: str
    run: Callable[..., Any]
    unavailable: Callable[[], str | None]
    why_not: Callable[..., str | None]
    prepare: Callable[..., PackedConvolution] | None = None
    method: Callable[..., str] = lambda *args: ""


_REFERENCES = (reference, reference_join, reference_pool, reference_algebraic)


def _reference(op: str) -> Kernel:
    run = next(getattr(module, op) for module in _REFERENCES if hasattr(module, op))
    return Kernel("reference", run, lambda: None, lambda *args: None)


def _cpu(op: str) -> Kernel:
    return Kernel("cpu", getattr(cpu, op), cpu.unavailable, cpu.why_not)


def _triton(op: str, module: str, why_not: Callable[..., str | None] = triton.why_not) -> Kernel:
    return Kernel("triton", triton.kernel(module, op), triton.unavailable, why_not)


def _cuda(op: str, why_not: Callable[..., str | None] = cuda.why_not) -> Kernel:
    return Kernel("cuda", getattr(cuda, op), cuda.unavailable, why_not)


def _persistent(op: str, why_not: Callable[..., str | None]) -> Kernel:
    """Behind "cuda", which serves all that it does: only a measured choice, or force, brings it to the front."""
    return Kernel("cuda_persistent", getattr(persistent, op), cuda.unavailable, why_not)


_BATCH_NORM_OPS = (
    "bn_act",
    "bn_act_backward",
    "add_act",
    "add_act_backward",
    "bn_act_maxpool",
    "bn_act_maxpool_backward",
)


def _part(name: str, run: Callable[..., Any], why_not: Callable[..., str | None] = lambda *args: None) -> list[Kernel]:
    reference_part = Kernel("reference", getattr(synchronised_reference, name), lambda: None, lambda *args: None)
    return [Kernel("cpu", run, cpu.unavailable, why_not), reference_part]


#: (op, device type) -> kernels, best first. Devices without an entry have the reference only; so has bn_add_bn_act on
#: CPUs, where fastres.functional makes it of two calls of bn_act.
TABLE: dict[tuple[str, str], list[Kernel]] = {
    **{(op, "cpu"): [_cpu(op), _reference(op)] for op in _BATCH_NORM_OPS},
    ("conv_bn_act", "cpu"): [
        Kernel("cpu", cpu.conv_bn_act, cpu.unavailable, cpu.conv_bn_act_why_not, method=cpu.conv_bn_act_method),
        _reference("conv_bn_act"),
    ],
    ("conv_bn_act_backward", "cpu"): [
        Kernel("cpu", cpu.conv_bn_act_backward, cpu.unavailable, cpu.conv_bn_act_backward_why_not),
        _reference("conv_bn_act_backward"),
    ],
    ("conv1x1_bn_act", "cpu"): [
        Kernel("cpu", cpu.conv1x1_bn_act, cpu.unavailable, cpu.conv1x1_bn_act_why_not),
        _reference("conv1x1_bn_act"),
    ],
    ("conv1x1_bn_act_backward", "cpu"): [
        Kernel("cpu", cpu.conv1x1_bn_act_backward, cpu.unavailable, cpu.conv1x1_bn_act_backward_why_not),
        _reference("conv1x1_bn_act_backward"),
    ],
    ("conv_bias_act", "cpu"): [
        Kernel(
            "cpu",
            convolution.conv_bias_act,
            convolution.unavailable,
            convolution.why_not,
            convolution.prepare,
            convolution.method_name,
        ),
        Kernel("onednn", onednn.conv_bias_act, onednn.unavailable, onednn.why_not, onednn.prepare),
        _reference("conv_bias_act"),
    ],
    # What fastres/ops/synchronised.py is made of besides the ops; not registered as ops. CPU only.
    ("bn_statistics", "cpu"): _part("bn_statistics", cpu.bn_statistics, cpu.why_not),
    ("bn_act_backward_apply", "cpu"): _part("bn_act_backward_apply", cpu.bn_act_backward_apply, cpu.why_not),
    ("convolution", "cpu"): _part("convolution", convolution.convolve),
    ("convolution_backward", "cpu"): _part("convolution_backward", convolution.convolve_backward),
    **{
        (name, "cpu"): [Kernel("cpu", run, cpu.unavailable, lambda *args: None)]  # where conv1x1_bn_act serves
        for name, run in (
            ("conv1x1_statistics", cpu.conv1x1_statistics),
            ("conv1x1_backward_reduce", cpu.conv1x1_backward_reduce),
            ("conv1x1_backward_apply", cpu.conv1x1_backward_apply),
        )
    },
    **{
        (op, "cuda"): [_triton(op, module), _cuda(op), _reference(op)]
        for module, ops in (
            ("join", ("bn_add_bn_act", "bn_add_bn_act_backward")),
            ("elementwise", ("add_act", "add_act_backward")),
        )
        for op in ops
    },
    ("bn_act", "cuda"): [
        _triton("bn_act", "batch_norm"),
        _cuda("bn_act"),
        _persistent("bn_act", persistent.why_not),
        _reference("bn_act"),
    ],
    ("bn_act_backward", "cuda"): [
        _triton("bn_act_backward", "batch_norm"),
        _cuda("bn_act_backward"),
        _persistent("bn_act_backward", persistent.backward_why_not),
        _reference("bn_act_backward"),
    ],
    ("bn_act_maxpool", "cuda"): [
        _triton("bn_act_maxpool", "pool", triton.bn_act_maxpool_why_not),
        _cuda("bn_act_maxpool"),
        _reference("bn_act_maxpool"),
    ],
    ("bn_act_maxpool_backward", "cuda"): [
        _triton("bn_act_maxpool_backward", "pool", triton.bn_act_maxpool_backward_why_not),
        _cuda("bn_act_maxpool_backward"),
        _reference("bn_act_maxpool_backward"),
    ],
    ("conv_bias_act", "cuda"): [
        _triton("conv_bias_act", "convolution_ops"),
        Kernel("cudnn", cudnn.conv_bias_act, cudnn.unavailable, cudnn.why_not),
        _cuda("conv_bias_act", cuda.conv_bn_act_why_not),
        _reference("conv_bias_act"),
    ],
    ("conv1x1_bn_act", "cuda"): [
        _triton("conv1x1_bn_act", "algebraic", triton.conv1x1_bn_act_why_not),
        _reference("conv1x1_bn_act"),
    ],
    ("conv1x1_bn_act_backward", "cuda"): [
        _triton("conv1x1_bn_act_backward", "algebraic", triton.conv1x1_bn_act_backward_why_not),
        _reference("conv1x1_bn_act_backward"),
    ],
    ("conv_bn_act", "cuda"): [
        _triton("conv_bn_act", "convolution_ops", triton.conv_bn_act_why_not),
        _cuda("conv_bn_act", cuda.conv_bn_act_why_not),
        _persistent("conv_bn_act", persistent.conv_bn_act_why_not),
        _reference("conv_bn_act"),
    ],
    ("conv_bn_act_backward", "cuda"): [
        _triton("conv_bn_act_backward", "convolution_ops", triton.conv_bn_act_backward_why_not),
        _cuda("conv_bn_act_backward", cuda.conv_bn_act_backward_why_not),
        _persistent("conv_bn_act_backward", persistent.conv_bn_act_backward_why_not),
        _reference("conv_bn_act_backward"),
    ],
    ("update_running_stats_", "cuda"): [
        _triton("update_running_stats_", "statistics", lambda *args: None),
        _cuda("update_running_stats_", cuda.update_why_not),
        _reference("update_running_stats_"),
    ],
    ("update_all_running_stats_", "cuda"): [
        _cuda("update_all_running_stats_", cuda.update_all_why_not),
        _reference("update_all_running_stats_"),
    ],
}
OPS = (
    *_BATCH_NORM_OPS,
    "bn_add_bn_act",
    "bn_add_bn_act_backward",
    "conv_bn_act",
    "conv_bn_act_backward",
    "conv1x1_bn_act",
    "conv1x1_bn_act_backward",
    "conv_bias_act",
    "update_running_stats_",
    "update_all_running_stats_",
)
_UPDATES = ("update_running_stats_", "update_all_running_stats_")  # a few values a channel: not worth forcing

_forced: tuple[str, ...] | None = None
_meta_is: str | None = None


@contextmanager
def meta_is(device_type: str) -> Iterator[None]:
    """Inside the `with` block, tensors of the meta device, which have shapes but no values, go the ways of those of
    `device_type`: to see what a call would save, without making it."""
    global _meta_is
    before, _meta_is = _meta_is, device_type
    try:
        yield
    finally:
        _meta_is = before


def device_type(x: Tensor) -> str:
    """The type of x's device, or of the one that it stands for."""
    return _meta_is if _meta_is is not None and x.is_meta else x.device.type


def kernels(op: str, device_type: str) -> list[Kernel]:
    """The kernels of `op` on a device type, best first; inside `use_kernels` only the forced ones, in their order."""
    device_type = _meta_is if _meta_is is not None and device_type == "meta" else device_type
    found = TABLE.get((op, device_type)) or [_reference(op)]
    if _forced is None or op in _UPDATES:
        return found
    return [kernel for name in _forced for kernel in found if kernel.name == name]


def _first(args: tuple[Any, ...]) -> Tensor:
    """The first tensor of a call."""
    return args[0][0] if isinstance(args[0], list | tuple) else args[0]


def candidates(op: str, args: tuple[Any, ...]) -> list[Kernel]:
    """The kernels that may serve this call, best first; if measured on this GPU, the fastest before the others."""
    first = _first(args)
    found = kernels(op, first.device.type)
    name = choices.preferred(op, first) if _forced is None else None
    return found if name is None else sorted(found, key=lambda kernel: kernel.name != name)


def select(op: str, args: tuple[Any, ...]) -> Kernel:
    """The kernel that serves this call.

    Raises:
        RuntimeError: if `use_kernels` leaves none, with the reason of each.
    """
    reasons = []
    for kernel in candidates(op, args):
        reason = kernel.unavailable() or kernel.why_not(*args)
        if reason is None:
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
    what = "; ".join(reasons) or f"{' or '.join(_forced or ())} has no kernel for it on {_first(args).device.type}"
    raise RuntimeError(f"fastres::{op}: no kernel may serve this call ({what})")


#: While fastres.explain runs: told of every call, (op, kernel, arguments).
_watcher: Callable[[str, Kernel, tuple[Any, ...]], None] | None = None


@contextmanager
def watching(watcher: Callable[[str, Kernel, tuple[Any, ...]], None]) -> Iterator[None]:
    """Calls `watcher(op, kernel, arguments)` before every call that a kernel of the table serves, forward and
    backward."""
    global _watcher
    before, _watcher = _watcher, watcher
    try:
        yield
    finally:
        _watcher = before


def run(op: str, args: tuple[Any, ...]) -> Any:
    """The result of the kernel that serves this call; raises as `select`."""
    kernel = select(op, args)
    if _watcher is not None:
        _watcher(op, kernel, args)
    return kernel.run(*args)


def fused_kernel_serves(op: str, args: tuple[Any, ...]) -> bool:
    """Whether a kernel other than the reference serves this call."""
    candidates = (kernel for kernel in kernels(op, _first(args).device.type) if kernel.name != "reference")
    return any(kernel.unavailable() is None and kernel.why_not(*args) is None for kernel in candidates)


def setting() -> tuple[str, ...] | None:
    """The forced kernels, or None."""
    return _forced


def no_fused_kernel(op: str, device_type: str) -> str | None:
    """Why `op` has nothing better than the reference on this device type, or None. A forced reference counts as a
    choice."""
    if _forced is not None:
        return None
    reasons = []
    for kernel in kernels(op, device_type):
        if kernel.name != "reference":
            reason = kernel.unavailable()
            if reason is None:
                return None
            reasons.append(f"{kernel.name}: {reason}")
    return "; ".join(reasons) or f"no fused kernel for {device_type}"


@contextmanager
def use_kernels(*names: str) -> Iterator[None]:
    """Only the named kernels serve inside the `with` block, in the whole process: for tests and benchmarks.

    Args:
        names: "reference", "cpu", "onednn", "triton", "cuda", "cuda_persistent", "cudnn"; the first that may serve a
            call does.

    Raises:
        ValueError: for a name that no kernel has.
    """
    global _forced
    known = {"reference"} | {kernel.name for row in TABLE.values() for kernel in row}
    if unknown := set(names) - known:
        raise ValueError(f"no kernel is named {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    before, _forced = _forced, names
    try:
        yield
    finally:
        _forced = before
