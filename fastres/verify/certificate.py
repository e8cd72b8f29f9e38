"""What `fastres.verify` answers with: a row for every value that was compared, as a table and as JSON."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MODEL = "(model)"


@dataclass(frozen=True)
class Row:
    """One tensor, eager's and the fused one's, beside float64's.

    Attributes:
        site: path of the block, shortcut or stem that ran alone, or "(model)" for the whole model.
        kind: "output", "top-1", "input gradient", "gradient", "buffer" or "counter".
        tensor: its name within the site, such as "conv1.weight".
        eager_error, fused_error: relative L2 error; for "top-1" the number of images with another class, for "counter"
            the largest difference.
        budget: what fused_error may be.
    """

    site: str
    kind: str
    tensor: str
    eager_error: float
    fused_error: float
    budget: float

    @property
    def ok(self) -> bool:
        return self.fused_error <= self.budget

    @property
    def share(self) -> float:
        """The part of the budget that is used; above 1 is too much."""
        if self.fused_error == 0 or self.budget == math.inf:
            return 0.0
        return self.fused_error / self.budget if self.budget > 0 and self.fused_error < math.inf else math.inf

    def sentence(self) -> str:
        """What is wrong, in words."""
        return f"{self.label}: error {self.fused_error:.1e}, budget {self.budget:.1e} (eager: {self.eager_error:.1e})"

    @property
    def label(self) -> str:
        """The tensor as one would write it in code."""
        return f"{self.tensor}.grad" if self.kind in ("gradient", "input gradient") else self.tensor


@dataclass(frozen=True)
class Site:
    """One place that could run fused.

    Attributes:
        name: path of the module; a network's stem is called "stem".
        fused: whether it did, in the model's own run.
        reason: why not, or "".
    """

    name: str
    fused: bool
    reason: str = ""


@dataclass(frozen=True)
class Fault:
    """What is wrong with a site (or "(model)") beside values outside their budget."""

    site: str
    text: str

    def __str__(self) -> str:
        return self.text if self.site == MODEL else f"{self.site}: {self.text}"


@dataclass
class Certificate:
    """The result of `fastres.verify`.

    Attributes:
        model: class of the model. mode: "eval" or "train". dtype: such as "float32". device: type of the input's.
        input_shape: of the batch. seed: of the upstream gradients.
        rows: everything that was compared.
        sites: every block, shortcut and stem that could run fused, in the order of the forward, and whether it did.
        faults: what is wrong beside rows outside their budget.
        versions: of Python, torch and fastres. machine: processor, instruction set of the kernels, threads.
        date: UTC, ISO 8601. seconds: how long it took.
    """

    model: str
    mode: str
    dtype: str
    device: str
    input_shape: tuple[int, ...]
    seed: int
    rows: list[Row] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    date: str = ""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Every value within its budget, no other problem, and something ran fused at all."""
        return not self.faults and bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def problems(self) -> list[str]:
        """The faults as text."""
        return [str(fault) for fault in self.faults]

    @property
    def first(self) -> str | None:
        """The first site in the order of the forward that fails, "(model)" if only the whole model does, None if all is
        well. A projection shortcut comes before the block that it is part of."""
        failed = {row.site for row in self.rows if not row.ok} | {fault.site for fault in self.faults}
        names = [site.name for site in self.sites if site.name in failed]
        if not names:
            return MODEL if failed else None
        return next((name for name in names if name.startswith(f"{names[0]}.")), names[0])

    @property
    def failures(self) -> list[Row]:
        """The rows outside their budget, worst first."""
        return sorted((row for row in self.rows if not row.ok), key=lambda row: -row.share)

    @property
    def fused_sites(self) -> int:
        return sum(site.fused for site in self.sites)

    def worst(self) -> list[Row]:
        """For every site the row that uses most of its budget, in the order of the model."""
        found: dict[str, Row] = {}
        for row in self.rows:
            if row.site not in found or row.share > found[row.site].share:
                found[row.site] = row
        return list(found.values())

    def __str__(self) -> str:
        shape = "x".join(map(str, self.input_shape))
        where = ", ".join(f"{name} {value}" for name, value in (self.machine | self.versions).items() if value)
        worst, failures = self.worst(), self.failures
        lines = [
            f"{self.model}, {self.mode} mode, {self.dtype}, input {shape}, on {self.device}",
            f"({where})",
            "Relative L2 errors against float64; for every site the value that uses most of its budget:",
            *_table(worst),
        ]
        if more := [row for row in failures if row not in worst]:
            lines += ["Also outside the budget, worst first:", *_first(_table(more))]
        slow = [f"  {site.name}: {site.reason}" for site in self.sites if not site.fused]
        lines += [f"{self.fused_sites} of {len(self.sites)} sites ran fused{', not:' if slow else ''}", *_first(slow)]
        return "\n".join([*lines, self.verdict()])

    def failure(self) -> str:
        """The verdict, and what is outside its budget, worst first."""
        lines = [f"  {row.site}, {row.sentence()}" for row in self.failures]
        return "\n".join([f"{self.model}, {self.mode} mode, {self.dtype}: {self.verdict()}", *_first(lines)])

    def verdict(self) -> str:
        """One line: PASS or FAIL, and why."""
        what = f"{len(self.rows)} values compared in {self.seconds:.0f} s"
        if self.ok:
            return f"PASS: all within budget ({what})"
        outside = [f"{len(self.failures)} outside the budget"] if self.failures else []
        where = [f"first at {self.first}"] if self.first not in (None, MODEL) else []
        return f"FAIL: {'; '.join([*self.problems, *outside, *where])} ({what})"

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON values; errors that are not finite are the strings "inf" and "nan"."""
        found = asdict(self)
        found["input_shape"] = list(self.input_shape)
        found["ok"], found["verdict"], found["first"] = self.ok, self.verdict(), self.first
        found["problems"] = self.problems
        for entry, row in zip(found["rows"], self.rows, strict=True):
            entry["ok"] = row.ok
            entry.update(
                {
                    key: str(value)
                    for key, value in entry.items()
                    if isinstance(value, float) and not math.isfinite(value)
                }
            )
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_json()` to a file; its folder is made if it is not there."""
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.to_json(), indent=1) + "\n")


def _table(rows: list[Row]) -> list[str]:
    """A header and a line for every row."""
    cells: list[tuple[str, ...]] = [("site", "value", "eager", "fused", "budget", "")]
    for row in rows:
        errors = (f"{value:.1e}" for value in (row.eager_error, row.fused_error, row.budget))
        cells.append((row.site, row.label, *errors, "ok" if row.ok else "FAIL"))
    site, value = (max(len(cell[i]) for cell in cells) for i in (0, 1))
    return [f"  {c[0]:<{site}}  {c[1]:<{value}} {c[2]:>9} {c[3]:>9} {c[4]:>9}  {c[5]}".rstrip() for c in cells]


def _first(lines: list[str], limit: int = 20) -> list[str]:
    more = len(lines) - limit
    return lines if more <= 0 else [*lines[:limit], f"  ... and {more} more (the JSON has them all)"]
