#!/usr/bin/env python3
"""Runs every CUDA kernel on the CPU under ASan + UBSan and under TSan: `make cuda-sanitize`.

The kernels are compiled by g++ (tests/cuda_on_cpu/cuda_on_cpu.h) into a program that checks what they compute
(main.cpp). Then it proves that they would notice: for each seeded bug one line of the kernels is changed, and the run
has to fail with the words that name it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cuda_tools import ON_CPU, SOURCES, build, kernels, on_cpu_command, run, toolkit

OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",  # a fiber that fails leaves its stack
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}
#: What the program is told: TSan has no time for all cases.
ARGUMENTS: dict[str, list[str]] = {"memory": [], "threads": ["few"]}


@dataclass(frozen=True)
class Bug:
    """One line of the kernels changed, and what a sanitizer must say to it."""

    name: str
    sanitizer: str
    file: str
    before: str
    after: str
    says: str
    kernel: str = "statistics.cu"  # the one that is compiled with it


BUGS = (
    Bug(
        "barrier missing before a sum in shared memory",
        "threads",
        "reduce.cuh",
        "  __syncthreads();\n  const int parts = parts_of(sums);",
        "  const int parts = parts_of(sums);",
        "data race",
    ),
    Bug(
        "fence missing before the ticket of the last block",
        "threads",
        "reduce.cuh",
        "    __threadfence();  // of what the whole block wrote\n",
        "",
        "data race",
    ),
    Bug(
        "blocks that do not wait for the last one",
        "threads",
        "reduce.cuh",
        "      while (peek(counter) <= blocks) __nanosleep(kNap);\n",
        "",
        "data race",
        "persistent.cu",
    ),
    Bug(
        "fence missing before the last block lets the others go on",
        "threads",
        "reduce.cuh",
        "      __threadfence();  // of what finish wrote\n",
        "",
        "data race",
        "persistent.cu",
    ),
    Bug(
        "a block that does not come to where the others wait",
        "memory",
        "persistent.cu",
        "  const Kept<T, kWidth> kept(memory);\n  const T* x",
        "  const Kept<T, kWidth> kept(memory);\n  if (blockIdx.y == 1) return;\n  const T* x",
        "blocks wait for what none of these does",
        "persistent.cu",
    ),
    Bug(
        "room on the chip for one tile less",
        "memory",
        "persistent.cu",
        "divide_up(found.view.tiles, splits) * tile;",
        "(divide_up(found.view.tiles, splits) - 1) * tile + 64;",
        "heap-buffer-overflow",
        "persistent.cu",
    ),
    Bug(
        "what is kept begins within 16 bytes",
        "memory",
        "persistent.cu",
        "explicit Kept(uint4* memory) : memory_(memory) {}",
        "explicit Kept(uint4* memory) : memory_(reinterpret_cast<uint4*>(reinterpret_cast<char*>(memory) + 4)) {}",
        "misaligned address",
        "persistent.cu",
    ),
    Bug(
        "rows behind the last one",
        "memory",
        "tile.cuh",
        "r < view.count() && channel < view.channels",
        "channel < view.channels",
        "heap-buffer-overflow|heap-use-after-free",  # what lies so far behind may be the memory of another test
        "bn_act.cu",
    ),
    Bug(
        "shared memory for half of the channels",
        "memory",
        "tile.cuh",
        "float near[kMostChannels], scale[kMostChannels], shift[kMostChannels];",
        "float near[kMostChannels], scale[kMostChannels], shift[8];",
        "index 8 out of bounds|use-after-poison",
        "bn_act.cu",
    ),
    Bug(
        "16-byte accesses wherever a tensor starts",
        "memory",
        "device.cuh",
        "% sizeof(uint4) == 0)",
        "% sizeof(uint4) < 16)",
        "misaligned address",
    ),
    Bug(
        "a barrier that not all threads reach",
        "memory",
        "statistics.cu",
        "\n  __syncthreads();\n  float sums",
        "\n  if (thread < 200) __syncthreads();\n  float sums",
        "a barrier is not reached by all threads",
    ),
)


def link(sanitizer: str) -> Path:
    command = on_cpu_command(sanitizer, "-I", str(SOURCES))
    return build(f"check_{sanitizer}", command, [*kernels(), ON_CPU / "main.cpp"], [])


def execute(program: Path, sanitizer: str) -> subprocess.CompletedProcess[str]:
    arguments = [str(program), *ARGUMENTS[sanitizer]]
    return subprocess.run(arguments, capture_output=True, text=True, env=os.environ | OPTIONS)


def seed(bug: Bug, program: Path) -> Path:
    """The program with the bug in one kernel; the other objects are those of `program`, which is without it."""
    place = SOURCES.parents[1] / "build" / "cuda" / "seeded" / str(BUGS.index(bug))
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(SOURCES, place)
    text = (place / bug.file).read_text()
    assert text.count(bug.before) == 1, f"{bug.file} has changed: {bug.before!r} is not there once"
    (place / bug.file).write_text(text.replace(bug.before, bug.after))
    command = on_cpu_command(bug.sanitizer)
    changed = place / f"{bug.kernel}.o"
    run([*command, "-x", "c++", "-c", str(place / bug.kernel), "-o", str(changed)])
    objects = program.with_name(f"{program.name}.objects")
    others = [str(o) for o in sorted(objects.glob("*.o")) if o.stem != Path(bug.kernel).stem]
    flags = [flag for flag in command if flag.startswith("-fsanitize")]
    # First: of an inline function that several objects have, the linker takes the first.
    run([command[0], *flags, str(changed), *others, "-o", str(place / "check")])
    return place / "check"


def notice(bug: Bug, program: Path) -> bool:
    """Whether the sanitizer says what it must; prints that."""
    start = time.monotonic()
    done = execute(seed(bug, program), bug.sanitizer)
    found = done.returncode != 0 and any(words in done.stdout + done.stderr for words in bug.says.split("|"))
    text = f"seeded: {bug.name}: {'noticed' if found else 'NOT NOTICED'} in {time.monotonic() - start:.0f} s"
    if not found:
        text += f"\nexit status {done.returncode}, without the words {bug.says!r}\n"
        text += done.stdout[-1000:] + done.stderr[-3000:]
    print(text, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(ARGUMENTS), help="memory: ASan + UBSan; threads: TSan (default: both)")
    parser.add_argument("--bugs", type=int, default=len(BUGS), metavar="N", help="of each sanitizer (default: all)")
    chosen = parser.parse_args()
    if toolkit() is None:
        sys.exit("cuda-sanitize: there is no CUDA toolkit")
    sanitizers = [chosen.only] if chosen.only else list(ARGUMENTS)
    bugs = [bug for sanitizer in sanitizers for bug in [b for b in BUGS if b.sanitizer == sanitizer][: chosen.bugs]]
    failed, programs = 0, {}
    for sanitizer in sanitizers:
        start = time.monotonic()
        programs[sanitizer] = link(sanitizer)
        done = execute(programs[sanitizer], sanitizer)
        right = done.returncode == 0 and "all kernels are right" in done.stdout
        failed += not right
        print(f"{sanitizer}: {'passed' if right else 'FAILED'} in {time.monotonic() - start:.0f} s", flush=True)
        if not right:
            print(done.stdout + done.stderr[-6000:])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failed += sum(not noticed for noticed in pool.map(lambda bug: notice(bug, programs[bug.sanitizer]), bugs))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
