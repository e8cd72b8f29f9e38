"""What the tests of the analyses share: small images, few of them, and a look at what a report leaves."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from fastres import cli
from fastres.analysis import Report, training
from fastres.train import datasets

#: Of options that every analysis which trains has: one step or two.
SHORT: dict[str, Any] = {"epochs": 1, "batch": 16, "data": "synthetic"}


def small(train: int = 32, test: int = 20) -> datasets.Data:
    """Patterns of 8 x 8 pixels in three classes, without augmentation."""
    return datasets.synthetic(8, classes=3, train=train, test=test)


@pytest.fixture
def small_data(monkeypatch: pytest.MonkeyPatch) -> datasets.Data:
    """The analyses get `small()` for any data set."""
    found = small()
    monkeypatch.setattr(training, "load_data", lambda *args, **options: found)
    return found


def check_files(report: Report, folder: Path) -> None:
    """Every table is a CSV file, every plot a PNG of less than 150 kB, and the page needs no other file."""
    pytest.importorskip("matplotlib")
    files = report.write(folder)
    assert sorted(files) == sorted(folder.iterdir())
    for table in report.tables:
        with open(folder / f"{table.name}.csv") as file:
            header, *rows = csv.reader(file)
        assert tuple(header) == tuple(table.columns) and len(rows) == len(table.rows) > 0
        assert all(len(found) == len(table.columns) for found in table.rows)
    for plot in report.plots:
        data = (folder / f"{plot.name}.png").read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) < 150_000
    page = (folder / f"{report.name}.html").read_text()
    assert page.count("data:image/png;base64,") == len(report.plots) > 0
    assert "http" not in page and "<script" not in page and 'src="data:' in page
    assert report.verdict in page and "paper's claim" in page


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """`fastres analyze ...`: exit code, stdout, stderr."""
    code = cli.main(("analyze", *arguments))
    found = capsys.readouterr()
    return code, found.out, found.err
