"""What `fastres.explain` answers with: a row for every operation, a line for every block, as text, JSON and a page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastres.report import Report, Row


@dataclass(frozen=True)
class Block:
    """What is counted and measured together: a block that fuse_ knows, or outside of those a single layer.

    Attributes:
        name: path of the module. kind: its class; of a network, whose own block is its stem, "stem of " and that.
        operations, fused: how many there are, and how many of them ran fused.
        eager_bytes, fused_bytes: sums of its rows.
        eager_saved, fused_saved: bytes that autograd keeps for backward (training mode); what two blocks keep counts
            for the first.
        eager_ms, fused_ms: medians of its time, by its original forward and as it ran; None if not measured.
        share: of fused_ms in the time of the whole step; None if not measured.
    """

    name: str
    kind: str
    operations: int
    fused: int
    eager_bytes: int
    fused_bytes: int
    eager_saved: int
    fused_saved: int
    eager_ms: float | None = None
    fused_ms: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class Step:
    """Median milliseconds of the whole step: an inference call, or forward and backward in training mode.

    Attributes:
        eager, fused: by the original forwards, and as the model is. rounds: how often each was measured.
    """

    eager: float
    fused: float
    rounds: int


@dataclass
class ExplainReport(Report):
    """What ran in one call: `fused` means that the fast path was taken.

    Attributes:
        model: its class. mode: "train" or "eval". dtype, device, input_shapes: of the inputs.
        blocks: in the order of the model. step: the whole, if time was measured.
    """

    model: str = ""
    mode: str = ""
    dtype: str = ""
    device: str = ""
    input_shapes: list[tuple[int, ...]] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    step: Step | None = None

    @property
    def fused_share(self) -> float:
        """Operations that ran fused, of all; 0.0 if there is none."""
        return self.fused / self.total if self.total else 0.0

    @property
    def lost(self) -> list[Row]:
        """The operations that did not run fused."""
        return [row for row in self.rows if not row.fused]

    def headline(self) -> list[str]:
        """What it comes to, in some lines."""
        lines = [f"{self.fused} of {self.total} operations fused ({self.fused_share:.1%})"]
        eager, fused = (sum(getattr(b, name) for b in self.blocks) for name in ("eager_bytes", "fused_bytes"))
        lines.append(f"activations read and written: {megabytes(eager)} MB in eager, {megabytes(fused)} MB now")
        eager, fused = (sum(getattr(b, name) for b in self.blocks) for name in ("eager_saved", "fused_saved"))
        if eager or fused:
            lines.append(f"kept for backward: {megabytes(eager)} MB in eager, {megabytes(fused)} MB now")
        if self.step is not None:
            what = "forward and backward" if self.mode == "train" else "one call"
            ratio = self.step.eager / self.step.fused
            lines.append(
                f"{what}: {self.step.eager:.2f} ms in eager, {self.step.fused:.2f} ms now, {ratio:.2f}x "
                f"(medians of {self.step.rounds})"
            )
        return lines

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Titles and cells: a line for every block, and one for all layers outside of blocks."""
        titles = ["block", "fused", "kernel", "eager MB", "MB now"]
        saved, timed = any(b.eager_saved for b in self.blocks), self.step is not None
        titles += ["saved: eager MB", "now"] if saved else []
        titles += ["eager ms", "ms now", "share"] if timed else []
        known = {row.block for row in self.rows if row.block != row.name or row.kind == "add"}
        lines = [self._cells(block, saved, timed) for block in self.blocks if block.name in known]
        outside = [block for block in self.blocks if block.name not in known]
        if outside:
            lines.append(self._cells(_together(outside), saved, timed))
        return titles, lines

    def _cells(self, block: Block, saved: bool, timed: bool) -> list[str]:
        cells = [block_name(block), f"{block.fused} of {block.operations}", self.kernels(block) or "-"]
        cells += [megabytes(block.eager_bytes), megabytes(block.fused_bytes)]
        cells += [megabytes(block.eager_saved), megabytes(block.fused_saved)] if saved else []
        if timed:
            measured = block.eager_ms is not None and block.fused_ms is not None and block.share is not None
            cells += [f"{block.eager_ms:.3f}", f"{block.fused_ms:.3f}", f"{block.share:.1%}"] if measured else ["-"] * 3
        return cells

    def kernels(self, block: Block) -> str:
        """The kernels that ran in a block."""
        found = (kernel_name(row) for row in self.rows if row.block == block.name and row.kernel)
        return "; ".join(dict.fromkeys(found))

    def not_fused(self) -> list[str]:
        """A line for every reason: its code, the text, and the operations."""
        by_reason: dict[tuple[str, str], list[str]] = {}
        for row in self.lost:
            by_reason.setdefault((row.code, row.reason), []).append(f"{row.name or '(model)'} [{row.kind}]")
        return [f"{code}: {reason}: {_first(names)}" for (code, reason), names in by_reason.items()]

    def notes(self) -> list[str]:
        """What else is to be known, each once."""
        return list(dict.fromkeys(row.note for row in self.rows if row.fused and row.note))

    def __str__(self) -> str:
        head, *more = self.headline()
        titles, lines = self.table()
        text = [head, *(f"  {line}" for line in more)]
        text += [f"  {line}" for line in columns([titles, *lines])]
        text += [f"  not fused, {line}" for line in self.not_fused()]
        text += [f"  note: {line}" for line in self.notes()]
        return "\n".join(text)

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        found = asdict(self)
        found["input_shapes"] = [list(shape) for shape in self.input_shapes]
        found["rows"] = [{"code": row.code} | entry for row, entry in zip(self.rows, found["rows"], strict=True)]
        return {"operations": self.total, "fused": self.fused, "fused_share": self.fused_share} | found

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes a page that needs no other file; its folder is made if it is not there."""
        from fastres.explain import page

        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(page.html(self), encoding="utf-8")


def block_name(block: Block) -> str:
    """What a block is called in tables."""
    return block.name or block.kind


def kernel_name(row: Row) -> str:
    """The kernel of a row, and its method."""
    return f"{row.kernel} ({row.method})" if row.method else row.kernel


def megabytes(count: int) -> str:
    """Millions of bytes, with two digits behind the point where that is not much."""
    return f"{count / 1e6:.1f}" if count >= 1e8 else f"{count / 1e6:.2f}"


def columns(lines: Sequence[Sequence[str]]) -> list[str]:
    """Cells as lines of text; all columns but the first and the third are numbers."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in (0, 2) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _together(blocks: Sequence[Block]) -> Block:
    def total(name: str) -> Any:
        values = [getattr(block, name) for block in blocks]
        return None if None in values else sum(values)

    numbers = {name: total(name) for name in Block.__dataclass_fields__ if name not in ("name", "kind")}
    return Block("layers outside of blocks", "", **numbers)


def _first(names: list[str], limit: int = 6) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
