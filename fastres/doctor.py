"""`fastres doctor`: versions, devices, and which kernel serves which op here, or why not."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from typing import Any

import torch

import fastres
from fastres.bench import machine
from fastres.kernels import extension, table


def _compiler() -> dict[str, Any]:
    """The C++ compiler that building fastres here would use, and the one that this torch was built with."""
    found: dict[str, Any] = {}
    command = next(
        filter(shutil.which, filter(None, [os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++"])), None
    )
    if command is None:
        found["here"] = None
    else:
        done = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
        found["here"] = (done.stdout.splitlines() or [command])[0]
    built = re.search(r"(GCC|clang|MSVC) [\d.]+", torch.__config__.show())
    found["torch_built_with"] = built.group(0) if built else None
    return found


def _extension() -> dict[str, Any]:
    """Whether the C++ kernels are loaded, for which instruction set and why that one, or the error."""
    build = extension.build_info()
    error = extension.load_error()
    if error is not None:
        return {"loaded": False, "error": error, "build": build}
    asked = os.environ.get("FASTRES_CPU_ISA")
    reason = (
        f"FASTRES_CPU_ISA={asked} asks for it" if asked else "the best that this processor has and the kernels know"
    )
    return {"loaded": True, "error": None, "isa": extension.isa(), "isa_reason": reason, "build": build}


def _cuda_extension() -> dict[str, Any]:
    """Whether the CUDA kernels are loaded and what for they were compiled, or the error."""
    error = extension.cuda_load_error()
    return {"loaded": error is None, "error": error, "build": extension.build_info().get("cuda", {})}


def _devices() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name": "cpu", **machine.cpu(), "memory_gib": round(machine.memory_bytes() / 2**30, 1)}
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            arch = f"{about.major}.{about.minor}"
            found.append(
                {
                    "name": f"cuda:{index}",
                    "model": about.name,
                    "capability": arch,
                    "memory_gib": round(about.total_memory / 2**30, 1),
                }
            )
    return found


def _onednn() -> dict[str, Any]:
    """Whether torch's oneDNN is there, and the low precisions in which it convolves on this processor."""
    if not torch.backends.mkldnn.is_available():
        return {"available": False}
    return {
        "available": True,
        "enabled": bool(torch.backends.mkldnn.enabled),
        "bfloat16": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        "float16": bool(torch.ops.mkldnn._is_mkldnn_fp16_supported()),
    }


def _kernels(device_types: list[str]) -> list[dict[str, Any]]:
    """For every op and device type the kernels in order of preference, each with the reason why it cannot run here, or
    None."""
    rows = []
    for op in table.OPS:
        for device in device_types:
            kernels = [
                {"name": kernel.name, "unavailable": kernel.unavailable()} for kernel in table.kernels(op, device)
            ]
            serving = next((kernel["name"] for kernel in kernels if kernel["unavailable"] is None), None)
            rows.append({"op": op, "device": device, "serves": serving, "kernels": kernels})
    return rows


def examine() -> dict[str, Any]:
    """Everything that `fastres doctor` prints, as plain data."""
    devices = _devices()
    types = sorted({device["name"].partition(":")[0] for device in devices}, key=("cpu", "cuda").index)
    return {
        "fastres": fastres.__version__,
        "commit": machine.git_commit(),
        "versions": machine.versions(),
        "system": platform.platform(),
        "cuda": {"built_for": torch.version.cuda, "available": torch.cuda.is_available()},
        "compiler": _compiler(),
        "devices": devices,
        "threads": {
            "torch": torch.get_num_threads(),
            "physical_cores": machine.physical_cores(),
            **{
                name: os.environ[name]
                for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY")
                if name in os.environ
            },
        },
        "extension": _extension(),
        "cuda_extension": _cuda_extension(),
        "onednn": _onednn(),
        "settings": {name: value for name, value in sorted(os.environ.items()) if name.startswith("FASTRES_")},
        "kernels": _kernels(types),
    }


def _facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and text of everything but the kernel table."""
    versions = {key: value for key, value in found["versions"].items() if key not in ("python", "fastres")}
    packages = ", ".join(f"{key} {value}" for key, value in versions.items())
    compiler, onednn, extension_ = found["compiler"], found["onednn"], found["extension"]
    facts = [
        ("fastres", found["fastres"] + (f" (commit {found['commit']})" if found["commit"] else "")),
        ("python", found["versions"]["python"]),
        ("packages", packages + ("" if "triton" in versions else "; triton is not installed")),
        ("system", found["system"]),
        ("compiler", f"{compiler['here'] or 'none found'}; torch was built with {compiler['torch_built_with']}"),
    ]
    for device in found["devices"]:
        about = f"{device['model']}, {device['memory_gib']} GiB"
        if device["name"] == "cpu":
            about += f", {device['cores']} cores, {' '.join(device['isa'])}"
        else:
            about += f", capability {device['capability']}"
        facts.append((device["name"], about))
    if not found["cuda"]["available"]:
        why = "" if found["cuda"]["built_for"] else ": this PyTorch is built for the CPU only"
        facts.append(("cuda", f"no device{why}"))
    facts.append(("threads", ", ".join(f"{key} {value}" for key, value in found["threads"].items())))
    if onednn["available"]:
        low = ", ".join(f"{name} {'yes' if onednn[name] else 'no'}" for name in ("bfloat16", "float16"))
        facts.append(("oneDNN", f"{'on' if onednn['enabled'] else 'switched off'}; convolutions in {low}"))
    else:
        facts.append(("oneDNN", "not in this PyTorch"))
    if found["settings"]:
        facts.append(("settings", ", ".join(f"{key}={value}" for key, value in found["settings"].items())))
    loaded = f"loaded, {extension_.get('isa')}: {extension_.get('isa_reason')}"
    build = extension_["build"]
    if build.get("compiled"):
        loaded += f"; built by {build['compiler']} with the headers of torch {build['torch']}"
    facts.append(("C++ kernels", loaded if extension_["loaded"] else f"not loaded: {extension_['error']}"))
    cuda = found["cuda_extension"]
    about = "loaded" if cuda["loaded"] else f"not loaded: {cuda['error']}"
    if cuda["build"].get("compiled"):
        about += f"; compiled for {', '.join(f'sm_{arch}' for arch in cuda['build']['architectures'])}"
    facts.append(("CUDA kernels", about))
    return facts


def _kernel_line(row: dict[str, Any], width: int) -> str:
    notes = [f"{kernel['name']} not: {kernel['unavailable']}" for kernel in row["kernels"] if kernel["unavailable"]]
    others = [kernel["name"] for kernel in row["kernels"] if not kernel["unavailable"]][1:]
    notes += [f"then {', '.join(others)}"] if others else []
    line = f"  {row['op']:<{width}}  {row['device']:<5} {row['serves'] or 'nothing':<10}"
    return f"{line} {'; '.join(notes)}".rstrip()


def text(found: dict[str, Any]) -> str:
    """What `examine` found, for a reader."""
    width = max(len(row["op"]) for row in found["kernels"])
    lines = [f"{name:<14}{about}" for name, about in _facts(found)]
    lines += ["", "Which kernel serves which op; one that has a reason against a call leaves it to the next:"]
    return "\n".join(lines + [_kernel_line(row, width) for row in found["kernels"]])
