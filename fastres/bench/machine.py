"""What a result must say about where it was measured: processor, versions, commit. Never the host's name."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

#: Instruction sets worth naming: those that decide which kernels run.
_ISA_FLAGS = (
    *(
        "avx",
        "f16c",
        "fma",
        "avx2",
        "avx_vnni",
        "avx512f",
        "avx512bw",
        "avx512dq",
        "avx512vl",
        "avx512_vnni",
        "avx512_bf16",
    ),
    *("avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "asimd", "asimdhp", "bf16", "i8mm", "sve", "sve2"),
)
_PACKAGES = (
    "torch",
    "fastres",
    "numpy",
    "onnx",
    "onnxruntime",
    "openvino",
    "ncnn",
    "pnnx",
    "torchvision",
    "timm",
    "triton",
)


def versions() -> dict[str, str]:
    """Versions of Python and of every installed package that can be part of a measurement."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    first = text.split("\n\n", 1)[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def cpu() -> dict[str, Any]:
    """Model, cores and instruction sets of the processor.

    `cores` are those that this process may use; `threads_per_core` is 2 where they are hyper-threads.
    """
    info = _cpuinfo()
    flags = info.get("flags", info.get("Features", "")).split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    siblings, physical = int(info.get("siblings", 0)), int(info.get("cpu cores", 0))
    return {
        "model": info.get("model name") or platform.processor() or platform.machine(),
        "family": "-".join(info[k] for k in ("cpu family", "model", "stepping") if k in info),
        "cores": cores,
        "threads_per_core": siblings // physical if siblings and physical else 1,
        "isa": [flag for flag in _ISA_FLAGS if flag in flags],
        "cache": info.get("cache size", ""),
    }


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads counted once."""
    found = cpu()
    return max(1, found["cores"] // found["threads_per_core"])


def gpu() -> dict[str, Any]:
    """The CUDA device that is used, its driver and libraries; nothing where there is none."""
    import torch

    if not torch.cuda.is_available():
        return {}
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "l2_mib": round(found.L2_cache_size / 2**20, 1),
        "driver": _driver(),
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
    }


def _driver() -> str:
    """Version of NVIDIA's driver, or nothing where its tool is not there."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        return (found.strip().splitlines() or [""])[0]
    except (OSError, subprocess.SubprocessError):
        return ""


def memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def load_average() -> float | None:
    """Mean number of running processes over the last minute; above about 0.5 others disturb a measurement."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def busy_seconds() -> float | None:
    """Processor seconds that this machine has spent working since it started, all processes and cores together.

    None where the system does not tell.
    """
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        user, nice, system, _idle, _iowait, irq, softirq, *more = map(int, fields)
        steal = more[0] if more else 0  # taken by other virtual machines: as bad as other processes
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None


def git_commit() -> str | None:
    """Commit of the checkout that this package runs from ("+changes" if it has uncommitted ones), or None."""
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *args], capture_output=True, text=True, timeout=10, check=True
        ).stdout

    try:
        if git("ls-files", "--error-unmatch", __file__) == "":
            return None
        return git("rev-parse", "--short=12", "HEAD").strip() + (
            "+changes" if git("status", "--porcelain", "-uno") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


def describe() -> dict[str, Any]:
    """The machine part of a result file."""
    load = load_average()
    return {
        "cpu": cpu(),
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": None if load is None else round(load, 2),
        "versions": versions(),
        "commit": git_commit(),
        "executable": Path(sys.executable).name,
    }


def slug() -> str:
    """A short file-name part that names the processor but not the host, such as "amd-epyc-2c"."""
    found = cpu()
    name = re.sub(r"\(r\)|\(tm\)|cpu|processor|@.*|\d+-core", " ", found["model"].lower())
    return "-".join(re.findall(r"[a-z0-9]+", name)[:4] + [f"{found['cores']}c"])
