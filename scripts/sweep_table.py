"""The sweep's results: as a line while it runs, as a table on the terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
import platform
from collections import Counter
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Entry = dict[str, Any]

KINDS = ("conv", "bn", "act", "add", "pool")
#: Title of a column -> the comparisons whose worst it shows.
ERRORS = {
    "float64": ("float64",),
    "inference": ("inference channels_last: output", "inference contiguous: output"),
    "gradients": ("training channels_last: gradient", "training contiguous: gradient"),
}
HEADER = ("model", "M", "px", *KINDS, *ERRORS, "", "not fused because, or what is wrong")
PACKAGES = ("fastres", "torch", "timm", "torchvision", "transformers", "segmentation_models_pytorch")


def line(entry: Entry) -> str:
    """One model, in one line."""
    kinds = " ".join(f"{kind} {count}" for kind, count in zip(KINDS, _kinds(entry), strict=True) if count)
    what = f"{entry['library']} {entry['name']}"
    return f"{entry['seconds']:6.1f} s  {what:<45} {entry['verdict']:<9} {kinds}  {why(entry)}"


def why(entry: Entry) -> str:
    """What is wrong, or else why operations are not fused: the most frequent reasons."""
    if entry.get("problems"):
        return "; ".join(entry["problems"][:3])
    reasons = [*entry.get("reasons", [])[:3], *((f"in training: {r}", n) for r, n in entry.get("in_training", [])[:2])]
    return "; ".join(f"{reason} ({count})" for reason, count in reasons)


def counts(found: list[Entry]) -> str:
    """How many passed, failed, could not be built, were too large."""
    verdicts = Counter(entry["verdict"] for entry in found)
    return ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in ("pass", "fail", "not built", "too large"))


def show(found: list[Entry], missing: list[str]) -> None:
    """The table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*HEADER, title="fused / all; relative L2 error fused (eager)")
    table.columns[-1].no_wrap, table.columns[-1].overflow = True, "ellipsis"
    for entry in found:
        if "total" in entry:
            table.add_row(*_cells(entry), style="red" if entry["verdict"] == "fail" else "")
    console = Console(width=max(Console().width, 200))
    console.print(table)
    for text in (*_left_out(found), *missing, *_summary(found), counts(found)):
        console.print(text, markup=False, highlight=False)


def write(found: list[Entry], missing: list[str], root: Path, listed: int) -> None:
    """benchmarks/results/sweep.json and docs/sweep.md. listed: how many models could have been run."""
    versions = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    about = {
        "command": "make sweep",
        "date": date.today().isoformat(),
        "versions": versions,
        "listed": listed,
        "missing": missing,
    }
    kept = [{key: value for key, value in entry.items() if key != "traceback"} for entry in found]
    lines = ",\n".join(json.dumps(entry | {"errors": _short(entry)}, separators=(",", ":")) for entry in kept)
    path = root / "benchmarks" / "results" / "sweep.json"
    path.write_text(f'{{"about": {json.dumps(about)},\n"models": [\n{lines}\n]}}\n')
    page = root / "docs" / "sweep.md"
    text = page.read_text().split(MARK)[0] if page.is_file() else "# The sweep\n\n"
    page.write_text(text + MARK + _markdown(found, about))


MARK = "<!-- what follows is written by scripts/sweep.py --write -->\n"


def _markdown(found: list[Entry], about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in about["versions"].items() if value)
    run = f"`{about['command']}`, {len(found)} of {about['listed']} models"
    lines = [f"\n{about['date']}, {versions}; {run}: {counts(found)}.\n"]
    lines += [f"- {text}" for text in (*_summary(found), *about["missing"])]
    for library in dict.fromkeys(entry["library"] for entry in found):
        rows = [entry for entry in found if entry["library"] == library and "total" in entry]
        lines += [f"\n## {library}\n", f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
        lines += [f"| {' | '.join(cell.replace('|', '/') for cell in _cells(entry))} |" for entry in rows]
    if left := _left_out(found):
        lines += ["\n## Not in the table\n", *(f"- {text}" for text in left)]
    return "\n".join(lines) + "\n"


def _cells(entry: Entry) -> tuple[str, ...]:
    errors = [_worst(entry, parts) for parts in ERRORS.values()]
    size = (f"{entry['parameters'] / 1e6:.1f}", str(entry["side"]))
    return (entry["name"], *size, *_kinds(entry), *errors, entry["verdict"], why(entry))


def _kinds(entry: Entry) -> list[str]:
    total, fused = entry.get("total", {}), entry.get("fused", {})
    return [f"{fused[kind]}/{total[kind]}" if total.get(kind) else "" for kind in KINDS]


def _worst(entry: Entry, parts: tuple[str, ...]) -> str:
    """The largest error among some comparisons, with eager's beside it where there is one."""
    found = [values for what, values in entry["errors"].items() if any(part in what for part in parts)]
    if not found:
        return ""
    _, eager, fused = max(found, key=lambda values: values[2])
    return f"{fused:.0e} ({eager:.0e})" if eager else f"{fused:.0e}"


def _short(entry: Entry) -> dict[str, list[float]]:
    return {what: [float(f"{value:.2g}") for value in values] for what, values in entry.get("errors", {}).items()}


def _left_out(found: list[Entry]) -> list[str]:
    """What is not in the table: larger than the limit, or refused by its own library."""
    large = [e for e in found if e["verdict"] == "too large"]
    names = ", ".join(f"{e['library']} {e['name']} ({e['parameters'] / 1e6:.0f} M)" for e in large)
    broken = [e for e in found if "total" not in e and e["verdict"] != "too large"]
    lines = [f"{e['library']} {e['name']}: {e['verdict']}: {why(e)}" for e in broken]
    return [*lines, f"too large for this run: {names}"] if large else lines


def _summary(found: list[Entry]) -> list[str]:
    """For every library and all its models: the share of each kind of operation that is fused."""
    lines = []
    for library in dict.fromkeys(entry["library"] for entry in found):
        rows = [entry for entry in found if entry["library"] == library and "total" in entry]
        sums = {k: (sum(e["fused"][k] for e in rows), sum(e["total"][k] for e in rows)) for k in KINDS}
        shares = ", ".join(f"{kind} {fused / total:.0%}" for kind, (fused, total) in sums.items() if total)
        some = sum(any(entry["fused"].values()) for entry in rows)
        lines.append(f"{library}: {len(rows)} models, in {some} of them something fuses; of all operations {shares}")
    return lines


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
