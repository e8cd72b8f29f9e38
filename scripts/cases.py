#!/usr/bin/env python3
"""The edge cases that fuse_ has to get right, row by row: which tests cover each, or why none does.

    python scripts/cases.py            the table; exit status 1 if a row has neither a test nor a reason
    python scripts/cases.py --run      runs the tests and counts what passed, failed and was skipped in each row
    python scripts/cases.py --write    writes docs/cases.md

Rows and reasons are in tests/case_rows.py. A test covers the row that its name begins with: test_a1_..., in
tests/test_cases_*.py.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from case_rows import NOT_YET, ROWS, SECTIONS  # noqa: E402

_NAME = re.compile(r"test_([a-g]\d+)_")


def files() -> list[Path]:
    return sorted((ROOT / "tests").glob("test_cases_*.py"))


def tests() -> dict[str, list[tuple[str, str]]]:
    """The test functions of each row: (file, function)."""
    found: dict[str, list[tuple[str, str]]] = {}
    for path in files():
        for name in re.findall(r"^def (test_\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE):
            if match := _NAME.match(name):
                found.setdefault(match[1].upper(), []).append((path.name, name))
    return found


def run() -> dict[str, Counter[str]]:
    """Runs the tests; what became of them, by row."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junit-xml={report}", *map(str, files())]
        subprocess.run(command, cwd=ROOT, check=False)
        return results(report.read_text(encoding="utf-8"))


def results(report: str) -> dict[str, Counter[str]]:
    """Counts of "passed", "failed" and "skipped" by row, from pytest's JUnit report."""
    found: dict[str, Counter[str]] = {}
    for case in ElementTree.fromstring(report).iter("testcase"):
        if match := _NAME.match(case.get("name", "")):
            tags = {child.tag for child in case}
            outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
            found.setdefault(match[1].upper(), Counter())[outcome] += 1
    return found


def state(row: str, found: dict[str, list[tuple[str, str]]]) -> str:
    """covered; partly; not yet, each with a reason but the first; or missing."""
    if row in found:
        return "partly" if row in NOT_YET else "covered"
    return "not yet" if row in NOT_YET else "missing"


def table(outcomes: dict[str, Counter[str]] | None) -> list[str]:
    """Lines for a terminal."""
    found, lines = tests(), []
    for row, text in ROWS.items():
        if row[1:] == "1":
            lines += ["", f"{row[0]}  {SECTIONS[row[0]][0]}"]
        names = found.get(row, [])
        about = f"{len(names)} test{'s' * (len(names) != 1)}"
        if outcomes is not None:
            about = ", ".join(f"{count} {what}" for what, count in sorted(outcomes.get(row, Counter()).items()))
        lines.append(f"{row:<4} {text:<66} {state(row, found):<8} {about}")
        if row in NOT_YET:
            lines.append(f"     {NOT_YET[row]}")
    return lines


def document() -> str:
    """docs/cases.md."""
    found = tests()
    states = Counter(state(row, found) for row in ROWS)
    lines = [
        "# Edge cases",
        "",
        "What has to be right when a whole model is swapped, row by row, and the tests that say so: those whose names",
        "begin with the row's id, each usually over many parameters. This page is written by `python scripts/cases.py",
        "--write`; `--run` runs the tests and counts what passed, failed and was skipped in each row.",
        "",
        f"{len(ROWS)} rows: " + ", ".join(f"{count} {what}" for what, count in sorted(states.items())) + ".",
    ]
    for letter, (title, rows) in SECTIONS.items():
        lines += ["", f"## {letter}. {title}", "", "| id | case | state | tests |", "|---|---|---|---|"]
        for row in (f"{letter}{number}" for number in range(1, len(rows) + 1)):
            where = ", ".join(f"`{file}`" for file in dict.fromkeys(file for file, _ in found.get(row, [])))
            lines.append(f"| {row} | {ROWS[row]} | {state(row, found)} | {where} |")
        left = [f"- {row}: {NOT_YET[row]}." for row in ROWS if row[0] == letter and row in NOT_YET]
        lines += ["", "Left out:", "", *left] if left else []
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run the tests")
    parser.add_argument("--write", action="store_true", help="write docs/cases.md")
    given = parser.parse_args(arguments)
    if given.write:
        (ROOT / "docs" / "cases.md").write_text(document(), encoding="utf-8")
    outcomes = run() if given.run else None
    print("\n".join(table(outcomes)))
    missing = [row for row in ROWS if state(row, tests()) == "missing"]
    failed = [row for row, found in (outcomes or {}).items() if found["failed"]]
    for what, rows in (("neither a test nor a reason", missing), ("failed", failed)):
        if rows:
            print(f"\n{what}: " + "; ".join(f"{row}  {ROWS[row]}" for row in rows))
    return 1 if missing or failed else 0


if __name__ == "__main__":
    sys.exit(main())
