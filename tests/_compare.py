"""A fused model beside the eager one: small blocks, a step with all that it leaves behind, and which path it took."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import _torchvision
import pytest
import torch
from torch import Tensor, nn

import fastres
import fastres.models.resnet
from fastres import folding, observe
from fastres.kernels import extension
from fastres.testing import LAYOUTS, budget, relative_error

#: Libraries whose blocks fuse_ knows.
LIBRARIES = ("fastres", "torchvision")
KINDS = ("BasicBlock", "Bottleneck")
#: "train" and "eval" with gradients; "inference" is eval without, where folded weights serve.
MODES = ("train", "eval", "inference")

libraries = pytest.mark.parametrize("library", LIBRARIES)
kinds = pytest.mark.parametrize("kind", KINDS)
modes = pytest.mark.parametrize("mode", MODES)

layouts = pytest.mark.parametrize("layout", LAYOUTS)

Outcome = dict[str, Tensor | None]
Seen = list[tuple[nn.Module, str | None]]


@contextmanager
def some_kernels() -> Iterator[None]:
    """Makes the fast path possible: without the extension it has to be asked for, by forcing the reference."""
    with nullcontext() if extension.available() else fastres.use_kernels("reference"):
        yield


def resnet(library: str) -> ModuleType:
    """The module with BasicBlock, Bottleneck, ResNet and resnet18 of a library."""
    if library == "fastres":
        return fastres.models.resnet
    found, reason = _torchvision.load()
    if found is None:
        pytest.skip(reason)
    return found.models.resnet


def network(library: str = "fastres", **options: Any) -> nn.Module:
    """An unfused ResNet for 32x32 images: the stem and two of the four stages, 10 classes, random batch norms."""
    models = resnet(library)
    model = models.ResNet(models.BasicBlock, [1, 1, 1, 1], num_classes=10, **options)
    model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 10)
    return randomise(model)


def block(
    library: str = "fastres", kind: str = "Bottleneck", width: int = 16, *, stride: int = 1, **options: Any
) -> nn.Module:
    """An unfused residual block with random batch norms; with stride 2 a projection shortcut. Input: see `image`."""
    cls = getattr(resnet(library), kind)
    planes = width // cls.expansion
    norm_layer = options.get("norm_layer", nn.BatchNorm2d)
    if stride != 1:
        options["downsample"] = nn.Sequential(nn.Conv2d(width, width, 1, stride, bias=False), norm_layer(width))
    return randomise(cls(width, planes, stride, **options))


def image(channels: int = 16, *, n: int = 3, size: int = 7, order: torch.memory_format = torch.channels_last) -> Tensor:
    """channels_last, which makes convolutions our own kernels' whatever the layout of their weights is."""
    return torch.randn(n, channels, size, size).contiguous(memory_format=order)


def randomise(model: nn.Module) -> nn.Module:
    """Gives every batch norm weights and statistics as after some training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                if module.affine:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(0.0, 0.3)
                if module.running_mean is not None:
                    module.running_mean.normal_(0.0, 0.3)
                    module.running_var.uniform_(0.5, 2.0)
    return model


def biased(model: nn.Module) -> nn.Module:
    """Gives every convolution a bias."""
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d):
            conv.bias = nn.Parameter(torch.randn(conv.out_channels))
    return model


def plainly(module: nn.Module) -> nn.Module:
    """A copy of a module of fastres.nn that keeps to its plain path: a hook is on every child."""
    module = copy.deepcopy(module)
    for child in module.children():
        child.register_forward_hook(lambda *args: None)
    return module


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def kept(conv: nn.Module) -> Any:
    """What is kept folded for this convolution, or None."""
    return folding._entries.get(conv)


def set_mode(model: nn.Module, mode: str | None) -> nn.Module:
    return model if mode is None else model.train(mode == "train")


def step(model: nn.Module, x: Tensor, mode: str | None = None, *, call: Callable[..., Any] | None = None) -> Outcome:
    """One forward, and a backward where there is history: output, gradients, buffers, by name. Leaves x alone."""
    set_mode(model, mode)
    model.zero_grad(set_to_none=True)
    leaf = x.detach()
    if x.is_floating_point() and mode != "inference":
        leaf.requires_grad_()
    before, version = leaf.detach().clone(), leaf._version
    with torch.no_grad() if mode == "inference" else nullcontext():
        y = (call or model)(leaf)
    if y.requires_grad:
        generator = torch.Generator().manual_seed(5)
        y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype))
    assert leaf._version == version and torch.equal(leaf.nan_to_num(), before.nan_to_num()), "the input was written to"
    outcome: Outcome = {"y": y, "x.grad": leaf.grad}
    outcome |= {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    return outcome | dict(buffers(model))


def buffers(model: nn.Module) -> Outcome:
    return {name: b.detach().clone() for name, b in model.named_buffers()}


def assert_same(got: Outcome, want: Outcome, tolerance: float = 1e-5) -> None:
    """The same names, dtypes, shapes and history, y in the same layout, values within a tolerance; integers exactly."""
    assert got.keys() == want.keys()
    for name, w in want.items():
        g = got[name]
        assert (g is None) == (w is None), f"{name}: {'no ' if g is None else ''}tensor, unlike eager"
        if g is None or w is None:
            continue
        assert g.dtype is w.dtype and g.shape == w.shape and g.device == w.device, name
        assert g.requires_grad == w.requires_grad, name
        if name == "y":
            assert g.stride() == w.stride(), f"y has strides {g.stride()}, eager {w.stride()}"
        if not w.is_floating_point():
            assert torch.equal(g, w), name
            continue
        g, w = g.detach().double(), w.detach().double()
        assert torch.equal(g.isnan(), w.isnan()) and torch.equal(g.isinf(), w.isinf()), f"{name}: NaN or Inf elsewhere"
        error = _norm(g - w)
        scale = 1 + _norm(w)
        if name.endswith("bias.grad"):  # zero but for rounding for a convolution before a batch norm
            scale += _norm(want.get(name.replace("bias.grad", "weight.grad")))
        assert error <= tolerance * scale, f"{name}: {error / scale:.2e} off"


def _norm(t: Tensor | None) -> float:
    return 0.0 if t is None else float(t.detach().double().nan_to_num(0, 0, 0).norm())


def assert_parity(got: Outcome, witness: Outcome, truth: Outcome, dtype: torch.dtype) -> None:
    """Every value at most twice as far from float64 as eager's, or as far as Winograd convolutions may be."""
    assert got.keys() == witness.keys() == truth.keys()
    for name, t in truth.items():
        g, w = got[name], witness[name]
        assert (g is None) == (w is None) == (t is None), name
        if g is None or w is None or t is None:
            continue
        assert g.dtype is w.dtype, name
        if name.endswith("num_batches_tracked"):
            assert torch.equal(g, w), name
            continue
        limit = budget(relative_error(w, t), dtype, summed=name.endswith(".grad"), winograd=True)
        error = relative_error(g, t)
        assert error <= limit, f"{name}: error {error:.2e}, budget {limit:.2e}"


def off_the_kinks(model: nn.Module, x: Tensor, mode: str | None) -> Tensor:
    """x, moved a little until no ReLU's input is within rounding of 0, where two kernels' gradients may jump."""
    if x.dtype is not torch.float32 or x.numel() == 0:
        return x
    probe, smallest = set_mode(copy.deepcopy(model), mode), []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        z = args[0].detach().abs()
        smallest.append(float(z[z > 0].min()) if bool((z > 0).any()) else 1.0)

    for module in probe.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(note)
    for _ in range(20):
        smallest.clear()
        with torch.no_grad():
            probe(x)
        if min(smallest, default=1.0) > 4e-6:
            break
        x = x + 1e-3 * torch.randn_like(x)
    return x


@contextmanager
def watched() -> Iterator[Seen]:
    """Collects what every fused module says about its path: (module, reason), reason None on the fast path."""
    seen: Seen = []
    with observe.listening(lambda module, reason: seen.append((module, reason))):
        yield seen


def assert_path(seen: Seen, path: str, reason: str = "") -> None:
    """Asserts the path taken.

    Args:
        seen: from `watched`.
        path: "fast" (all of it), "block" (fast but for shortcuts), "eager" (the first module that ran says why, and
            it matches `reason`), "any", or "none" (nothing is swapped).
        reason: a regular expression.
    """
    if path == "any":
        return
    if path == "none":
        assert not seen, "something ran fused"
        return
    assert seen, "no fused module ran"
    if path == "block":
        assert [why for module, why in seen if why is not None and isinstance(module, fastres.fuse.FusedModule)] == []
    elif path == "fast":
        assert [why for _, why in seen if why is not None] == []
    else:
        why = seen[0][1]
        assert why is not None, "the fast path was taken"
        assert re.search(reason, why), f"reason {why!r} does not match {reason!r}"


def check(
    model: nn.Module,
    x: Tensor,
    mode: str | None = None,
    *,
    path: str = "fast",
    reason: str = "",
    tolerance: float = 1e-5,
    steps: int = 1,
    after: Callable[[nn.Module], Any] | None = None,
) -> nn.Module:
    """Runs copies of `model` eager and fused on x, asserts the path taken and the same outcome; returns the fused copy.

    `after`: what to do to either copy, after the swap.
    """
    eager, fused = copy.deepcopy(model), copy.deepcopy(model)
    fastres.fuse_(fused)
    for copied in (eager, fused):
        if after is not None:
            after(copied)
    x = off_the_kinks(eager, x, mode)
    for _ in range(steps):
        want = step(eager, x, mode)
        with watched() as seen:
            got = step(fused, x, mode)
        assert_path(seen, path, reason)
        assert_same(got, want, tolerance)
    return fused


def check_numbers(model: nn.Module, x: Tensor, mode: str, *, path: str = "fast") -> None:
    """As `check`, against float64 and with eager as witness."""
    x = off_the_kinks(model, x, mode)
    truth = step(copy.deepcopy(model).double(), x.double(), mode)
    eager, fused = copy.deepcopy(model), copy.deepcopy(model)
    fastres.fuse_(fused)
    want = step(eager, x, mode)
    with watched() as seen:
        got = step(fused, x, mode)
    assert_path(seen, path)
    assert_parity(got, want, truth, x.dtype)


def check_error(
    model: nn.Module,
    x: Any,
    mode: str = "train",
    *,
    same_message: bool = True,
    same_state: bool = True,
    after: Callable[[nn.Module], Any] | None = None,
) -> Exception:
    """Both copies of `model` raise the same kind of error on x and leave the same state behind; returns the error."""
    eager, fused = set_mode(copy.deepcopy(model), mode), set_mode(copy.deepcopy(model), mode)
    fastres.fuse_(fused)
    errors = []
    for copied in (eager, fused):
        if after is not None:
            after(copied)
        with pytest.raises(Exception) as info, torch.no_grad() if mode == "inference" else nullcontext():
            copied(x)
        errors.append(info.value)
    assert type(errors[1]) is type(errors[0]), f"eager raised {errors[0]!r}, fused {errors[1]!r}"
    if same_message:
        assert str(errors[1]) == str(errors[0])
    if same_state:
        assert_same(buffers(fused), buffers(eager))
    return errors[1]


def assert_same_in_threads(eager: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """Inference of the fused model in four Python threads at once, each over eight images in another order."""
    images = [torch.randn_like(x) for _ in range(8)]
    start = threading.Barrier(4)
    with torch.no_grad():
        want = [eager(image) for image in images]

    def work(k: int) -> list[Tensor]:
        start.wait()
        with torch.no_grad():
            return [fused(images[(k + i) % 8]) for i in range(8)]

    with ThreadPoolExecutor(4) as pool:
        for k, got in enumerate(pool.map(work, range(4))):
            for i, y in enumerate(got):
                torch.testing.assert_close(y, want[(k + i) % 8], rtol=1e-4, atol=1e-4)
