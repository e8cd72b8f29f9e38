"""What fuse_ and explain answer with: a row for every convolution, batch norm, activation, addition and pooling."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One operation of a model.

    Attributes:
        name: path of the module, as in named_modules(); of the block for an addition.
        kind: "conv", "bn", "act", "add" or "pool".
        fused: whether it runs (explain) or can run (fuse_) inside a fused op.
        reason: why not, or "".
        kernel: name of the kernel that serves it (explain only), or "".
        note: what else is to be known of an operation that is fused, or "".
    """

    name: str
    kind: str
    fused: bool
    reason: str = ""
    kernel: str = ""
    note: str = ""


@dataclass
class Report:
    """Rows, and a short table of them as text."""

    rows: list[Row] = field(default_factory=list)

    @property
    def total(self) -> int:
        return len(self.rows)

    @property
    def fused(self) -> int:
        return sum(row.fused for row in self.rows)

    def __str__(self) -> str:
        lines = [f"{self.fused} of {self.total} operations fused"]
        by_kind: Counter[str] = Counter(row.kind for row in self.rows)
        fused: Counter[str] = Counter(row.kind for row in self.rows if row.fused)
        lines += [
            f"  {kind:<5} {fused[kind]:>4} of {by_kind[kind]}"
            for kind in ("conv", "bn", "act", "add", "pool")
            if by_kind[kind]
        ]
        kernels: Counter[str] = Counter(row.kernel for row in self.rows if row.kernel)
        lines += [f"  by kernel {name}: {count}" for name, count in kernels.most_common()]
        notes: Counter[str] = Counter(row.note for row in self.rows if row.fused and row.note)
        lines += [f"  note on {count}: {note}" for note, count in notes.items()]
        left = [row for row in self.rows if not row.fused]
        lines += [f"  not fused: {row.name or '(model)'} [{row.kind}]: {row.reason}" for row in left[:20]]
        if len(left) > 20:
            lines.append(f"  ... and {len(left) - 20} more (report.rows has them all)")
        return "\n".join(lines)


@dataclass(frozen=True)
class BlockMemory:
    """What one fused block keeps from forward to backward.

    Attributes:
        name: its path, "" for the model itself: what is outside of all other blocks, its stem and classifier.
        form: "keep" (the outputs of convolutions are saved) or "recompute" (computed again in backward).
        algebraic: whether its last convolution saves no output anyway (fastres::conv1x1_bn_act).
        fast_bytes, expected_bytes: in the fast form and in this one, from shapes alone. A tensor that two blocks keep
            counts for the first.
    """

    name: str
    form: str
    algebraic: bool
    fast_bytes: int
    expected_bytes: int


@dataclass(frozen=True)
class MemoryReport:
    """What fuse_(model, memory="low") chose, and what it saves in a training step on the example.

    Attributes:
        blocks: in the order of the model.
        fast_bytes, expected_bytes: sums for the whole model, without parameters and buffers.
        measured_bytes: counted in a forward on the example; None for one on the meta device.
    """

    blocks: list[BlockMemory]
    fast_bytes: int
    expected_bytes: int
    measured_bytes: int | None

    def __str__(self) -> str:
        def mib(count: int) -> str:
            return f"{count / 2**20:.1f}"

        lines = [f"  memory for backward: {mib(self.fast_bytes)} MiB fast, {mib(self.expected_bytes)} MiB so, expected"]
        if self.measured_bytes is not None:
            lines[0] += f"; {mib(self.measured_bytes)} MiB measured"
        lines += [
            f"    {b.name or '(stem)'}: {b.form}{', algebraic' if b.algebraic else ''}, {mib(b.fast_bytes)} MiB fast, "
            f"{mib(b.expected_bytes)} MiB so"
            for b in self.blocks
        ]
        return "\n".join(lines)


@dataclass
class FuseReport(Report):
    """What fuse_ changed: `fused` means that the operation's block now has a fast path. `memory`: what memory="low"
    chose."""

    memory: MemoryReport | None = None

    def __str__(self) -> str:
        return super().__str__() + ("" if self.memory is None else f"\n{self.memory}")


class ExplainReport(Report):
    """What ran in one forward: `fused` means that the fast path was taken."""
