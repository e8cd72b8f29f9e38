"""What a run leaves to look at: a line an epoch, a progress bar, log.csv, TensorBoard."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path
from typing import Any

from fastres.errors import UserError
from fastres.train.checkpoint import write_atomically

__all__ = ["LOG", "Log"]

LOG = "log.csv"
Row = dict[str, Any]


class Log:
    """The log of the process of rank 0; that of any other process says and writes nothing.

    Args:
        folder: of the run, which is there; None: a log that does nothing.
        steps: of the whole run. done: of them, at the start.
        tensorboard: write for TensorBoard as well, into a folder of that name.

    Raises:
        UserError: if tensorboard is asked for and not installed.
    """

    def __init__(self, folder: Path | None, *, steps: int = 0, done: int = 0, tensorboard: bool = False) -> None:
        self.folder = folder
        self._writer: Any = None
        self._bar: Any = None
        if folder is None:
            return
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                why = f"--tensorboard needs tensorboard ({error})"
                raise UserError(f"{why}: pip install 'fastres[tensorboard]'") from error
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        self._bar = _progress_bar(steps, done)

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        elif self.folder is not None:
            print(text, flush=True)

    def step(self, done: int, loss: float) -> None:
        """Steps that are done, and the loss of the last one."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, description=f"loss {loss:.4f}")

    def epoch(self, history: list[Row]) -> None:
        """Writes all epochs into log.csv, and says the last one."""
        if self.folder is None:
            return
        row = history[-1]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        write_atomically(self.folder / LOG, text.getvalue().encode())
        if self._writer is not None:
            for name in ("lr", "train_loss", "train_error", "test_loss", "test_error", "ema_test_error"):
                if name in row:
                    self._writer.add_scalar(name, row[name], row["step"])
            self._writer.flush()
        ema = f", of the average {row['ema_test_error']:.2f} %" if "ema_test_error" in row else ""
        self.say(
            f"epoch {row['epoch']:3}   loss {row['train_loss']:.4f}   error {row['train_error']:.2f} %   "
            f"test error {row['test_error']:.2f} %{ema}   {row['images_per_second']:.0f} images/s"
        )

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._bar is not None:
            self._bar.stop()


def _progress_bar(steps: int, done: int) -> Any:
    """A bar with the time left, on a terminal; None elsewhere, or without rich."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    bar = Progress(*columns, transient=True, refresh_per_second=4)
    bar.add_task("starting", total=steps, completed=done)
    bar.start()
    return bar
