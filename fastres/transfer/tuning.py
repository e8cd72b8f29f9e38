"""Training that starts from pre-trained weights: `fastres train`'s loop with early stopping, frozen parts, and a rate
for each part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastres.train import Options as TrainOptions
from fastres.train import Trainer
from fastres.train.datasets import ArrayImages, Data
from fastres.train.distributed import World
from fastres.train.log import Log
from fastres.transfer.features import Features
from fastres.transfer.freeze import freeze_until, later_first, param_groups
from fastres.transfer.heads import MLP

__all__ = ["EarlyStopping", "FineTuner", "standardised", "train_head"]


class EarlyStopping(Trainer):
    """Ends a run when the error has not fallen for some epochs; the weights are then those of the best epoch.

    The best epoch has the lowest error on the test images, among equals the lowest loss.

    Args:
        patience: epochs; 0: runs to the end, and the last weights count. first: epochs that do not wear it out.
    """

    def __init__(self, *given: Any, patience: int = 0, first: int = 0) -> None:
        super().__init__(*given)
        self.patience, self.first = patience, first
        self._best: dict[str, Tensor] = {}

    @property
    def best_epoch(self) -> int:
        """The number of the best epoch so far, from 1 on; without patience that of the last one. 0: there is none."""
        history = self.progress.history
        if not self.patience:
            return len(history)
        return min((row["test_error"], row["test_loss"], row["epoch"]) for row in history)[-1] if history else 0

    def weights(self) -> dict[str, Tensor]:
        """The weights that count, on the CPU."""
        state = self._best or self.model.state_dict()
        return {name: value.detach().cpu().clone() for name, value in state.items()}

    def state(self) -> dict[str, Any]:
        return {**super().state(), "best": self._best}

    def _load_state(self, state: dict[str, Any]) -> None:
        best = dict(state["best"])
        super()._load_state(state)
        self._best = best

    def _finished(self) -> bool:
        waited = self.progress.epoch - max(self.best_epoch, self.first)
        return super()._finished() or bool(self.patience and waited >= self.patience)

    def _save(self) -> None:
        epoch = self.progress.epoch
        if self.patience and self.progress.batch == 0 and self.best_epoch == epoch:  # an epoch has just ended
            self._best = {}
            self._best = self.weights()
        super()._save()


class FineTuner(EarlyStopping):
    """Trains the head and some parts of a network; the rest is frozen.

    Args:
        given: as in `Trainer`; the learning rate of its options is that of the head.
        names: the parts. backbone_lr, decay: as in `param_groups`.
        gradual: epochs in which only the head is trained, then also the last part, then the one before it, ...; 0: all
            are trained from the start (Howard and Ruder 2018, section 3.3: gradual unfreezing).
        patience: epochs without a lower error until the run ends, counted from the last unfreezing on; 0: any number.
        about: what else checkpoints are to hold.
    """

    def __init__(
        self,
        *given: Any,
        names: Sequence[str] = (),
        backbone_lr: float | None = None,
        decay: float = 0.5,
        gradual: int = 0,
        patience: int = 0,
        about: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(*given, patience=patience, first=gradual * len(names))
        self._about = about or {}
        self.names, self.gradual = later_first(self.model, names), gradual
        groups = param_groups(self.model, names, lr=self.options.lr, backbone_lr=backbone_lr, decay=decay)
        for group in groups:
            group["scale"] = group["lr"] / self.options.lr  # of the rate that the schedule gives
        self.optimizer = torch.optim.SGD(
            groups, self.options.lr, self.options.momentum, weight_decay=self.options.weight_decay
        )

    def state(self) -> dict[str, Any]:
        return {**super().state(), **self._about}

    def unfrozen(self) -> list[str]:
        """The parts that are trained in this epoch, beside the head."""
        return self.names[: self.progress.epoch // self.gradual] if self.gradual else self.names

    def _train_mode(self) -> None:
        freeze_until(self.model, self.unfrozen())


class _HeadTrainer(EarlyStopping):
    def _input(self, images: Tensor) -> Tensor:
        return images.to(self.world.device)  # they are features


def standardised(train: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Mean and standard deviation (D) of features (N, D), and all sets of features with that mean at 0 and that
    deviation at 1. A feature that hardly changes is only centred."""
    mean, std = train.mean(0), train.std(0, correction=0)
    std = torch.where(std > 1e-6 * std.max(), std, 1.0)
    return mean, std, [(x - mean) / std for x in (train, *others)]


def train_head(
    head: nn.Linear | MLP,
    train: Features,
    test: Features,
    classes: list[str],
    options: TrainOptions,
    *,
    device: torch.device | None = None,
    patience: int = 0,
    log: Log | None = None,
    folder: Path | None = None,
) -> list[dict[str, Any]]:
    """Trains a head on features, in place.

    It sees features of mean 0 and deviation 1, so that one learning rate suits all networks; then its first layer,
    W (x - mean) / std + b, takes that in: W' = W / std, b' = b - W' mean.

    Args:
        head: a linear layer or an `MLP`. train, test: features. classes: their names.
        options: of `fastres train`: epochs, batch, rates, seed. patience: see `EarlyStopping`.

    Returns:
        A row for each epoch, as in `fastres train`'s log.csv.

    Raises:
        Stopped: if the loss is not finite, or the user interrupts.
    """
    mean, std, (x, y) = standardised(train.values, test.values)
    data = Data(ArrayImages(x, train.labels), ArrayImages(y, test.labels), classes, (0.0,) * 3, (1.0,) * 3)
    world = World(device or torch.device("cpu"))
    trainer = _HeadTrainer(options, head, data, world, log or Log(None), folder, patience=patience)
    trainer.run()
    head.load_state_dict(trainer.weights())
    head.cpu().requires_grad_(True)
    first: Any = head[0] if isinstance(head, MLP) else head
    with torch.no_grad():
        first.weight /= std
        first.bias -= first.weight @ mean
    return trainer.progress.history
