"""Measured block sizes: what tune() tries and keeps, what the file decides later, and that nothing happens unasked."""

# ruff: noqa: E402 (what imports Triton follows importorskip)

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")

import fastres
from fastres.errors import UserError
from fastres.kernels.triton import batch_norm, tuning
from fastres.kernels.triton.record import recording
from fastres.kernels.triton.tiles import rows_of


def ask(key):
    return tuning.choose(lambda: key, torch.device("cpu"), SIZES[0], lambda: SIZES)


SIZES = [{"block": 32}, {"block": 64}, {"block": 128}]


def timed(best):
    """A clock by which the choices of `best` are the fastest; `run` returns what it chose."""
    return lambda run: sum(abs(chosen["block"] - best[key]) for key, chosen in run().items())


def both():
    return {key: ask(key) for key in ("a", "b")}


def test_without_a_file_the_plain_function_decides():
    assert fastres.config.triton_choices is None
    assert ask("a") is SIZES[0]


def test_the_fastest_is_kept_and_used_later(tmp_path, monkeypatch):
    path = tmp_path / "choices.json"
    tuning.tune(both, path, timed({"a": 128, "b": 64}))
    assert json.loads(path.read_text()) == {"cpu": {"a": {"block": 128}, "b": {"block": 64}}}
    assert both() == {"a": SIZES[0], "b": SIZES[0]}  # not before it is asked for
    monkeypatch.setattr(fastres.config, "triton_choices", str(path))
    assert both() == {"a": SIZES[2], "b": SIZES[1]}
    assert ask("c") == SIZES[0]


def test_the_file_keeps_what_was_not_measured(tmp_path, monkeypatch):
    path = tmp_path / "choices.json"
    path.write_text(json.dumps({"NVIDIA H200": {"a": {"block": 1}}, "cpu": {"z": {"block": 2}, "a": {"block": 32}}}))
    found = tuning.tune(both, path, timed({"a": 128, "b": 32}))
    assert found == {
        "NVIDIA H200": {"a": {"block": 1}},
        "cpu": {"z": {"block": 2}, "a": {"block": 128}, "b": {"block": 32}},
    }


def test_a_run_that_fails_leaves_nothing_behind(tmp_path):
    def run():
        assert both() != {"a": SIZES[1], "b": SIZES[0]}, "stop"
        return both()

    with pytest.raises(AssertionError, match="stop"):
        tuning.tune(run, tmp_path / "choices.json", timed({"a": 32, "b": 32}))
    assert not (tmp_path / "choices.json").exists()
    assert both() == {"a": SIZES[0], "b": SIZES[0]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "is not a file of tune"),
        ('{"cpu": 1}', "is not a file of tune"),
        ('{"cpu": {"a": {"block": 7}}}', "a: {'block': 7} is none of"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_wrong_is_refused(tmp_path, monkeypatch, text, said):
    path = tmp_path / "choices.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(fastres.config, "triton_choices", str(path))
    with pytest.raises(UserError, match=said):
        ask("a")


def test_never_while_a_graph_is_captured(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
        tuning.tune(both, tmp_path / "choices.json", timed({"a": 32, "b": 32}))
    assert not (tmp_path / "choices.json").exists()


def test_passes_over_activations_follow_the_file(tmp_path, monkeypatch):
    x = torch.empty(256, 64, 56, 56, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    weight = torch.empty(64, device="meta")
    before, path = rows_of(x), tmp_path / "choices.json"

    def run():
        with recording() as launches:
            batch_norm.bn_act(x, weight, weight, weight, weight, None, False, 1e-5, True, False)
        return launches[0]

    def time(run):
        launch = run()
        return abs(launch.arguments["BLOCK_ROWS"] - 64) + abs(launch.grid[0] - 4 * 132)

    tuning.tune(run, path, time)
    assert rows_of(x) == before
    monkeypatch.setattr(fastres.config, "triton_choices", str(path))
    after = rows_of(x)
    assert (after.block_rows, after.programs) == (64, 4 * 132) != (before.block_rows, before.programs)
    assert json.loads(path.read_text()) == {
        "meta": {"rows: 64 channels, 2^19 rows, bfloat16, channels_last": {"values": 4096, "programs": 4}}
    }
