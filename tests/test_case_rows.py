"""No row of the edge-case table gets lost: each has a test named by its id, or a reason why not."""

import re
from pathlib import Path

import pytest
from case_rows import IDS, NOT_YET

TESTED = {
    found.upper()
    for file in Path(__file__).parent.glob("test_cases_*.py")
    for found in re.findall(r"^def test_([a-e]\d+)_", file.read_text(encoding="utf-8"), re.MULTILINE)
}


@pytest.mark.parametrize("row", IDS)
def test_row_has_a_test_or_a_reason(row):
    assert row in TESTED or NOT_YET.get(row), f"{row} has neither a test nor a reason"


def test_names_and_reasons_are_of_rows():
    assert set(IDS) >= TESTED and set(NOT_YET) <= set(IDS)
    assert all(len(reason.split()) > 3 for reason in NOT_YET.values())
