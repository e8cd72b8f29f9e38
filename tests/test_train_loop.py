"""The training loop: what a step computes, and that an interruption changes nothing."""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from _train import assert_same_bits, data, options, signal_after, trainer

from fastres.errors import UserError
from fastres.recipes.residual import FusedModule
from fastres.train import Options, Stopped, Trainer, checkpoint
from fastres.train.interrupt import Interruption
from fastres.train.loop import CHECKPOINT
from fastres.train.sampler import global_batches


def whole(given: Options) -> dict:
    training = trainer(given)
    training.run()
    return training.state()


def continued(given: Options, folder: Path) -> Trainer:
    """A trainer in a new process, as it were, from the checkpoint of the folder."""
    torch.manual_seed(12345)
    training = trainer(given, folder)
    training.load_state(checkpoint.load(folder / CHECKPOINT))
    return training


VARIANTS = {
    "fused": {},
    "eager": {"fused": False},
    "dropout, accumulation, averages": {"model": "with_dropout", "accumulate": 2, "ema": 0.9},
    "warm-up of the paper, label smoothing": {"schedule": "step", "warmup": "paper", "label_smoothing": 0.1},
    "bfloat16, workers": {"amp": True, "workers": 1},
}


@pytest.mark.parametrize(
    ("variant", "step"), [*((variant, step) for variant in VARIANTS for step in (1, 3)), ("fused", 5)]
)
def test_a_resumed_run_is_the_same_bit_for_bit(variant: str, step: int, tmp_path: Path) -> None:
    """Stopped in the middle of an epoch, at its end before the test, and in the second one."""
    given = options(**VARIANTS[variant])
    training = trainer(given, tmp_path)
    signal_after(training, step)
    with pytest.raises(Stopped, match=rf"stopped after step {step + 1}; .*last.pt \(step {step + 1}\)") as stop:
        training.run()
    assert stop.value.signal == signal.SIGTERM
    again = continued(given, tmp_path)
    assert again.progress.step == step + 1 and again.progress.batch == (step + 1 if step < 4 else step - 3)
    again.run()
    assert_same_bits(again.state(), whole(given))
    assert len(again.progress.history) == 2 and again.progress.step == 8


def test_a_run_that_died_between_epochs_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = options()
    training = trainer(given, tmp_path)

    def die(history: list) -> None:
        raise MemoryError

    monkeypatch.setattr(training.log, "epoch", die)
    with pytest.raises(MemoryError):
        training.run()
    again = continued(given, tmp_path)
    assert (again.progress.epoch, again.progress.step) == (1, 4)
    again.run()
    assert_same_bits(again.state(), whole(given))


def test_checkpoints_within_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After steps 3 and 6, and after both epochs; the one of step 3 continues to the same end."""
    given, saved = options(checkpoint_every=3), []
    training = trainer(given, tmp_path)
    monkeypatch.setattr(checkpoint, "save", lambda state, path: saved.append(copy.deepcopy(state)))
    training.run()
    assert [state["progress"]["step"] for state in saved] == [3, 4, 6, 8]
    again = trainer(given)
    again.load_state(saved[0])
    again.run()
    assert_same_bits(again.state(), training.state())


def test_seeds_decide() -> None:
    first, again, other = (whole(options(seed=seed))["model"] for seed in (1, 1, 2))
    assert_same_bits(first, again)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_fused_and_eager_start_alike_and_stay_close() -> None:
    runs = [trainer(options(fused=fused, epochs=1)) for fused in (True, False)]
    assert any(isinstance(module, FusedModule) for module in runs[0].model.modules())
    assert not any(isinstance(module, FusedModule) for module in runs[1].model.modules())
    assert_same_bits(runs[0].model.state_dict(), runs[1].model.state_dict())
    losses = [training.run().history[0]["train_loss"] for training in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulation_equals_the_large_batch(accumulate: int) -> None:
    states = [whole(options("without_batch_norm", accumulate=n, label_smoothing=0.1)) for n in (1, accumulate)]
    for name, value in states[0]["model"].items():
        torch.testing.assert_close(states[1]["model"][name], value, atol=1e-5, rtol=1e-5)
    for row, other in zip(*(state["progress"]["history"] for state in states), strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)


def test_a_step_is_sgd_with_momentum_and_weight_decay_on_the_mean_loss() -> None:
    """v <- m v + g + w p, p <- p - lr v, with g of the mean over all images, whatever the rows of the epoch are."""
    given = options("without_batch_norm", epochs=1, augment="none", weight_decay=0.01, warmup=0, schedule="step")
    training, images = trainer(given, images=data(augment="none")), data(augment="none").train
    reference = copy.deepcopy(training.model)
    velocity = [torch.zeros_like(p) for p in reference.parameters()]
    for indices in global_batches(26, 8, 0, 0):
        x, y = images.__getitems__(indices.tolist())  # type: ignore[misc]
        loss = torch.nn.functional.cross_entropy(reference((x.float() / 255 - 0.5) / 0.25), y)
        gradients = torch.autograd.grad(loss, list(reference.parameters()))
        with torch.no_grad():
            for p, g, v in zip(reference.parameters(), gradients, velocity, strict=True):
                v.mul_(0.9).add_(g + 0.01 * p)
                p.sub_(0.05 * v)
    training.run()
    for p, q in zip(training.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_evaluation_counts_every_image_once() -> None:
    training = trainer(options("without_batch_norm", batch=4), images=data(test=11))
    x, y = training.data.test.__getitems__(list(range(11)))  # type: ignore[misc]
    with torch.no_grad():
        logits = training.model(training._input(x))
    loss, error = training.evaluate(training.model)
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, y).item(), rel=1e-5)
    assert error == pytest.approx(100 * (logits.argmax(1) != y).float().mean().item())


def test_rates_are_those_of_the_schedule() -> None:
    training, rates = trainer(options(schedule="step", milestones=[1], warmup=2, lr=0.5)), []
    training.log.step = lambda done, loss: rates.append(training.optimizer.param_groups[0]["lr"])  # type: ignore
    training.run()
    assert rates == pytest.approx([0.25, 0.5, 0.5, 0.5, 0.05, 0.05, 0.05, 0.05])


def test_warmup_of_the_paper_lowers_the_rate_until_something_is_learned() -> None:
    training = trainer(options(schedule="step", warmup="paper"))
    assert training._rate(0) == pytest.approx(0.005)
    training.run()
    assert not training.progress.cold and training._rate(0) == pytest.approx(0.05)


@pytest.mark.parametrize("step", [0, 5])
def test_a_loss_that_is_not_finite_stops_with_step_and_checkpoint(step: int, tmp_path: Path) -> None:
    training = trainer(options(), tmp_path)

    def poison(done: int, loss: float) -> None:
        if done == step:
            with torch.no_grad():
                training.model.fc.bias[0] = math.nan  # type: ignore[index, union-attr]

    training.log.step = poison  # type: ignore[method-assign]
    poison(0, 0.0)
    with pytest.raises(Stopped) as stop:
        training.run()
    last = "there is no checkpoint yet" if step == 0 else f"last good checkpoint is {tmp_path / CHECKPOINT} (step 4)"
    assert f"the loss is nan at step {step + 1} (epoch {1 + step // 4}" in str(stop.value)
    assert last in str(stop.value) and stop.value.signal == 0
    if step:
        state = checkpoint.load(tmp_path / CHECKPOINT)
        assert state["progress"]["step"] == 4 and state["model"]["fc.bias"].isfinite().all()


def test_weights_that_are_not_finite_never_replace_a_checkpoint(tmp_path: Path) -> None:
    training = trainer(options(), tmp_path)

    def poison(done: int, loss: float) -> None:
        if done == 8:  # after the last step: no loss will tell
            with torch.no_grad():
                training.model.fc.bias[0] = math.inf  # type: ignore[index, union-attr]

    training.log.step = poison  # type: ignore[method-assign]
    with pytest.raises(Stopped, match=r"fc.bias is not finite after step 8; .*\(step 4\)"):
        training.run()
    assert checkpoint.load(tmp_path / CHECKPOINT)["progress"]["step"] == 4


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, fsync, writes = options(), os.fsync, []

    def full(descriptor: int) -> None:
        writes.append(descriptor)
        if len(writes) > 2:  # the first checkpoint: file and folder
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    training = trainer(given, tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Stopped, match=r"checkpoint of step 8: No space left on device; .*\(step 4\)"):
        training.run()
    monkeypatch.undo()
    assert os.listdir(tmp_path) == [CHECKPOINT]  # nothing half written
    again = continued(given, tmp_path)
    again.run()
    assert_same_bits(again.state(), whole(given))


def test_a_second_signal_acts_as_always() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # may be ignored, as for a job in the background
    with pytest.raises(KeyboardInterrupt), Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
    assert interruption.signal == 0
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_leaves_loading_processes_alone(tmp_path: Path) -> None:
    """It reaches them too; the step after it still gets its images."""
    training = trainer(options(workers=1, batch=2), tmp_path)  # 13 steps: more than are loaded ahead

    def interrupt(done: int, loss: float) -> None:
        if done == 2:
            for process in multiprocessing.active_children():
                os.kill(process.pid, signal.SIGINT)  # type: ignore[arg-type]
        if done == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    training.log.step = interrupt  # type: ignore[method-assign]
    with pytest.raises(Stopped, match="stopped after step 9"):
        training.run()


def test_a_checkpoint_of_other_data_is_refused() -> None:
    state = trainer(options()).state()
    with pytest.raises(UserError, match="20 images to train, it had 26"):
        trainer(options(), images=data(train=20)).load_state(state)
    with pytest.raises(UserError, match="other classes than at the checkpoint \\(4 then, 3 now\\)"):
        trainer(options()).load_state({**state, "classes": list("abcd")})


# ---- files


def test_a_checkpoint_is_the_old_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pt"
    checkpoint.save({"value": torch.ones(3)}, path)
    for name in ("fsync", "replace"):

        def fail(*args: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="No space"):
                checkpoint.save({"value": torch.zeros(3)}, path)
        assert torch.equal(checkpoint.load(path)["value"], torch.ones(3))
        assert os.listdir(tmp_path) == ["x.pt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_device_that_is_full(tmp_path: Path) -> None:
    (tmp_path / ".x.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save({"value": torch.zeros(3)}, tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()


class Evil:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ("evil",))


def test_bad_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pt"
    with pytest.raises(FileNotFoundError):
        checkpoint.load(path)
    checkpoint.save({"value": torch.ones(3)}, path)
    content = path.read_bytes()
    for bad in (b"", b"abc", content[: len(content) // 2]):
        path.write_bytes(bad)
        with pytest.raises(UserError, match="corrupt, or not a checkpoint"):
            checkpoint.load(path)
    for value, says in (({"model": 1}, "no checkpoint of a training run"), ({"format": 99}, "format 99")):
        torch.save(value, path)
        with pytest.raises(UserError, match=says):
            checkpoint.load(path)
    torch.save({"format": 1, "x": Evil()}, path)
    with pytest.raises(UserError, match="corrupt, or not"):
        checkpoint.load(path)
    assert not (tmp_path / "evil").exists()
