"""A run from its options to its files, or from where it was left."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fastres.errors import UserError
from fastres.train import checkpoint, datasets, network, plot
from fastres.train.distributed import World, world
from fastres.train.log import LOG, Log
from fastres.train.loop import CHECKPOINT, Progress, Stopped, Trainer
from fastres.train.options import Options

__all__ = ["resume", "train"]

WEIGHTS, CURVES = "weights.pt", "curves.png"
FILES = (CHECKPOINT, WEIGHTS, LOG, CURVES)


def train(options: Options, *, overwrite: bool = False) -> Progress:
    """Trains a network and writes last.pt, log.csv, curves.png and weights.pt into the folder of the run.

    Args:
        options: of the run. overwrite: also where another run has left a checkpoint.

    Raises:
        UserError: if something is not there, or does not fit. Stopped: if the run ended before its time.
    """
    if (Path(options.out) / CHECKPOINT).exists() and not overwrite:
        raise UserError(f"{options.out} holds a run: continue it with --resume {options.out}, or give --overwrite")
    with world(options.device) as processes:
        return _run(options, processes, None)


def resume(folder: str | Path, **changes: Any) -> Progress:
    """Continues a run from its last checkpoint, with the numbers that it would have had without the interruption.

    Args:
        folder: of the run. changes: options, see `Options.changed`; moving the folder is no change.

    Raises:
        FileNotFoundError: if there is no checkpoint. UserError, Stopped: as in `train`. UserError also if the model is
            "package.module:callable" and `changes` do not name it: a file alone does not make us import anything.
    """
    path = Path(folder) / CHECKPOINT
    state = checkpoint.load(path)
    options = checkpoint.restored(Options, state.get("options"), path)
    options.check()
    network.check_named(options.model, changes)
    options = dataclasses.replace(options, out=str(folder)).changed(changes)
    with world(options.device) as processes:
        return _run(options, processes, state)


def _run(options: Options, processes: World, state: dict[str, Any] | None) -> Progress:
    data = datasets.load(options)
    model = network.build(options.model, len(data.classes), fused=options.fused, seed=options.seed)
    image = data.test.__getitems__([0])
    if isinstance(image, UserError):
        raise image
    height, width = image[0].shape[2:]
    network.check_takes(model, (height, width), len(data.classes))
    folder = Path(options.out)
    if processes.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in FILES if state is None else ():  # of the run that is overwritten: nobody is to continue it
                (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error
    trainer = Trainer(options, model, data, processes, Log(None), folder)
    if state is not None:
        trainer.load_state(state)
    log = Log(
        folder if processes.rank == 0 else None,
        steps=options.epochs * trainer.steps,
        done=trainer.progress.step,
        tensorboard=options.tensorboard,
    )
    trainer.log = log
    try:
        log.say(_headline(options, trainer, processes))
        progress = trainer.run()
        if processes.rank == 0:
            _finish(options, trainer, folder, log)
        return progress
    finally:
        log.close()


def _headline(options: Options, trainer: Trainer, processes: World) -> str:
    parameters = sum(p.numel() for p in trainer.model.parameters())
    many = f", {processes.size} processes" if processes.size > 1 else ""
    where = f"{processes.device.type}{many}"
    return (
        f"{options.model} ({'fused' if options.fused else 'eager'}, {parameters:,} parameters) on {options.data}: "
        f"{len(trainer.data.train)} images to train, {len(trainer.data.test)} to test; {options.epochs} epochs of "
        f"{trainer.steps} steps, {where}" + (f"; from step {trainer.progress.step}" if trainer.progress.step else "")
    )


def _finish(options: Options, trainer: Trainer, folder: Path, log: Log) -> None:
    """The files that only a finished run has."""
    best = trainer.ema.model if trainer.ema else trainer.model
    try:
        state = {name: value.cpu() for name, value in best.state_dict().items()}
        checkpoint.save_weights(state, folder / WEIGHTS)
        written = [WEIGHTS, CHECKPOINT, LOG]
        history = trainer.progress.history
        try:
            plot.write(history, folder / CURVES, f"{options.model} on {options.data}, seed {options.seed}")
            written.append(CURVES)
        except ImportError as error:
            log.say(f"no curves: {error}")
    except OSError as error:
        raise Stopped(f"cannot write the results: {error.strerror}; {folder / CHECKPOINT} is complete") from error
    row = history[-1]
    error_rate = row.get("ema_test_error", row["test_error"])
    log.say(
        f"test accuracy {100 - error_rate:.2f} % after {row['epoch']} epochs, {trainer.progress.seconds:.0f} s; "
        f"in {folder}: {', '.join(written)}"
    )
