"""Parameters that are elsewhere between calls: hooks that bring them (as accelerate's), meta devices, swapped tensors.
Blocks whose parameters come and go run as they are, and nothing of theirs is kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _distributed import NHWC, network, ran
from torch import Tensor, nn

import fastres
from fastres import folding
from fastres.kernels import extension
from fastres.recipes.residual import FusedModule
from fastres.testing import relative_error

needs_extension = pytest.mark.skipif(
    not extension.available(), reason=f"compiled kernels are not loaded: {extension.load_error()}"
)


def image() -> Tensor:
    return torch.randn(2, 3, 16, 16).contiguous(memory_format=NHWC)


class Offload:
    """What accelerate's AlignDevicesHook does: tensors are on the meta device, but during a call.

    everything: of the module's children too.
    """

    def __init__(self, everything: bool = False) -> None:
        self.offload, self.everything = True, everything

    def attach(self, module: nn.Module) -> None:
        self.kept = {name: t.detach().clone() for name, t in module.named_parameters(recurse=self.everything)}
        module._old_forward, module._hf_hook = module.forward, self  # type: ignore[assignment]
        self.take(module)

        def forward(module: Any, *args: Any) -> Any:
            module._hf_hook.bring(module)
            y = module._old_forward(*args)
            module._hf_hook.take(module)
            return y

        module.forward = functools.update_wrapper(functools.partial(forward, module), module._old_forward)

    def bring(self, module: nn.Module) -> None:
        for name, value in self.kept.items():
            owner, _, last = name.rpartition(".")
            module.get_submodule(owner)._parameters[last] = nn.Parameter(value.clone(), requires_grad=False)

    def take(self, module: nn.Module) -> None:
        for name in self.kept:
            owner, _, last = name.rpartition(".")
            parameters = module.get_submodule(owner)._parameters
            parameters[last] = nn.Parameter(parameters[last].to("meta"), requires_grad=False)


def leaves(model: nn.Module) -> None:
    """A hook for each module with parameters of its own, as cpu_offload."""
    for module in list(model.modules()):
        if module._parameters and any(p is not None for p in module._parameters.values()):
            Offload().attach(module)


def blocks(model: nn.Module) -> None:
    """A hook for each block, which brings all that is in it, and for the rest."""
    for block in (model.layer1[0], model.layer2[0], model.layer3):
        Offload(everything=True).attach(block)
    for module in (model.conv1, model.bn1, model.fc):
        Offload().attach(module)


def accelerate(model: nn.Module) -> None:
    hooks = pytest.importorskip("accelerate", reason="accelerate is not installed: its look-alike is tested")
    hooks.cpu_offload(model, torch.device("cpu"))


def accelerate_blocks(model: nn.Module) -> None:
    hooks = pytest.importorskip("accelerate", reason="accelerate is not installed: its look-alike is tested")
    hooks.cpu_offload(model, torch.device("cpu"), preload_module_classes=["Bottleneck", "FusedBottleneck"])


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("offload", [leaves, blocks, accelerate, accelerate_blocks], ids=lambda f: f.__name__)
def test_offloaded(offload: Callable[[nn.Module], None], when: str) -> None:
    """fuse_ before or after: eager's numbers, the reason, nothing kept; and un-swapped again."""
    model, plain, x = network().eval(), network().eval(), image()
    if when == "before":
        fastres.fuse_(model)
    offload(model)
    if when == "after":
        assert fastres.fuse_(model).fused == 0
    want = plain(x)
    with torch.no_grad():
        for _ in range(3):
            with ran() as reasons:
                assert torch.equal(model(x), want)
            assert None not in reasons
    assert folding.packed_bytes(model) == 0
    assert all(p.is_meta for p in model.parameters())
    report = fastres.explain(model, x)
    assert report.fused == 0 and "an offload hook manages" in str(report), str(report)

    with torch.no_grad(), fastres.disabled(model):
        assert torch.equal(model(x), want)
    with torch.no_grad():
        assert torch.equal(model(x), want)
    fastres.unfuse_(model)
    assert not any(isinstance(module, FusedModule) for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(x), want)


@needs_extension
def test_offloaded_in_part() -> None:
    """The other blocks stay fused."""
    model, plain, x = network().eval(), network().eval(), image()
    fastres.fuse_(model)
    Offload(everything=True).attach(model.layer2[0])
    with torch.no_grad(), ran() as reasons:
        got = model(x)
    assert reasons == {None, "an offload hook manages the block"}
    assert relative_error(got, plain(x)) < 1e-5


@needs_extension
def test_hook_that_only_moves_inputs() -> None:
    """accelerate's hooks without offload, as for a model on several devices: parameters stay, so fused code runs."""
    model, plain, x = network().eval(), network().eval(), image()
    fastres.fuse_(model)
    block = model.layer2[0]
    hook = Offload()
    hook.offload, hook.kept, forward = False, {}, block.forward
    block._hf_hook, block.forward = hook, lambda x: forward(x.clone())
    with torch.no_grad(), ran() as reasons:
        got = model(x)
    assert reasons == {None}
    assert relative_error(got, plain(x)) < 1e-5


@needs_extension
@pytest.mark.parametrize("hooked", ["block", "children"])
def test_hooks_that_bring_parameters(hooked: str) -> None:
    """Forward hooks of torch.nn, as of ZeRO-3: those of children switch fused code off, a block's run around it."""
    model, plain, x = network().eval(), network().eval(), image()
    fastres.fuse_(model)
    block = model.layer2[0]
    for module in [block] if hooked == "block" else [m for m in block.modules() if m._parameters]:
        offload = Offload(everything=hooked == "block")
        offload.kept = {n: p.detach().clone() for n, p in module.named_parameters(recurse=offload.everything)}
        offload.take(module)
        module.register_forward_pre_hook(lambda module, _, o=offload: o.bring(module))
        module.register_forward_hook(lambda module, *_, o=offload: o.take(module))
    with torch.no_grad():
        for factor in (1.0, 1.0, 1.5):
            if hooked == "block":
                offload.kept["conv2.weight"] *= factor
                plain.layer2[0].conv2.weight.mul_(factor)
            with ran() as reasons:
                got = model(x)
            assert relative_error(got, plain(x)) < 1e-5
            assert reasons == ({None} if hooked == "block" else {None, "hooks on conv1"})


@pytest.mark.parametrize("way", ["assign", "to_empty", "swap"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_from_a_meta_device(way: str, when: str) -> None:
    """Built without memory; fused before or after there are weights."""
    state, x = network(3).state_dict(), image()
    with torch.device("meta"):
        model = network()
    if when == "before":
        fastres.fuse_(model)
    if way == "assign":
        model.load_state_dict(state, assign=True)
    else:
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(way == "swap")
        try:
            model.to_empty(device="cpu")
            model.load_state_dict(state)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)
    if when == "after":
        fastres.fuse_(model)
    plain = network(3)
    for train in (True, False, False):
        model.train(train)
        plain.train(train)
        with torch.set_grad_enabled(train):
            assert relative_error(model(x), plain(x)) < 1e-5
    fastres.refresh_(model)  # a recorded inference holds tensors, and swap_tensors wants to be the only one who does
    with torch.no_grad():
        for p, other in zip(model.parameters(), plain.parameters(), strict=True):
            torch.utils.swap_tensors(p, nn.Parameter(p * 1.25))
            other.mul_(1.25)
        assert relative_error(model(x), plain(x)) < 1e-5


def test_a_checkpoint_counts_as_eager() -> None:
    """Its second forward ends where the last tensor for backward is there: by then statistics are written."""
    for kind in (nn.BatchNorm2d, nn.SyncBatchNorm):
        found = []
        for fuse in (False, True):
            block = network().layer1[0].to(memory_format=NHWC)
            if kind is nn.SyncBatchNorm:
                block = nn.SyncBatchNorm.convert_sync_batchnorm(block)
            if fuse:
                fastres.fuse_(block)
            torch.manual_seed(0)
            x = torch.randn(4, 16, 8, 8).contiguous(memory_format=NHWC).requires_grad_()
            torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).square().sum().backward()
            found.append(dict(block.named_buffers()))
        for name, want in found[0].items():
            assert relative_error(found[1][name], want) < 1e-5, name
