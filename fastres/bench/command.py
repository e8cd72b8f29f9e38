"""What `fastres bench` does around the harness: options, progress bar, tables, files."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fastres.bench import harness, plot, report
from fastres.errors import UserError


def contenders(peers: str | None) -> list[str]:
    """The contenders that `--peers` asks for, in the order of the table."""
    if peers is None:
        return list(harness.CONTENDERS)
    wanted = [name.strip() for name in peers.split(",") if name.strip() not in ("", "none")]
    if unknown := [name for name in wanted if name not in harness.CONTENDERS]:
        known = ", ".join(name for name in harness.CONTENDERS if name not in harness.ALWAYS)
        raise UserError(f"--peers: no contender is named {', '.join(unknown)}; there are {known}")
    return [name for name in harness.CONTENDERS if name in harness.ALWAYS or name in wanted]


def _options(given: argparse.Namespace) -> harness.Options:
    options = harness.Options(
        contenders=contenders(given.peers),
        **{
            name: getattr(given, name)
            for name in ("dtype", "device", "threads", "rounds", "seconds", "size", "checkpoint", "images", "timeout")
        },
    )
    options.models = given.models or options.models
    options.modes = ["infer", "train"] if given.mode == "both" else [given.mode]
    if given.batch:
        options.batches = {"infer": given.batch, "train": given.batch}
    options.check()
    return options


@contextmanager
def progress(program: str) -> Iterator[harness.Say]:
    """A progress bar on a terminal; elsewhere (CI logs) a line for each table."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        seen: set[str] = set()

        def line(text: str, share: float) -> None:
            title = text.partition(":")[0]
            if title not in seen:
                seen.add(title)
                print(f"{program}: {title}", file=sys.stderr, flush=True)

        yield line
        return
    columns = (BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, refresh_per_second=2) as bar:
        job = bar.add_task("starting", total=1.0)
        yield lambda text, share: bar.update(job, description=text, completed=share)


def run(given: argparse.Namespace) -> int:
    """Run the benchmark and show it. The exit code is 1 if fastres itself failed somewhere."""
    try:
        from rich.console import Console
    except ImportError as error:
        raise UserError(f"the benchmark's tables need rich ({error}): pip install 'fastres[bench]'") from error
    options = _options(given)
    # A terminated benchmark ends its contenders and removes its files, as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with progress("fastres bench") as say:
        result = harness.run(options, say)
    console = Console(highlight=False)
    console.width = max(console.width, report.WIDTH)
    for part in report.tables(result):
        console.print(part)
    console.print(report.LEGEND, style="dim")
    console.print("\n" + report.machine_line(result))
    stem = report.default_stem(result["date"])
    json_file = given.json or stem.with_suffix(".json")
    plot_file = given.plot or stem.with_suffix(".png")
    report.write_json(result, json_file)
    written = [json_file]
    try:
        plot.write(result, plot_file)
        written.append(plot_file)
    except ImportError as error:
        console.print(f"no chart: {error}")
    console.print(f"\n{result['seconds']:.0f} s. Results: {' and '.join(map(str, written))}", soft_wrap=True)
    failed = [
        task["title"]
        for task in result["tables"]
        for row in task["contenders"]
        if (row["name"], row["status"]) == (harness.OURS, "failed")
    ]
    return 1 if failed else 0
