"""How kernels are launched, without a GPU: on the tensors' device and the current stream, and in whole training steps
that wait for nothing and allocate by PyTorch alone, as a CUDA graph demands."""

# ruff: noqa: E402 (what imports Triton follows importorskip)

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from _triton import serving
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget

import fastres
from fastres.kernels import table
from fastres.kernels.triton import elementwise
from fastres.kernels.triton.launch import launch
from fastres.kernels.triton.record import Launch, recording
from fastres.models import resnet18, resnet50


class Devices:
    """Stands for torch.cuda where there is none: which device is current."""

    def __init__(self, monkeypatch, current):
        self.current = current
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "device", self.switched)

    @contextmanager
    def switched(self, device):
        before, self.current = self.current, device.index
        yield
        self.current = before


@pytest.mark.parametrize("current", [0, 1])
def test_launches_go_to_the_device_of_the_tensors(monkeypatch, current):
    devices, seen = Devices(monkeypatch, current), []

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: seen.append((grid, devices.current, arguments["x"].device.index))

    with FakeTensorMode():
        x = torch.empty(8, device="cuda:1")
        launch(Kernel(), (3,), size=8, x=x)
    assert seen == [((3,), 1, 1)] and devices.current == current


def test_launches_go_to_the_current_stream(monkeypatch):
    """Through the whole of Triton's JIT, with a driver that keeps what it is to launch."""
    Devices(monkeypatch, None)  # that of tensors without data
    launched = []

    class Driver:
        utils = SimpleNamespace(
            load_binary=lambda *args: (None, 77, 32, 0, 1024),
            get_device_properties=lambda *args: {"max_shared_mem": 1 << 20},
        )
        streams = iter((11, 12))

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return next(self.streams)

        def launcher_cls(self, source, metadata):
            return lambda x, y, z, stream, function, *args: launched.append(((x, y, z), stream, function))

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(triton.compiler.compiler, "max_shared_mem", lambda device: 1 << 20)
    x = torch.empty(2, 16, 16, 16, dtype=torch.bfloat16, device="meta")
    try:
        for _ in range(2):
            elementwise.add_act(x, x, True)
    finally:
        elementwise.add_act_kernel.device_caches.clear()
    assert launched == [((2, 1, 1), 11, 77), ((2, 1, 1), 12, 77)]


# Whole steps


class Launching(TorchDispatchMode):
    """On tensors without data our ops launch their kernels, where PyTorch would ask for shapes only, and no operation
    may have a result that is somewhere else. Whatever asks for a value fails by itself."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastres":
            name = func._schema.name.removeprefix("fastres::")
            with self:
                return table.select(name, args).run(*args)
        found = func(*args, **(kwargs or {}))
        for t in found if isinstance(found, tuple | list) else (found,):
            assert not isinstance(t, torch.Tensor) or t.is_meta, f"{func} gives a tensor on {t.device}"
        return found


def images(batch: int, size: int) -> torch.Tensor:
    x = torch.empty(batch, 3, size, size, dtype=torch.bfloat16, device="meta")
    return x.contiguous(memory_format=torch.channels_last)


def training_step(model: nn.Module, batch: int, size: int) -> list[Launch]:
    """What a step of a network launches."""
    x = images(batch, size)
    with serving("meta"), recording() as launches, Launching():
        y = model(x)
        y.backward(torch.empty_like(y))
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())
    return launches


def on_meta(model: nn.Module) -> nn.Module:
    fastres.fuse_(model)
    return model.to("meta", torch.bfloat16, memory_format=torch.channels_last).train()


@pytest.mark.parametrize("make", [resnet18, resnet50])
def test_a_training_step_asks_for_no_value_and_stays_on_its_device(make):
    model = on_meta(make(fused=False))
    launches = training_step(model, 256, 224)
    counts = Counter(one.name for one in launches)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert counts["update_running_stats_kernel"] == norms
    assert counts["maxpool_kernel"] == counts["apply_pooled_gradient_kernel"] == 1
    joins = {resnet18: 3, resnet50: 0}[make]  # see recipes/projection.py
    assert counts["join_kernel"] == counts["apply_join_gradient_kernel"] == joins
    expansions = {resnet18: 0, resnet50: 17}[make]  # 16 blocks, and the shortcut of the first, without a stride
    assert counts["gram_kernel"] == expansions
    assert {t.device.type for one in launches for t in one.tensors().values()} == {"meta"}


@pytest.mark.parametrize("make", [resnet18, resnet50])
def test_inference_asks_for_no_value(make):
    model = on_meta(make(fused=False)).eval()
    x = images(8, 64)
    with serving("meta"), recording(), Launching(), torch.no_grad():
        for _ in range(3):
            assert model(x).shape == (8, 1000)
