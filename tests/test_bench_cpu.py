"""benchmarks/cpu.py and its parts: the arithmetic, the definitions of the sweeps, and small runs of the real thing."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastres.bench import harness, machine
from fastres.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
cpu, cpu_layers, floor, layers, sweeps = (
    importlib.import_module(name) for name in ("cpu", "cpu_layers", "floor", "layers", "sweeps")
)
AVX2_ONLY = {"cores": 2, "threads_per_core": 1, "isa": ["avx2"]}
AVX512 = {**AVX2_ONLY, "isa": ["avx2", "avx512f", "avx512_bf16"]}


# What a convolution needs, and what the processor can do


def test_layers_are_those_of_the_operator_benchmarks() -> None:
    networks = [f"resnet{depth}" for depth in layers.DEPTHS]
    found = {layer.shape: layer.counts for layer in floor.layers_of(networks)}
    table: dict[Any, dict[str, int]] = {}
    for layer in layers.LAYERS:
        counts = table.setdefault(floor.Shape(layer.c, layer.h, layer.k, layer.r, layer.stride, 1), {})
        for depth in layers.DEPTHS:
            counts[f"resnet{depth}"] = counts.get(f"resnet{depth}", 0) + layer.count(depth)
    assert found == {shape: {name: n for name, n in counts.items() if n} for shape, counts in table.items()}


@pytest.mark.parametrize(("network", "published"), [("resnet18", 1.814), ("resnext50_32x4d", 4.23)])
def test_multiplications_of_a_network_are_the_published_ones(network: str, published: float) -> None:
    """Less the classifier's 0.5 and 2 million; groups do not multiply with each other."""
    all_ = floor.layers_of([network])
    flops = sum(layer.counts[network] * floor.work(layer.shape, 1, 1).direct_flops for layer in all_)
    assert flops / 2e9 == pytest.approx(published, abs=0.005)


def test_unknown_network() -> None:
    with pytest.raises(UserError, match="no model named 'resnet19'"):
        floor.layers_of(["resnet19"])


def test_work_of_a_convolution() -> None:
    shape = floor.Shape(c=8, h=7, k=16, r=3, stride=1, groups=1)
    direct = 2 * 7 * 7 * 16 * 8 * 9
    product, winograd = floor.work(shape, 2, 1), floor.work(shape, 2, 2)
    assert product == ("product", 2 * direct, 2 * direct, 4 * (2 * 49 * 8 + 2 * 49 * 16 + 16 * 8 * 9))
    # 2 x 2 tiles of 4 x 4 outputs, 36 products of channels in each
    assert winograd.method == "F(4x4)" and winograd.direct_flops == 2 * direct
    assert winograd.method_flops == 2 * 2 * 4 * 36 * 8 * 16
    assert winograd.bytes == 4 * (2 * 49 * 8 + 2 * 49 * 16 + 36 * 8 * 16)
    grouped = floor.work(shape._replace(groups=4, stride=2), 1, 0)
    assert grouped == ("oneDNN", *[2 * 16 * 16 * 2 * 9] * 2, 4 * (49 * 8 + 16 * 16 + 16 * 2 * 9))


def test_the_floor_is_the_longer_time() -> None:
    can = floor.Ceilings(flops=100.0, bandwidth={1024: 40.0, 4096: 10.0})
    work = floor.Work("product", 0, 5000, 1024)
    assert can.floor(work) == (50.0, "compute")
    assert can.floor(work._replace(bytes=8192)) == (819.2, "memory")
    assert [can.bandwidth_at(size) for size in (1, 1024, 2048, 4096, 10**9)] == [40.0, 40.0, 25.0, 10.0, 10.0]


def test_ceilings_take_the_faster_of_copy_and_triad() -> None:
    n = len(cpu_layers._SIZES)
    copies, triads = [[1.0, 9.0, 2.0]] * n, [[4.0]] + [[0.5]] * (n - 1)
    can = cpu_layers.ceilings([[2.0], *copies, *triads])
    assert can.flops == 1536**3
    sizes = list(cpu_layers._SIZES)
    assert can.bandwidth == {sizes[0]: sizes[0] / 2, **{size: size / 0.5 for size in sizes[1:]}}


def test_ceilings_move_the_bytes_that_they_count() -> None:
    _, *calls = cpu_layers.ceiling_calls()
    n = len(cpu_layers._SIZES)
    for size, copy, triad in zip(cpu_layers._SIZES, calls[:n], calls[n:], strict=True):
        assert 2 * copy().nbytes == size
        assert 3 * triad().nbytes == pytest.approx(size, rel=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_both_providers_compute_the_same(groups: int) -> None:
    layer = floor.Layer(floor.Shape(c=6, h=9, k=10, r=3, stride=2, groups=groups), "", {})
    results = []
    for provider in cpu_layers.PROVIDERS:
        torch.manual_seed(1)
        with torch.inference_mode():
            (call,) = cpu_layers.convolution_calls(provider, [layer], batch=2)
            results.append(call())
    assert results[0].shape == (2, 10, 5, 5) and results[0].std() > 0.1
    assert torch.allclose(*results, atol=1e-5)


@pytest.mark.slow
def test_layers_are_measured() -> None:
    table = cpu_layers.measure(1, ["resnet18"], threads=1, seconds=0.1, rounds=2)
    assert table["threads"] == 1 and table["peak_flops"] > 1e8
    assert len(table["layers"]) == 11
    for row in table["layers"]:
        assert len(row["samples"]["fastres"]) == len(row["samples"]["oneDNN"]) >= 2
        assert row["of_floor"] == pytest.approx(row["floor_seconds"] / row["seconds"]["fastres"])
        assert row["counts"] and row["limit"] in ("compute", "memory")
    assert cpu_layers.summary("resnet18", table["layers"])[0] == "resnet18"


def test_summary_weighs_layers_by_how_often_they_occur() -> None:
    def row(shape: str, count: int, ours: float, theirs: float, least: float) -> dict[str, Any]:
        seconds = {"fastres": ours, "oneDNN": theirs}
        return {"shape": shape, "counts": {"net": count}, "seconds": seconds, "floor_seconds": least}

    rows = [row("a", 3, 0.002, 0.003, 0.001), row("b", 1, 0.004, 0.011, 0.002), {"counts": {"another": 1}}]
    assert cpu_layers.summary("net", rows) == ["net", "20.0", "10.0", "2.00", "50%", "a: 3.00\nb: 2.00"]


# Sweeps


def test_every_sweep_has_its_points() -> None:
    found = {part.name: part for part in sweeps.parts(2, AVX512)}
    assert set(found) | {"layers", "memory"} == set(cpu.PARTS) and not any(part.skipped for part in found.values())
    values = {
        name: [getattr(point, found[name].along) for point in found[name].points if point.model == "resnet50"]
        for name in ("batch", "threads")
    }
    assert values == {"batch": [1, 2, 4, 8, 16, 32, 64], "threads": [1, 2, 1, 2]}
    assert [p.model for p in found["depth"].points if p.batch == 16] == [f"resnet{n}" for n in (18, 34, 50, 101, 152)]
    assert all(point.avx2 for point in found["avx2"].points)
    assert {point.mode for point in found["networks"].points} == {"infer", "train"}


def test_parts_that_make_no_sense_here_say_why() -> None:
    skipped = {part.name: part.skipped for part in sweeps.parts(1, {"cores": 1, "isa": ["avx2"]}) if part.skipped}
    assert set(skipped) == {"threads", "avx2", "bf16"}
    assert "nothing above AVX2" in skipped["avx2"] and "one core" in skipped["threads"]


def test_shared_points_are_measured_once_and_together() -> None:
    point = sweeps.Point("a", "infer", 16, 2)
    other = [sweeps.Point("a", "infer", 1, 1), sweeps.Point("b", "infer", 16, 2)]
    small = sweeps.Point("a", "infer", 1, 2)
    assert sweeps.runs([point, *other, small, point]) == [[small, point], [other[0]], [other[1]]]


def test_a_smoke_run_is_small() -> None:
    batch = next(part for part in sweeps.parts(2, AVX2_ONLY) if part.name == "batch")
    assert {(point.size, point.batch) for point in sweeps.smaller(batch).points} == {(64, 1), (64, 2), (64, 4)}
    assert len(sweeps.smaller(batch).points) == 6


def _row(name: str, seconds: float, batch: int = 1) -> dict[str, Any]:
    about = {"name": name, "title": name, "status": "ok", "reason": "", "error": 1e-7, "setup_seconds": 1.0}
    times = {"median_seconds": seconds, "low_seconds": 0.9 * seconds, "high_seconds": 1.1 * seconds}
    memory = {"peak_bytes": 2**30, "peak_over_imports_bytes": 2**28}
    return about | times | memory | {"images_per_second": batch / seconds}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[harness.Options, str | None]]:
    """Instead of measuring, the harness notes what it is asked for, and the instruction set its processes would get."""
    found: list[tuple[harness.Options, str | None]] = []

    def run(options: harness.Options, say: Any) -> dict[str, Any]:
        found.append((options, os.environ.get("ONEDNN_MAX_CPU_ISA")))
        tables = []
        (mode,) = options.modes
        for batch in options.batches[mode]:
            rows = [_row(name, batch * (1 + i), batch) for i, name in enumerate(options.contenders)]
            about = {"model": options.models[0], "mode": mode, "batch": batch, "dtype": options.dtype, "device": "cpu"}
            about |= {"size": options.size, "threads": options.threads, "title": f"{options.models[0]}, batch {batch}"}
            tables.append({**about, "best_peer": harness.compare(rows, batch), "contenders": rows})
        return {"tables": tables}

    monkeypatch.setattr(harness, "run", run)
    return found


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["cpu.py", *arguments])
    return cpu.main()


def test_command_writes_a_file_and_a_chart_for_each_part(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "cpu", lambda: {"model": "none", **AVX2_ONLY})
    assert command(monkeypatch, "batch", "depth", "avx2", "threads", "--out", str(tmp_path), "--threads", "2") == 0
    out = capsys.readouterr().out
    assert "avx2: skipped: this processor has nothing above AVX2" in out
    assert "inference against the batch size: ms of an iteration (2 threads, float32, 224 px)" in out
    names = {f"cpu-2core-avx2-{part}.{end}" for part in ("batch", "depth", "threads") for end in ("json", "png")}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))
    depth = json.loads((tmp_path / "cpu-2core-avx2-depth.json").read_text())
    assert [table["model"] for table in depth["tables"]][:2] == ["resnet18", "resnet34"]
    assert depth["schema"] == 1 and depth["part"] == "depth"
    threads = json.loads((tmp_path / "cpu-2core-avx2-threads.json").read_text())
    assert [table["threads"] for table in threads["tables"]] == [1, 2] * 4
    points = [(o.models[0], o.threads, batch) for o, _ in asked for batch in o.batches["infer"]]
    assert len(points) == len(set(points)) == 14 + 6 + 4
    assert all(options.contenders == [n for n in harness.CONTENDERS if n != "eager"] for options, _ in asked)


def test_networks_have_the_full_tables_too(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "cpu", lambda: {"model": "none", **AVX512})
    assert command(monkeypatch, "networks", "bf16", "--peers", "openvino", "--out", str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "pays after" in out and "whole networks: ms of an iteration (2 threads, float32" in out
    assert {path.name for path in tmp_path.iterdir()} == {
        f"cpu-2core-avx512-{part}.{end}" for part in ("networks", "bf16") for end in ("json", "png")
    }
    assert {options.dtype for options, _ in asked} == {"float32", "bfloat16"}
    assert all(options.contenders == ["channels_last", "openvino", "fastres"] for options, _ in asked)


def test_headings_say_what_differs() -> None:
    common = {"threads": 2, "dtype": "float32", "size": 224}
    tables = [{**common, "title": "a"}, {**common, "title": "b", "size": 32, "threads": 1}]
    assert sweeps.headings(tables) == ("float32", ["a, 2 threads, 224 px", "b, 1 thread, 32 px"])


def test_everyone_is_held_to_avx2(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "cpu", lambda: {"model": "none", **AVX512})
    assert command(monkeypatch, "avx2", "--out", str(tmp_path)) == 0
    assert {isa for _, isa in asked} == {"AVX2"} and "ONEDNN_MAX_CPU_ISA" not in os.environ
    assert asked[0][0].contenders == ["channels_last", "compile", "openvino", "fastres"]
    assert "ncnn skipped: cannot be held to AVX2" in capsys.readouterr().out
    tables = json.loads((tmp_path / "cpu-2core-avx512-avx2.json").read_text())["tables"]
    assert all(table["held_to_avx2"] and table["title"].endswith(", AVX2") for table in tables)


def test_fastres_that_fails_is_the_exit_code(asked: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = harness.run

    def broken(options: harness.Options, say: Any) -> dict[str, Any]:
        result = whole(options, say)
        result["tables"][0]["contenders"][-1] = _row("fastres", 1.0) | {"status": "failed", "reason": "not today"}
        return result

    monkeypatch.setattr(harness, "run", broken)
    assert command(monkeypatch, "depth", "--out", str(tmp_path)) == 1
    assert (tmp_path / f"{cpu.stem()}-depth.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "no part is named speed; there are networks, layers"),
        (["batch", "--peers", "caffe"], "no contender is named caffe"),
        (["batch", "--seconds", "0"], "must be above zero"),
        (["batch", "--threads", "-1"], "must be above zero"),
    ],
)
def test_bad_options_are_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [["--networks", "resnet19"], ["--batch", "0"], ["--seconds", "-1"], ["--threads", "-1"]], ids=str
)
def test_bad_options_of_the_layers_are_one_line(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cpu_layers.py", *arguments])
    assert cpu_layers.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("cpu_layers.py: error: ") and len(error.splitlines()) == 1
