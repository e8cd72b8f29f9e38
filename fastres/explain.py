"""explain: what ran fused in one forward, by which kernel, and why the rest did not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastres import batch_norm, fuse, sites
from fastres.kernels import table
from fastres.report import ExplainReport, Row


def explain(model: nn.Module, x: Tensor) -> ExplainReport:
    """Runs `model(x)` once, without gradients, and says for every operation whether it ran fused, by which kernel, or
    why not.

    Modes stay as they are; statistics, counters and random state are put back afterwards.

    Args:
        model: any module, swapped by fuse_ or not.
        x: an input of the model, [N, C, H, W].

    Returns:
        An ExplainReport; print it, or read its rows.
    """
    outcome: dict[nn.Module, str | None] = {}
    with state_kept(model), torch.no_grad(), sites.listening(outcome.__setitem__):
        model(x)
    modules = dict(model.named_modules())
    rows = fuse.plan(model).rows
    return ExplainReport([_ran(row, modules.get(row.name), owner, outcome, x.device.type) for row, owner in rows])


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Puts every buffer of `model` and the random state back at the end of the `with` block."""
    before = {buffer: buffer.clone() for buffer in model.buffers()}
    with torch.random.fork_rng():
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, values in before.items():
                    buffer.copy_(values)


def _ran(
    row: Row,
    module: nn.Module | None,
    owner: nn.Module | None,
    outcome: dict[nn.Module, str | None],
    device_type: str,
) -> Row:
    if not row.fused or owner is None:
        return row
    if owner not in outcome:
        return replace(row, fused=False, reason="not swapped (call fuse_), or it did not run")
    # A unit says of single modules that they did not run fused, where the rest of it did.
    if reason := outcome[owner] or (module is not None and outcome.get(module)):
        return replace(row, fused=False, reason=reason)
    return replace(row, kernel=_kernel(owner, device_type))


def _kernel(owner: nn.Module, device_type: str) -> str:
    batch_norms = [m for m in owner.modules() if isinstance(m, batch_norm.BatchNorm)]
    op = "conv_bn_act" if any(bn.training or bn.running_mean is None for bn in batch_norms) else "conv_bias_act"
    return next(kernel.name for kernel in table.kernels(op, device_type) if kernel.unavailable() is None)
