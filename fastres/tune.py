"""Never slower: tune_ measures every fused block beside its original forward, and lets the faster one run."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastres import aside, decisions, folding, observe, switches
from fastres.bench import machine, stats
from fastres.decisions import Site, TuneReport
from fastres.errors import UserError
from fastres.explain import state_kept
from fastres.kernels import extension
from fastres.recipes.residual import FusedModule
from fastres.switches import Decision, Kind

_WARM_UP = 2
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 50
_TURN_SECONDS = 0.005  # of one contender before the other's turn; one call at least
_NETWORK_SHARE = 0.3  # of the time, for the whole model


def tune_(
    model: nn.Module,
    example: Any,
    *,
    mode: str | None = None,
    seconds: float = 10.0,
    save: str | os.PathLike[str] | None = None,
) -> TuneReport:
    """Times the original and the fused forward of every fused block of `model` on the inputs that it gets from
    `example`, in turns, and lets the original run from now on where the fused one is slower beyond the spread. Then
    times the whole model eager, fused and so tuned; where one of the first two is faster than the last, all blocks
    follow it.

    Everything runs on copies: weights, statistics, counters, gradients, random state, hooks and training flags of the
    model are not touched. `fastres.explain` shows what runs eager now; `unfuse_` forgets it. Decisions hold for calls
    of the mode, dtype and layout that were measured, and for other shapes by the nearest (`switches.reason`); under
    torch.compile they do not. They belong to this machine and process: copies and pickles of the model run fused, until
    `load_tuning_` reads the file.

    Args:
        model: swapped by `fuse_`, before it is wrapped for data parallelism or compiled.
        example: an input of the model, or a tuple of its arguments; a tensor [N, C, H, W] as in later calls. A gradient
            of it is computed if it requires one. Autocast counts as it is now.
        mode: "eval", inference without gradients; "train", forward and backward; None: what `model` is in now. In the
            mode that it is in, training flags of its modules (frozen batch norms) stay as they are.
        seconds: that measuring should take; it is more where five rounds take longer.
        save: a file for all decisions about the model, also of earlier calls (other modes, other shapes), which
            `load_tuning_` reads.

    Raises:
        ValueError: for bad arguments, and if nothing of the model runs fused on `example`.
        RuntimeError: inside torch.compile or the capture of a CUDA graph.
    """
    _check(model, example, mode, seconds)
    args = example if isinstance(example, tuple) else (example,)
    training = model.training if mode is None else mode == "train"
    folding.forget(model)  # the copies' packed weights take their place under config.max_packed_bytes
    with state_kept(model), torch.inference_mode(False):
        copy = aside.aside(model)
        if model.training is not training:
            copy.train(training)
        calls = _calls(copy, args, training)
        budget = seconds * (1 - _NETWORK_SHARE) / len(calls)
        measured = {name: _measure_site(copy, name, *call, training, budget) for name, call in calls.items()}
        found = _whole(copy, args, training, measured, seconds * _NETWORK_SHARE)
    for site in found.sites:
        _apply(model.get_submodule(site.name), site)
    if save is not None:
        replace(found, sites=_all_sites(model)).save(save)
    return found


def load_tuning_(model: nn.Module, path: str | os.PathLike[str]) -> TuneReport:
    """Lets the decisions of the file `path`, that `tune_` saved, hold for `model`, which `fuse_` has swapped.

    A file that was measured on another device or instruction set, or with another version of fastres or PyTorch (other
    than its last number), is not applied: a warning says so, and `applied` of the report is False.

    Raises:
        ValueError: if it is no such file (see `fastres.decisions.read`), or names a block that the model has not, or
            not swapped. The model is then as it was.
        FileNotFoundError: if there is no such file.
    """
    report = decisions.read(path)
    here, now = _machine(report.machine["device"]), decisions.versions()
    differences = [
        f"{what} {there!r}, here {ours!r}"
        for what, there, ours in (
            *((key, report.machine[key], here[key]) for key in ("device", "name", "isa")),
            ("fastres", report.versions["fastres"], now["fastres"]),
            ("torch", _release(report.versions["torch"]), _release(now["torch"])),
        )
        if there != ours
    ]
    if differences:
        warnings.warn(f"{path} was not applied, it was measured with {'; '.join(differences)}", stacklevel=2)
        report.applied = False
        return report
    modules = dict(model.named_modules())
    wrong = sorted({s.name for s in report.sites if not isinstance(modules.get(s.name), FusedModule)})
    if wrong:
        raise UserError(
            f"{path} names {len(wrong)} blocks that the model does not have, or fuse_ has not swapped: "
            + ", ".join(repr(name) for name in wrong[:5])
        )
    for site in report.sites:
        _apply(modules[site.name], site)
    return report


def _check(model: Any, example: Any, mode: str | None, seconds: float) -> None:
    if torch.compiler.is_compiling():
        raise RuntimeError("tune_ measures, which torch.compile cannot do: call it before compiling")
    if torch.cuda.is_available() and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tune_ measures, which the capture of a CUDA graph forbids: call it before capturing")
    if not isinstance(model, nn.Module):
        raise TypeError(f"tune_ takes an nn.Module, got {type(model).__name__}")
    if mode not in (None, "eval", "train"):
        raise ValueError(f"mode must be 'eval', 'train' or None, not {mode!r}")
    if not (isinstance(seconds, int | float) and 0 < seconds < math.inf):
        raise ValueError(f"seconds must be above zero, not {seconds!r}")
    if not any(isinstance(module, FusedModule) for module in model.modules()):
        raise ValueError("the model has no fused blocks: call fastres.fuse_ first")
    if not any(isinstance(t, Tensor) for t in (example if isinstance(example, tuple) else (example,))):
        raise TypeError(f"example must be a tensor or a tuple of arguments, not {type(example).__name__}")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ValueError(f"tune the module inside of {type(model).__name__}: tune_(model.module, ...)")


#: Arguments of a block and the kind of call.
_Call = tuple[tuple[Any, ...], dict[str, Any], Kind]


def _calls(copy: nn.Module, args: tuple[Any, ...], training: bool) -> dict[str, _Call]:
    """The first call of every block that runs fused in copy(*args)."""
    names = {module: name for name, module in copy.named_modules() if issubclass(type(module), FusedModule)}
    reasons: dict[nn.Module, str | None] = {}
    calls: dict[str, _Call] = {}

    def note(block: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        kind = switches.kind_of(block, next(aside.tensors_in((inputs, keywords)), None))
        if kind is not None and names[block] not in calls:
            calls[names[block]] = (_detached(inputs), _detached(keywords), kind)

    for hooked in (False, True):  # hooks may be in the way of a block that another one runs in its own forward
        ran = {module for module, reason in reasons.items() if reason is None and module in names}
        hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in ran if hooked]
        reasons.clear()
        with torch.set_grad_enabled(training), observe.listening(reasons.__setitem__):
            copy(*args)
        for hook in hooks:
            hook.remove()
    found = {names[m]: calls[names[m]] for m in names if m in reasons and reasons[m] is None and names[m] in calls}
    if not found:
        why = next(filter(None, reasons.values()), "no fused block ran")
        raise ValueError(f"nothing of the model runs fused on this example: {why}")
    return found


def _detached(value: Any) -> Any:
    """The same arguments, with tensors of their own that remember whether they need a gradient."""
    return torch.utils._pytree.tree_map_only(
        Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), value
    )


def _measure_site(
    copy: nn.Module,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    kind: Kind,
    training: bool,
    seconds: float,
) -> Site:
    """The site with its times."""
    module = copy.get_submodule(name)
    contenders = [aside.site_alone(aside.aside(module, plain=plain), module) for plain in (True, False)]
    eager, fused = _race([_step(c, args, kwargs, training) for c in contenders], seconds, _device(args, kwargs))
    choice = "eager" if stats.verdict(fused, eager) == "slower" else "fused"
    return Site(name, *kind, eager.median * 1e3, fused.median * 1e3, choice)


def _whole(
    copy: nn.Module, args: tuple[Any, ...], training: bool, measured: dict[str, Site], seconds: float
) -> TuneReport:
    """The report, after the whole model had its say."""
    contenders = {"eager": aside.aside(copy, plain=True), "fused": aside.aside(copy)}
    if any(site.choice == "eager" for site in measured.values()):
        contenders["tuned"] = aside.aside(copy)
        for site in measured.values():
            _apply(contenders["tuned"].get_submodule(site.name), site)
    steps = [_step(model, args, {}, training) for model in contenders.values()]
    times = dict(zip(contenders, _race(steps, seconds, _device(args, {})), strict=True))
    kept = [*times][-1]
    for other in ("fused", "eager"):
        if stats.verdict(times[other], times[kept]) == "faster":
            kept = other
    found = [site if kept == "tuned" else replace(site, choice=kept) for site in measured.values()]
    network = {name: timing.median * 1e3 for name, timing in times.items()}
    return TuneReport(_machine(_device(args, {})), decisions.versions(), found, network, kept)


def _step(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> Callable[[], None]:
    """One call of the module's forward, in training with its gradients, which go nowhere."""
    weights = [p for p in module.parameters() if p.requires_grad]
    upstream: list[Tensor] = []

    def evaluate() -> None:
        with torch.no_grad():
            module.forward(*args, **kwargs)

    def train() -> None:
        with torch.enable_grad():
            mine = _views((args, kwargs))
            outputs = [y for y in aside.tensors_in(module.forward(*mine[0], **mine[1])) if y.requires_grad]
            inputs = [t for t in aside.tensors_in(mine) if t.requires_grad] + weights
            if not upstream:
                upstream.extend(torch.randn_like(y) for y in outputs)
            if outputs and inputs:
                torch.autograd.grad(outputs, inputs, upstream, allow_unused=True)

    return train if training else evaluate


def _views(value: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), value)


def _race(steps: list[Callable[[], None]], seconds: float, device: str) -> list[stats.Timing]:
    """Times of the steps, in turns: rounds in which each runs for a few milliseconds, or once."""

    def turn(step: Callable[[], None], times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / times

    for step in steps:
        turn(step, _WARM_UP)
    repeats = [max(1, round(_TURN_SECONDS / turn(step, 1))) for step in steps]
    samples: list[list[list[float]]] = [[] for _ in steps]
    end = time.perf_counter() + seconds
    order = [*range(len(steps))]
    while len(samples[0]) < _LEAST_ROUNDS or (len(samples[0]) < _MOST_ROUNDS and time.perf_counter() < end):
        for i in order:
            samples[i].append([turn(steps[i], repeats[i])])
        order.append(order.pop(0))  # nobody always runs after the same one
    return [stats.timing(rounds) for rounds in samples]


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return next(aside.tensors_in((args, kwargs))).device.type


def _apply(block: nn.Module, site: Site) -> None:
    kind = Kind(site.mode, site.shape, site.dtype, site.layout)
    switches.decide(block, kind, Decision(site.eager_ms, site.fused_ms, site.choice))


def _all_sites(model: nn.Module) -> list[Site]:
    """All decisions about blocks of the model."""
    return [
        Site(name, *kind, decision.eager_ms, decision.fused_ms, decision.choice)
        for name, module in model.named_modules()
        for kind, decision in switches.decisions(module).items()
    ]


def _machine(device: str) -> dict[str, Any]:
    """Where a model on a device of this type is measured."""
    threads = torch.get_num_threads()
    if device == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return {"device": device, "name": torch.cuda.get_device_name(), "isa": f"sm_{major}{minor}", "threads": threads}
    isa = extension.isa() if extension.available() else "none"
    return {"device": "cpu", "name": machine.cpu()["model"], "isa": isa, "threads": threads}


def _release(version: str) -> str:
    """2.13 of 2.13.0+cpu"""
    return ".".join(version.split("+")[0].split(".")[:2])
