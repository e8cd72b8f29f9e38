"""Three versions of a model, run whole and site by site, and what their results differ by."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastres import config, observe
from fastres.errors import UserError
from fastres.fuse import fuse_, unfuse_
from fastres.kernels import extension
from fastres.recipes.residual import StemForward, shortcut_of
from fastres.recipes.units import Unit
from fastres.testing import budget, relative_error
from fastres.verify import kinks
from fastres.verify.certificate import MODEL, Certificate, Fault, Row, Site
from fastres.verify.run import Call, Outcome, captured, run

#: Relative L2 error that the fp32 outputs of a whole model in eval mode may have.
LOGITS = 1e-5
#: Relative L2 error of a whole model's gradient that one value on the other side of a kink can make.
KINK = 2e-2
#: How often gradients are tried.
TRIES = 3

_GRADIENTS = ("gradient", "input gradient")


class Comparison:
    """Fills a certificate with what `model` does on its inputs.

    Attributes:
        eager, fused: copies of the model in the dtype of the certificate; oracle: in float64, with the same weights.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype, certificate: Certificate) -> None:
        self.certificate, self.dtype, self.training = certificate, dtype, certificate.mode == "train"
        self.autocast = dtype if self.training and dtype is not torch.float32 else None
        stored = torch.float32 if self.training else dtype
        self.call = Call(inputs, {}).map(lambda t: t.detach().to(stored) if t.is_floating_point() else t)
        self.eager = unfuse_(copy.deepcopy(model)).to(stored).train(self.training)
        for module in self.eager.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        self.oracle = copy.deepcopy(self.eager).double()
        self.fused = copy.deepcopy(self.eager)
        self.fusible = fuse_(self.fused)

    def run(self) -> None:
        """The whole model, then every site that ran fused in it."""
        reported: dict[nn.Module, str | None] = {}
        names = {module: name for name, module in self.fused.named_modules()}
        with observe.listening(reported.__setitem__):
            fused = self._run_fused(MODEL, self.fused, self.call, self.training, self.certificate.seed)
        found = {names[module]: (module, reason) for module, reason in reported.items() if module in names}
        for name, (module, reason) in found.items():
            self.certificate.sites.append(Site(_site_name(name, module), reason is None, reason or ""))
        if not self.certificate.fused_sites:
            reasons = [site.reason for site in self.certificate.sites] + [row.reason for row in self.fusible.rows]
            self._fault(MODEL, f"nothing ran fused ({next(filter(None, reasons), 'nothing to fuse')})")
        ran = [name for name, (module, reason) in found.items() if reason is None and not _whole_model(name, module)]
        with captured(self.oracle, ran) as exact, captured(self.eager, ran) as rounded:
            truth, eager = self._run_plain(self.oracle, self.eager, self.call, self.training, self.certificate.seed)
        if fused is not None:
            self.certificate.rows += self._whole(truth, eager, fused)
        del truth, eager, fused
        for name in [name for name in ran if name in exact]:  # of a module that is called twice, the first call
            inputs = _like(exact.pop(name), rounded.pop(name))
            self.certificate.rows += self._site(name, found[name][0], inputs)

    def _fault(self, site: str, text: str) -> None:
        if Fault(site, text) not in self.certificate.faults:
            self.certificate.faults.append(Fault(site, text))

    def _run_plain(
        self, oracle: nn.Module, eager: nn.Module, call: Call, gradients: bool, seed: int
    ) -> tuple[Outcome, Outcome]:
        how: Any = {"gradients": gradients, "seed": seed, "round_to": self.dtype}
        with observe.original_forwards():
            try:
                found = run(eager, call, autocast=self.autocast, **how)
            except Exception as error:  # whatever the model raises: it is the user's model and input that do not fit
                raise UserError(f"the model does not run on this input: {type(error).__name__}: {error}") from error
            return run(oracle, call.double(), autocast=None, **how), found

    def _run_fused(self, site: str, fused: nn.Module, call: Call, gradients: bool, seed: int) -> Outcome | None:
        try:
            return run(fused, call, gradients=gradients, seed=seed, round_to=self.dtype, autocast=self.autocast)
        except Exception as error:  # a finding, unless eager raises too
            self._fault(site, f"the fused model raised {type(error).__name__}: {error}")
            return None

    def _whole(self, truth: Outcome, eager: Outcome, fused: Outcome) -> list[Row]:
        """Rows of the whole model; gradients outside their budget are tried again on a slightly changed input."""
        rows = self._rows(MODEL, truth, eager, fused)
        for attempt in range(1, TRIES):
            if all(row.ok for row in rows if row.kind in _GRADIENTS):
                break
            seed = self.certificate.seed + attempt
            call = _other(self.call, seed)
            again = self._run_fused(MODEL, self.fused, call, True, seed)
            if again is None:
                break
            rows = _better(rows, self._rows(MODEL, *self._run_plain(self.oracle, self.eager, call, True, seed), again))
        return rows

    def _site(self, name: str, module: nn.Module, inputs: Call) -> list[Row]:
        """Rows of one site that runs alone."""
        site = _site_name(name, module)
        oracle, eager, fused = (
            _alone(version.get_submodule(name), module, version is self.fused)
            for version in (self.oracle, self.eager, self.fused)
        )
        rows: list[Row] = []
        for gradients in (True,) if self.training else (False, True):
            tried: list[Row] = []
            for attempt in range(TRIES if gradients else 1):
                seed = self.certificate.seed + attempt
                call = _other(inputs, seed) if attempt else inputs
                if gradients and self.dtype is torch.float32:
                    with observe.original_forwards():
                        call, _ = kinks.avoid(oracle, call, seed)
                seen: list[str | None] = []
                with observe.listening(lambda _, reason: seen.append(reason)):  # noqa: B023
                    got = self._run_fused(site, fused, call, gradients, seed)
                if got is None:
                    return rows + tried
                if not seen or seen[0]:
                    self._fault(site, f"does not run fused alone: {seen[0] if seen else ''}")
                new = self._rows(site, *self._run_plain(oracle, eager, call, gradients, seed), got)
                tried = _better(tried, new) if tried else new
                if all(row.ok for row in tried if row.kind in _GRADIENTS):
                    break
            rows += (
                tried if not rows else [_with_gradients(row) for row in tried if row.kind not in ("buffer", "counter")]
            )
        return rows

    def _rows(self, site: str, truth: Outcome, eager: Outcome, fused: Outcome) -> list[Row]:
        rows = []
        for key in eager | fused:
            kind, name = key
            want, witness, got = truth.get(key), eager.get(key), fused.get(key)
            if want is None or witness is None or got is None or got.dtype is not witness.dtype:
                got_is, witness_is = (None if t is None else t.dtype for t in (got, witness))
                self._fault(site, f"{name} ({kind}): fused gives {got_is}, eager {witness_is}")
                continue
            scale = _scale(key, truth)
            errors = (_error(kind, witness, want) * scale, _error(kind, got, want) * scale)
            rows.append(Row(site, kind, name, *errors, self._budget(site, kind, errors[0], witness)))
            if (site, kind) == (MODEL, "output") and not self.training and want.dim() == 2 and want.shape[1] > 1:
                rows.append(_top1(name, want, witness, got, rows[-1].budget))
        return rows

    def _budget(self, site: str, kind: str, eager_error: float, eager: Tensor) -> float:
        if kind == "counter" or (kind == "buffer" and not self.training):
            return 0.0
        if (site, kind, self.training, self.dtype) == (MODEL, "output", False, torch.float32) and eager_error <= LOGITS:
            return LOGITS
        # fp32 sums in another order are several roundings off: eager's own convolution from one layout to the other.
        summed = eager.dtype is torch.float32 and kind != "buffer"
        winograd = summed and eager.device.type == "cpu" and config.winograd and extension.available()
        limit = budget(eager_error, eager.dtype, summed=summed, winograd=winograd)
        return max(limit, KINK) if site == MODEL and kind in _GRADIENTS else limit


def _other(call: Call, seed: int) -> Call:
    """The same call with every value a few per cent off, so that others fall on the wrong side of a kink."""
    generator = torch.Generator().manual_seed(seed)

    def change(t: Tensor) -> Tensor:
        return t + t * 2.0**-5 * torch.randn(t.shape, generator=generator).to(t) if t.is_floating_point() else t

    return call.map(change)


def _with_gradients(row: Row) -> Row:
    """A row of the second run of a site in eval mode: gradients are wanted, so batch norm is not folded."""
    return replace(row, tensor=f"{row.tensor} with gradients") if row.kind == "output" else row


def _better(rows: list[Row], again: list[Row]) -> list[Row]:
    """For every gradient the better of two tries; the first of everything else, which has no reason to jump."""
    found = {(row.kind, row.tensor): row for row in again}
    others = ((row, found.get((row.kind, row.tensor), row)) for row in rows)
    return [other if row.kind in _GRADIENTS and other.share < row.share else row for row, other in others]


def _error(kind: str, x: Tensor, truth: Tensor) -> float:
    if kind == "counter":
        return float((x.double() - truth.double()).abs().max()) if x.shape == truth.shape else float("inf")
    if x.shape == truth.shape:
        distance, size = float(torch.dist(x.double(), truth)), float(truth.norm())
        if math.isfinite(distance) and 0 < size < math.inf:
            return distance / size
    return relative_error(x, truth)  # NaN and Inf have to be in the same places


def _scale(key: tuple[str, str], truth: Outcome) -> float:
    """What an error relative to the tensor itself is multiplied by, where that is not the size that counts: 1 but for

    - a bias before a batch norm: it changes nothing, so its true gradient is 0 and what there is of it is rounding;
      measured by the gradient of the weight beside it;
    - a running mean near 0, which is a sum whose terms cancel: measured by the standard deviation.
    """
    kind, name = key
    if kind == "gradient" and name.endswith("bias"):
        weight = truth.get((kind, name.removesuffix("bias") + "weight"))
        size = 0.0 if weight is None else float(weight.norm())
        smallest = 1e-9 * size
    elif kind == "buffer" and name.endswith("running_mean"):
        var = truth.get((kind, name.removesuffix("mean") + "var"))
        size = smallest = 0.0 if var is None else float(var.sqrt().norm())
    else:
        return 1.0
    own = float(truth[key].norm())
    return (own or 1.0) / size if own < smallest else 1.0


def _top1(name: str, truth: Tensor, eager: Tensor, fused: Tensor, allowed: float) -> Row:
    """How many images get another class than in float64, not counting those whose two best logits are closer than the
    error that is allowed."""
    best = truth.topk(2, dim=1)
    clear = best.values[:, 0] - best.values[:, 1] > 2 * allowed * truth.norm(dim=1)
    wrong = [int((clear & (logits.argmax(1) != best.indices[:, 0])).sum()) for logits in (eager, fused)]
    return Row(MODEL, "top-1", f"{name} top-1", wrong[0], wrong[1], 0)


def _whole_model(name: str, module: nn.Module) -> bool:
    """Whether a site is all of the model, whose rows there are already."""
    return not name and isinstance(module, Unit)


def _site_name(name: str, module: nn.Module) -> str:
    return f"{name}.stem".lstrip(".") if isinstance(module, StemForward) else name or MODEL


def _alone(module: nn.Module, fused_module: nn.Module, fused: bool) -> nn.Module:
    """The part of one version that a site consists of. `fused_module`: what stands there in the fused version."""
    if isinstance(fused_module, StemForward):
        return _without(module, list(module._modules)[1 + _last(fused_module, module) :])
    return _Shortcut(module, fused) if type(fused_module) is nn.Sequential else module


def _last(fused_module: StemForward, module: nn.Module) -> int:
    return max(list(module._modules).index(child) for child in fused_module.fused_children)


def _without(module: nn.Module, children: Iterable[str]) -> nn.Module:
    """A module with the same parameters and buffers, in which some children do nothing."""
    other = copy.copy(module)
    other._modules = dict(module._modules) | {child: nn.Identity() for child in children}
    return other


class _Shortcut(nn.Module):
    """A projection shortcut alone; fused, it runs as part of its block only."""

    def __init__(self, downsample: nn.Module, fused: bool) -> None:
        super().__init__()
        self.downsample, self.fused = downsample, fused

    def forward(self, x: Tensor) -> Tensor:
        return shortcut_of(self, x) if self.fused else self.downsample(x)


def _like(exact: Call, rounded: Call) -> Call:
    """The tensors of `exact` in the dtypes and memory layouts of `rounded`."""
    likes = iter([t for _, t in rounded.tensors()])
    return exact.map(lambda t: torch.empty_like(next(likes)).copy_(t))
