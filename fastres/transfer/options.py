"""What a transfer is made of. Two with equal options give equal numbers."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from fastres.errors import UserError
from fastres.models import image_size
from fastres.train import Options as TrainOptions
from fastres.train.options import DATA

__all__ = ["MODES", "Options"]

#: What suits a mode, and what means something only in it.
MODES: dict[str, dict[str, Any]] = {
    "features": {"epochs": 60, "batch": 64, "lr": 0.05, "cache": "runs/features"},
    "finetune": {
        "epochs": 15,
        "batch": 32,
        "lr": 0.02,
        "unfreeze": None,
        "gradual": 1,
        "backbone_lr": 0.0,
        "lr_decay": 0.5,
        "augment": "",
        "keep_head": False,
        "amp": False,
    },
}
_OWN = {mode: sorted(set(values) - {"epochs", "batch", "lr"}) for mode, values in MODES.items()}


@dataclass
class Options:
    """A transfer of pre-trained weights to a data set.

    Attributes:
        checkpoint: the file of the weights.
        data: a data set of `fastres train`. root: where its files are.
        model: a model of fastres.models, or "package.module:callable", called with num_classes=.
        mode: "features": a head is trained on features of the frozen network; "finetune": head and some parts.
        keep_head: the file's head is loaded too and must fit. hidden: width of a hidden layer of the new head; 0: none.
        fused: run `fastres.fuse_` on the network.
        unfreeze: parts that are trained beside the head; None: the last stage.
        gradual: epochs between their unfreezings; 0: all at once.
        lr: of the head. backbone_lr: of the last part; 0: lr / 10. lr_decay: from each part to the one before it.
        weight_decay, epochs, batch, amp, augment, size, seed, device, workers: as in `fastres train`.
        patience: epochs without a lower error until the run ends, with the weights of the best; 0: any number.
        cache: the folder where features are kept.
        out: the folder of the run; "": runs/transfer-DATA-MODEL-MODE.
    """

    checkpoint: str = ""
    data: str = "folder"
    root: str | None = None
    model: str = "resnet18"
    mode: str = "features"
    keep_head: bool = False
    hidden: int = 0
    fused: bool = True
    unfreeze: list[str] | None = None
    gradual: int = 0
    lr: float = 0.05
    backbone_lr: float = 0.0
    lr_decay: float = 0.5
    weight_decay: float = 1e-4
    epochs: int = 60
    batch: int = 64
    patience: int = 0
    augment: str = ""
    size: int = 0
    seed: int = 0
    device: str = "cpu"
    workers: int = 0
    amp: bool = False
    cache: str = ""
    out: str = ""

    @classmethod
    def of(cls, **given: Any) -> Options:
        """The options that suit the mode, the data and the model, and those that are given. Raises UserError."""
        mode, data = given.get("mode", cls.mode), given.get("data", cls.data)
        if mode not in MODES:
            raise UserError(f"--mode must be one of {', '.join(MODES)}, not {mode}")
        if data not in DATA:
            raise UserError(f"no data set is named {data!r}; there are {', '.join(DATA)}")
        if not given.get("checkpoint"):
            raise UserError(f"--data {data} needs --checkpoint: the weights to start from")
        for other, names in _OWN.items():
            if other != mode and (wrong := [name for name in names if name in given]):
                raise UserError(f"--{wrong[0].replace('_', '-')} means nothing with --mode {mode}")
        if given.get("keep_head") and given.get("hidden"):
            raise UserError("--hidden is for a new head, --keep-head keeps the old one: give one of them")
        about: dict[str, Any] = {name: DATA[data][name] for name in ("model", "workers") if name in DATA[data]}
        options = cls(**{"model": "resnet20", **about, **MODES[mode], **given})
        if mode == "finetune" and not options.augment:
            options.augment = DATA[data].get("augment", "none")
        if data in ("folder", "synthetic") and not options.size:
            options.size = image_size(options.model) if data == "folder" else 32
        options.out = options.out or f"runs/transfer-{data}-{options.model.replace(':', '.')}-{mode}"
        options.check()
        return options

    def check(self) -> None:
        """Raises UserError if a value makes no sense."""
        for name in ("gradual", "patience", "hidden"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} must be at least 0, not {getattr(self, name)}")
        if not (math.isfinite(self.backbone_lr) and self.backbone_lr >= 0):
            raise UserError(f"--backbone-lr must be above zero, not {self.backbone_lr}")
        if not 0 < self.lr_decay <= 1:
            raise UserError(f"--lr-decay must be above 0 and at most 1, not {self.lr_decay}")
        self.training()
        frozen = self.gradual * (1 if self.unfreeze is None else len(self.unfreeze))
        if frozen >= self.epochs:
            raise UserError(f"--gradual {self.gradual} unfreezes all parts after {frozen} epochs of {self.epochs}")

    def training(self) -> TrainOptions:
        """Options of `fastres train` for the same data and steps."""
        names = {f.name for f in dataclasses.fields(TrainOptions)} & {f.name for f in dataclasses.fields(self)}
        given = {name: getattr(self, name) for name in names - {"augment", "root", "size"}}
        if self.root is not None:
            given["root"] = self.root
        if self.size:
            given["size"] = self.size
        given["augment"] = self.augment or "none"
        return TrainOptions.of(**given, schedule="cosine", warmup=0, milestones=[])
