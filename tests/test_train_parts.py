"""The parts of training by themselves: schedules, which image goes where, augmentation, averaged weights, options."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from _train import data, options, tiny, trainer
from torch import nn

from fastres.errors import UserError
from fastres.train import Options, augment
from fastres.train.ema import Ema
from fastres.train.interrupt import Interruption
from fastres.train.sampler import MicroBatches, global_batches
from fastres.train.schedule import Schedule, warmed_up


def test_step_schedule_of_the_paper() -> None:
    schedule = Schedule("step", 0.1, 64_000, (32_000, 48_000))
    rates = [schedule.rate(step) for step in (0, 31_999, 32_000, 47_999, 48_000, 63_999)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_cosine_schedule_with_warmup() -> None:
    schedule = Schedule("cosine", 0.4, 110, warmup=10)
    assert [schedule.rate(step) for step in range(10)] == pytest.approx([0.04 * (i + 1) for i in range(10)])
    for step in (10, 35, 60, 109):
        assert schedule.rate(step) == pytest.approx(0.2 * (1 + math.cos(math.pi * (step - 10) / 100)))
    assert schedule.rate(60) == pytest.approx(0.2) and schedule.rate(110) == pytest.approx(0)


def test_warmup_of_the_paper_ends_below_80_per_cent() -> None:
    assert not warmed_up(wrong=800, seen=1000, samples=50_000)
    assert warmed_up(wrong=799, seen=1000, samples=50_000)
    assert not warmed_up(wrong=10, seen=128, samples=50_000)  # one lucky batch
    assert warmed_up(wrong=10, seen=100, samples=100)  # a whole epoch, if it is smaller


def parts(n: int, batch: int, size: int, accumulate: int = 1, **more: int) -> list[list[list[int]]]:
    """Micro-batches of every process."""
    return [
        list(MicroBatches(n, batch, seed=3, epoch=1, rank=rank, size=size, accumulate=accumulate, **more))
        for rank in range(size)
    ]


@pytest.mark.parametrize(("n", "batch"), [(64, 16), (65, 16), (79, 16), (17, 16), (5, 16), (16, 16)])
@pytest.mark.parametrize(("size", "accumulate"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)])
def test_no_image_is_lost_or_seen_twice(n: int, batch: int, size: int, accumulate: int) -> None:
    found = parts(n, batch, size, accumulate)
    assert sorted(i for process in found for micro in process for i in micro) == list(range(n))
    steps = math.ceil(n / batch)
    assert all(len(process) == steps * accumulate for process in found)
    alone = parts(n, batch, 1)[0]
    for step in range(steps):  # the processes together have what one process has, in the same order
        together = [i for p in found for micro in p[step * accumulate : (step + 1) * accumulate] for i in micro]
        assert together == alone[step]
    sizes = [len(indices) for indices in alone]
    assert max(sizes) <= batch and max(sizes) - min(sizes) <= 1


def test_order_depends_on_seed_and_epoch_and_starts_anywhere() -> None:
    orders = {tuple(np.concatenate(global_batches(50, 8, seed, epoch))) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    assert parts(50, 8, 2, first=3)[1] == parts(50, 8, 2)[1][3:]


def test_more_processes_than_images_are_refused() -> None:
    with pytest.raises(UserError, match="--batch must be larger"):
        parts(17, 16, size=3, accumulate=3)


def test_pad_crop_is_a_shift_with_black_borders() -> None:
    images = torch.randint(1, 255, (2, 3, 6, 5), dtype=torch.uint8)
    middle = np.full((2, 2), 0.5)
    assert torch.equal(augment.pad_crop(images, middle), images)
    shifted = augment.pad_crop(images, np.array([[0.0, 0.0], [0.999, 0.5]]))
    assert torch.equal(shifted[0, :, 4:, 4:], images[0, :, :2, :1])
    assert not shifted[0, :, :4].any() and not shifted[0, :, :, :4].any()
    assert torch.equal(shifted[1, :, :2], images[1, :, 4:]) and not shifted[1, :, 2:].any()


def test_flip_mirrors_the_images_that_are_chosen() -> None:
    images = torch.arange(24).view(2, 1, 3, 4)
    flipped = augment.flip(images, np.array([0.7, 0.2]))
    assert torch.equal(flipped[0], images[0]) and torch.equal(flipped[1], images[1].flip(2))


def test_augmentation_depends_on_seed_epoch_and_image_only() -> None:
    def batch(indices: list[int], seed: int = 0, epoch: int = 0) -> torch.Tensor:
        images = data().train
        images.set_epoch(seed, epoch)
        return images.__getitems__(indices)[0]  # type: ignore[index]

    whole = batch(list(range(26)))
    assert torch.equal(batch([7, 3]), whole[[7, 3]])
    assert not torch.equal(batch(list(range(26)), epoch=1), whole)
    assert not torch.equal(batch(list(range(26)), seed=1), whole)


def test_random_resized_crop_has_the_area_and_aspect_of_the_paper() -> None:
    random = np.random.default_rng(0)
    for width, height in ((640, 480), (100, 300), (20, 2000)):
        for _ in range(50):
            left, top, right, bottom = augment._random_box(width, height, random)
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            aspect = (right - left) / (bottom - top)
            assert 3 / 4 - 1e-6 <= aspect <= 4 / 3 + 1e-6
            if height < 2000:
                assert 0.08 - 1e-6 <= (right - left) * (bottom - top) / (width * height) <= 1


def test_ema_is_the_formula() -> None:
    model = tiny(3)
    ema = Ema(model, decay=0.3)
    expected = {name: value.double().clone() for name, value in model.state_dict().items()}
    for step in range(5):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.copy_(torch.randn_like(value) if value.is_floating_point() else value + 1)
        ema.update(model, step)
        decay = min(0.3, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            average = decay * expected[name] + (1 - decay) * value.double()
            expected[name] = average if value.is_floating_point() else value.double()
    for name, value in ema.model.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], atol=1e-6, rtol=1e-6)
    assert not ema.model.training and not any(p.requires_grad for p in ema.model.parameters())


def test_options_suit_data_and_model() -> None:
    paper = Options.of(data="cifar10", model="resnet110", root="x")
    assert (paper.epochs, paper.batch, paper.milestones, paper.warmup) == (164, 128, [82, 123], "paper")
    assert (paper.lr, paper.momentum, paper.weight_decay, paper.augment) == (0.1, 0.9, 1e-4, "crop-flip")
    assert Options.of(data="cifar10", root="x").warmup == 0
    assert Options.of(augment="none").augment == "none" and Options.of().augment == "crop"  # digits are never mirrored
    assert Options.of(model="a.b:c", seed=3).out == "runs/digits-a.b.c-3"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"accumulate": 0}, "--accumulate must be"),
        ({"workers": -1}, "--workers must be at least 0"),
        ({"lr": 0.0}, "--lr must be above zero"),
        ({"lr": float("nan")}, "--lr must be"),
        ({"weight_decay": -1.0}, "--weight-decay"),
        ({"ema": 1.0}, "--ema must be"),
        ({"label_smoothing": -0.1}, "--label-smoothing"),
        ({"warmup": -1}, "--warmup"),
        ({"warmup": "soon"}, "--warmup"),
        ({"schedule": "linear"}, "--schedule must be one of step, cosine"),
        ({"augment": "resized-crop"}, "--augment must be one of none, crop, crop-flip with --data digits"),
        ({"data": "mnist"}, "no data set is named 'mnist'"),
        ({"device": "tpu"}, "--device"),
        ({"root": "x"}, "--root means nothing with --data digits"),
        ({"data": "cifar10", "size": 64}, "--size means nothing with --data cifar10"),
    ],
)
def test_options_that_make_no_sense(given: dict, says: str) -> None:
    with pytest.raises(UserError) as error:
        Options.of(**given)
    assert says in str(error.value)


def test_a_resumed_run_keeps_its_options() -> None:
    run = options(ema=0.9)
    assert run.changed({"workers": 3, "ema": 0.9}).workers == 3
    with pytest.raises(UserError, match="ema \\(0.9, not 0.5\\), lr"):
        run.changed({"ema": 0.5, "lr": 1.0})


def test_label_smoothing_is_the_formula() -> None:
    """The loss of a step is (1 - s) * (-log p[y]) + s * mean over classes of -log p."""
    training = trainer(options("without_batch_norm", label_smoothing=0.2))
    images, labels = training.data.test.__getitems__(list(range(8)))  # type: ignore[misc]
    with torch.no_grad():
        log_p = nn.functional.log_softmax(training.model(training._input(images)), 1)
    expected = (0.8 * -log_p[range(8), labels] + 0.2 * -log_p.mean(1)).sum().item()
    training._step([(images, labels)], 8, Interruption())
    assert training.progress.loss == pytest.approx(expected, rel=1e-5)
