"""No row of the table of edge cases gets lost: each has a test named by its id, or a reason why not; and docs/cases.md
says so."""

import sys
from pathlib import Path

import pytest
from case_rows import NOT_YET, ROWS, SECTIONS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import cases  # noqa: E402

TESTS = cases.tests()


@pytest.mark.parametrize("row", ROWS)
def test_row_has_a_test_or_a_reason(row):
    assert TESTS.get(row) or NOT_YET.get(row), f"{row} has neither a test nor a reason"


def test_all_rows_are_there():
    counts = {letter: len(rows) for letter, (_, rows) in SECTIONS.items()}
    assert counts == {"A": 18, "B": 9, "C": 12, "D": 11, "E": 11, "F": 13, "G": 9}


def test_names_and_reasons_are_of_rows():
    assert set(ROWS) >= set(TESTS) and set(NOT_YET) <= set(ROWS)
    assert all(len(reason.split()) > 3 for reason in NOT_YET.values())


def test_document_is_current():
    text = (ROOT / "docs" / "cases.md").read_text(encoding="utf-8")
    assert text == cases.document(), "run `python scripts/cases.py --write`"


def test_a_row_without_either_is_an_error(monkeypatch, capsys):
    monkeypatch.setitem(ROWS, "G10", "a row that nobody wrote a test for")
    assert cases.main([]) == 1
    assert "G10  a row that nobody wrote a test for" in capsys.readouterr().out


def test_results_by_row():
    report = (
        '<testsuites><testsuite><testcase classname="t" name="test_a1_bias[x]" time="1"/>'
        '<testcase classname="t" name="test_a1_other" time="1"><failure message="no"/></testcase>'
        '<testcase classname="t" name="test_b2_mode" time="1"><skipped message="why"/></testcase>'
        '<testcase classname="t" name="test_helper" time="1"/></testsuite></testsuites>'
    )
    assert cases.results(report) == {"A1": {"passed": 1, "failed": 1}, "B2": {"skipped": 1}}
