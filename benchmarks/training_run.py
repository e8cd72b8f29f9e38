"""Does training with fused ops end where eager training ends? Loss curves and test accuracy of two small networks.

ResNet-20 and a small bottleneck network are trained on the digits of scikit-learn (1,797 scans of handwritten digits,
8x8, upscaled to 32x32; a fixed split), with the same batches from the same weights:

- eager;
- eager, with every weight changed by 1e-7 of its size at the start: two runs drift apart by this much without any
  fused op, because training amplifies rounding. It is the yardstick;
- fused.

Writes the curves and accuracies as JSON and PNG, and prints a table.

    python benchmarks/training_run.py [--steps 200] [--seeds 0 1 2] [--autocast] [--out benchmarks/results/training-run]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastres
from fastres import models
from fastres.bench import machine

NETWORKS = {
    "resnet20": lambda: models.resnet20(fused=False),
    "bottleneck": lambda: models.CifarResNet(models.Bottleneck, (2, 2, 2), shortcut="B"),
}
RATES = {"resnet20": 0.1, "bottleneck": 0.02}  # with 0.1 the bottlenecks do not learn in 200 steps, eager ones neither
RUNS = ("eager", "eager, weights + 1e-7", "fused")
BATCH, TEST_IMAGES = 32, 397


def digits(size: int = 32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [n, 3, size, size] and labels for training, then for the test; the same split in every run."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    x = nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=False)
    x = ((x - x.mean()) / x.std()).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    y = torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    return x[train], y[train], x[test], y[test]


def network(name: str, run: str, seed: int) -> nn.Module:
    """A model with seeded weights; the same for each run but for what its name says."""
    torch.manual_seed(seed)
    model = NETWORKS[name]().to(memory_format=torch.channels_last)
    if run == RUNS[1]:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + 1e-7 * torch.randn_like(p))
    if run == RUNS[2]:
        fastres.fuse_(model)
    return model


def train(
    model: nn.Module, data: tuple[Tensor, ...], rate: float, steps: int, seed: int, autocast: bool
) -> dict[str, Any]:
    """SGD with momentum and a cosine schedule, forward under bf16 autocast if asked for.

    Returns the loss of every step, test accuracy in per cent, seconds.
    """
    x, y, test_x, test_y = data
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses, order = [], torch.empty(0, dtype=torch.long)
    start = time.perf_counter()
    model.train()
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(x), generator=generator)
        batch, order = order[:BATCH], order[BATCH:]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(x[batch].contiguous(memory_format=torch.channels_last))
        loss = nn.functional.cross_entropy(logits.float(), y[batch])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(a).argmax(1) == b).sum()) for a, b in zip(test_x.split(100), test_y.split(100), strict=True)
        )
    return {"losses": losses, "accuracy": 100 * right / len(test_y), "seconds": seconds}


def distance(a: list[float], b: list[float]) -> float:
    """Mean difference of two loss curves over their last half, where they are compared with what they have reached."""
    half = len(a) // 2
    return statistics.fmean(abs(x - y) for x, y in zip(a[half:], b[half:], strict=True))


def table(found: dict[str, Any]) -> str:
    lines = [
        f"{'network':<12}{'run':<24}{'loss, last 20 steps':>22}{'test accuracy %':>24}{'|loss - eager|':>16}{'s':>7}",
    ]
    for name, seeds in found["networks"].items():
        for run in RUNS:
            rows = [seed[run] for seed in seeds.values()]
            last = [statistics.fmean(row["losses"][-20:]) for row in rows]
            apart = [distance(seed[run]["losses"], seed[RUNS[0]]["losses"]) for seed in seeds.values()]
            accuracies = " ".join(f"{row['accuracy']:.2f}" for row in rows)
            lines.append(
                f"{name:<12}{run:<24}{' '.join(f'{value:.4f}' for value in last):>22}{accuracies:>24}"
                f"{'-' if run == RUNS[0] else f'{statistics.fmean(apart):.4f}':>16}"
                f"{sum(row['seconds'] for row in rows):>7.0f}"
            )
    return "\n".join(lines)


def plot(found: dict[str, Any], file: Path) -> None:
    """A row a network, a column a seed: the three loss curves, smoothed over 5 steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    networks = found["networks"]
    columns = len(next(iter(networks.values())))
    figure, axes = pyplot.subplots(len(networks), columns, figsize=(4.2 * columns, 3 * len(networks)), squeeze=False)
    styles = (("#333333", "-", 2.5), ("#999999", "-", 1.5), ("#d1495b", "--", 1.5))
    for row, (name, seeds) in zip(axes, networks.items(), strict=True):
        for axis, (seed, runs) in zip(row, seeds.items(), strict=True):
            for run, (color, dash, width) in zip(RUNS, styles, strict=True):
                losses = torch.tensor(runs[run]["losses"]).unfold(0, 5, 1).mean(1)
                label = f"{run}: {runs[run]['accuracy']:.1f} %"
                axis.plot(range(5, 5 + len(losses)), losses, dash, color=color, linewidth=width, label=label)
            axis.set_yscale("log")
            axis.set_title(f"{name}, seed {seed}", fontsize=10, loc="left")
            axis.set_xlabel("step")
            axis.legend(fontsize=7, frameon=False, title="test accuracy", title_fontsize=7)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("training loss (mean of 5 steps)")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--autocast", action="store_true", help="forward in bfloat16, by torch.autocast")
    default = Path(__file__).parent / "results" / "training-run"
    parser.add_argument("--out", type=Path, default=default, help="without suffix")
    options = parser.parse_args()
    data = digits()
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "threads": torch.get_num_threads(),
        "steps": options.steps,
        "batch": BATCH,
        "autocast": options.autocast,
        "rates": RATES,
        "networks": {},
    }
    for name in options.networks:
        seeds = found["networks"][name] = {}
        for seed in options.seeds:
            settings = (data, RATES[name], options.steps, seed, options.autocast)
            seeds[seed] = {run: train(network(name, run, seed), *settings) for run in RUNS}
            print(f"{name}, seed {seed}: done", flush=True)
    print(table(found))
    for suffix in (".json", ".png"):
        options.out.with_suffix(suffix).parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(found))
    plot(found, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
