"""Compiles recorded launches without a GPU or its driver, and reads from the result what the code needs and does."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fastres.kernels.triton.record import Argument, Launch


@dataclass(frozen=True)
class Target:
    """A GPU to compile for.

    Attributes:
        shared: bytes of shared memory of a multiprocessor.
        shared_limit: how many of them one program may have.
    """

    gpu: GPUTarget
    shared: int
    shared_limit: int


# shared memory: CUDA programming guide, "Technical specifications per compute capability"; CDNA3 ISA, 2.1
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 164 << 10, 163 << 10),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 228 << 10, 227 << 10),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 228 << 10, 227 << 10),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 << 10, 64 << 10),
}


@dataclass(frozen=True)
class Specialisation:
    """What of a launch the JIT compiles for: launches of a kernel with the same `key` share the code."""

    launch: Launch
    target: str
    options: dict[str, Any]
    signature: dict[str, str]
    constexprs: dict[Any, Any]
    attributes: dict[Any, Any]
    key: str


def specialise(launch: Launch, target: str) -> Specialisation:
    """Does what JITFunction.run does with the arguments of a launch, by its own functions (Triton 3.6 to 3.9)."""
    kernel, backend = launch.kernel, make_backend(TARGETS[target].gpu)
    given = {**launch.arguments, **launch.options}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, options = bind(**given)
    key = f"{specialisation} {options}"
    parsed, signature, constexprs, attributes = kernel._pack_args(backend, given, bound, specialisation, options)
    return Specialisation(launch, target, dict(parsed.__dict__), signature, constexprs, attributes, key)


@dataclass(frozen=True)
class Compiled:
    """Machine code of a kernel.

    Attributes:
        registers: of a thread (AMD: vector registers).
        spills: bytes of a thread's stack, where registers go that are too many.
        shared: bytes of shared memory of a program.
        scratch: bytes of global memory that Triton would have to allocate for every launch.
        accesses: (argument, "load" or "store", bytes): how many such instructions. "?": no argument could be told.
        matrix: matrix instructions.
        dot: whether the kernel multiplies matrices.
    """

    registers: int
    spills: int
    shared: int
    scratch: int
    accesses: Counter[tuple[str, str, int]]
    matrix: Counter[str]
    dot: bool


def compiled(one: Specialisation) -> Compiled:
    """Compiles for the target; Triton keeps the code in its cache."""
    source = ASTSource(one.launch.kernel, one.signature, one.constexprs, one.attributes)
    code = triton.compile(source, target=TARGETS[one.target].gpu, options=one.options)
    # arguments that are constants do not reach the machine code
    names = [name for name, kind in one.signature.items() if kind != "constexpr"]
    read = _read_amdgcn if "amdgcn" in code.asm else _read_cubin
    registers, spills, instructions = read(code.asm)
    matrix = Counter(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)[\w.:]*", instructions))
    dot = "tt.dot" in code.asm["ttir"]
    scratch = sum(getattr(code.metadata, f"{kind}_scratch_size", 0) for kind in ("global", "profile"))
    return Compiled(registers, spills, code.metadata.shared, scratch, accesses(code.asm["llir"], names), matrix, dot)


def _number(pattern: str, text: str) -> int:
    return sum(int(found) for found in re.findall(pattern, text))


def _read_cubin(asm: dict[str, Any]) -> tuple[int, int, str]:
    """Registers, bytes of the stack, and the instructions (PTX: to disassemble takes longer than to compile)."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        done = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True)
    return _number(r"REG:(\d+)", done.stdout), _number(r"(?:STACK|LOCAL):(\d+)", done.stdout), asm["ptx"]


def _read_amdgcn(asm: dict[str, Any]) -> tuple[int, int, str]:
    text = asm["amdgcn"]
    spills = _number(r"\.[sv]gpr_spill_count:\s+(\d+)", text)
    return (
        _number(r"\.vgpr_count:\s+(\d+)", text),
        max(spills, _number(r"\.private_segment_fixed_size:\s+(\d+)", text)),
        text,
    )


def resident(one: Specialisation, code: Compiled) -> int:
    """How many programs a multiprocessor holds at a time, by their registers and shared memory."""
    target, warps = TARGETS[one.target], one.options["num_warps"]
    registers = max(-(-code.registers // 8) * 8, 8)  # given out by 8
    if target.gpu.backend == "hip":  # 4 SIMDs with 512 registers for each lane, and 8 waves
        by_registers = 4 * min(512 // registers, 8) // warps
    else:  # 65536 registers, 64 warps
        by_registers = min(65536 // (registers * 32), 64) // warps
    # CUDA keeps 1 KB of a program's shared memory for itself
    reserved = 1024 if target.gpu.backend == "cuda" else 0
    return min(by_registers, target.shared // max(code.shared + reserved, 1), 32)


_BITS = {"double": 64, "float": 32, "half": 16, "bfloat": 16, "f64": 64, "f32": 32, "f16": 16, "bf16": 16}
_VALUE = r"(?:<(\d+) x )?(\w+)>?"  # a type of LLVM


def _bytes(count: str | None, kind: str) -> int:
    bits = _BITS.get(kind) or int(re.sub(r"\D", "", kind) or 0)
    return int(count or 1) * bits // 8


def _access(line: str) -> tuple[str, int] | None:
    """("load" or "store", bytes) if the line accesses global memory."""
    if found := re.search(r"(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfus](\d+) ", line):
        return {"ld": "load", "st": "store"}[found[1]], int(found[2] or 1) * int(found[3]) // 8
    if found := re.search(r"cp\.async\.c[ag]\.shared\.global[\w.:]* [^,]*,[^,]*, (0x[0-9a-f]+|\d+)", line):
        return "load", int(found[1], 0)
    if found := re.search(r"@llvm\.nvvm\.cp\.async\.c[ag]\.shared\.global\.(\d+)", line):
        return "load", int(found[1])
    if found := re.search(r"buffer\.load(?:\.async)?\.lds\(.*?, ptr addrspace\(3\) [^,]+, i32 (\d+)", line):
        return "load", int(found[1])
    if found := re.search(r"buffer\.(load|store)\.(?:v(\d+))?([a-z]+\d+)\(", line):
        return found[1], _bytes(found[2], found[3])
    if found := re.search(rf"= load {_VALUE}, ptr addrspace\(1\)", line):
        return "load", _bytes(found[1], found[2])
    if found := re.search(rf" store {_VALUE} .*, ptr addrspace\(1\)", line):
        return "store", _bytes(found[1], found[2])
    return None


def accesses(llir: str, names: list[str]) -> Counter[tuple[str, str, int]]:
    """Counts accesses to global memory in LLVM's form of a kernel, by argument, direction and width.

    Args:
        llir: the module; a pointer is followed back through address arithmetic to the argument that it comes from.
        names: of the kernel's arguments, in order.
    """
    parents: dict[str, list[str]] = {}
    found: Counter[tuple[str, str, int]] = Counter()
    lines = re.sub(r"(?m)^(?:declare|;).*$", "", llir).splitlines()
    for line in lines:
        if made := re.match(r"\s*(%[\w.]+) = (?:tail call )?(.*(?:getelementptr|phi ptr|select|make\.buffer).*)", line):
            parents[made[1]] = re.findall(r"(?:ptr addrspace\(\d\) |\[ )(%[\w.]+)", made[2])

    def argument(pointer: str) -> str:
        seen, queue = set(), [pointer]
        while queue:
            at = queue.pop()
            if at in seen:
                continue
            seen.add(at)
            if at in parents:
                queue += parents[at]
            elif at[1:].isdigit() and int(at[1:]) < len(names):
                return names[int(at[1:])]
        return "?"

    for line in lines:
        if access := _access(line):
            pointers = re.findall(r"ptr addrspace\([18]\) (?:[a-z]+(?:\(\w+\))? )*(%[\w.]+)", line)
            found[(argument(pointers[-1]) if pointers else "?", *access)] += 1
    return found


def wide(t: Argument) -> bool:
    """Whether all of an activation can be accessed 16 bytes at a time: it starts at such an address, and so do the
    runs of contiguous values, of channels or of pixels, in pieces of 16 values."""
    if not t.is_activation or not t.dtype.is_floating_point or t.pointer:
        return False
    _, c, h, w = t.shape
    return (c if t.stride[1] == 1 else h * w) % 16 == 0


def faults(one: Specialisation, code: Compiled) -> list[str]:
    """Why code is not as it should be: it spills, needs more shared memory than there is or global memory of its own,
    accesses activations less than 16 bytes at a time, multiplies matrices of 16-bit values without matrix
    instructions."""
    found = []
    tensors, limit = one.launch.tensors(), TARGETS[one.target].shared_limit
    if code.spills:
        found.append(f"spills {code.spills}")
    if code.shared > limit:
        found.append(f"{code.shared} bytes of shared memory, {one.target} has {limit}")
    if code.scratch:  # a CUDA graph would not know of it
        found.append(f"allocates {code.scratch} bytes")
    amd = TARGETS[one.target].gpu.backend == "hip"
    for name, kind, width in sorted(code.accesses):
        # AMD's matrix instructions leave 4 neighbours in a lane, and Triton stores them from there
        least = 8 if amd and code.dot and kind == "store" else 16
        if width < least and (name == "?" or wide(tensors[name])):
            found.append(f"{kind}s {name} {width} bytes at a time")
    sixteen = [name for name in code.matrix if "f16" in name]  # or bf16
    if code.dot and not sixteen and any(t.is_activation and t.dtype.itemsize == 2 for t in tensors.values()):
        found.append("no matrix instructions of 16-bit values")
    return found
