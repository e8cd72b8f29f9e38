"""What fuse_ and explain answer with: a row for every convolution, batch norm, activation, addition and pooling."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from fastres import reasons


@dataclass(frozen=True)
class Row:
    """One operation of a model.

    Attributes:
        name: path of the module, as in named_modules(); of the block for an addition.
        kind: "conv", "bn", "act", "add" or "pool".
        fused: whether it runs (explain) or can run (fuse_) inside a fused op.
        reason: why not, or "".
        note: what else is to be known of an operation that is fused, or "".

    Of explain only:
        block: name of the block whose time and memory it shares; its own name outside of blocks that fuse_ knows.
        op: the op of fastres that did it, such as "conv_bn_act", or "".
        kernel, method: name of the kernel that ran it, and how, where that kernel has several ways; or "".
        backward: name of the kernel that ran its gradient, where that is an op of fastres and was asked for; or "".
        eager_bytes, fused_bytes: activations that are read and written for it in one call (in training mode forward and
            backward), in eager and as it ran; None if it did not run.
    """

    name: str
    kind: str
    fused: bool
    reason: str = ""
    note: str = ""
    block: str = ""
    op: str = ""
    kernel: str = ""
    method: str = ""
    backward: str = ""
    eager_bytes: int | None = None
    fused_bytes: int | None = None

    @property
    def code(self) -> str:
        """The reason's code, one of fastres.reasons.CODES; "" if it is fused."""
        return reasons.code_of(self.reason)


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
        notes: Counter[str] = Counter(row.note for row in self.rows if row.fused and row.note)
        lines += [f"  note on {count}: {note}" for note, count in notes.items()]
        left = [row for row in self.rows if not row.fused]
        lines += [f"  not fused: {row.name or '(model)'} [{row.kind}]: {row.reason}" for row in left[:20]]
        if len(left) > 20:
            lines.append(f"  ... and {len(left) - 20} more (report.rows has them all)")
        return "\n".join(lines)


class FuseReport(Report):
    """What fuse_ changed: `fused` means that the operation's block now has a fast path."""
