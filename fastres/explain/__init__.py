"""explain: what ran fused in one call of a model, by which kernel, why the rest did not, and what it was worth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from fastres import fuse, observe
from fastres.batch_norm import BatchNorm
from fastres.explain import timing, traffic
from fastres.explain.ledger import Block, ExplainReport, Step
from fastres.explain.record import Flow, Recorder, Served, floating, flows, state_kept
from fastres.explain.record import Step as Run
from fastres.explain.units import entered, is_block, is_network, is_shortcut
from fastres.fuse import kind_of
from fastres.reasons import because
from fastres.recipes.residual import FusedModule
from fastres.recipes.units import Unit, undisturbed
from fastres.report import Row
from fastres.saved import SavedTensors

#: What is kept outside of all units counts for this name, which no module has.
_BETWEEN = "(between)"

__all__ = ["Block", "ExplainReport", "Step", "explain"]


def explain(model: nn.Module, x: Tensor | tuple[Any, ...], *, time: bool = False) -> ExplainReport:
    """Runs `model(x)` and says for every operation whether it ran fused, by which kernel, or why not; what activations
    it reads and writes, in eager and as it ran; and what that is worth.

    A model in eval mode runs without gradients; one in training mode runs forward and backward. Each runs twice, as it
    is and with all original forwards. Modes stay as they are; `.grad`, statistics, counters and random state are as
    before, and the model's own hooks are called.

    Args:
        model: any module, swapped by fuse_ or not.
        x: an input of the model, such as [N, C, H, W], or a tuple of its positional arguments. It is not written to.
        time: also measure how long each block takes, fused and by its original forward, in some seconds of
            interleaved runs.

    Returns:
        An ExplainReport: print it, read its rows and blocks, `to_json()`, `to_html(path)`.
    """
    run = Run(model, x if isinstance(x, tuple) else (x,))
    planned = [(row, owner, _module(model, row)) for row, owner in fuse.plan(model).rows]
    names = {module: name for name, module in model.named_modules()}
    placed = [replace(row, block=_block(row, owner, names, model)) for row, owner, _ in planned]
    units = {row.block: model.get_submodule(row.block) for row in placed}
    with state_kept(model), undisturbed(model):
        recorder, kept = _run_fused(run, units)
        flow, kept_by_eager = _run_eager(run, units, _counted(planned))
        times = timing.measure(run, units) if time else None
    own = _own(placed, planned)
    rows = []
    for row, (_, owner, module) in zip(placed, planned, strict=True):
        calls = _calls(row, module, units[row.block], own[row.block], recorder.calls)
        row = _ran(row, owner, module, units[row.block], recorder.outcome, calls)
        if found := flow.get(_key(row)):
            before = traffic.eager(row.kind, module, found, run.gradients)
            inside = row.fused and (calls or row.kind in ("act", "add"))
            now = traffic.fused(row.kind, module, found, calls, run.gradients) if inside else before
            row = replace(row, eager_bytes=before, fused_bytes=now)
        rows.append(row)
    tensors = floating(run.inputs)
    return ExplainReport(
        rows,
        model=_class(model),
        mode="train" if model.training else "eval",
        dtype=str(tensors[0].dtype).removeprefix("torch.") if tensors else "",
        device=tensors[0].device.type if tensors else "",
        input_shapes=[tuple(t.shape) for t in tensors],
        blocks=_blocks(rows, units, kept_by_eager, kept, times),
        step=None if times is None else Step(times.eager, times.fused, times.rounds),
    )


def _class(module: Any) -> str:
    """The name of a module's class, as the user wrote it."""
    return str(module._get_name())


def _counted(planned: list[tuple[Row, nn.Module | None, nn.Module]]) -> dict[str, nn.Module]:
    """The modules whose inputs and outputs tell what a row moves: its own, or for an addition its block, if that has
    one only. What a traced forward does by functions beside that is not counted."""
    additions = Counter(row.name for row, _, _ in planned if row.kind == "add")
    return {
        _key(row): module
        for row, _, module in planned
        if (additions[row.name] == 1 if row.kind == "add" else kind_of(module) == row.kind)
    }


def _key(row: Row) -> str:
    return f"{row.name} {row.kind}"


def _module(model: nn.Module, row: Row) -> nn.Module:
    return model.get_submodule(row.name)


def _block(row: Row, owner: nn.Module | None, names: dict[nn.Module, str], model: nn.Module) -> str:
    """The name of the block that a row belongs to."""
    parent = row.name.rpartition(".")[0]
    if owner is not None:
        name = names[owner]
        outer = name.rpartition(".")[0]
        return outer if name and is_shortcut(owner, model.get_submodule(outer)) else name
    return parent if row.name and is_block(model.get_submodule(parent)) else row.name


def _run_fused(run: Run, units: dict[str, nn.Module]) -> tuple[Recorder, SavedTensors]:
    """The model as it is: what its blocks did, and what was kept for backward in each unit."""
    recorder, saved, inputs = Recorder(run.model), SavedTensors(run.model), run.copies()
    with recorder.watching(), entered(units, partial(_label, saved)):
        with saved:
            output = run.forward(inputs)
        recorder.backward = True
        run.backward(output, inputs)
    return recorder, saved


def _run_eager(
    run: Run, units: dict[str, nn.Module], modules: dict[str, nn.Module]
) -> tuple[dict[str, Flow], SavedTensors]:
    """The model's original forward: what came in and out of each module, and what was kept in each unit."""
    saved = SavedTensors(run.model)
    with observe.original_forwards(), entered(units, partial(_label, saved)), flows(modules) as found, saved:
        run.forward(run.copies())
    return found, saved


def _label(saved: SavedTensors, name: str | None) -> None:
    saved.label = _BETWEEN if name is None else name


def _own(
    placed: Sequence[Row], planned: Sequence[tuple[Row, nn.Module | None, nn.Module]]
) -> dict[str, list[nn.Module]]:
    """The modules of each block's rows in order, without those of a projection that a recipe takes over."""
    found: dict[str, list[nn.Module]] = {row.block: [] for row in placed}
    for row, (*_, module) in zip(placed, planned, strict=True):
        if row.kind != "add" and not row.name.startswith(f"{row.block}.downsample.".lstrip(".")):
            found[row.block].append(module)
    return found


def _calls(
    row: Row, module: nn.Module, block: nn.Module, own: Sequence[nn.Module], calls: Sequence[Served]
) -> list[Served]:
    """The kernels that ran for a row: those of its module; for an activation or an addition those of the last call in
    its block that has one; in a traced block, which may have many, those of the layer before an activation."""
    if row.kind in ("conv", "bn", "pool"):
        return [call for call in calls if module in call.modules]
    if isinstance(block, Unit) and row.kind == "act":
        before = own[: own.index(module)] if module in own else []
        layers = [m for m in before if kind_of(m) in ("conv", "bn")]
        return [call for call in calls if layers and layers[-1] in call.modules]
    modules = {*own, block}
    of_block = [call for call in calls if modules.intersection(call.modules)]
    forward = [call for call in of_block if not call.backward]
    if row.kind == "act":  # stands behind a batch norm
        forward = [call for call in forward if any(isinstance(m, BatchNorm) for m in call.modules)] or forward
    last = forward[-1] if forward else None
    ends = set() if last is None else set(last.modules)
    backward = [call for call in of_block if call.backward]
    return [*([last] if last else []), *(call for call in backward if call.addend or ends.intersection(call.modules))]


def _ran(
    row: Row,
    owner: nn.Module | None,
    module: nn.Module,
    block: nn.Module,
    outcome: dict[nn.Module, str | None],
    calls: Sequence[Served],
) -> Row:
    """What became of a row: fused or not, by which kernel, or why not."""
    forward = [call for call in calls if not call.backward]
    row = replace(
        row,
        op=_one(call.op for call in forward),
        kernel=_one(call.kernel for call in forward),
        method=_one(call.method for call in forward),
        backward=_one(call.kernel for call in calls if call.backward and call.op.endswith(("_backward", "_apply"))),
    )
    if owner is None:  # not planned: a module of fastres.nn, or taken along by the kernel of its neighbour
        together = any(len(call.modules) > 1 for call in forward)
        if together or (forward and row.code != "outside-block" and outcome.get(block, "") is None):
            return replace(row, fused=True, reason="")
        return replace(row, reason=outcome.get(block) or row.reason)
    if not row.fused:
        return row
    if owner not in outcome and block not in outcome:
        swapped = isinstance(block, FusedModule)
        why = because("not-run", "did not run") if swapped else because("not-swapped", "not swapped: call fuse_")
        return replace(row, fused=False, reason=why)
    # A unit says of single modules that they did not run fused, where the rest of it did.
    if reason := outcome.get(owner, outcome.get(block)) or outcome.get(module):
        return replace(row, fused=False, reason=reason)
    return row


def _one(names: Any) -> str:
    """The different names, in order."""
    return ", ".join(filter(None, dict.fromkeys(names)))


def _blocks(
    rows: Sequence[Row],
    units: dict[str, nn.Module],
    eager: SavedTensors,
    fused: SavedTensors,
    times: timing.Times | None,
) -> list[Block]:
    found = []
    whole = 0.0 if times is None else sum(fused for _, fused in times.units.values())
    for name, module in units.items():
        own = [row for row in rows if row.block == name]
        block = Block(
            name,
            f"stem of {_class(module)}" if is_network(module) else _class(module),
            len(own),
            sum(row.fused for row in own),
            sum(row.eager_bytes or 0 for row in own),
            sum(row.fused_bytes or 0 for row in own),
            eager.bytes_of(name),
            fused.bytes_of(name),
        )
        if times is not None and name in times.units:
            before, now = times.units[name]
            block = replace(block, eager_ms=before, fused_ms=now, share=now / whole)
        found.append(block)
    return found
