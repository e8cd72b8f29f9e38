"""What a run is made of. Two runs with equal options give equal numbers."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from fastres.errors import UserError
from fastres.train.schedule import SCHEDULES

__all__ = ["AUGMENTATIONS", "DATA", "FREE", "Options"]

#: What suits a data set. Those of CIFAR are of He et al. 2015, section 4.2 (64,000 steps); of folders, of section 3.4.
DATA: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 15, "batch": 64, "schedule": "cosine", "warmup": 22, "augment": "crop"},
    "cifar10": {"epochs": 164, "batch": 128, "milestones": [82, 123], "augment": "crop-flip"},
    "cifar100": {"epochs": 164, "batch": 128, "milestones": [82, 123], "augment": "crop-flip"},
    "folder": {
        "model": "resnet18",
        "epochs": 90,
        "batch": 256,
        "milestones": [30, 60],
        "augment": "resized-crop",
        "size": 224,
        "workers": 2,
    },
    "synthetic": {"epochs": 5, "batch": 64, "schedule": "cosine"},
}
AUGMENTATIONS = ("none", "crop", "crop-flip", "resized-crop")
#: Options that do not change what is computed: a resumed run may have others.
FREE = ("root", "workers", "checkpoint_every", "tensorboard")


@dataclass
class Options:
    """A run.

    Attributes:
        data: a key of `DATA`. root: where its files are, for those that have any.
        model: a model of fastres.models, or "package.module:callable", called with num_classes=.
        fused: run `fastres.fuse_` on it.
        epochs, batch: passes over the images; images a step, over all processes and micro-batches.
        accumulate: micro-batches a step, whose gradients are added up.
        lr, momentum, weight_decay: of SGD; the decay is of all parameters.
        schedule, milestones (epochs), gamma, warmup (steps, or "paper"): the learning rate, see `schedule.py`.
        label_smoothing: the share of the target that goes to all classes alike.
        ema: decay of the moving average of the weights; 0: none.
        amp: autocast to bfloat16.
        sync_bn: batch norm with the statistics of all processes.
        augment: one of `AUGMENTATIONS`.
        size: height and width of the images of folders and of synthetic ones.
        seed: of weights, order, augmentation and random layers.
        device: "cpu" or "cuda".
        workers: processes that load images, for each training process; 0: it loads them itself.
        checkpoint_every: steps between checkpoints within an epoch; 0: only at its end.
        tensorboard: also log for TensorBoard.
        out: the folder of the run; "": runs/DATA-MODEL-SEED.
    """

    data: str = "digits"
    root: str | None = None
    model: str = "resnet20"
    fused: bool = True
    epochs: int = 15
    batch: int = 128
    accumulate: int = 1
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "step"
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.1
    warmup: int | str = 0
    label_smoothing: float = 0.0
    ema: float = 0.0
    amp: bool = False
    sync_bn: bool = False
    augment: str = "none"
    size: int = 32
    seed: int = 0
    device: str = "cpu"
    workers: int = 0
    checkpoint_every: int = 0
    tensorboard: bool = False
    out: str = ""

    @classmethod
    def of(cls, **given: Any) -> Options:
        """The options that suit the data set and the model, and those that are given. Raises UserError."""
        data = given.get("data", cls.data)
        if data not in DATA:
            raise UserError(f"no data set is named {data!r}; there are {', '.join(DATA)}")
        for name, users in (("root", ("cifar10", "cifar100", "folder")), ("size", ("folder", "synthetic"))):
            if name in given and data not in users:
                raise UserError(f"--{name} means nothing with --data {data}")
        options = cls(**{**DATA[data], **given})
        if "warmup" not in given and options.model in ("resnet110", "resnet1202") and options.schedule == "step":
            options.warmup = "paper"
        options.out = options.out or f"runs/{options.data}-{options.model.replace(':', '.')}-{options.seed}"
        options.check()
        return options

    def check(self) -> None:
        """Raises UserError if a value makes no sense."""
        smallest = {"epochs": 1, "batch": 1, "accumulate": 1, "workers": 0, "checkpoint_every": 0, "size": 1, "seed": 0}
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(self, name)}")
        for name in ("lr", "gamma"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise UserError(f"--{name} must be above zero, not {getattr(self, name)}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise UserError(f"--weight-decay must not be negative, not {self.weight_decay}")
        for name in ("momentum", "label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be in 0..1, below 1, not {getattr(self, name)}")
        if isinstance(self.warmup, str) and self.warmup != "paper" or isinstance(self.warmup, int) and self.warmup < 0:
            raise UserError(f'--warmup must be a number of steps or "paper", not {self.warmup}')
        self._one_of("schedule", SCHEDULES)
        self._one_of("device", ("cpu", "cuda"))
        self._one_of("augment", ("none", "resized-crop") if self.data == "folder" else AUGMENTATIONS[:3])

    def _one_of(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            where = f" with --data {self.data}" if name == "augment" else ""
            raise UserError(f"--{name} must be one of {', '.join(choices)}{where}, not {getattr(self, name)}")

    def changed(self, given: dict[str, Any]) -> Options:
        """These options with other values for those that do not change what is computed.

        Raises:
            UserError: if another one is given with a value that differs.
        """
        wrong = [name for name, value in given.items() if name not in FREE and getattr(self, name) != value]
        if wrong:
            flags = ", ".join(f"{name} ({getattr(self, name)}, not {given[name]})" for name in wrong)
            raise UserError(f"a resumed run keeps its options; different are: {flags}")
        return dataclasses.replace(self, **given)
