"""`fastres bench`: the arithmetic on made-up samples, and small runs of the real thing."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastres import cli, models
from fastres.bench import harness, machine, plot, process, report, stats, task
from fastres.bench.contenders import Eager
from fastres.bench.harness import Options
from fastres.bench.stats import Timing
from fastres.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def tiny(**changes: Any) -> Options:
    """Seconds, not minutes: 64 x 64, batch 1, two rounds, no peers."""
    chosen: dict[str, Any] = {"models": ["resnet18"], "modes": ["infer"], "batches": {"infer": [1], "train": [2]}}
    chosen |= {"contenders": ["channels_last", "fastres"], "size": 64, "rounds": 2, "timeout": 60.0, "threads": 1}
    return Options(**(chosen | changes))


# Statistics


def test_timing_counts_every_round_once() -> None:
    found = stats.timing([[1.0, 1.0, 9.0], [2.0], [3.0, 3.0]])
    assert found == Timing(2.0, 1.0, 3.0)


def test_timing_of_many_rounds_has_the_middle_half_as_spread() -> None:
    found = stats.timing([[float(value)] for value in range(1, 10)])
    assert found == Timing(5.0, 3.0, 7.0)


def test_quantile_interpolates() -> None:
    assert stats.quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert stats.quantile([7.0], 0.25) == 7.0


@pytest.mark.parametrize(
    ("ours", "other", "verdict"),
    [
        (Timing(1.0, 0.9, 1.1), Timing(2.0, 1.9, 2.1), "faster"),
        (Timing(2.0, 1.9, 2.1), Timing(1.0, 0.9, 1.1), "slower"),
        (Timing(1.0, 0.9, 1.5), Timing(1.6, 1.4, 1.8), "no difference"),
        (Timing(1.0, 1.0, 1.0), Timing(1.0, 1.0, 1.0), "no difference"),
    ],
)
def test_verdict(ours: Timing, other: Timing, verdict: str) -> None:
    assert stats.verdict(ours, other) == verdict


def test_break_even() -> None:
    slow, fast = Timing(0.4, 0.39, 0.41), Timing(0.2, 0.19, 0.21)
    assert stats.break_even_images(21.0, fast, 1.0, slow, batch=2) == 200  # 20 s more, 0.1 s less an image
    assert stats.break_even_images(0.5, fast, 1.0, slow, batch=2) == 0
    assert stats.break_even_images(21.0, slow, 1.0, fast, batch=2) is None
    assert stats.break_even_images(21.0, Timing(0.2, 0.1, 0.5), 1.0, slow, batch=2) is None  # no difference


def _row(name: str, seconds: float, setup: float = 1.0) -> dict[str, Any]:
    times = {"median_seconds": seconds, "low_seconds": seconds * 0.99, "high_seconds": seconds * 1.01}
    memory = {"peak_bytes": 2**30, "peak_over_imports_bytes": 2**28}
    about = {"name": name, "title": name, "status": "ok", "reason": "", "error": 1e-7, "setup_seconds": setup}
    return about | times | memory | {"images_per_second": 4 / seconds, "idle_cpu_share": 0.0}


def _result() -> dict[str, Any]:
    rows = [_row("eager", 2.0), _row("channels_last", 1.0), _row("compile", 0.8, setup=20.0), _row("fastres", 0.5)]
    rows.append({"name": "ncnn", "title": "ncnn", "status": "skipped", "reason": "ncnn is not installed"})
    best = harness.compare(rows, batch=4)
    task = {"model": "m", "mode": "infer", "batch": 4, "dtype": "float32", "device": "cpu", "size": 64, "threads": 2}
    table = {**task, "title": "m inference, batch 4", "best_peer": best, "contenders": rows}
    return {"date": "2026-01-02T03:04:05+00:00", "machine": machine.describe(), "tables": [table]}


def test_compare_fills_in_ratios_and_break_even() -> None:
    table = _result()["tables"][0]
    rows = {row["name"]: row for row in table["contenders"]}
    assert table["best_peer"] == "compile"
    assert rows["fastres"]["vs_eager"] == {"ratio": 2.0, "verdict": "faster"}
    assert rows["fastres"]["vs_best_peer"] == {"ratio": pytest.approx(1.6), "verdict": "faster"}
    assert rows["fastres"]["break_even_images"] == 0
    assert rows["compile"]["break_even_images"] == 380  # 19 s more, 0.05 s less an image
    assert rows["eager"]["vs_eager"] == {"ratio": 0.5, "verdict": "slower"}
    assert "vs_eager" not in rows["channels_last"]
    assert "vs_best_peer" not in rows["compile"]
    assert "vs_eager" not in rows["ncnn"]


def test_report_names_fastres_the_missing_and_the_busy() -> None:
    from rich.console import Console

    result = _result()
    table = result["tables"][0]
    table["contenders"][0]["idle_cpu_share"] = 0.5
    table |= {"other_cpu_share": 0.123, "reference_failed": "too large"}
    table["contenders"][1] |= {"title": "eager channels_last", "median_seconds": 0.0987, "images_per_second": 12345.6}
    table["contenders"][2] |= {"break_even_images": 1234567, "setup_seconds": 123.4, "low_seconds": 0.1}
    table["contenders"][2] |= {
        "high_seconds": 123.0,
        "peak_over_imports_bytes": 2**35,
        "vs_eager": {"verdict": "no difference"},
    }
    console = Console(width=report.WIDTH, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    for part in report.tables(result):
        console.print(part)
    text = console.export_text()
    assert "fastres: 2.00x eager channels_last; 1.60x the best peer (compile)" in text
    assert "ncnn: skipped: ncnn is not installed" in text
    assert "warning: not idle between its turns: eager" in text
    assert "warning: other processes used 12%" in text
    assert "float64 reference failed: too large" in text
    assert "…" not in text  # nothing cut off at the width that the command asks for


def test_report_says_no_difference() -> None:
    result = _result()
    rows = result["tables"][0]["contenders"]
    rows[3] = _row("fastres", 0.805)
    harness.compare(rows, batch=4)
    assert "no difference to the best peer (compile)" in report.summary(result["tables"][0])[0]
    assert report.cells(rows[3])[5] == "no diff."


def test_plot_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the chart needs matplotlib")
    plot.write(_result(), tmp_path / "new" / "chart.png")
    assert (tmp_path / "new" / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_results_lie_in_the_checkout_or_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert report.default_stem("2026-01-02T03:04:05").parent == Path(".")
    monkeypatch.chdir(ROOT / "benchmarks")
    stem = report.default_stem("2026-01-02T03:04:05")
    assert stem.parent == ROOT / "benchmarks" / "results" / "local"
    assert stem.name.startswith("2026-01-02T0304-")


def test_machine_does_not_name_the_host() -> None:
    host = os.uname().nodename
    described = machine.describe()
    assert described["cpu"]["cores"] >= 1 and described["versions"]["torch"] == torch.__version__
    assert host not in machine.slug() or len(host) < 4


# Options


@pytest.mark.parametrize(
    "changes",
    [
        {"batches": {"infer": [0], "train": [1]}},
        {"rounds": 0},
        {"seconds": 0.0},
        {"size": -1},
        {"threads": -2},
        {"dtype": "int8"},
        {"contenders": ["caffe"]},
        {"models": ["resnet19"]},
        {"models": ["json:loads_not"]},
        {"models": ["collections:OrderedDict"]},
        {"checkpoint": "missing.pth"},
        {"images": "missing"},
    ],
    ids=str,
)
def test_bad_options(changes: dict[str, Any]) -> None:
    with pytest.raises((UserError, FileNotFoundError)):
        harness.run(tiny(**changes))


def small() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten())


def headless() -> torch.nn.Module:
    return torch.nn.Conv2d(3, 4, 3)


def test_ones_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    images = torch.randn(16, 3, 8, 8) + 5
    model = task.prepared_model("mine:small", images)
    assert not model.training
    assert torch.allclose(model[1].running_mean, model[0](images).mean((0, 2, 3)), atol=1e-4)
    task.write_files(model, images, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"weights.pt", "images.npy", "labels.npy"}
    with pytest.raises(UserError, match="no classifier"):
        task.write_files(task.prepared_model("mine:headless", images), images, tmp_path)
    with pytest.raises(UserError, match="the model does not take images of .*3, 2, 2"):
        task.write_files(model, images[:, :, :2, :2], tmp_path)


# Small runs


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    said: list[tuple[str, float]] = []
    found = harness.run(tiny(modes=["infer", "train"]), lambda text, share: said.append((text, share)))
    shares = [share for _, share in said]
    assert shares == sorted(shares) and all(0 <= share < 1 for share in shares)
    return found


def test_run_measures_both_modes(result: dict[str, Any]) -> None:
    assert [table["title"] for table in result["tables"]] == [
        "resnet18 inference, batch 1",
        "resnet18 training, batch 2",
    ]
    for table in result["tables"]:
        assert table["best_peer"] == "channels_last" and table["reference_failed"] is None
        for row in table["contenders"]:
            assert row["status"] == "ok", row["reason"]
            assert 0 < row["low_seconds"] <= row["median_seconds"] <= row["high_seconds"]
            assert row["images_per_second"] == pytest.approx(table["batch"] / row["median_seconds"])
            assert len(row["samples"]) == 2 and all(row["samples"])
            assert row["setup_seconds"] > 0
            assert row["peak_bytes"] > 40e6  # the weights alone
            assert row["error"] < 0.05  # gradients: where a ReLU's input is nearly 0 its mask may differ from float64's


def test_run_compares_with_float64(result: dict[str, Any]) -> None:
    infer, train = result["tables"]
    for row in infer["contenders"]:
        assert 0 < row["error"] < 1e-5
        assert row["same_top1"] == 1.0
    for row in train["contenders"]:
        assert 0 <= row["loss_error"] < 1e-5


def test_result_file_says_everything(result: dict[str, Any], tmp_path: Path) -> None:
    report.write_json(result, tmp_path / "result.json")
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["schema"] == 1
    assert set(found) == {"schema", "date", "seconds", "command", "machine", "options", "tables"}
    assert set(found["machine"]) >= {"cpu", "versions", "commit", "load_average", "memory_gib"}
    assert found["options"]["size"] == 64 and found["options"]["threads"] == 1
    documented = (ROOT / "benchmarks" / "README.md").read_text()
    for key in (*found, *found["tables"][0]["contenders"][1]):
        assert f"`{key}`" in documented or key == "title", f"benchmarks/README.md does not explain {key}"


def test_command_shows_tables_and_writes_files(
    result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Options] = []
    monkeypatch.setattr(harness, "run", lambda options, say: asked.append(options) or result)
    monkeypatch.chdir(tmp_path)
    json_file, plot_file = tmp_path / "a" / "out.json", tmp_path / "out.png"
    files = ["--json", str(json_file), "--plot", str(plot_file)]
    assert (
        cli.main(["bench", "resnet18", "--batch", "1", "2", "--peers", "compile, ncnn", "--threads", "3", *files]) == 0
    )
    found = asked[0]
    assert (found.models, found.batches, found.threads) == (["resnet18"], {"infer": [1, 2], "train": [1, 2]}, 3)
    assert found.contenders == ["channels_last", "compile", "ncnn", "fastres"]
    out = capsys.readouterr().out
    assert "resnet18 training, batch 2, 64 x 64, float32, cpu, 1 thread" in out
    assert out.rstrip().endswith(f"Results: {json_file} and {plot_file}")
    assert json.loads(json_file.read_text())["schema"] == 1 and plot_file.exists()
    assert cli.main(["bench"]) == 0  # the defaults: everything, files in the current folder
    assert asked[1].models == ["resnet18", "resnet50"] and asked[1].contenders == list(harness.CONTENDERS)
    assert asked[1].batches == {"infer": [1, 16], "train": [16]}
    assert {path.suffix for path in tmp_path.glob("fastres-bench-*")} == {".json", ".png"}


class Crash(Eager):
    title = "crash"

    def step(self) -> None:
        if self.task.batch == 1:
            os._exit(7)
        os.kill(os.getpid(), 9)


class Raise(Eager):
    title = "raise"

    def setup(self) -> None:
        raise ValueError("not\ntoday")


class Hang(Eager):
    title = "hang"

    def setup(self) -> None:
        time.sleep(60 if self.task.batch == 1 else 0)
        super().setup()


class Missing(Eager):
    title = "missing"
    packages = ("a_package_that_nobody_has",)


@pytest.mark.slow
def test_a_contender_that_fails_is_a_row_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # the contenders' processes import this file
    monkeypatch.setitem(sys.modules, "test_bench", sys.modules[__name__])
    kinds = {kind.title: f"test_bench:{kind.__name__}" for kind in (Crash, Raise, Hang, Missing)}
    for name, kind in kinds.items():
        monkeypatch.setitem(harness.CONTENDERS, name, kind)
    batches = {"infer": [1, 2], "train": [1]}
    found = harness.run(tiny(contenders=[*kinds, "channels_last"], batches=batches, timeout=8.0, size=32))
    assert len(found["tables"]) == 2  # the second batch size starts dead processes anew
    reasons = ("ended with exit code 7", "died of SIGKILL (out of memory?)")
    for table, reason in zip(found["tables"], reasons, strict=True):
        rows = {row["name"]: row for row in table["contenders"]}
        assert rows["channels_last"]["status"] == "ok"
        assert rows["missing"]["status"] == "skipped"
        assert rows["missing"]["reason"] == "a_package_that_nobody_has is not installed"
        assert [rows[name]["status"] for name in ("crash", "raise")] == ["failed"] * 2
        assert rows["crash"]["reason"] == reason
        assert rows["raise"]["reason"] == "ValueError: not"
    hung, restarted = ({row["name"]: row for row in table["contenders"]}["hang"] for table in found["tables"])
    assert (hung["status"], hung["reason"]) == ("failed", "no answer in 8 s")
    assert restarted["status"] == "ok"


def test_contenders_get_the_same_threads_and_default_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    found = process.environment(3, "folder")
    assert found["OMP_NUM_THREADS"] == found["MKL_NUM_THREADS"] == "3"
    assert "OMP_WAIT_POLICY" not in found


# The layer table of benchmarks/


def _layers() -> Any:
    spec = importlib.util.spec_from_file_location("layers", ROOT / "benchmarks" / "layers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["layers"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_layer_table_is_the_networks(depth: int) -> None:
    """Every convolution of the model, with its input shape, as often as the table says."""
    layers = _layers()
    with torch.device("meta"):
        model = models.create_model(f"resnet{depth}", fused=False).eval()
    seen: list[tuple[int, ...]] = []

    def note(conv: torch.nn.Conv2d, args: tuple[torch.Tensor], out: torch.Tensor) -> None:
        c, h, w = args[0].shape[1:]
        assert conv.padding == (conv.kernel_size[0] // 2,) * 2
        seen.append((c, h, w, conv.out_channels, conv.kernel_size[0], conv.stride[0], *out.shape[1:]))

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(note)
    model(torch.empty(1, 3, 224, 224, device="meta"))
    table: list[tuple[int, ...]] = []
    for layer in layers.layers(depth):
        shape = (layer.c, layer.h, layer.w, layer.k, layer.r, layer.stride, *layer.out)
        table += [shape] * layer.count(depth)
    assert sorted(seen) == sorted(table)


def test_layer_table_adds_up() -> None:
    """Multiply-adds of the convolutions: the published numbers, less the classifier's 0.5 and 2 million."""
    layers = _layers()
    macs = {depth: sum(layer.macs * layer.count(depth) for layer in layers.layers(depth)) for depth in (18, 50)}
    assert macs[18] / 1e9 == pytest.approx(1.814, abs=0.001)
    assert macs[50] / 1e9 == pytest.approx(4.087, abs=0.001)
