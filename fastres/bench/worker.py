"""The process of one contender: reads commands as JSON lines, answers each with one JSON line.

    {"do": "start", "contender": "module:Class", "threads": 2}   -> {"seconds": of its imports}
    {"do": "setup", "task": {...}}                               -> {"seconds": ..., what after_setup says}
    {"do": "run", "iterations": 10}                              -> {"samples": [seconds, ...], "cpu": seconds}
    {"do": "memory"}                                             -> {"peak": bytes, "baseline": bytes}
    {"do": "saved"}                                              -> {"bytes": kept for backward, "storages": number}

A command that fails is answered with {"failed": "why"}. Between commands the process waits in a blocking read;
every answer has the seconds ("idle") and processor seconds ("idle_cpu") that it waited before the command, so that the
harness can tell whether it disturbed the others.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from fastres.bench.contenders import Contender, Eager
from fastres.bench.task import Task


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status, 0 where there is none."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _forget_peak() -> None:
    """Set the kernel's high-water mark of resident memory back to what is resident now."""
    with contextlib.suppress(OSError):  # then the peak also covers set-up
        Path("/proc/self/clear_refs").write_text("5")


class Worker:
    def __init__(self) -> None:
        self.kind: type[Contender]  # set by `start`
        self.contender: Contender | None = None
        self.baseline = 0
        self.device = "cpu"

    def start(self, contender: str, threads: int) -> dict[str, Any]:
        import torch

        torch.set_num_threads(threads)
        module, _, name = contender.partition(":")
        self.kind = getattr(importlib.import_module(module), name)
        start = time.perf_counter()
        self.kind.imports()
        return {"seconds": time.perf_counter() - start}

    def setup(self, task: dict[str, Any]) -> dict[str, Any]:
        self.contender = None  # the batch before, with its memory
        self.baseline = self.baseline or _status("VmRSS")
        self.device = task["device"]
        contender = self.kind(Task(**task))
        start = time.perf_counter()
        contender.setup()
        seconds = time.perf_counter() - start
        found = contender.after_setup()
        self.contender = contender
        self.reset_peak()
        return {"seconds": seconds, **found}

    def run(self, iterations: int) -> dict[str, Any]:
        if self.contender is None:
            raise RuntimeError("nothing is set up")
        cpu = time.process_time()
        samples = self.contender.timed(iterations)
        cpu = time.process_time() - cpu
        if self.device == "cuda":
            import torch

            torch.cuda.empty_cache()  # the others need the memory in their turns
        return {"samples": samples, "cpu": cpu}

    def reset_peak(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
        _forget_peak()

    def memory(self) -> dict[str, Any]:
        if self.device == "cuda":
            import torch

            captured = self.contender.captured_peak if self.contender else 0
            return {"peak": max(torch.cuda.max_memory_allocated(), captured), "baseline": 0}
        peak = _status("VmHWM")
        if not peak:
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"peak": peak, "baseline": self.baseline}

    def saved(self) -> dict[str, Any]:
        if not isinstance(self.contender, Eager):
            raise RuntimeError("only a PyTorch contender that is set up has tensors saved for backward")
        return dict(self.contender.saved())


def main() -> None:
    # Answers leave through a copy of stdout; what libraries print goes where errors go, to the log.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Worker()
    while True:
        cpu, clock = time.process_time(), time.perf_counter()
        line = sys.stdin.readline()
        if not line:
            return
        idle = {"idle_cpu": time.process_time() - cpu, "idle": time.perf_counter() - clock}
        command = json.loads(line)
        try:
            answer = getattr(worker, command.pop("do"))(**command)
        except Exception as error:
            traceback.print_exc()
            message = (str(error).strip().splitlines() or [""])[0]
            answer = {"failed": f"{type(error).__name__}: {message}"}
        answers.write(json.dumps({**answer, **idle}) + "\n")


if __name__ == "__main__":
    main()
