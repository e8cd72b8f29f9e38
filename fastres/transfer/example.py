"""The embedded example: a network that knows the digits 0 to 4 learns 5 to 9 from a few examples of each."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from fastres.analysis.figures import COLORS, axes
from fastres.analysis.report import Plot, Report, Table
from fastres.errors import UserError
from fastres.train import Options as TrainOptions
from fastres.train import Trainer, datasets, network
from fastres.train.datasets import ArrayImages, Data
from fastres.train.distributed import World
from fastres.train.log import Log
from fastres.transfer.features import Features, extract
from fastres.transfer.heads import feature_extractor, make_head, replace_head
from fastres.transfer.tuning import FineTuner, train_head

__all__ = ["METHODS", "Setting", "digits"]

#: The order of the table; what each is called in the figure.
METHODS = {"scratch": "from scratch", "features": "features of the frozen network", "finetune": "fine-tuned"}
#: Images of an epoch: fewer are repeated, each time with another crop, so that all runs have equally many steps.
_EPOCH = 320
_CLAIM = (
    "What a network has learned on one task serves another. Transferred layers beat random ones, fine-tuned ones too "
    "(Yosinski et al. 2014, arXiv 1411.1792); the gain over training from scratch is largest with few labels, and "
    "fine-tuning beats a classifier on fixed features (Kornblith et al. 2018, arXiv 1805.08974)."
)
_LIMITS = (
    "Five classes of small grey images, close to the five that were learned before; one pre-trained network; the rates "
    "of the methods were chosen by hand, with seed 0 and these test images: the default seeds are others. It says "
    "nothing about distant tasks."
)


@dataclass(frozen=True)
class Setting:
    """What the example runs.

    Attributes:
        model: of fastres.models, for 32 x 32. unfreeze: its parts that are fine-tuned.
        shots: images a class to learn from. seeds: each chooses other images, heads and crops.
        pretrain_epochs, epochs: of the first task, and of the second from images; head_epochs: of a head on features.
        scratch_lr, lr, backbone_lr, head_lr: from random weights; of head and backbone; of a head on features.
    """

    model: str = "resnet20"
    unfreeze: Sequence[str] = ("layer3", "layer2", "layer1")
    shots: Sequence[int] = (1, 5, 20)
    seeds: Sequence[int] = (1, 2, 3)
    pretrain_epochs: int = 10
    epochs: int = 10
    head_epochs: int = 40
    scratch_lr: float = 0.1
    lr: float = 0.1
    backbone_lr: float = 0.05
    head_lr: float = 0.05

    def check(self, most: int) -> None:
        """Raises UserError if a value makes no sense. most: images of the smallest class."""
        if not self.shots or not self.seeds:
            raise UserError("the example needs at least one of --shots and one of --seeds")
        if min(self.shots) < 1 or max(self.shots) > most:
            raise UserError(f"--shots must be from 1 to {most}, the images of the rarest digit; not {max(self.shots)}")
        if min(self.seeds) < 0:
            raise UserError(f"--seeds must be at least 0, not {min(self.seeds)}")


class Row(NamedTuple):
    """Test accuracy in per cent of one run, and the seconds that it took."""

    shots: int
    method: str
    seed: int
    accuracy: float
    seconds: float


def digits(setting: Setting, methods: Iterable[str] = tuple(METHODS)) -> Report:
    """Trains on the digits 0 to 4, transfers to 5 to 9 with few examples a class, beside training from scratch.

    Args:
        setting: what to run. methods: keys of `METHODS`.

    Raises:
        UserError: if a value makes no sense, or scikit-learn or matplotlib is missing. Stopped: on Ctrl-C.
    """
    methods = [name for name in METHODS if name in set(methods)]
    axes()  # without matplotlib this ends here, not after minutes
    data = datasets.digits()
    known, new = _only(data, range(5)), _only(data, range(5, 10))
    setting.check(int(torch.bincount(_arrays(new.train).labels).min()))
    start = time.perf_counter()
    model = network.build(setting.model, 5, fused=True, seed=0)
    before = _trained(model, known, setting.pretrain_epochs, setting.scratch_lr)
    _say(f"digits 0 to 4: test accuracy {before:.2f} %, {time.perf_counter() - start:.0f} s")
    backbone = feature_extractor(model)
    features = [extract(backbone, images, data.mean, data.std) for images in (new.train, new.test)]
    rows = []
    for shots in setting.shots:
        for seed in setting.seeds:
            chosen = few(_arrays(new.train).labels, shots, seed)
            for method in methods:
                start = time.perf_counter()
                accuracy = _run(method, setting, model, new, features, chosen, seed)
                rows.append(Row(shots, method, seed, accuracy, time.perf_counter() - start))
                _say(f"{shots} a class, seed {seed}, {METHODS[method]}: {accuracy:.2f} %")
    return _report(setting, rows, before, len(new.test))


def few(labels: torch.Tensor, shots: int, seed: int) -> list[int]:
    """Indices of so many images of each class, drawn without replacement; fewer are the first of more."""
    random = np.random.default_rng((seed, 3))
    order = random.permutation(len(labels))
    found = []
    for label in labels.unique().tolist():
        found += order[labels.numpy()[order] == label][:shots].tolist()
    return sorted(found)


def _only(data: Data, digits: range) -> Data:
    """The images of some digits, numbered from 0 on."""
    parts = []
    for images in (_arrays(data.train), _arrays(data.test)):
        mine = (images.labels >= digits[0]) & (images.labels <= digits[-1])
        parts.append(ArrayImages(images.images[mine], images.labels[mine] - digits[0]))
    return Data(parts[0], parts[1], [data.classes[i] for i in digits], data.mean, data.std)


def _arrays(images: Any) -> ArrayImages:
    assert isinstance(images, ArrayImages)
    return images


def _run(
    method: str, setting: Setting, model: nn.Module, new: Data, features: list[Features], chosen: list[int], seed: int
) -> float:
    """Test accuracy in per cent of one method, from the chosen images."""
    if method == "features":
        torch.manual_seed(seed)
        head = make_head(features[0].values.shape[1], 5)
        train = Features(features[0].values[chosen], features[0].labels[chosen])
        options = TrainOptions.of(
            epochs=setting.head_epochs, batch=32, lr=setting.head_lr, warmup=0, augment="none", seed=seed
        )
        return 100 - train_head(head, train, features[1], new.classes, options)[-1]["test_error"]
    many = chosen * -(-_EPOCH // len(chosen))
    images = _arrays(new.train)
    data = Data(ArrayImages(images.images[many], images.labels[many], "crop"), new.test, new.classes, new.mean, new.std)
    if method == "scratch":
        fresh = network.build(setting.model, 5, fused=True, seed=seed)
        return _trained(fresh, data, setting.epochs, setting.scratch_lr, seed=seed)
    torch.manual_seed(seed)
    copied = replace_head(copy.deepcopy(model), 5)
    return _trained(copied, data, setting.epochs, setting.lr, setting=setting, seed=seed)


def _trained(
    model: nn.Module, data: Data, epochs: int, lr: float, *, setting: Setting | None = None, seed: int = 0
) -> float:
    """Trains in place, and returns the test accuracy in per cent. setting: fine-tune, else all weights alike."""
    options = TrainOptions.of(epochs=epochs, batch=32, lr=lr, warmup=20, seed=seed)
    common = options, model, data, World(torch.device("cpu")), Log(None), None
    if setting is None:
        trainer: Trainer = Trainer(*common)
    else:
        trainer = FineTuner(*common, names=setting.unfreeze, backbone_lr=setting.backbone_lr, gradual=1)
    return 100 - trainer.run().history[-1]["test_error"]


def _say(text: str) -> None:
    print(f"fastres transfer: {text}", file=sys.stderr, flush=True)


def _report(setting: Setting, rows: list[Row], before: float, tested: int) -> Report:
    methods = [name for name in METHODS if any(row.method == name for row in rows)]
    summary: dict[tuple[int, str], list[Row]] = {
        (shots, method): [row for row in rows if (row.shots, row.method) == (shots, method)]
        for shots in setting.shots
        for method in methods
    }
    means = {which: float(np.mean([row.accuracy for row in found])) for which, found in summary.items()}
    table = Table(
        "transfer",
        ("images a class", "method", "mean accuracy, %", "lowest", "highest", "mean seconds"),
        [
            (shots, METHODS[method], means[shots, method], min(row.accuracy for row in found),
             max(row.accuracy for row in found), float(np.mean([row.seconds for row in found])))
            for (shots, method), found in summary.items()
        ],
        f"Accuracy on {tested} test images of the digits 5 to 9, over {len(setting.seeds)} seeds",
    )  # fmt: skip
    runs = Table("runs", Row._fields, rows, "Every run", long=True)
    few_shots = min(setting.shots)
    measured = f"With {few_shots} images a class: " + ", ".join(
        f"{METHODS[method]} {means[few_shots, method]:.1f} %" for method in methods
    )
    return Report(
        name="transfer",
        title="Transfer learning: the digits 5 to 9 by a network that knows 0 to 4",
        claim=_CLAIM,
        measured=f"{measured}. The network is right on {before:.1f} % of the test images of its own digits.",
        verdict=verdict(setting.shots, methods, means),
        setting=(
            f"{setting.model}, {setting.pretrain_epochs} epochs on 0 to 4. From images: {setting.epochs} epochs of 10 "
            f"steps of 32 random crops, SGD with momentum and a cosine; from scratch at rate {setting.scratch_lr}, "
            f"fine-tuned at {setting.lr} (head) and {setting.backbone_lr}, halved from part to part "
            f"({', '.join(setting.unfreeze)}, one more each epoch). On features, without crops: {setting.head_epochs} "
            f"epochs at {setting.head_lr}. The last weights count. Seeds {' '.join(map(str, setting.seeds))}."
        ),
        limits=_LIMITS,
        tables=[table, runs],
        plots=[_plot(setting, methods, summary, means)],
    )


def verdict(shots: Sequence[int], methods: Sequence[str], means: dict[tuple[int, str], float]) -> str:
    """Reproduced: every transfer beats scratch at the fewest images, and fine-tuning beats fixed features there."""
    few_shots = min(shots)
    others = [method for method in methods if method != "scratch"]
    if "scratch" not in methods or not others:
        return "no claim"
    better = [means[few_shots, method] > means[few_shots, "scratch"] for method in others]
    if all(name in others for name in ("features", "finetune")):
        better.append(means[few_shots, "finetune"] > means[few_shots, "features"])
    return "reproduced" if all(better) else "partly reproduced" if any(better) else "not reproduced"


def _plot(
    setting: Setting,
    methods: Sequence[str],
    summary: dict[tuple[int, str], list[Row]],
    means: dict[tuple[int, str], float],
) -> Plot:
    figure, (axis,) = axes(width=6.5, height=4.0)
    shots = sorted(set(setting.shots))
    for method, color in zip(methods, COLORS[1:3] + COLORS[:1] if len(methods) == 3 else COLORS, strict=False):
        values = [[row.accuracy for row in summary[n, method]] for n in shots]
        axis.plot(shots, [means[n, method] for n in shots], marker="o", color=color, label=METHODS[method])
        axis.fill_between(shots, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.15, lw=0)
    axis.set_xscale("log")
    axis.set_xticks(shots, [str(n) for n in shots])
    axis.minorticks_off()
    axis.set_xlabel("labelled images a class", fontsize=9)
    axis.set_title("test accuracy on the digits 5 to 9, %", fontsize=10, loc="left")
    axis.legend(fontsize=8, frameon=False)
    return Plot(
        "transfer", figure, f"Means over {len(setting.seeds)} seeds; the bands are from the lowest to the highest"
    )
