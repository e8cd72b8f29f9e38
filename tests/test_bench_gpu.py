"""benchmarks/gpu.py without a GPU: its arithmetic, resuming, and small runs of every stage on the CPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastres import images, reference
from fastres.bench import harness, table
from fastres.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
gpu, gpu_networks, gpu_ops, gpu_plots, gpu_products, gpu_profile, gpu_tables, gpu_timing = (
    importlib.import_module(f"gpu{name}")
    for name in ("", "_networks", "_ops", "_plots", "_products", "_profile", "_tables", "_timing")
)
MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
CEILINGS = {"copy": 100.0, "bandwidth": {"1024": 100.0}, "flops": {"bfloat16": 1000.0}, "size": 8}


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    return gpu.main()


def quietly(text: str) -> None:
    pass


# Bytes and floors


def test_bytes_of_the_ops() -> None:
    values = 2 * 8 * 4 * 4
    moved = {
        (op, mode): gpu_ops.Case(op, mode, (8, 4, 4), {}).bytes(2, 2)
        for op, mode in {(case.op, case.mode) for case in gpu_ops.cases()}
    }
    x = 2 * values
    assert moved["bn_act", "forward"] == 3 * x and moved["bn_act", "backward"] == 5 * x
    assert moved["bn_act", "eval"] == 2 * x and moved["bn_add_act", "eval"] == 3 * x
    assert moved["bn_add_act", "forward"] == 4 * x + values // 8
    assert moved["bn_add_act", "backward"] == 6 * x + values // 8
    assert moved["bn_add_bn_act", "forward"] == 5 * x + values // 8
    assert moved["bn_add_bn_act", "backward"] == 8 * x + 2 * (values // 8)
    assert moved["add_act", "forward"] == moved["add_act", "backward"] == 3 * x
    assert moved["bn_act_maxpool", "forward"] == 2 * x + x // 4 + values // 4
    assert moved["bn_act_maxpool", "backward"] == 3 * x + 2 * (x // 4 + values // 4)
    assert moved["bn_act_maxpool", "eval"] == x + x // 4


def test_cases_are_the_activations_of_both_networks() -> None:
    found = [case for case in gpu_ops.cases() if case.mode == "forward"]
    norms, pairs = {"resnet50": 0, "resnet18": 0}, {"resnet50": 0, "resnet18": 0}
    for case in found:
        for name, count in case.counts.items():
            norms[name] += count * (case.normalises and case.op != "bn_add_bn_act")
            pairs[name] += count * (case.op == "bn_add_bn_act")
    assert norms == {"resnet50": 53 - 4, "resnet18": 20 - 3}  # all but the shortcuts', which have no ReLU
    assert pairs == {"resnet50": 4, "resnet18": 3}
    assert max(case.shape[0] for case in found) == 2048


def test_contenders_compute_the_same() -> None:
    for case in gpu_ops.cases():
        case = gpu_ops.Case(case.op, case.mode, (8, 6, 6), case.counts)
        torch.manual_seed(1)
        operands = gpu_ops.Operands(case, 2, torch.float32, "cpu", 1)
        training = case.mode != "eval"
        results = []
        for function in (gpu_ops._eager, gpu_ops._fused):
            torch.manual_seed(2)
            found = gpu_ops.call(case, gpu_ops.partial(function, case.op, training), operands)(0)
            results.append(found if isinstance(found, tuple) else (found,))
        for eager, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


def test_compiling_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_ops, "_COMPILE_SECONDS", -1)
    monkeypatch.setattr(gpu_ops, "cases", lambda: [gpu_ops.Case("add_act", "forward", (8, 4, 4), {})])
    watch = gpu_timing.Stopwatch("cpu", 2, 1e-4)
    (row,) = gpu_ops.ops(watch, torch.float32, 2, CEILINGS, True, quietly)["rows"]
    assert "left out" in row["times"]["compile"]["failed"] and row["vs_compile"] is None and row["vs_eager"] > 0


def test_products_of_the_algebraic_batch_norm() -> None:
    """The matrices are views of the activations, so the products are those of the convolution."""
    shape = gpu_products.Shape(c=8, h=4, k=32, r=1, stride=1, groups=1)
    expansion = gpu_products.Expansion(shape, 2, torch.float32, gpu_timing.Stopwatch("cpu"))
    conv, calls = expansion.conv, expansion.calls()
    plain = conv.calls()
    raw = plain["forward"](0).permute(0, 2, 3, 1).reshape(-1, 32)
    torch.testing.assert_close(calls["addmm"](0), raw + expansion.residual[0])
    grad_weight = plain["grad_weight"](0)[1]
    torch.testing.assert_close(calls["grad_weight"](0), grad_weight.flatten(1))
    grad_input = plain["grad_input"](0)[0].permute(0, 2, 3, 1).reshape(-1, 8)
    torch.testing.assert_close(calls["grad_input"](0) - expansion.rows[0] @ expansion.square, grad_input)
    torch.testing.assert_close(calls["gram"](0), expansion.rows[0].T @ expansion.rows[0])
    ordinary, ours = (calls.get(f"{way} forward", calls["ordinary forward"])(0) for way in ("ordinary", "op"))
    torch.testing.assert_close(ours, ordinary, rtol=1e-4, atol=1e-4)


def test_the_gain_is_that_of_the_faster_forward() -> None:
    seconds = {
        "gram": 1.0,
        "addmm": 3.0,
        "conv_add_relu": 2.0,
        "mask": 1.0,
        "grad_weight": 1.0,
        "ordinary forward": 6.0,
    }
    times: dict[str, Any] = {name: {"seconds": value} for name, value in seconds.items()}
    times |= {"grad_input": {"failed": "no"}, "ordinary backward": {"seconds": 9.0}}
    assert gpu_products._gain(times, "forward") == 2.0
    assert gpu_products._gain(times, "backward") is None


def test_totals_of_a_network() -> None:
    def one(op: str, counts: dict[str, int], ours: dict[str, Any]) -> dict[str, Any]:
        times = {"eager": {"seconds": 2.0}, "compile": {"failed": "no"}, "fastres": ours}
        return {"op": op, "mode": "forward", "counts": counts, "times": times}

    rows = [one("bn_act", {"a": 2, "b": 1}, {"seconds": 1.0}), one("bn_add_act", {"a": 3}, {"seconds": 0.5})]
    rows.append(one("add_act", {"a": 9}, {"seconds": 9.0}))
    others = {"cuda": None, "persistent": None}
    assert gpu_ops.totals({"rows": rows}) == [
        {"network": "a", "mode": "forward", "eager": 10.0, "compile": None, "fastres": 3.5, **others},
        {"network": "b", "mode": "forward", "eager": 2.0, "compile": None, "fastres": 1.0, **others},
    ]


# Networks


def test_points_cover_what_is_claimed() -> None:
    points = gpu_networks.speed_points()
    names = [point.name for point in points]
    assert len(names) == len(set(names)) and names[0] == "resnet50-training-bf16-256"
    assert {point.batch for point in points if point.model == "resnet50"} == {1, 32, 64, 128, 256, 400, 512}
    for model in ("resnet18", "resnet50", "resnet152"):
        own = [point for point in points if point.model == model]
        assert {point.dtype for point in own} == {"bfloat16", "float16", "tf32"}
        assert {point.mode for point in own} == {"train", "infer"}
    assert set(points[0].contenders) <= set(table.CONTENDERS | table.GPU_CONTENDERS)
    assert all(gpu_networks.GRAPH in point.contenders for point in (*points, *gpu_networks.parity_points()))


def test_fastres_in_a_graph_is_no_peer() -> None:
    def row(name: str, seconds: float) -> dict[str, Any]:
        times = {"median_seconds": seconds, "low_seconds": seconds, "high_seconds": seconds}
        return {"name": name, "status": "ok", "setup_seconds": 1.0, **times}

    rows = [row("channels_last", 3.0), row("compile", 2.0), row("fastres", 1.5), row("fastres_graph", 1.0)]
    assert harness.compare(rows, 1) == "compile"
    assert rows[3]["vs_best_peer"]["ratio"] == 2.0


def test_tf32_needs_a_gpu() -> None:
    with pytest.raises(UserError, match="tf32 needs --device cuda"):
        harness.Options(dtype="tf32").check()


def test_synthetic_images() -> None:
    found = images.synthetic(3, 20)
    assert found.shape == (3, 3, 20, 20) and torch.isfinite(found).all()
    assert torch.equal(found, images.synthetic(3, 20)) and not torch.equal(found[0], found[1])
    assert torch.allclose(found.std((2, 3)), torch.ones(3, 3), atol=1e-3)


# The command


def test_every_stage_runs_and_a_second_run_has_nothing_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = ["ceilings", "ops/bf16", "convolutions", "algebraic"]
    arguments = [*stages, "--device", "cpu", "--quick", "--out", str(tmp_path)]
    assert command(monkeypatch, *arguments) == 0
    out = capsys.readouterr().out
    file = tmp_path / "gpu-cpu-quick.json"
    found = json.loads(file.read_text())["units"]
    assert set(found) == {"ceilings/all", "ops/bf16", "convolutions/bf16", "algebraic/bf16"}
    for unit in found.values():
        assert "torch" in unit["machine"]["versions"] and unit["date"] and "gpu.py" in unit["command"]
    ops = found["ops/bf16"]["rows"]
    assert {(row["op"], row["mode"]) for row in ops} == {(case.op, case.mode) for case in gpu_ops.cases()}
    assert all("seconds" in times for row in ops for times in row["times"].values())
    assert all(row["of_copy"] == pytest.approx(row["bandwidth"] / found["ceilings/all"]["copy"]) for row in ops)
    layers = found["convolutions/bf16"]["rows"]
    assert {"forward", "grad_input", "grad_weight"} <= set(layers[0]["rates"])
    assert "failed" in layers[0]["times"]["relu"]  # cuDNN's
    assert found["algebraic/bf16"]["rows"][0]["backward_ratio"] > 0
    assert "our kernels are left out: our kernels need a CUDA device" in out and "relu failed:" in out
    charts = {f"gpu-cpu-quick-{name}.png" for name in ("roofline", "ops")} if MATPLOTLIB else set()
    assert {path.name for path in tmp_path.glob("*.png")} == charts
    before = file.read_text()
    assert command(monkeypatch, *arguments) == 0
    assert "4 of 4 units are done already" in capsys.readouterr().out and file.read_text() == before


@pytest.mark.slow
def test_networks_run_and_are_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    point = gpu_networks.Point("resnet18", "train", "float32", 4, ("channels_last", "fastres_graph"), True, 48)
    monkeypatch.setattr(gpu_networks, "quick_points", lambda: [point])
    assert command(monkeypatch, "parity", "--device", "cpu", "--quick", "--out", str(tmp_path)) == 0
    found = json.loads((tmp_path / "gpu-cpu-quick.json").read_text())["units"]
    rows = found["parity/resnet18-training-fp32-4"]["contenders"]
    assert [row["name"] for row in rows] == ["channels_last", "fastres_graph"]
    for row in rows:
        assert row["status"] == "ok" and row["images_per_second"] > 0 and row["saved_bytes"] > 1e5
        assert 0 < row["error"] <= 4 * rows[0]["error"]
    assert rows[0]["saved_ratio"] == 1.0
    assert "saved GiB" in capsys.readouterr().out
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    networks = {"networks/a": found["parity/resnet18-training-fp32-4"]}
    assert list(gpu_plots.draw(networks, tmp_path / "a.json")) == [(tmp_path / "a-networks.png", "")]
    assert (tmp_path / "a-networks.png").read_bytes().startswith(b"\x89PNG")


def unit(name: str, seconds: float = 1.0, fails: bool = False) -> Any:
    def run(say: Any) -> dict[str, Any]:
        if fails:
            raise RuntimeError("out of luck")
        return {"rows": [], **CEILINGS, "contenders": [], "title": name, "dtype": "bfloat16", "size": 8}

    return gpu.Unit(name, seconds, run)


def test_results_grow_and_what_failed_is_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = gpu.Results(tmp_path / "a.json", "cpu")
    pending = [unit("ceilings/all"), unit("networks/a", fails=True), unit("networks/b"), unit("networks/long", 1e9)]
    assert gpu.measure(pending, results, 8) == ["networks/a"]
    out = capsys.readouterr().out
    assert "failed: RuntimeError: out of luck" in out and "1 units do not fit into 8 minutes" in out
    again = gpu.Results(tmp_path / "a.json", "cpu")
    assert [one.name for one in pending if again.done(one.name)] == ["ceilings/all", "networks/b"]
    assert list(tmp_path.iterdir()) == [tmp_path / "a.json"]


def test_units_are_chosen_by_their_beginnings() -> None:
    all_ = [unit("ceilings/all"), unit("ops/bf16"), gpu.Unit("ops/fp16", 1, quietly, True), unit("networks/resnet50-x")]
    assert [one.name for one in gpu.chosen(all_, [])] == ["ceilings/all", "ops/bf16", "networks/resnet50-x"]
    assert [one.name for one in gpu.chosen(all_, ["ops/fp16"])] == ["ceilings/all", "ops/fp16"]
    with pytest.raises(UserError, match="no unit begins with speed"):
        gpu.chosen(all_, ["speed"])


def test_the_list_has_every_stage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "--list", "--device", "cpu", "--out", str(tmp_path)) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {name.partition("/")[0] for name in names} == set(gpu.STAGES) and len(names) == len(set(names))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch) == 2
    error = capsys.readouterr().err
    assert "sees no CUDA device" in error and len(error.splitlines()) == 1


def test_what_cannot_be_read_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gpu-cpu-quick.json").write_text("{")
    assert command(monkeypatch, "--device", "cpu", "--quick", "--out", str(tmp_path)) == 2
    assert "is no result file of this program" in capsys.readouterr().err


def test_without_matplotlib_there_is_no_chart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    units = {"ops/bf16": {"rows": [{}], "batch": 1, "dtype": "bfloat16"}}
    ((path, why),) = gpu_plots.draw(units, tmp_path / "a.json")
    assert path.name == "a-ops.png" and why.startswith("no chart: ")


def test_ours_failed() -> None:
    assert not gpu_tables.ours_failed({"contenders": [{"name": "compile", "status": "failed"}]})
    assert gpu_tables.ours_failed({"contenders": [{"name": "fastres_graph", "status": "failed"}]})
    assert gpu_tables.ours_failed({"rows": [{"times": {"fastres": {"failed": "x"}}}]})
    assert not gpu_tables.ours_failed({"rows": [{"times": {"forward": {"seconds": 1.0}}}]})


@pytest.mark.parametrize(("r", "stride"), [(1, 1), (1, 2), (3, 1)])
def test_our_products_compute_what_cudnn_computes(r: int, stride: int) -> None:
    """Interpreted: only that they are called with the right arguments."""
    pytest.importorskip("triton", reason="Triton is not installed")
    pytest.importorskip("fastres.kernels.triton.convolution")
    from _triton import interpreting

    shape = gpu_products.Shape(c=8, h=4, k=16, r=r, stride=stride, groups=1)
    conv = gpu_products.Convolution(shape, 1, torch.float32, gpu_timing.Stopwatch("cpu"))
    theirs = conv.calls()
    bias = conv.bias.view(1, -1, 1, 1)
    want = {
        "forward": theirs["forward"](0),
        "with statistics": theirs["forward"](0),
        "add_relu": torch.relu(theirs["forward"](0) + bias + conv.residual[0]),
        "grad_input": theirs["grad_input"](0)[0],
        "grad_weight": theirs["grad_weight"](0)[1],
    }
    # Behind a batch norm with ones for weight, bias, mean and var, whose input the residual stands for.
    ones = torch.ones(16)
    norm = (ones, ones, ones.double(), ones.double(), None, True, 1e-5, True, True, True, False)
    grad_raw, grad_weight, *_ = reference.bn_act_backward(conv.grad[0], conv.residual[0], *norm)
    conv.grad, kept = [grad_raw], conv.grad
    want |= {
        "bn backward": grad_raw,
        "bn sums": grad_weight,
        "grad_input behind bn": theirs["grad_input"](0)[0],
        "grad_weight behind bn": theirs["grad_weight"](0)[1],
    }
    conv.grad = kept
    with interpreting():
        got = {name.removeprefix("ours "): call(0) for name, call in conv.our_calls().items()}
    assert set(got) == (set(want) if r == 1 else {"forward", "with statistics", "add_relu"})
    if r == 1:
        got["bn sums"] = got["bn sums"][1]
    for name, found in got.items():
        found = found[0] if isinstance(found, tuple) else found
        torch.testing.assert_close(found, want[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32", "convolution"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_TNT", "convolution"),
        ("void at::native::batch_norm_transform_input_channels_last_kernel<...>", "normalise"),
        ("reduce_gradient_kernel", "normalise"),
        ("apply_pooled_gradient_kernel", "normalise"),
        ("apply_join_gradient_kernel", "normalise"),
        ("join_kernel", "normalise"),
        ("apply_kernel", "normalise"),
        ("row_product_kernel", "convolution"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<...>", "optimizer"),
        ("Memset (Device)", "rest"),
    ],
)
def test_kinds_of_kernels(name: str, kind: str) -> None:
    assert gpu_profile.kind(name) == kind


def test_split_of_a_step() -> None:
    found = gpu_profile.summary([("conv", 2.0, 1.0), ("batch_norm", 3.0, 2.0), ("other", 1.0, 1.0)])
    assert found["seconds"] == 6.0 and found["kinds"] == {
        "normalise": 3.0,
        "convolution": 2.0,
        "optimizer": 0.0,
        "rest": 1.0,
    }
    assert [one["name"] for one in found["longest"]] == ["batch_norm", "conv", "other"]
    shown = gpu_tables.text("split", {"title": "a", "contenders": [{"name": "fastres", **found}]})
    assert "longest of fastres" in shown
