"""A transfer from its options to its files."""

from __future__ import annotations

import dataclasses
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastres import models
from fastres.errors import UserError
from fastres.train import Stopped, checkpoint, datasets, network, plot
from fastres.train.datasets import Data
from fastres.train.distributed import World, world
from fastres.train.log import LOG, Log
from fastres.train.loop import CHECKPOINT
from fastres.transfer.features import cached
from fastres.transfer.heads import feature_extractor, head_name, load_backbone, replace_head
from fastres.transfer.options import Options
from fastres.transfer.tuning import FineTuner, train_head

__all__ = ["resume", "transfer"]

WEIGHTS, CURVES, CLASSES = "weights.pt", "curves.png", "classes.txt"
#: Options that may differ when a run is resumed: they do not change what is computed.
FREE = ("root", "workers")

History = list[dict[str, Any]]


def transfer(options: Options, *, overwrite: bool = False) -> History:
    """Transfers weights to a data set; writes weights.pt, classes.txt, log.csv, curves.png into the folder of the run.

    Args:
        options: of the run. overwrite: also where another run has left its files.

    Returns:
        A row for each epoch, as in log.csv.

    Raises:
        FileNotFoundError: if there is no such checkpoint. UserError: if something is not there, or does not fit.
        Stopped: if the run ended before its time.
    """
    folder = Path(options.out)
    if not overwrite and (found := next((n for n in (CHECKPOINT, WEIGHTS) if (folder / n).exists()), None)):
        more = f": continue it with --resume {folder}, or give" if found == CHECKPOINT else "; give"
        raise UserError(f"{folder} holds a run{more} --overwrite, or another --out")
    with _world(options) as processes:
        return _run(options, processes, None)


def resume(folder: str | Path, **changes: Any) -> History:
    """Continues a fine-tuning from its last checkpoint, with the numbers that it would have had otherwise.

    Args:
        folder: of the run. changes: options of `FREE`.

    Raises: as `transfer`, and UserError as `fastres.train.resume` for a model that is "package.module:callable".
    """
    path = Path(folder) / CHECKPOINT
    state = checkpoint.load(path)
    if "transfer" not in state:
        raise UserError(f"{folder} is a run of fastres train, not of fastres transfer")
    options = checkpoint.restored(Options, state["transfer"], path)
    options.check()
    network.check_named(options.model, changes)
    if wrong := [name for name, value in changes.items() if name not in FREE and getattr(options, name) != value]:
        raise UserError(f"a resumed run keeps its options; different are: {', '.join(wrong)}")
    with _world(options) as processes:
        return _run(dataclasses.replace(options, **changes, out=str(folder)), processes, state)


def _world(options: Options) -> AbstractContextManager[World]:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("fastres transfer runs as one process: start it without torchrun")
    return world(options.device)


def _run(options: Options, processes: World, state: dict[str, Any] | None) -> History:
    data = datasets.load(options.training())
    model = network.build(options.model, len(data.classes), fused=options.fused, seed=options.seed)
    loaded = "" if state is not None else _load(model, options)
    if options.hidden:
        replace_head(model, len(data.classes), options.hidden)
    image = data.test.__getitems__([0])
    if isinstance(image, UserError):
        raise image
    height, width = image[0].shape[2:]
    network.check_takes(model, (height, width), len(data.classes))
    folder = Path(options.out)
    # What may raise for the user's input comes before the first file.
    names = _parts(model, options) if options.mode == "finetune" else []
    tuner = _tuner(options, model, data, processes, names, folder) if options.mode == "finetune" else None
    if tuner is not None and state is not None:
        tuner.load_state(state)
    _make(folder, anew=state is None)
    if loaded:
        _say(loaded)
    if tuner is None:
        history, epoch = _features(options, model, data, processes, folder)
    else:
        history, epoch = _finetune(options, tuner, folder)
    _finish(options, model, data, history, epoch, folder)
    return history


def _say(text: str) -> None:
    print(text, flush=True)


def _load(model: nn.Module, options: Options) -> str:
    """Loads the checkpoint, and says so."""
    if options.keep_head:
        models.load_checkpoint(model, options.checkpoint)
        return f"{options.model} from {options.checkpoint}, with its head"
    dropped = load_backbone(model, options.checkpoint)
    what = f"its head is dropped: {', '.join(dropped)}" if dropped else "it has no head"
    return f"{options.model} from {options.checkpoint}; {what}"


def _parts(model: nn.Module, options: Options) -> list[str]:
    """The parts to unfreeze; by default the last stage."""
    if options.unfreeze is not None:
        return options.unfreeze
    stages = [name for name, _ in model.named_children() if name.startswith("layer")]
    if not stages:
        raise UserError(f"which parts of {options.model} are to be trained? --unfreeze names them, or none")
    return stages[-1:]


def _make(folder: Path, *, anew: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (CHECKPOINT, WEIGHTS, LOG, CURVES, CLASSES) if anew else ():
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error


def _features(options: Options, model: nn.Module, data: Data, processes: World, folder: Path) -> tuple[History, int]:
    """Trains the head of `model` on features. Returns the log, and the epoch whose weights it has."""
    backbone = feature_extractor(model, fuse=options.fused).to(processes.device)
    found = []
    for what, images in (("train", data.train), ("test", data.test)):
        features, notice = cached(
            Path(options.cache), backbone, images, data.mean, data.std,
            device=processes.device, workers=options.workers,
        )  # fmt: skip
        count, width = features.values.shape
        speed = f" in {features.seconds:.1f} s, {count / features.seconds:.0f} images/s" if features.seconds else ""
        _say(f"{what}: {count} images, {width} features each{speed}; {notice}")
        found.append(features)
    head: Any = model.get_submodule(head_name(model))
    log = _LastRow(folder)
    torch.manual_seed(options.seed)
    history = train_head(
        head, found[0], found[1], data.classes, options.training(),
        device=processes.device, patience=options.patience, log=log,
    )  # fmt: skip
    log.write(history)
    return history, _best(history, options.patience)


class _LastRow(Log):
    """A log that is written at the end: the epochs of a head take milliseconds."""

    def __init__(self, folder: Path) -> None:
        super().__init__(None)
        self.folder = folder  # which says that there is something to say

    def epoch(self, history: History) -> None:
        pass

    def write(self, history: History) -> None:
        try:
            super().epoch(history)
        except OSError as error:
            raise Stopped(f"cannot write the log: {error.strerror}") from error


def _tuner(
    options: Options, model: nn.Module, data: Data, processes: World, names: list[str], folder: Path
) -> FineTuner:
    return FineTuner(
        options.training(), model, data, processes, Log(None), folder,
        names=names, backbone_lr=options.backbone_lr or None, decay=options.lr_decay,
        gradual=options.gradual, patience=options.patience, about={"transfer": dataclasses.asdict(options)},
    )  # fmt: skip


def _finetune(options: Options, tuner: FineTuner, folder: Path) -> tuple[History, int]:
    """Trains head and parts. Returns the log, and the epoch whose weights the model has."""
    log = Log(folder, steps=options.epochs * tuner.steps, done=tuner.progress.step)
    tuner.log = log
    try:
        groups = ", ".join(f"{g['name']} {options.lr * g['scale']:.2g}" for g in tuner.optimizer.param_groups)
        log.say(
            f"{tuner.samples} images to train, {len(tuner.data.test)} to test; {options.epochs} epochs of "
            f"{tuner.steps} steps; learning rates: {groups}; the rest is frozen"
        )
        history = tuner.run().history
    finally:
        log.close()
    tuner.model.load_state_dict(tuner.weights())
    return history, tuner.best_epoch


def _best(history: History, patience: int) -> int:
    rows = history if patience else history[-1:]
    return min((row["test_error"], row["test_loss"], row["epoch"]) for row in rows)[-1]


def _finish(options: Options, model: nn.Module, data: Data, history: History, epoch: int, folder: Path) -> None:
    try:
        state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
        checkpoint.save_weights(state, folder / WEIGHTS)
        checkpoint.write_atomically(folder / CLASSES, "".join(f"{name}\n" for name in data.classes).encode())
        try:
            plot.write(history, folder / CURVES, f"{options.model} on {options.data}, {options.mode}")
        except ImportError as error:
            _say(f"no curves: {error}")
    except OSError as error:
        raise Stopped(f"cannot write the results: {error.strerror}") from error
    if len(history) < options.epochs:
        _say(f"ended after {len(history)} of {options.epochs} epochs: no lower error for {options.patience} of them")
    row = history[epoch - 1]
    kept = f" (epoch {epoch})" if options.patience else ""
    _say(f"test accuracy {100 - row['test_error']:.2f} %{kept}; in {folder}: {WEIGHTS}, {CLASSES}, {LOG}")
