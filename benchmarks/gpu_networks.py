"""Whole networks on a GPU: the points of benchmarks/gpu.py, measured by the harness of `fastres bench`.

Every contender has a process of its own; they take turns in interleaved rounds and give the memory of a turn back after
it (a CUDA graph keeps its own). Times are those of the device, iterations follow each other without waiting.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastres.bench import harness
from fastres.kernels import cuda

EAGER, COMPILE, AUTOTUNE, OURS, GRAPH = "channels_last", "compile", "autotune", "fastres", "fastres_graph"
REDUCE, TENSORRT, CUDA, GRAPHED = "reduce_overhead", "tensorrt", "fastres_cuda", "fastres_graphed"
MOST = (EAGER, COMPILE, OURS, GRAPH)  # max-autotune takes minutes to set up: at the main points only
#: Of the main points.
ALL = {
    "train": (EAGER, COMPILE, OURS, CUDA, GRAPH),
    "infer": (EAGER, COMPILE, AUTOTUNE, TENSORRT, OURS, GRAPH),
}
#: Where launches take the time.
ONE = (EAGER, REDUCE, TENSORRT, OURS, GRAPH, GRAPHED)
SHORT = {"bfloat16": "bf16", "float16": "fp16", "tf32": "tf32", "float32": "fp32"}
_MODES = {"train": "training", "infer": "inference"}


@dataclass(frozen=True)
class Point:
    """One table: see `fastres.bench.task.Task`.

    Attributes:
        parity: a small batch, whose errors against float64 are measured (in training that of all gradients of the
            first step); else speed and memory are.
    """

    model: str
    mode: str
    dtype: str
    batch: int
    contenders: tuple[str, ...]
    parity: bool = False
    size: int = 224

    @property
    def name(self) -> str:
        return f"{self.model}-{_MODES[self.mode]}-{SHORT[self.dtype]}-{self.batch}"

    @property
    def seconds(self) -> float:
        """About how long it takes: processes, set-ups, rounds."""
        deep = {"resnet18": 1.0, "resnet50": 1.5, "resnet152": 3.0}.get(self.model, 1.0)
        setups = {EAGER: 5, COMPILE: 25, AUTOTUNE: 60, OURS: 10, GRAPH: 12}
        setups |= {REDUCE: 30, TENSORRT: 1, CUDA: 10, GRAPHED: 10}  # TensorRT: mostly it is not there
        return 15 + deep * sum(setups[name] for name in self.contenders)


def speed_points() -> list[Point]:
    """Points of speed and memory, the most telling first."""
    pairs = [(model, mode) for model in ("resnet50", "resnet18", "resnet152") for mode in ("train", "infer")]
    found = [Point(model, mode, "bfloat16", 256, ALL[mode]) for model, mode in pairs[:4]]
    found.insert(2, Point("resnet50", "infer", "bfloat16", 1, ONE))
    found += [Point(model, mode, "bfloat16", 256, MOST) for model, mode in pairs[4:]]
    found += [Point("resnet50", mode, dtype, 256, MOST) for dtype in ("float16", "tf32") for mode in _MODES]
    found += [Point("resnet50", mode, "bfloat16", batch, MOST) for batch in (32, 512, 128, 64) for mode in _MODES]
    found += [Point("resnet50", "train", "bfloat16", 400, MOST)]  # MLPerf's batch
    found += [
        Point(model, mode, dtype, 256 if model == "resnet18" else 128, MOST)
        for model in ("resnet18", "resnet152")
        for dtype in ("float16", "tf32")
        for mode in _MODES
    ]
    found += [
        Point(model, mode, "bfloat16", batch, MOST)
        for model in ("resnet18", "resnet152")
        for batch in (32, 512, 128, 64)
        for mode in _MODES
    ]
    return found


def parity_points() -> list[Point]:
    """Small batches, with errors against float64."""
    return [
        Point(model, mode, dtype, 16, (EAGER, OURS, GRAPH), parity=True)
        for dtype in ("bfloat16", "float16", "tf32")
        for model in ("resnet50", "resnet18", "resnet152")
        for mode in _MODES
    ]


def quick_points() -> list[Point]:
    """Every kind of point, tiny, for a CPU."""
    small = {"batch": 4, "contenders": (EAGER, OURS, GRAPH), "size": 64}
    found = [Point("resnet18", mode, dtype, **small) for mode in _MODES for dtype in ("float32", "bfloat16")]
    found.append(Point("resnet18", "infer", "float32", 1, (EAGER, TENSORRT, OURS, GRAPHED), size=64))
    return [*found, Point("resnet18", "train", "float32", **small, parity=True)]


def why_synthetic() -> str:
    """Why there are no photographs, or nothing."""
    missing = [name for name in ("sklearn", "PIL") if importlib.util.find_spec(name) is None]
    return f"synthetic images in place of photographs: {', '.join(missing)} not installed" if missing else ""


def measure(point: Point, device: str, quick: bool, timeout: float, say: Callable[[str], None]) -> dict[str, Any]:
    """The table of a point. A contender that fails, or whose set-up takes longer than `timeout` seconds, is in it with
    the reason."""
    contenders = list(point.contenders)
    if CUDA in contenders and (why := cuda.unavailable()):
        say(f"{CUDA} is left out: {why}")
        contenders.remove(CUDA)
    options = harness.Options(
        models=[point.model],
        modes=[point.mode],
        batches={point.mode: [point.batch]},
        dtype=point.dtype,
        device=device,
        threads=1 if quick else 0,
        contenders=contenders,
        rounds=3 if quick or point.parity else 11,
        seconds=0.1 if quick or point.parity else 10.0,
        size=point.size,
        timeout=timeout,
        synthetic=bool(why_synthetic()) or quick,
        reference=point.parity,
        saved=point.mode == "train",
    )
    (table,) = harness.run(options, lambda text, share: say(text.partition(": ")[2] or text))["tables"]
    eager = next((row.get("saved_bytes") for row in table["contenders"] if row["name"] == EAGER), None)
    for row in table["contenders"]:
        if eager and "saved_bytes" in row:
            row["saved_ratio"] = row["saved_bytes"] / eager
    return table
