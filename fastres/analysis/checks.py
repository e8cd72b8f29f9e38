"""A verdict from what was measured: a claim in parts, each with the numbers that decide it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastres.analysis.report import Table

__all__ = ["Check", "tables", "verdict"]


class Check(NamedTuple):
    """A part of a claim. claim: with the bound that decides. measured: the numbers. holds: what they say."""

    claim: str
    measured: str
    holds: bool


def verdict(checks: Sequence[Check]) -> str:
    """One of `report.VERDICTS`: whether all, some or none hold."""
    if not checks:
        return "no claim"
    held = sum(check.holds for check in checks)
    return "reproduced" if held == len(checks) else "partly reproduced" if held else "not reproduced"


def tables(name: str, checks: Sequence[Check]) -> list[Table]:
    """A table of them; none if there are none."""
    rows = [(check.claim, check.measured, "yes" if check.holds else "no") for check in checks]
    return [Table(name, ("claim", "measured", "holds"), rows, "The claim in parts")] if rows else []
