"""`fastres bench` and benchmarks/gpu.py on a device: its clock, CUDA graphs, fp16. Here with fakes, or on a CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastres import images
from fastres.bench import contenders, graphs, machine, process, report, task
from fastres.kernels import table
from fastres.testing import relative_error

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
gpu, gpu_timing = (importlib.import_module(name) for name in ("gpu", "gpu_timing"))


def test_a_call_that_fails_does_not_stop_the_others() -> None:
    def broken(index: int) -> None:
        raise RuntimeError("no such kernel\nwith a long story")

    seen: list[int] = []
    times = gpu_timing.Stopwatch("cpu", 3, 1e-4).measure({"bad": broken, "good": seen.append}, sets=2)
    assert times["bad"] == {"failed": "RuntimeError: no such kernel"}
    assert len(times["good"]["samples"]) == 3 and times["good"]["seconds"] > 0
    assert set(seen) == {0, 1}
    assert gpu_timing.ratio(times, "good", "bad") is None
    assert gpu_timing.ratio({"a": {"seconds": 1.0}, "b": {"seconds": 3.0}}, "a", "b") == 3.0


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the programs ask of a CUDA device, without one. Every event is 8 ms after the one before; notes the order
    of what happens."""
    seen: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            seen.append("event")

        def synchronize(self) -> None:
            seen.append("wait")

        def elapsed_time(self, end: Any) -> float:
            return 8.0

    class Stream:
        def wait_stream(self, other: Any) -> None:
            seen.append("wait stream")

    class Graph:
        def replay(self) -> None:
            seen.append("replay")

    properties = {"name": "NVIDIA H200", "major": 9, "minor": 0, "multi_processor_count": 132}
    properties |= {"total_memory": 139 * 2**30, "L2_cache_size": 60 * 2**20}
    fakes: dict[str, Any] = {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": contextlib.nullcontext,
        "stream": contextlib.nullcontext,
        "current_stream": Stream,
        "_sleep": lambda cycles: seen.append("sleep"),
        "synchronize": lambda: None,
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_name": lambda: properties["name"],
        "get_device_properties": lambda device: SimpleNamespace(**properties),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return seen


def test_a_device_is_timed_by_its_own_clock(fake_cuda: list[str]) -> None:
    """It sleeps until all calls are queued; sets of buffers are together four times the cache."""
    watch = gpu_timing.Stopwatch("cuda", 3, turn_seconds=1e-9)
    assert [watch.sets(size) for size in (1, 10 * 2**20, 2**30)] == [64, 24, 2]
    times = watch.measure({"a": lambda index: fake_cuda.append("call")}, sets=2)
    assert times["a"]["samples"] == [8e-3] * 3
    turn = ["sleep", "event", "call", "event", "wait"]
    assert fake_cuda == ["call"] * 5 + turn * 3


def test_a_gpu_is_named(fake_cuda: list[str]) -> None:
    found = machine.gpu()
    assert (found["name"], found["capability"], found["l2_mib"]) == ("NVIDIA H200", "9.0", 60.0)
    line = report.machine_line({"machine": machine.describe() | {"gpu": found}, "date": "2026-01-02T03:04:05"})
    assert line.startswith("NVIDIA H200, torch ") and line.endswith(", 2026-01-02") and "driver" in line
    assert gpu.slug("cuda") == "nvidia-h200" and gpu.slug("cpu") == "cpu"


def test_a_capture_warms_up_first(fake_cuda: list[str]) -> None:
    replay, result = graphs.capture(lambda: fake_cuda.append("run") or "result", "cuda")
    replay()
    assert result == "result"
    assert fake_cuda == ["wait stream", *["run"] * 3, "wait stream", "run", "replay"]


def test_iterations_on_a_gpu_follow_each_other(fake_cuda: list[str], tmp_path: Path) -> None:
    photos = images.synthetic(2, 32)
    task.write_files(task.prepared_model("resnet18", photos), photos, tmp_path)
    contender = contenders.ChannelsLast(task.Task("resnet18", "infer", 1, "float32", "cpu", 32, 1, str(tmp_path)))
    contender.setup()
    contender.task = dataclasses.replace(contender.task, device="cuda")
    assert contender.timed(3) == [8e-3] * 3 and fake_cuda == ["event"] * 4


def test_kernels_of_triton_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert process.environment(1, "here")["TRITON_CACHE_DIR"] == "here/triton"
    monkeypatch.setenv("FASTRES_BENCH_TRITON", "/kept")
    found = process.environment(1, "here")
    assert found["TRITON_CACHE_DIR"] == "/kept" and found["TORCHINDUCTOR_CACHE_DIR"] == "here/inductor"


def test_a_captured_training_step_starts_where_eager_does(tmp_path: Path) -> None:
    """Its warm-up and capture leave no trace: the first replay is the first step, the second the second."""
    photos = images.synthetic(4, 32)
    task.write_files(task.prepared_model("resnet18", photos), photos, tmp_path)
    about = task.Task("resnet18", "train", 4, "float32", "cpu", 32, 1, str(tmp_path))
    plain, captured = contenders.Fastres(about), graphs.FastresGraph(about)
    for contender in (plain, captured):
        contender.setup()
        contender.step()
    for (name, a), b in zip(plain.model.state_dict().items(), captured.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    assert captured.saved() == plain.saved()


def test_contenders_of_a_gpu_compute_the_same(tmp_path: Path) -> None:
    photos = images.synthetic(16, 64)  # fewer values a channel would let rounding grow
    task.write_files(task.prepared_model("resnet18", photos), photos, tmp_path)
    about = task.Task("resnet18", "infer", 2, "float32", "cpu", 64, 1, str(tmp_path))
    logits = []
    for kind in (contenders.ChannelsLast, graphs.FastresGraphed, graphs.FastresCuda):
        contender = kind(about)
        contender.setup()
        contender.step()
        logits.append(contender.logits)
    for ours in logits[1:]:
        assert relative_error(ours, logits[0]) < 1e-4
    assert table.setting() is None


def test_tensorrt_is_named_where_it_is_not_installed() -> None:
    if importlib.util.find_spec("torch_tensorrt") is None:
        assert graphs.TensorRt.why_not("infer", "bfloat16", "cuda") == "torch_tensorrt is not installed"
    assert graphs.TensorRt.why_not("train", "bfloat16", "cuda") is not None


def test_fp16_training_scales_its_loss(tmp_path: Path) -> None:
    photos = images.synthetic(4, 64)
    task.write_files(task.prepared_model("resnet18", photos), photos, tmp_path)
    contender = contenders.ChannelsLast(task.Task("resnet18", "train", 4, "float16", "cpu", 64, 1, str(tmp_path)))
    contender.setup()
    assert contender.scaler.is_enabled() and contender.scaler.get_scale() == 16.0
    norm = torch.cat([torch.from_numpy(g) for g in contender.gradients()]).norm()
    assert 0 < norm < 100  # of the loss, without the scale
