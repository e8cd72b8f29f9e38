"""An ExplainReport as one HTML page, without scripts or other files."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from fastres.explain.ledger import Block, ExplainReport, kernel_name, megabytes
from fastres.reasons import CODES
from fastres.report import Row

_STYLE = """
:root { --yes: #1b7f4b; --part: #b7791f; --no: #b3261e; --line: #d9dde2; --soft: #f4f6f8; --text: #1c2733; }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--text); max-width: 1200px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.4em; margin-bottom: 0.1em; } h2 { font-size: 1.1em; margin-top: 1.8em; }
p.about { color: #5b6875; margin-top: 0; }
.bar { display: flex; height: 14px; border-radius: 7px; overflow: hidden; background: var(--no); margin: 0.8em 0; }
.bar span { background: var(--yes); }
ul.sum { list-style: none; padding: 0; } ul.sum li { padding: 1px 0; } ul.sum li:first-child { font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 3px 8px; border-bottom: 1px solid var(--line); vertical-align: top; }
th { position: sticky; top: 0; background: #fff; font-weight: 600; border-bottom: 2px solid var(--text); }
td { white-space: nowrap; } td.w { white-space: normal; } td.l, th.l { text-align: left; }
tr.block { background: var(--soft); font-weight: 600; } tr.op td:first-child { padding-left: 2em; }
tr.yes td.s { color: var(--yes); } tr.part td.s { color: var(--part); } tr.no td.s { color: var(--no); }
code { background: var(--soft); padding: 0 4px; border-radius: 3px; white-space: nowrap; }
.share { display: inline-block; height: 9px; background: #6b8fb5; vertical-align: middle; margin-right: 5px; }
#all:not(:checked) ~ table tr.op.yes { display: none; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 1em; } dd { margin: 0; }
@media (prefers-color-scheme: dark) {
  :root { --yes: #5cc98f; --part: #e0b050; --no: #f0857d; --line: #39424c; --soft: #222a32; --text: #e4e8ec; }
  body, th { background: #161b20; } p.about { color: #9aa7b4; }
}
"""


def html(report: ExplainReport) -> str:
    """The page: what it comes to, a table of blocks with their operations, and what the codes mean."""
    timed, saved = report.step is not None, any(block.eager_saved or block.fused_saved for block in report.blocks)
    shapes = ", ".join("x".join(map(str, shape)) for shape in report.input_shapes)
    about = f"{report.mode} mode, {report.dtype}, input {shapes}, on {report.device}"
    titles = ["eager MB", "MB now"]
    titles += ["saved: eager MB", "now"] if saved else []
    titles += ["eager ms", "ms now", "share"] if timed else []
    body = [
        f"<h1>{escape(report.model)}: what runs fused</h1>",
        f'<p class="about">{escape(about)}</p>',
        f'<div class="bar"><span style="width: {report.fused_share:.2%}"></span></div>',
        '<ul class="sum">',
        *(f"<li>{escape(line)}</li>" for line in report.headline()),
        "</ul>",
        "<h2>Blocks</h2>",
        '<input type="checkbox" id="all"><label for="all"> also show the operations that are fused</label>',
        "<table><thead><tr>",
        '<th class="l">block, operation</th><th class="l">fused</th><th class="l">kernel, or why not</th>',
        *(f"<th>{title}</th>" for title in titles),
        "</tr></thead><tbody>",
        *(line for block in report.blocks for line in _block(report, block, saved, timed)),
        "</tbody></table>",
        *_notes(report, timed),
        *_legend(report.lost),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    title = f"<title>{escape(report.model)}: fastres explain</title>"
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}{title}<style>{_STYLE}</style></head>\n<body>\n' + "\n".join(
        [*body, "</body></html>", ""]
    )


def _block(report: ExplainReport, block: Block, saved: bool, timed: bool) -> Iterable[str]:
    """Table rows of a block and its operations; a layer outside of blocks has one."""
    rows = [row for row in report.rows if row.block == block.name]
    single = len(rows) == 1 and rows[0].name == block.name and rows[0].kind != "add"
    numbers = [megabytes(block.eager_bytes), megabytes(block.fused_bytes)]
    numbers += [megabytes(block.eager_saved), megabytes(block.fused_saved)] if saved else []
    if timed and block.eager_ms is not None and block.fused_ms is not None and block.share is not None:
        bar = f'<span class="share" style="width: {60 * block.share:.1f}px"></span>'
        numbers += [f"{block.eager_ms:.3f}", f"{block.fused_ms:.3f}", f"{bar}{block.share:.1%}"]
    elif timed:
        numbers += ["-"] * 3
    state = "yes" if block.fused == block.operations else "part" if block.fused else "no"
    name = f"{block.name} ({rows[0].kind if single else block.kind})" if block.name else block.kind
    why = _why(rows[0]) if single else escape(report.kernels(block))
    yield _row("block", state, name, f"{block.fused} of {block.operations}", why, numbers)
    for row in [] if single else rows:
        unknown = row.eager_bytes is None or row.fused_bytes is None
        numbers = ["-", "-"] if unknown else [megabytes(row.eager_bytes or 0), megabytes(row.fused_bytes or 0)]
        numbers += [""] * (2 * saved + 3 * timed)
        short = row.name.removeprefix(f"{block.name}.") if row.name != block.name else ""
        state = "yes" if row.fused else "no"
        yield _row("op", state, f"{short} [{row.kind}]".strip(), "fused" if row.fused else "no", _why(row), numbers)


def _row(kind: str, state: str, name: str, fused: str, why: str, numbers: list[str]) -> str:
    cells = f'<td class="l">{escape(name)}</td><td class="l s">{fused}</td><td class="l w">{why}</td>'
    return f'<tr class="{kind} {state}">{cells}{"".join(f"<td>{number}</td>" for number in numbers)}</tr>'


def _why(row: Row) -> str:
    kernel = escape(": ".join(filter(None, (row.op, kernel_name(row)))))
    if row.backward:
        kernel += f"; backward {escape(row.backward)}"
    if row.fused:
        return kernel
    return f"<code>{row.code}</code> {escape(row.reason)}" + (f" ({kernel})" if kernel else "")


def _notes(report: ExplainReport, timed: bool) -> Iterable[str]:
    yield "<h2>How to read this</h2><ul>"
    yield "<li>MB: activations that are read and written, counted from shapes; the documentation has the counts.</li>"
    if report.mode == "train":
        yield "<li>Saved: what autograd keeps for backward, measured; what two blocks keep counts for the first.</li>"
    if timed:
        yield (
            "<li>Times are those of whole blocks: their operations run inside each other and have none of their own. "
            "Share: of the step as it is now; what is missing to 100 % lies between the blocks.</li>"
        )
    yield from (f"<li>{escape(note)}</li>" for note in report.notes())
    yield "</ul>"


def _legend(lost: list[Row]) -> Iterable[str]:
    codes = dict.fromkeys(row.code for row in lost)
    if codes:
        yield "<h2>Reasons</h2><dl>"
        yield from (f"<dt><code>{code}</code></dt><dd>{escape(CODES[code])}</dd>" for code in codes)
        yield "</dl>"
