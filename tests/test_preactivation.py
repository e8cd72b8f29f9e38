"""Pre-activation and plain networks fused: against float64, and eager wherever the fast path may not run."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from _compare import (
    assert_path,
    assert_same,
    block,
    check,
    check_error,
    check_numbers,
    image,
    modes,
    randomise,
    set_mode,
    some_kernels,
    step,
    watched,
)
from test_model_family import small
from torch import Tensor, nn

import fastres
from fastres import functional, models, replay
from fastres.kernels import extension
from fastres.saved import SavedTensors

#: Networks: class, block, options.
NETWORKS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "v2-basic": (models.PreActResNet, models.PreActBasicBlock, {}),
    "v2-bottleneck": (models.PreActResNet, models.PreActBottleneck, {}),
    "v2-cifar-a": (models.PreActCifarResNet, models.PreActBasicBlock, {}),
    "v2-cifar-c": (models.PreActCifarResNet, models.PreActBottleneck, {"shortcut": "C"}),
    "plain-basic": (models.ResNet, models.PlainBasicBlock, {}),
    "plain-bottleneck": (models.ResNet, models.PlainBottleneck, {}),
    "plain-cifar": (models.CifarResNet, models.PlainBasicBlock, {}),
    "v1-c": (models.ResNet, models.Bottleneck, {"stride_in_1x1": True, "shortcut": "C"}),
    "v1-a": (models.ResNet, models.BasicBlock, {"shortcut": "A"}),
}
networks = pytest.mark.parametrize("name", NETWORKS)

BLOCKS = (models.PreActBasicBlock, models.PreActBottleneck, models.PlainBasicBlock, models.PlainBottleneck)
blocks = pytest.mark.parametrize("kind", BLOCKS)


def network(name: str) -> nn.Module:
    kind, block, options = NETWORKS[name]
    return small(kind, block, **options)


def one(kind: Any, width: int = 16, **options: Any) -> nn.Module:
    return randomise(kind(width, width // kind.expansion, **options))


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with some_kernels():
        yield


@modes
@pytest.mark.parametrize("option", [None, *"ABC"])
@blocks
def test_numbers(kind: Any, option: str | None, mode: str) -> None:
    """Outputs, gradients and running statistics, against float64 with eager as witness."""
    options: dict[str, Any] = {} if option is None else {"stride": 2}
    if kind.residual and option is not None:
        options["downsample"] = models.make_shortcut(option, 16, 16, 2, preactivation=True)
    check_numbers(one(kind, **options), image(), mode)
    if kind.residual:  # the first block of a network
        first: Any = one(kind, **options)
        first.bn1 = None
        check_numbers(first, image(), mode)


@blocks
@modes
def test_float64(kind: Any, mode: str) -> None:
    check(one(kind).double(), image().double(), mode, tolerance=1e-12)


@blocks
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(kind: Any, dtype: torch.dtype) -> None:
    for mode in ("eval", "train"):
        certificate = fastres.verify(one(kind), image(), mode=mode, dtype=dtype)
        assert certificate.ok, str(certificate)


@networks
@modes
def test_networks(name: str, mode: str) -> None:
    check(network(name), image(3, n=2, size=32), mode, tolerance=1e-4)


@blocks
@modes
def test_contiguous_and_autocast(kind: Any, mode: str) -> None:
    check(one(kind), image(order=torch.contiguous_format), mode)
    with torch.autocast("cpu", torch.bfloat16):
        check(one(kind), image(), mode, tolerance=0.1)


@networks
def test_everything_is_covered(name: str) -> None:
    """But for convolutions whose output the fused part takes: the stem's and bare projections."""
    model = network(name)
    report = fastres.fuse_(model)
    left = [row.name for row in report.rows if not row.fused]
    assert all(name == "conv1" or name.endswith("downsample") for name in left)
    for training in (True, False):
        ran = fastres.explain(model.train(training), image(3, n=2, size=32))
        # In inference a kernel may take the stem's convolution along.
        assert {row.name for row in ran.rows if not row.fused} <= set(left)
    added = {row.name for row in report.rows if row.kind == "add"}
    assert bool(added) == (not name.startswith("plain"))


@networks
def test_verify_certifies(name: str) -> None:
    """Every site and the whole network: outputs, gradients, running statistics against float64."""
    for mode in ("eval", "train"):
        certificate = fastres.verify(network(name), torch.randn(4, 3, 32, 32), mode=mode)
        assert certificate.ok and certificate.fused_sites >= 3, str(certificate)


@pytest.mark.skipif(not extension.available(), reason="replay is for the compiled kernels")
@networks
def test_inference_is_replayed_and_notices_changes(name: str) -> None:
    eager = network(name).eval()
    fused: Any = copy.deepcopy(eager)
    fastres.fuse_(fused)
    x = image(3, n=2, size=32)
    with torch.no_grad():
        for _ in range(3):
            fused(x)
        assert isinstance(replay._replays.get(fused), replay._Replay)
        for change in (
            lambda m: m.layer2[0].conv2.weight.mul_(1.5),
            lambda m: m.layer1[1].bn1.bias.add_(1.0),
            lambda m: m.layer1[1].bn1.running_mean.data.add_(0.5),
            lambda m: setattr(m.layer2[0], "relu", nn.ReLU6()),
        ):
            change(eager), change(fused)
            torch.testing.assert_close(fused(x), eager(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("child", ["bn1", "conv1", "bn2", "conv2", "relu"])
@blocks
@modes
def test_hooks_on_children(kind: Any, child: str, mode: str) -> None:
    seen: list[Tensor] = []
    check(
        one(kind),
        image(),
        mode,
        path="eager",
        reason=f"hooks on {child}",
        after=lambda m: m.get_submodule(child).register_forward_hook(lambda *args: seen.append(args[2])),
    )

    assert seen


@blocks
@modes
def test_replaced_children(kind: Any, mode: str) -> None:
    norm = nn.GroupNorm(1, 16 // kind.expansion)
    check(one(kind), image(), mode, path="eager", reason="GroupNorm", after=lambda m: _set(m, "bn2", norm))
    check(one(kind), image(), mode, path="eager", reason="relu is a ReLU6", after=lambda m: _set(m, "relu", nn.ReLU6()))


def _set(module: nn.Module, name: str, child: nn.Module) -> None:
    setattr(module, name, child)


@modes
@pytest.mark.parametrize("kind", BLOCKS[:2])
def test_shortcuts_of_ones_own(kind: Any, mode: str) -> None:
    """Other modules, other dtypes and shapes are what they are in eager."""
    for downsample in (
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)),
        nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Conv2d(16, 16, 1)),
        nn.AdaptiveAvgPool2d(1),  # broadcast by eager's +=
        models.ZeroPadShortcut(16, 1),
    ):
        check(one(kind, downsample=randomise(downsample)), image(), mode, path="block")


@modes
@pytest.mark.parametrize("kind", BLOCKS[:2])
def test_shortcut_that_does_not_fit(kind: Any, mode: str) -> None:
    check_error(one(kind, stride=2), image(), mode, same_message=False)
    hopeless = one(kind)
    hopeless.downsample = _Nothing()
    check_error(hopeless, image(), mode, same_message=False)


class _Nothing(nn.Module):
    def forward(self, x: Tensor) -> None:
        return None


@modes
@pytest.mark.parametrize("kind", BLOCKS[:2])
def test_batch_norm_shared_with_the_shortcut(kind: Any, mode: str) -> None:
    model: Any = one(kind)
    shared = nn.BatchNorm2d(16)
    model.bn1, model.downsample = shared, nn.Sequential(nn.Conv2d(16, 16, 1), shared)
    check(randomise(model), image(), mode, path="eager", reason="shared with the shortcut", steps=2)


@blocks
def test_sync_batch_norm_and_frozen_statistics(kind: Any) -> None:
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(one(kind))
    check(converted, image(), "eval")
    frozen = one(kind).train()
    for module in frozen.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    check(frozen, image())


@blocks
def test_state_copies_and_undoing(kind: Any) -> None:
    model = one(kind)
    before = (repr(model), list(model.state_dict()), type(model))
    fused = copy.deepcopy(model)
    fastres.fuse_(fused)
    assert isinstance(fused, kind) and (repr(fused), list(fused.state_dict())) == before[:2]
    again = pickle.loads(pickle.dumps(copy.deepcopy(fused)))
    x = image()
    with watched() as seen:
        outcome = step(again, x, "train")
    assert_path(seen, "fast")
    assert_same(outcome, step(model, x, "train"))
    assert type(fastres.unfuse_(again)) is before[2]


@blocks
def test_own_forward_is_traced(kind: Any) -> None:
    class Mine(kind):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    check(one(Mine), image(), "train")


@pytest.mark.parametrize("name", ["v2-cifar-a", "plain-cifar"])
def test_nan_and_infinity(name: str) -> None:
    for value in (float("nan"), float("inf")):
        x = image(3, n=2, size=16)
        x[0, 1, 3, 4] = value
        model = network(name)
        eager, fused = set_mode(copy.deepcopy(model), "eval"), set_mode(copy.deepcopy(model), "eval")
        fastres.fuse_(fused)
        with torch.no_grad():
            assert torch.equal(fused(x).isfinite(), eager(x).isfinite())


@pytest.mark.parametrize("kind", BLOCKS[:2])
def test_second_derivatives(kind: Any) -> None:
    """A gradient penalty, in float64."""
    model = one(kind).double()
    fused = copy.deepcopy(model)
    fastres.fuse_(fused)
    x, grads = image().double(), []
    for m in (fused, model):
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(m(leaf).square().sum(), leaf, create_graph=True)
        grads.append(torch.autograd.grad(slope.square().sum(), [leaf, *m.parameters()]))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8 * float(want.abs().max() + 1))


@pytest.mark.parametrize("kind", [*BLOCKS[:3], models.Bottleneck])
def test_compile_and_export(kind: Any) -> None:
    model = one(kind)
    fastres.fuse_(model)
    x = image()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    want = step(copy.deepcopy(model), x, "train")
    assert_same(step(model, x, "train", call=lambda x: compiled(x)), want)
    exported = torch.export.export(model.eval(), (x,))
    torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_block_of_v1_may_have_a_bare_projection() -> None:
    model: Any = block("fastres", "BasicBlock")
    model.downsample = nn.Conv2d(16, 16, 1)
    for mode in ("train", "inference"):
        check(model, image(), mode)


@pytest.mark.skipif(not extension.available(), reason="without kernels blocks run eagerly")
@pytest.mark.parametrize("kind", BLOCKS[:2])
def test_saves_no_activation_that_can_be_computed_again(kind: Any) -> None:
    """Of a block in training: its input and the raw outputs of the convolutions before a batch norm, nothing else."""
    model = one(kind, width=64)
    fastres.fuse_(model)
    x = image(64, n=4, size=16).requires_grad_()
    with SavedTensors(model.train()) as saved:
        y = model(x)
    inner = 4 * 16 * 16 * 4 * (64 // kind.expansion)
    raw = inner if kind.expansion == 1 else 2 * inner
    assert x.nbytes + raw <= saved.bytes < 1.02 * (x.nbytes + raw)
    y.sum().backward()


def test_recomputed_activations_are_the_same_bit_for_bit() -> None:
    x, (a, b) = image(8), (torch.randn(8, 8, 3, 3) for _ in range(2))
    values = [t.requires_grad_() for t in (x, a, b)]

    def chain(recompute: bool) -> Tensor:
        y = functional.bn_act(x, None, None, training=True, recompute=recompute)
        y = functional.conv_bn_act(y, a, None, None, training=True, padding=1, recompute=recompute)
        return functional.conv_bias_act(y, b, padding=1, act="identity").sin().sum()

    for got, want in zip(*(torch.autograd.grad(chain(recompute), values) for recompute in (True, False)), strict=True):
        assert torch.equal(got, want)
