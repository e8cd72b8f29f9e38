"""Where the time of a training step goes on a GPU: its kernels by kind, and the longest ones. A part of
benchmarks/gpu.py."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from typing import Any

import gpu_networks
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fastres import images
from fastres.bench import harness
from fastres.bench.table import contender_class
from fastres.bench.task import Task, prepared_model, write_files
from fastres.kernels import cuda

_STEPS = 3
_LONGEST = 25
#: Kinds of kernels by their names, the first that fits: cuDNN's and cuBLAS's, ATen's, Inductor's and our own.
KINDS = {
    "optimizer": r"multi_tensor|foreach|sgd|amp_",
    "normalise": r"batch_?norm|bn_(fw|bw)|statistics|apply_(gradient_)?kernel|(reduce|combine)_gradient"
    r"|persistent_.*kernel|pool(ed)?_.*kernel|join_.*kernel|add_act|running_stats|finish_|norm_kernel|native_batch",
    "convolution": r"conv|gemm|cutlass|xmma|nvjet|wgrad|dgrad|fprop|implicit|cudnn|cublas|splitk|product_kernel|gram"
    r"|_mm$|addmm|nchwToNhwc|nhwcToNchw",
    "rest": r"",
}


def kind(name: str) -> str:
    """Of a kernel, by its name."""
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))


def split(point: gpu_networks.Point, device: str, say: Callable[[str], None]) -> dict[str, Any]:
    """One training step of eager channels_last and of fastres, by its own choice of kernels and by those of CUDA C++:
    launches, and seconds of all kernels by kind and by name."""
    found = []
    with tempfile.TemporaryDirectory(prefix="fastres-profile-") as folder:
        photos = images.synthetic(point.batch, point.size)
        write_files(prepared_model(point.model, photos[:16]), photos, folder)
        task = Task(point.model, point.mode, point.batch, point.dtype, device, point.size, 0, folder)
        for name in (*harness.ALWAYS, *(() if cuda.unavailable() else (gpu_networks.CUDA,))):
            say(name)
            contender = contender_class(name)(task)
            contender.setup()
            contender.timed(2)
            activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
            with profile(activities=[activity]) as seen:
                contender.timed(_STEPS)
            found.append({"name": name, **summary(kernels(seen, device))})
            del contender
    return {"title": point.name, "contenders": found}


def kernels(seen: profile, device: str) -> list[tuple[str, float, float]]:
    """Name, seconds and calls in one step, of every kernel; of every operator where the device is the CPU."""
    if device == "cuda":
        rows = [row for row in seen.key_averages() if row.device_type == DeviceType.CUDA]
        return [(row.key, row.self_device_time_total / 1e6 / _STEPS, row.count / _STEPS) for row in rows]
    return [(row.key, row.self_cpu_time_total / 1e6 / _STEPS, row.count / _STEPS) for row in seen.key_averages()]


def summary(rows: list[tuple[str, float, float]]) -> dict[str, Any]:
    """Seconds by kind, and the longest kernels."""
    kinds = dict.fromkeys(KINDS, 0.0)
    for name, seconds, _ in rows:
        kinds[kind(name)] += seconds
    longest = sorted(rows, key=lambda row: -row[1])[:_LONGEST]
    return {
        "status": "ok",
        "seconds": sum(kinds.values()),
        "launches": sum(calls for name, _, calls in rows if not name.startswith(("Memcpy", "Memset"))),
        "kinds": kinds,
        "longest": [{"name": name, "kind": kind(name), "seconds": s, "calls": calls} for name, s, calls in longest],
    }
