"""The harness's side of a contender's process: start it, ask it, notice when it dies or hangs."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import fastres

#: Set by some users; they would make waiting threads burn the processor (or never spin), for every contender alike but
#: not in the same way. The libraries' defaults are what their users get.
_WAIT_POLICIES = (
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "KMP_BLOCKTIME",
    "OMP_PROC_BIND",
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
)


class ContenderError(RuntimeError):
    """A contender failed, died or ran out of time; the message says which."""


def environment(threads: int, folder: str) -> dict[str, str]:
    """Environment of every contender: the same thread count, the same fastres, cold compile caches (but for Triton's
    kernels where FASTRES_BENCH_TRITON names a folder that keeps them: minutes of a lent GPU)."""
    env = {key: value for key, value in os.environ.items() if key not in _WAIT_POLICIES}
    package = str(Path(fastres.__file__).resolve().parent.parent)
    env["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [env.get("PYTHONPATH")])])
    env["OMP_NUM_THREADS"] = env["MKL_NUM_THREADS"] = str(threads)
    env["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(folder, "inductor")
    env["TRITON_CACHE_DIR"] = os.environ.get("FASTRES_BENCH_TRITON") or os.path.join(folder, "triton")
    env["PYTHONWARNINGS"] = "ignore"
    return env


class Process:
    """One contender's process.

    Args:
        contender: "module:Class".
        threads: its thread count.
        folder: where its log and caches go.
        name: of the log file.
    """

    def __init__(self, contender: str, threads: int, folder: str, name: str) -> None:
        self.log = Path(folder) / f"{name.rpartition(':')[2]}.log"
        self.answers: queue.Queue[str | None] = queue.Queue()
        with self.log.open("w") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "fastres.bench.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
                env=environment(threads, folder),
                start_new_session=True,  # compilers that it starts end with it
            )
        threading.Thread(target=self._read, daemon=True).start()
        self.send(do="start", contender=contender, threads=threads)

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.answers.put(line)
        self.answers.put(None)

    def send(self, **command: Any) -> None:
        assert self.popen.stdin is not None
        with contextlib.suppress(OSError):  # it is dead: `receive` says why
            self.popen.stdin.write(json.dumps(command) + "\n")

    def receive(self, timeout: float) -> dict[str, Any]:
        """The answer to the oldest command without one.

        Raises:
            ContenderError: if the command failed, the process died, or no answer came in `timeout` seconds (it is
            ended then).
        """
        try:
            line = self.answers.get(timeout=timeout)
        except queue.Empty:
            self.end()
            raise ContenderError(f"no answer in {timeout:.0f} s") from None
        if line is None:
            raise ContenderError(self._death())
        answer = json.loads(line)
        if "failed" in answer:
            raise ContenderError(answer["failed"])
        return answer

    def ask(self, timeout: float, **command: Any) -> dict[str, Any]:
        self.send(**command)
        return self.receive(timeout)

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def _death(self) -> str:
        code = self.popen.wait()
        if code < 0:
            how = signal.Signals(-code).name + (" (out of memory?)" if -code == signal.SIGKILL else "")
            return f"died of {how}"
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"ended with exit code {code}" + (f": {lines[-1]}" if lines else "")

    def end(self) -> None:
        """End the process and what it started."""
        if self.alive:
            try:
                os.killpg(self.popen.pid, signal.SIGKILL)
            except (OSError, AttributeError):
                self.popen.kill()
        self.popen.wait()
        for stream in (self.popen.stdin, self.popen.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
