"""What an analysis leaves: tables as CSV, figures as PNG, and one HTML page that needs no other file."""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastres.bench import machine
from fastres.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["VERDICTS", "Plot", "Report", "Table"]

#: How what was measured stands to the claim. "no claim": the analysis describes, the paper says nothing to test.
VERDICTS = ("reproduced", "partly reproduced", "not reproduced", "no claim")


@dataclass(frozen=True)
class Table:
    """Rows of values.

    Attributes:
        name: of its file: NAME.csv. columns: their titles, with units. rows: text and numbers.
        caption: a sentence above it. long: only in the CSV file, too long for a page.
    """

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    long: bool = False

    def csv(self) -> str:
        """All values, unrounded."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return text.getvalue()

    def __str__(self) -> str:
        """For a terminal."""
        rows = [tuple(map(str, self.columns)), *(tuple(map(_short, row)) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        words = [all(isinstance(value, str) for value in column) for column in zip(*self.rows, strict=True)]
        sides = [str.ljust if text else str.rjust for text in words or [False] * len(widths)]
        lines = (
            "  ".join(place(cell, width) for cell, width, place in zip(row, widths, sides, strict=True)) for row in rows
        )
        return "\n".join(line.rstrip() for line in lines)


@dataclass(frozen=True)
class Plot:
    """A figure of matplotlib. name: of its file: NAME.png. caption: a sentence below it."""

    name: str
    figure: Figure
    caption: str = ""

    def png(self) -> bytes:
        data = io.BytesIO()
        self.figure.savefig(data, format="png", dpi=130)
        return data.getvalue()


@dataclass
class Report:
    """What a paper claims beside what was measured.

    Attributes:
        name: of the analysis, and of its files. title: of the page.
        claim: of the paper, in our words, with the section. measured: what was seen here, with the figures that matter.
        verdict: one of `VERDICTS`.
        setting: what was run: data, networks, steps, seeds; enough to repeat it.
        limits: what this size of experiment cannot show.
    """

    name: str
    title: str
    claim: str
    measured: str
    verdict: str
    setting: str
    limits: str = ""
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict must be one of {', '.join(VERDICTS)}, got {self.verdict!r}")

    def __str__(self) -> str:
        lines = [self.title, f"claim     {self.claim}", f"measured  {self.measured}", f"verdict   {self.verdict}"]
        for table in self.tables:
            if not table.long:
                lines += ["", table.caption or table.name, str(table)]
        return "\n".join(lines)

    def write(self, folder: str | Path) -> list[Path]:
        """Writes NAME.html, and a CSV file and a PNG for each table and plot, into a folder that is made if need be.

        Raises:
            UserError: if a file cannot be written.
        """
        folder = Path(folder)
        plots = [(plot, plot.png()) for plot in self.plots]
        files: dict[str, bytes] = {f"{self.name}.html": self._html(plots).encode()}
        files |= {f"{table.name}.csv": table.csv().encode() for table in self.tables}
        files |= {f"{plot.name}.png": data for plot, data in plots}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                (folder / name).write_bytes(content)
        except OSError as error:
            raise UserError(f"cannot write the report into {folder}: {error.strerror}") from error
        return [folder / name for name in files]

    def _html(self, plots: Sequence[tuple[Plot, bytes]]) -> str:
        cpu = machine.cpu()
        measured_on = (
            f"{datetime.now(timezone.utc):%Y-%m-%d}, {cpu['cores']} cores of {cpu['model']}, "
            f"{torch.get_num_threads()} threads, "
            + ", ".join(f"{name} {version}" for name, version in machine.versions().items())
        )
        facts = [
            ("The paper's claim", self.claim),
            ("Measured here", self.measured),
            ("Verdict", self.verdict),
            ("How", self.setting),
            ("What this cannot show", self.limits),
            ("When and where", measured_on),
        ]
        body = "".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>\n" for name, text in facts if text)
        body = f"<h1>{html.escape(self.title)}</h1>\n<dl>\n{body}</dl>\n"
        for plot, data in plots:
            source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
            caption = html.escape(plot.caption or plot.name)
            body += f'<figure><img alt="{caption}" src="{source}"><figcaption>{caption}</figcaption></figure>\n'
        for table in self.tables:
            body += f"<h2>{html.escape(table.caption or table.name)}</h2>\n"
            body += f"<p>In {html.escape(table.name)}.csv.</p>\n" if table.long else _html_table(table)
        return _PAGE.format(title=html.escape(self.title), body=body)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(str(column))}</th>" for column in table.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_short(value))}</td>" for value in row) + "</tr>\n" for row in table.rows
    )
    return f"<table>\n<tr>{head}</tr>\n{rows}</table>\n"


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #20262c }}
dt {{ font-weight: 600; margin-top: .6rem }} dd {{ margin: 0 }}
figure {{ margin: 1.5rem 0 }} img {{ max-width: 100% }} figcaption {{ color: #6b7a88; font-size: .9rem }}
h2 {{ font-size: 1.05rem; margin-top: 2rem }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }}
th, td {{ padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid #d9dfe4 }}
</style>
{body}</html>
"""
