"""Fine-tuning and training of heads: what a step changes, when a run ends, that an interruption changes nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from _train import assert_same_bits, data, options, signal_after, tiny
from torch import nn

import fastres
from fastres.train import Stopped, checkpoint
from fastres.train.distributed import World
from fastres.train.log import Log
from fastres.train.loop import CHECKPOINT
from fastres.transfer import Features, FineTuner, train_head
from fastres.transfer.heads import make_head
from fastres.transfer.tuning import standardised


def tuner(folder: Path | None = None, *, epochs: int = 3, lr: float = 0.05, **given: Any) -> FineTuner:
    """On 26 synthetic images, four steps an epoch."""
    torch.manual_seed(1)
    model = tiny(3)
    fastres.fuse_(model)
    trained = options(epochs=epochs, lr=lr)
    return FineTuner(trained, model, data(), World(torch.device("cpu")), Log(None), folder, **given)


def parts_that_change(tuning: FineTuner) -> list[set[str]]:
    """For each epoch the parts whose bits change in it, running statistics and counters included."""
    states = [copy.deepcopy(tuning.model.state_dict())]
    tuning.log.epoch = lambda history: states.append(copy.deepcopy(tuning.model.state_dict()))  # type: ignore
    tuning.run()
    return [
        {name.split(".")[0] for name in now if not torch.equal(before[name], now[name])}
        for before, now in zip(states, states[1:], strict=False)
    ]


def test_gradual_unfreezing() -> None:
    found = parts_that_change(tuner(names=["layer2", "layer3"], gradual=1, epochs=4))
    assert found == [{"fc"}, {"fc", "layer3"}, *[{"fc", "layer3", "layer2"}] * 2]
    assert parts_that_change(tuner(names=["layer3"], gradual=2)) == [{"fc"}, {"fc"}, {"fc", "layer3"}]
    assert parts_that_change(tuner(names=["layer3"], epochs=1)) == [{"fc", "layer3"}]
    assert parts_that_change(tuner(epochs=2)) == [{"fc"}, {"fc"}]


def test_every_part_has_its_rate_of_the_schedule() -> None:
    tuning = tuner(names=["layer3", "layer2"], backbone_lr=0.01, decay=0.1, epochs=2)
    rates: list[list[float]] = []
    tuning.log.step = lambda done, loss: rates.append(  # type: ignore[method-assign]
        [group["lr"] for group in tuning.optimizer.param_groups]
    )
    tuning.run()
    for step, found in enumerate(rates):
        rate = tuning.schedule.rate(step)
        assert found == pytest.approx([rate, rate * 0.2, rate * 0.02])
    assert len(rates) == 8 and rates[-1][0] < rates[3][0] < 0.05


@pytest.mark.parametrize("step", [2, 5, 9])
def test_a_resumed_run_is_the_same_bit_for_bit(step: int, tmp_path: Path) -> None:
    """Stopped while all but the head is frozen, after the first unfreezing, and in the last epoch."""
    given: dict[str, Any] = {"names": ["layer3", "layer2"], "gradual": 1, "patience": 5, "about": {"note": "here"}}
    whole = tuner(**given)
    whole.run()
    cut = tuner(tmp_path, **given)
    signal_after(cut, step)
    with pytest.raises(Stopped, match="the last good checkpoint is"):
        cut.run()
    torch.manual_seed(99)
    again = tuner(tmp_path, **given)
    state = checkpoint.load(tmp_path / CHECKPOINT)
    assert state["note"] == "here"
    again.load_state(state)
    again.run()
    assert_same_bits(again.state(), whole.state())
    assert_same_bits(again.weights(), whole.weights())


class Scripted(FineTuner):
    """Has the given errors on the test images, whatever the weights are."""

    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        return 1.0, self.errors[self.progress.epoch]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("errors", "options_", "ran", "best"),
    [
        ([50, 40, 45, 41, 40, 10], {"patience": 3}, 5, 2),  # equals are no gain: the first of them counts
        ([50, 40, 45, 30, 35, 34], {"patience": 2}, 6, 4),
        ([50, 60, 60, 60, 60, 60], {"patience": 1}, 2, 1),
        ([50, 60, 60, 60, 60, 60], {"patience": 1, "gradual": 2, "names": ["layer3"]}, 3, 1),  # from the unfreezing on
        ([50, 60, 60, 60, 60, 60], {}, 6, 6),
    ],
)
def test_early_stopping(errors: list[float], options_: dict[str, Any], ran: int, best: int) -> None:
    torch.manual_seed(1)
    world = World(torch.device("cpu"))
    tuning = Scripted(options(epochs=6), tiny(3), data(), world, Log(None), None, **options_)
    tuning.errors = errors  # type: ignore[attr-defined]
    states: list[Any] = []
    tuning.log.epoch = lambda history: states.append(copy.deepcopy(tuning.model.state_dict()))  # type: ignore
    tuning.run()
    assert (tuning.progress.epoch, tuning.best_epoch) == (ran, best)
    assert_same_bits(tuning.weights(), states[best - 1])


def test_divergence_names_the_step(tmp_path: Path) -> None:
    with pytest.raises(Stopped, match=r"the loss is (nan|inf) at step \d+ .*the last good checkpoint is|no checkpoint"):
        tuner(tmp_path, lr=1e30).run()


# Heads


def clusters(n: int, classes: int = 3, width: int = 6) -> Features:
    """Well separated, in units of very different size."""
    labels = torch.arange(n) % classes
    values = torch.eye(width)[labels] * 4 + torch.randn(n, width)
    return Features(values * torch.tensor([1e-3, 1e3, 1, 1, 0, 1]) + 5, labels)


def test_standardised() -> None:
    train, other = clusters(60).values, clusters(10).values
    mean, std, (x, y) = standardised(train, other)
    reference = train.double()
    torch.testing.assert_close(mean.double(), reference.mean(0))
    torch.testing.assert_close(std[:4].double(), reference[:, :4].var(0, correction=0).sqrt(), rtol=1e-4, atol=0)
    assert std[4] == 1.0 and not x[:, 4].any()  # a constant
    torch.testing.assert_close(y, (other - mean) / std)


@pytest.mark.parametrize("hidden", [0, 8])
def test_a_trained_head_takes_features_as_they_are(hidden: int) -> None:
    """The standardisation that training sees is in the weights: the log's last row is what the head itself gives."""
    train, test = clusters(60), clusters(31)
    head = make_head(6, 3, hidden)
    history = train_head(head, train, test, ["a", "b", "c"], options(epochs=20, batch=16, lr=0.1))
    with torch.no_grad():
        logits = head.double()(test.values.double())
    error = 100 * (logits.argmax(1) != test.labels).double().mean().item()
    loss = nn.functional.cross_entropy(logits, test.labels).item()
    assert history[-1]["test_error"] == pytest.approx(error) and error < 15
    assert history[-1]["test_loss"] == pytest.approx(loss, rel=1e-3)
    assert len(history) == 20 and all(p.requires_grad for p in head.parameters())


def test_a_linear_head_learns_what_gradient_descent_does() -> None:
    """Two full-batch steps by hand, in float64, on standardised features."""
    train = clusters(12)
    head = make_head(6, 3)
    w, b = (p.detach().double().clone() for p in head.parameters())
    given = options(epochs=2, batch=12, lr=0.1, momentum=0.0, weight_decay=0.0)
    train_head(head, train, train, ["a", "b", "c"], given)
    x = train.values.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    std[4] = 1.0
    x = (x - mean) / std
    for rate in (0.1, 0.05):  # a cosine over two steps
        gradient = torch.softmax(x @ w.T + b, 1) - torch.eye(3, dtype=torch.float64)[train.labels]
        w, b = w - rate * gradient.T @ x / 12, b - rate * gradient.mean(0)
    torch.testing.assert_close(head.weight.detach().double(), w / std, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head.bias.detach().double(), b - (w / std) @ mean, rtol=1e-4, atol=1e-4)


def test_same_seed_same_head() -> None:
    train, test = clusters(40), clusters(10)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        head = make_head(6, 3, hidden=4)
        train_head(head, train, test, ["a", "b", "c"], options(seed=seed))
        found.append(head.state_dict())
    assert_same_bits(found[0], found[1])
    assert not torch.equal(found[0]["0.weight"], found[2]["0.weight"])
