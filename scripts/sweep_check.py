"""What the sweep asks of one model: does it compute the same after fuse_, and is it the same model after unfuse_?

Networks with random weights are chaotic: where rounding puts a value on the other side of a kink of ReLU, gradients
jump, in eager as in fused code, and in a deep network all that follows differs. So numbers are compared twice:

- in float64, with batch norms as they come (random weights near 1, biases near 0). Eager and fused code then differ by
  1e-13, and whatever a swap gets wrong (another order, another eps, a forgotten bias) is larger by many powers of ten;
- in float32, where the kernels are, with batch norms that keep away from kinks: biases of several standard deviations,
  positive in even channels and negative in odd ones, so that ReLU passes the former and blocks the latter, also behind
  an addition. Then a whole network's gradients are well defined, and fused code is held to twice eager's error.

In float32 both memory layouts run.
"""

from __future__ import annotations

import copy
import math
import pickle
import statistics
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastres
from fastres import config, observe
from fastres.kernels import extension
from fastres.testing import LAYOUTS, budget
from fastres.verify.compare import _error, _scale
from fastres.verify.run import Call, Outcome, run

#: What eager and fused code may differ by in float64, relative L2. If eager's own results in the two memory layouts
#: differ by more than half of it: twice that. A batch norm over two values multiplies roundings.
EXACT = 1e-8
#: Standard deviation and mean of what batch norms that keep away from kinks give.
CLEAR_STD, CLEAR_MEAN = 0.2, 1.2

MODES = ("training", "inference")
KINDS = ("conv", "bn", "act", "add", "pool")


@dataclass
class Result:
    """What came of one model.

    Attributes:
        problems: what differs; empty if the model passed.
        total, fused: operations by kind ("conv", "bn", "act", "add", "pool"); `fused` of those that ran in inference.
        reasons: why the rest did not, most frequent first, with counts.
        in_training: why parts that could run fused did not in training, with counts.
        errors: what was compared -> largest share of its budget, eager's error and the fused one there.
        parameters: number of values.
    """

    problems: list[str] = field(default_factory=list)
    total: dict[str, int] = field(default_factory=dict)
    fused: dict[str, int] = field(default_factory=dict)
    reasons: list[tuple[str, int]] = field(default_factory=list)
    in_training: list[tuple[str, int]] = field(default_factory=list)
    errors: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    parameters: int = 0

    def compare(self, what: str, truth: Outcome, witnesses: list[Outcome], fused: Outcome, exact: bool) -> None:
        """Compares every tensor of one run with the truth's; `what` names the run.

        The errors of single tensors owe much to luck, so what counts is eager's error over all tensors of a kind, the
        median and the largest, and over all ways to run eager (`witnesses`): they may differ by more than twice."""
        pairs: dict[str, list[tuple[float, float, str]]] = {}
        eager = witnesses[0] if witnesses else truth
        largest = max((float(t.norm()) for (kind, _), t in truth.items() if kind == "gradient"), default=0.0)
        for key in [*eager, *(key for key in fused if key not in eager)]:
            if key not in fused or key not in eager or fused[key].dtype is not eager[key].dtype:
                self.problems.append(f"{what}: {' '.join(key)} is in one of eager and fused only, or of another dtype")
                continue
            kind, size = key[0], _scale(key, truth) * _smallness(key, truth, largest)
            error, *errors = (_error(kind, found[key], truth[key]) * size for found in (fused, *witnesses))
            kind = "gradient" if kind == "input gradient" else kind
            pairs.setdefault(kind, []).append((max(errors, default=0.0), error, key[1]))
        for kind, found in pairs.items():
            for (eager_error, fused_error), name in ((_median(found), "median"), _largest(found)):
                limit = _limit(what, kind, eager_error, exact)
                share = 0.0 if fused_error == 0 else fused_error / limit if limit else math.inf
                group = f"{what}: {kind}"
                if not share <= 1:  # NaN too
                    self.problems.append(f"{group} {name}: error {fused_error:.1e}, eager's {eager_error:.1e}")
                if group not in self.errors or not share <= self.errors[group][0]:
                    self.errors[group] = (share, eager_error, fused_error)


def _smallness(key: tuple[str, str], truth: Outcome, largest: float) -> float:
    """What an error relative to the tensor itself is multiplied by: not 1 for a gradient whose terms cancel, as that of
    the bias of keys in attention, so that what there is of it is rounding. Measured by the largest of all gradients."""
    own = float(truth[key].norm()) if key[0] == "gradient" and key in truth else largest
    return (own or 1.0) / largest if own < 1e-6 * largest else 1.0


def _median(found: list[tuple[float, float, str]]) -> tuple[float, float]:
    return statistics.median(errors[0] for errors in found), statistics.median(errors[1] for errors in found)


def _largest(found: list[tuple[float, float, str]]) -> tuple[tuple[float, float], str]:
    worst = max(found, key=lambda errors: math.inf if math.isnan(errors[1]) else errors[1])
    return (max(errors[0] for errors in found), worst[1]), worst[2]


def _limit(what: str, kind: str, eager_error: float, exact: bool) -> float:
    """What a fused tensor may be off by; the budgets of fastres.verify."""
    if kind == "counter" or (kind == "buffer" and what.startswith("inference")):
        return 0.0
    if exact:
        return max(EXACT, 2 * eager_error)
    winograd = config.winograd and extension.available() and kind != "buffer"
    return budget(eager_error, torch.float32, summed=kind != "buffer", winograd=winograd)


class PackedConvolutions(TorchDispatchMode):
    """Inside, PyTorch convolves with packed weights, as its frozen compiled models do and fused code for contiguous
    inputs. Of many input channels that is less exact than eager: oneDNN then adds them up in one long sum."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is not torch.ops.aten.convolution.default or args[6] or args[0].dim() != 4:
            return op(*args, **(kwargs or {}))
        x, weight, bias, stride, padding, dilation, _, _, groups = args
        geometry = (padding, stride, dilation, groups)
        packed = torch._C._nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), *geometry, x.shape)
        return torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *geometry, "none", [], "")


class NoOracle(Exception):
    """The plain model does not run in float64."""


def check(model: nn.Module, x: Tensor, batches: int = 2) -> Result:
    """Fuses a copy of `model`, whose weights are changed, and compares both.

    Args:
        x: an input of the model, [N, 3, H, W] float32. batches: how many like it its batch norms get to know.

    Returns:
        A Result.

    Raises:
        NoOracle: if the plain model does not run in float64.
    """
    result = Result(parameters=sum(p.numel() for p in model.parameters()))
    x = _laid_out(x, "channels_last")
    plain = _in_layout(model, "channels_last")
    _randomise(plain)
    _calibrate(plain, x, batches)
    fused, oracle, tree = copy.deepcopy(plain), copy.deepcopy(plain).double(), _tree(plain)
    _swap(fused, result)
    _in_float64(oracle, fused.double(), x.double(), result)
    _explain(fused.float().train(), x, result)  # train: models drop what they keep for inference, which was float64
    _keep_away_from_kinks(plain)
    _calibrate(plain, x, batches)
    for other in (oracle, fused):
        other.load_state_dict(plain.state_dict())
    before, call = _in_float32(oracle, plain, fused, x, result), Call((x,), {})
    fastres.refresh_(fused)  # weights folded for the other layout may serve this one, with other roundings
    _require(result, "output of a copy", _same(_run(fused, call, False), _run(_copied(fused), call, False)))
    fastres.unfuse_(fused)
    _require(result, "state_dict after unfuse_", _state(plain) == _state(fused))
    _require(result, "modules after unfuse_", tree == _tree(fused))
    _require(result, "output after unfuse_", _same(before, _run(fused, call, False)))
    return result


def run_eager(model: nn.Module, x: Tensor) -> None:
    """What `check` does with the plain model, and nothing else."""
    _randomise(model)
    _calibrate(model, x, 2)
    for mode in MODES:
        for layout in LAYOUTS:
            _run_in(model.train(mode == "training"), layout, x, mode == "training")


# ------------------------------------------------------------------------------------------------------- the numbers


def _in_float64(oracle: nn.Module, fused: nn.Module, x: Tensor, result: Result) -> None:
    for mode in MODES:
        training, call = mode == "training", Call((x,), {})
        try:
            other = _run_in(oracle.train(training), "contiguous", x, training)
            truth = _run_in(oracle, "channels_last", x, training)
        except Exception as error:  # whatever the model raises is the reason
            raise NoOracle(f"the plain model does not run in float64: {type(error).__name__}: {error}") from error
        result.compare(f"{mode} float64", truth, [other], _run(fused.train(training), call, training), True)


def _in_float32(oracle: nn.Module, plain: nn.Module, fused: nn.Module, x: Tensor, result: Result) -> Outcome:
    """In both layouts. Returns what the plain model gave in the last of them, in inference."""
    for mode in MODES:
        training = mode == "training"
        truth = _run(oracle.train(training), Call((x.double(),), {}), training)
        eager = {layout: _run_in(plain.train(training), layout, x, training) for layout in LAYOUTS}
        witnesses = list(eager.values())
        for other in (torch.backends.mkldnn.flags(enabled=False), *(() if training else (PackedConvolutions(),))):
            with other:
                witnesses.append(_run_in(plain, "contiguous", x, training))
        reasons: dict[nn.Module, str | None] = {}
        for layout in LAYOUTS:
            with observe.listening(reasons.__setitem__) if training else nullcontext():  # a listener rules replays out
                got = _run_in(fused.train(training), layout, x, training)
            result.compare(f"{mode} {layout}", truth, witnesses, got, False)
        result.in_training += Counter(reason for reason in reasons.values() if reason).most_common()
    return eager[layout]


def _run_in(model: nn.Module, layout: str, x: Tensor, gradients: bool) -> Outcome:
    """The outcome of a model whose weights and input are laid out so."""
    return _run(_in_layout(model, layout), Call((_laid_out(x, layout),), {}), gradients)


def _in_layout(model: nn.Module, layout: str) -> nn.Module:
    """model.to(memory_format=...), which refuses models with weights of five dimensions."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = _laid_out(parameter.data, layout)
    return model


def _laid_out(x: Tensor, layout: str) -> Tensor:
    return x.contiguous(memory_format=LAYOUTS[layout])


def _run(model: nn.Module, call: Call, gradients: bool) -> Outcome:
    return run(model, call, gradients=gradients, seed=0, round_to=torch.float32, autocast=None)


# -------------------------------------------------------------------------------------------- what is left unchanged


def _swap(model: nn.Module, result: Result) -> None:
    """fuse_ leaves state_dict, modules and parameters as they are, and is idempotent."""
    state, tree, parameters = _state(model), _tree(model), list(model.parameters())
    rows = fastres.fuse_(model).rows
    _require(result, "state_dict after fuse_", state == _state(model))
    _require(result, "modules after fuse_", tree == _tree(model))
    _require(result, "parameters after fuse_", all(p is q for p, q in zip(parameters, model.parameters(), strict=True)))
    _require(result, "fuse_ called twice", rows == fastres.fuse_(model).rows)


def _require(result: Result, what: str, holds: bool) -> None:
    if not holds:
        result.problems.append(f"{what} differs")


def _state(model: nn.Module) -> list[tuple[str, Any]]:
    """Keys in their order, with dtype, shape and bytes, or the value where it is no tensor."""
    state = model.state_dict()
    tensors = [(k, (v.dtype, v.shape, _bits(v)) if isinstance(v, Tensor) else repr(v)) for k, v in state.items()]
    return [*tensors, ("_metadata", repr(dict(getattr(state, "_metadata", {}))))]


def _bits(t: Tensor) -> bytes:
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""


def _tree(model: nn.Module) -> list[tuple[str, str, list[str]]]:
    """Path, repr's name and instance attributes of every module; hooks would be among the last."""
    return [(name, m._get_name(), sorted(m.__dict__)) for name, m in model.named_modules()]


def _same(a: Outcome, b: Outcome) -> bool:
    return a.keys() == b.keys() and all(_bits(a[key]) == _bits(b[key]) for key in a)


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy that went through pickle, if the plain model can be pickled."""
    model = copy.deepcopy(model)
    try:
        return pickle.loads(pickle.dumps(model))
    except Exception as error:  # what classes raise that refuse to be pickled differs
        try:
            pickle.dumps(fastres.unfuse_(copy.deepcopy(model)))
        except Exception:
            return model
        raise AssertionError("the plain model can be pickled, the fused one cannot") from error


def _explain(model: nn.Module, x: Tensor, result: Result) -> None:
    """Which operations run fused, and why the others do not."""
    rows = fastres.explain(model.eval(), x).rows
    result.total = {kind: sum(row.kind == kind for row in rows) for kind in KINDS}
    result.fused = {kind: sum(row.kind == kind and row.fused for row in rows) for kind in KINDS}
    result.reasons = Counter(row.reason for row in rows if not row.fused).most_common()
    if not result.reasons and sum(result.fused.values()) < sum(result.total.values()):
        result.problems.append("not all is fused, and no reason given")


# ------------------------------------------------------------------------------------------------------- preparation


def norms(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that normalise and have a weight and a bias per channel, frozen ones included."""
    for module in model.modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(weight, Tensor) and isinstance(bias, Tensor) and weight.shape == bias.shape and weight.dim() == 1:
            yield module


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Random values where initialisation left zeros (the last batch norm of a block), which would hide what is there;
    dropout off."""
    for module in norms(model):
        module.weight.uniform_(0.5, 1.5)
        module.bias.uniform_(-0.3, 0.3)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0


@torch.no_grad()
def _keep_away_from_kinks(model: nn.Module) -> None:
    for module in norms(model):
        module.weight.fill_(CLEAR_STD).mul_(1 + 0.1 * torch.randn_like(module.weight))
        module.bias.fill_(CLEAR_MEAN)[1::2].neg_()
        module.bias.mul_(1 + 0.1 * torch.randn_like(module.bias))


@torch.no_grad()
def _calibrate(model: nn.Module, x: Tensor, batches: int) -> None:
    """Running statistics of a few batches like x, by forwards in training mode; frozen batch norms get those of the
    last one."""
    with _averaging(model), _frozen_ones_follow(model):
        model.train()
        for _ in range(batches):
            model(x + 0.5 * torch.randn_like(x))


@contextmanager
def _averaging(model: nn.Module) -> Iterator[None]:
    """Inside, running statistics become the mean over the batches seen."""
    batch_norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    momenta = [m.momentum for m in batch_norms]
    for module in batch_norms:
        module.reset_running_stats()
        module.momentum = None
    yield
    for module, momentum in zip(batch_norms, momenta, strict=True):
        module.momentum = momentum


@contextmanager
def _frozen_ones_follow(model: nn.Module) -> Iterator[None]:
    def follow(module: Any, args: tuple[Tensor, ...]) -> None:
        module.running_mean.copy_(args[0].mean((0, 2, 3)))
        module.running_var.copy_(args[0].var((0, 2, 3), unbiased=False))

    frozen = [m for m in model.modules() if "frozenbatchnorm" in type(m).__name__.lower()]
    handles = [module.register_forward_pre_hook(follow) for module in frozen]
    yield
    for handle in handles:
        handle.remove()
