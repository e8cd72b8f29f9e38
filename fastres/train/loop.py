"""The training loop."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastres.errors import UserError
from fastres.models.checkpoint import check_fits
from fastres.nn import convert_sync_batchnorm
from fastres.train import checkpoint
from fastres.train.batches import load_batches, normalised, per_channel
from fastres.train.datasets import Data, Images
from fastres.train.distributed import World
from fastres.train.ema import Ema
from fastres.train.interrupt import Interruption
from fastres.train.log import Log
from fastres.train.options import Options
from fastres.train.sampler import MicroBatches, share
from fastres.train.schedule import WARM_RATE, Schedule, warmed_up

__all__ = ["CHECKPOINT", "Progress", "Stopped", "Trainer"]

CHECKPOINT = "last.pt"


class Stopped(Exception):
    """A run ended before its time: the message says why, where, and which checkpoint there is.

    Attributes:
        signal: the signal that ended it, or 0: it diverged, or could not write a file.
    """

    def __init__(self, message: str, signal: int = 0) -> None:
        super().__init__(message)
        self.signal = signal


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        epoch: epochs that are finished. batch: steps of the next one that are done. step: steps in all.
        cold: the paper's warm-up is still on.
        loss, wrong, seen: sum of the losses, misclassified images and images of the current epoch.
        seconds: of training and testing, so far.
        history: a row for each epoch: errors in per cent, losses as means over the images.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    cold: bool = False
    loss: float = 0.0
    wrong: int = 0
    seen: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """Trains a model.

    Args:
        options: of the run. model: on the CPU, with its first weights; it is moved to the device of `world`.
        data: what to train on. world: the processes. log: what to tell. folder: where checkpoints go; None: nowhere.
    """

    def __init__(
        self, options: Options, model: nn.Module, data: Data, world: World, log: Log, folder: Path | None
    ) -> None:
        self.options, self.data, self.world, self.log = options, data, world, log
        self.path = None if folder is None else folder / CHECKPOINT
        self.model = model.to(world.device)
        self.parallel = world.parallel(self.model)
        if options.sync_bn and world.size > 1:  # after DistributedDataParallel, which refuses such on the CPU
            convert_sync_batchnorm(self.model)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), options.lr, options.momentum, weight_decay=options.weight_decay
        )
        self.ema = Ema(self.model, options.ema) if options.ema else None
        self.samples = len(data.train)
        self.steps = math.ceil(self.samples / options.batch)  # of an epoch
        self.schedule = Schedule(
            options.schedule,
            options.lr,
            options.epochs * self.steps,
            [epoch * self.steps for epoch in options.milestones],
            options.gamma,
            options.warmup if isinstance(options.warmup, int) else 0,
        )
        self.progress = Progress(cold=options.warmup == "paper")
        self._saved = 0  # the step of the last checkpoint
        self._mean, self._std = per_channel(data.mean, world.device), per_channel(data.std, world.device)

    def state(self) -> dict[str, Any]:
        """Everything that a continuation needs. Random numbers need no state: they follow from seed and step."""
        return {
            "options": asdict(self.options),
            "progress": asdict(self.progress),
            "classes": self.data.classes,
            "samples": self.samples,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.model.state_dict() if self.ema else {},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was made. Raises UserError if it is of other data, or damaged."""
        try:
            self._load_state(state)
        except UserError:
            raise
        except Exception as error:  # whatever a part does that is not what it should be
            what = " ".join([type(error).__name__, *str(error).splitlines()[:1]])
            raise UserError(f"the checkpoint is damaged, or of another network ({what})") from error

    def _load_state(self, state: dict[str, Any]) -> None:
        if state["classes"] != self.data.classes:
            then, now = len(state["classes"]), len(self.data.classes)
            raise UserError(f"the data has other classes than at the checkpoint ({then} then, {now} now)")
        if state["samples"] != self.samples:
            raise UserError(f"the data has {self.samples} images to train, it had {state['samples']} at the checkpoint")
        check_fits(state["model"], self.model.state_dict(), "of the run")
        if self.ema:
            check_fits(state["ema"], self.ema.model.state_dict(), "of the run (moving average)")
        progress = checkpoint.restored(Progress, state["progress"], self.path or Path(CHECKPOINT))
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, kept in self.optimizer.state.items():
            if any(isinstance(value, Tensor) and value.shape != parameter.shape for value in kept.values()):
                raise UserError("the checkpoint is damaged: the optimizer's state does not fit the weights")
        self.model.load_state_dict(state["model"])
        if self.ema:
            self.ema.model.load_state_dict(state["ema"])
        self.progress = progress
        self._saved = self.progress.step

    def run(self) -> Progress:
        """Trains to the end of the last epoch.

        Raises:
            Stopped: on SIGINT or SIGTERM, after a checkpoint; if the loss is not finite; if a file cannot be written.
            UserError: if an image cannot be read, or a batch is too small.
        """
        with Interruption() as interruption:
            while not self._finished():
                self._epoch(interruption)
        return self.progress

    def _finished(self) -> bool:
        return self.progress.epoch >= self.options.epochs

    def _train_mode(self) -> None:
        self.parallel.train()

    def _epoch(self, interruption: Interruption) -> None:
        options, progress = self.options, self.progress
        start, done = time.perf_counter(), progress.seen
        self.data.train.set_epoch(options.seed, progress.epoch)
        sampler = MicroBatches(
            self.samples,
            options.batch,
            seed=options.seed,
            epoch=progress.epoch,
            rank=self.world.rank,
            size=self.world.size,
            accumulate=options.accumulate,
            first=progress.batch,
        )
        batches = self._batches(self.data.train, sampler)
        self._train_mode()
        for count in map(len, sampler.batches):
            stop = self._step([next(batches) for _ in range(options.accumulate)], count, interruption)
            last = progress.batch == self.steps
            if stop or (options.checkpoint_every and progress.step % options.checkpoint_every == 0 and not last):
                progress.seconds += time.perf_counter() - start
                start = time.perf_counter()
                self._save()
            if stop:
                raise Stopped(f"stopped after step {progress.step}; {self._checkpoint()}", stop)
        speed = (progress.seen - done) / max(time.perf_counter() - start, 1e-9)
        row: dict[str, Any] = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "lr": self._rate(max(0, progress.step - 1)),
            "train_loss": progress.loss / progress.seen,
            "train_error": 100 * progress.wrong / progress.seen,
        }
        row["test_loss"], row["test_error"] = self.evaluate(self.model)
        if self.ema:
            row["ema_test_loss"], row["ema_test_error"] = self.evaluate(self.ema.model)
        progress.seconds += time.perf_counter() - start
        row |= {"images_per_second": speed, "seconds": progress.seconds}
        progress.history.append(row)
        progress.epoch, progress.batch = progress.epoch + 1, 0
        progress.loss, progress.wrong, progress.seen = 0.0, 0, 0
        self._save()
        try:
            self.log.epoch(progress.history)
        except OSError as error:
            raise Stopped(f"cannot write the log: {error.strerror}; {self._checkpoint()}") from error

    def _batches(self, images: Images, sampler: Any) -> Iterator[tuple[Tensor, Tensor]]:
        return load_batches(images, sampler, self.options.workers, self.world.device)

    def _input(self, images: Tensor) -> Tensor:
        return normalised(images, self._mean, self._std)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.options.amp)

    def _rate(self, step: int) -> float:
        return self.schedule.rate(step) * (WARM_RATE if self.progress.cold else 1.0)

    def _step(self, batches: list[tuple[Tensor, Tensor]], count: int, interruption: Interruption) -> int:
        """One step on `count` images over all processes. Returns the signal that asks for an end, or 0."""
        options, progress, world = self.options, self.progress, self.world
        torch.manual_seed(_seed(options.seed, progress.step, world.rank))  # for random layers
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(progress.step) * group.get("scale", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        losses, wrong = [], []
        for i, (images, labels) in enumerate(batches):
            labels = labels.to(world.device, non_blocking=True)
            last = i == len(batches) - 1
            with nullcontext() if last or world.size == 1 else self.parallel.no_sync():  # type: ignore[operator]
                with self._autocast():
                    logits = self.parallel(self._input(images))
                loss = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=options.label_smoothing)
                # The mean over all images of the step, whatever part of them is here; processes are averaged.
                (loss * (world.size / count)).backward()
            losses.append(loss.detach())
            wrong.append((logits.detach().argmax(1) != labels).sum())
        found = torch.stack([torch.stack(losses).sum().double(), torch.stack(wrong).sum().double()]).tolist()
        number = interruption.signal
        total, misses, interrupted, terminated = world.sum([*found, number == signal.SIGINT, number == signal.SIGTERM])
        if not math.isfinite(total):  # before the weights take it in
            raise Stopped(
                f"the loss is {total} at step {progress.step + 1} (epoch {progress.epoch + 1}, "
                f"learning rate {self._rate(progress.step):.3g}); {self._checkpoint()}"
            )
        self.optimizer.step()
        world.average_buffers(self.model)
        if self.ema:
            self.ema.update(self.model, progress.step)
        progress.batch, progress.step = progress.batch + 1, progress.step + 1
        progress.loss += total
        progress.wrong += int(misses)
        progress.seen += count
        if progress.cold and warmed_up(progress.wrong, progress.seen, self.samples):
            progress.cold = False
        self.log.step(progress.step, total / count)
        return signal.SIGINT if interrupted else signal.SIGTERM if terminated else 0

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Mean loss, without label smoothing, and error in per cent on the test images."""
        batch = max(1, self.options.batch // (self.world.size * self.options.accumulate))
        own = share(np.arange(len(self.data.test)), self.world.rank, self.world.size)
        pieces = [own[i : i + batch].tolist() for i in range(0, len(own), batch)]
        training = model.training
        model.eval()
        loss, wrong = 0.0, 0.0
        for images, labels in self._batches(self.data.test, pieces):
            labels = labels.to(self.world.device, non_blocking=True)
            with self._autocast():
                logits = model(self._input(images))
            loss += F.cross_entropy(logits.float(), labels, reduction="sum").item()
            wrong += (logits.argmax(1) != labels).sum().item()
        model.train(training)
        loss, wrong = self.world.sum([loss, wrong])
        return loss / len(self.data.test), 100 * wrong / len(self.data.test)

    def _save(self) -> None:
        """Writes a checkpoint, by the first process. Weights that are not finite never replace one."""
        state = self.model.state_dict()
        if bad := [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]:
            raise Stopped(f"{bad[0]} is not finite after step {self.progress.step}; {self._checkpoint()}")
        if self.path is None:
            return
        if self.world.rank == 0:
            try:
                checkpoint.save(self.state(), self.path)
            except OSError as error:
                why = f"cannot write the checkpoint of step {self.progress.step}: {error.strerror}"
                raise Stopped(f"{why}; {self._checkpoint()}") from error
        self._saved = self.progress.step

    def _checkpoint(self) -> str:
        """For messages: the last good checkpoint."""
        if self.path is None or not self._saved:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self.path} (step {self._saved})"


def _seed(*numbers: int) -> int:
    """A seed that differs for every other tuple of numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
