"""lesion, paths, responses and architecture from the command line: what they write, what they say, what they refuse."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from _compare import randomise
from torch import Tensor, nn

import fastres
from fastres import cli, models
from fastres.analysis import ANALYSES, checks, training
from fastres.analysis.checks import Check
from fastres.analysis.lesion import _check as check_lesions
from fastres.analysis.lesion import _Lesions, lesion
from fastres.analysis.paths import paths
from fastres.analysis.responses import Response, _Network, measure, responses
from fastres.analysis.responses import _check as check_responses
from fastres.errors import UserError
from fastres.models import lowlevel
from fastres.train import datasets


def plain(num_classes: int) -> nn.Module:
    """Three plain blocks, 8 layers as _train:tiny."""
    return models.CifarResNet(models.PlainBasicBlock, (1, 1, 1), num_classes)


def deeper(num_classes: int) -> nn.Module:
    """Five residual blocks."""
    return models.CifarResNet(models.BasicBlock, (2, 2, 1), num_classes)


PLAIN, DEEPER = "test_analysis_networks:plain", "test_analysis_networks:deeper"
SHORT: dict[str, Any] = {"data": "synthetic", "epochs": 1, "batch": 16}


@pytest.fixture(autouse=True)
def small_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any data set is 32 patterns of 16 x 16 pixels to train and 20 to test, in ten classes."""
    load = training.load_data

    def small(data: str, root: str) -> datasets.Data:
        return datasets.synthetic(16, train=32, test=20) if data == "synthetic" else load(data, root)

    monkeypatch.setattr(training, "load_data", small)


def rows(file: Path) -> list[dict[str, str]]:
    with open(file) as opened:
        return list(csv.DictReader(opened))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(("analyze", *arguments))
    found = capsys.readouterr()
    return code, found.out, found.err


COMMANDS = {
    "lesion": (*("--models", DEEPER, PLAIN, "--repeats", "2", "--images", "32"), *("--epochs", "1", "--batch", "16")),
    "paths": (*("--model", "_train:tiny", "--samples", "2", "--batches", "1"), *("--epochs", "1", "--images", "4")),
    "responses": (*("--models", "_train:tiny", PLAIN, DEEPER, "--images", "32"), *("--epochs", "1", "--batch", "16")),
    "architecture": ("--model", "resnet20"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_and_its_files(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data = () if name == "architecture" else ("--data", "synthetic")
    code, said, _ = run(capsys, name, *COMMANDS[name], *data, "--out", str(tmp_path / "a" / "new"))
    assert code == 0 and "claim     " in said and "verdict   " in said and "verdict   no claim" not in said
    folder = tmp_path / "a" / "new"
    files = {file.name for file in folder.iterdir()}
    assert {f"{name}.html", f"{name}.csv", f"{name}.png"} <= files
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for file in folder.glob("*.csv"):
        assert rows(file) and f" {file}" in said
    page = (folder / f"{name}.html").read_text()
    assert "data:image/png;base64," in page and "verdict" in page.lower()
    assert not re.search(r"""(src|href)=["'](?!data:)|https?://|@import|<script""", page)


def test_every_analysis_of_networks_has_a_command() -> None:
    assert COMMANDS.keys() <= ANALYSES.keys()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("architecture", "--model", "resnet51"), "no model named 'resnet51'; did you mean resnet"),
        (("architecture", "--size", "x"), "invalid int value: 'x'"),
        (("architecture", "--model", "timm.models:resnet9000"), "no model timm.models:resnet9000"),
        (("lesion", "--models", "resnet51", "--data", "synthetic"), "no model named 'resnet51'"),
        (("lesion", "--models", "resnet20", "--data", "mnist"), "no data set is named 'mnist'"),
        (("lesion", "--repeats", "0"), "--repeats must be at least 1"),
        (("lesion", "--models", "_train:without_batch_norm", *("--data", "synthetic", "--epochs", "1")), "no blocks"),
        (("lesion", "--models", "resnet20", "--checkpoint", "missing", "--data", "synthetic"), "missing"),
        (("paths", "--model", "resnet51", "--data", "synthetic"), "no model named 'resnet51'"),
        (("paths", "--images", "1"), "--images must be at least 2"),
        (("responses", "--models", "resnet51", "--data", "synthetic"), "no model named 'resnet51'"),
        (("responses", "--epochs", "0", "--data", "synthetic"), "--epochs must be at least 1"),
    ],
    ids=" ".join,
)
def test_wrong_input_is_one_line_and_no_file(
    arguments: tuple[str, ...], says: str, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said, error = run(capsys, *arguments)
    assert (code, said) == (2, "")
    last = error.splitlines()[-1]
    assert last.startswith("fastres: error: ") and says in last and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_a_training_that_diverges_is_exit_code_1(capsys: Any, tmp_path: Path) -> None:
    short = ("--data", "synthetic", "--epochs", "3", "--lr", "1e30")
    code, _, error = run(capsys, "paths", "--model", "_train:tiny", *short, "--out", str(tmp_path / "a"))
    assert code == 1 and error.splitlines()[-1].startswith("fastres analyze: the loss is ")


# Values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["A", "B"])
def test_responses_against_the_network_by_hand(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard deviations of what lowlevel's batch norms give, in two batches."""
    net = lowlevel.Architecture("basic", (1, 2, 1), "v1.5", option, small_images=True, num_classes=10)
    model = randomise(models.CifarResNet(models.BasicBlock, (1, 2, 1), shortcut=option)).eval()
    seen: dict[str, list[Tensor]] = {}
    original = lowlevel.batch_norm

    def watched(x: Tensor, state: Any, name: str, training: bool) -> Tensor:
        y = original(x, state, name, training)
        seen.setdefault(name, []).append(y)
        return y

    images = [torch.randn(4, 3, 16, 16), torch.randn(2, 3, 16, 16) + 1]
    with monkeypatch.context() as patch:
        patch.setattr(lowlevel, "batch_norm", watched)
        for x in images:
            lowlevel.forward(net, model.state_dict(), x)
    expected = {name: torch.cat([y.flatten() for y in ys]).std(correction=0).item() for name, ys in seen.items()}
    fastres.fuse_(model)
    found, ratios = measure(model, [(x, torch.zeros(len(x))) for x in images])
    assert [r.name for r in found] == [name for name in expected if "downsample" not in name]
    for response in found:
        assert response.std == pytest.approx(expected[response.name], rel=1e-4)
    x = [lowlevel.relu(y) for y in seen["bn1"]]  # what enters the first block: its shortcut is the identity
    assert ratios[0] == pytest.approx(
        expected["layer1.0.bn2"] / torch.cat([y.flatten() for y in x]).std(correction=0).item(), rel=1e-4
    )
    assert len(ratios) == 4 and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_responses_of_bottlenecks_are_those_of_the_3x3() -> None:
    model = models.CifarResNet(models.Bottleneck, (1, 1, 1))
    fastres.fuse_(model.eval())
    found, _ = measure(model, [(torch.randn(2, 3, 16, 16), torch.zeros(2))])
    assert [r.name for r in found] == ["bn1", "layer1.0.bn2", "layer2.0.bn2", "layer3.0.bn2"]


def test_responses_refuses_v2() -> None:
    with pytest.raises(UserError, match="precedes the layers in a network of v2"):
        responses(models=("resnet20_v2",), **SHORT)


def test_lesion_drops_what_it_says(tmp_path: Path) -> None:
    """From a checkpoint: the error of the whole network, without all blocks, and the number of each kind."""
    torch.manual_seed(3)
    files = []
    for i, build in enumerate((deeper, plain)):
        torch.save(build(10).state_dict(), tmp_path / f"{i}.pt")
        files.append(str(tmp_path / f"{i}.pt"))
    report = lesion(models=(DEEPER, PLAIN), checkpoint=tuple(files), repeats=2, images=16, **SHORT)
    tables = {table.name: table for table in report.tables}
    numbers = {(row[0], row[1], row[2]): row[3] for row in tables["lesion"].rows}
    assert numbers == {
        (DEEPER, "block", "keeps"): 3,
        (DEEPER, "block", "changes"): 2,
        (PLAIN, "block", "keeps"): 1,
        (PLAIN, "block", "changes"): 2,
        (PLAIN, "layer", "keeps"): 4,
        (PLAIN, "layer", "changes"): 2,
    }
    removed = [row for row in tables["lesion-removed"].rows if row[0] == DEEPER]
    assert [row[1] for row in removed] == [0, 1, 2, 3, 4, 5]
    whole = {row[4] for row in tables["lesion"].rows if row[0] == DEEPER}
    assert whole == {removed[0][3]}
    single = [row for row in tables["lesion-single"].rows if row[0] == DEEPER]
    assert [row[2] for row in single] == [f"layer{i}.{j}" for i, j in ((1, 0), (1, 1), (2, 0), (2, 1), (3, 0))]
    assert f"weights of {files[0]}" in report.setting
    again = lesion(models=(DEEPER, PLAIN), checkpoint=tuple(files), repeats=2, images=16, **SHORT)
    assert [table.csv() for table in again.tables] == [table.csv() for table in report.tables]


def test_paths_of_a_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(3)
    torch.save(deeper(10).state_dict(), tmp_path / "w.pt")
    report = paths(model=DEEPER, checkpoint=str(tmp_path / "w.pt"), images=4, batches=2, samples=3, **SHORT)
    table = next(table for table in report.tables if table.name == "paths")
    assert [row[:2] for row in table.rows] == [(0, 1), (1, 5), (2, 10), (3, 10), (4, 5), (5, 1)]
    shares = [row[5] for row in table.rows]
    weights = [row[1] * row[2] for row in table.rows]
    assert shares == pytest.approx([w / sum(weights) for w in weights])
    assert sum(row[7] for row in table.rows) == pytest.approx(1)
    for row in (table.rows[0], table.rows[-1]):  # one path: it is the sum
        assert row[2] == pytest.approx(row[6], rel=1e-5)
    assert "32 paths through 5 blocks" in report.measured


# Verdicts follow from the numbers ------------------------------------------------------------------------------------


def lesions(name: str, plain: bool, error: float, single: list[float]) -> Any:
    found = _Lesions(name, "", plain, len(single), error)
    found.single = [(str(i), False, e) for i, e in enumerate(single)]
    found.removed = {1: [error + 10], 2: [error + 20], 3: [error + 60], 4: [90.0]}
    found.order = [(1, 0.9, error + 1), (2, 0.8, error + 3), (4, 0.5, error + 9)]
    return found


@pytest.mark.parametrize(
    ("residual", "plain", "holds"),
    [
        ([3.0, 4.0, 5.0], [60.0, 70.0, 80.0], [True, True, True, True]),
        ([3.0, 40.0, 50.0], [60.0, 70.0, 80.0], [False, True, True, True]),
        ([3.0, 4.0, 5.0], [10.0, 20.0, 80.0], [True, True, True, False]),
    ],
)
def test_verdict_of_lesions(residual: list[float], plain: list[float], holds: list[bool]) -> None:
    found = check_lesions([lesions("r", False, 2.0, residual), lesions("p", True, 4.0, plain)], 90.0)
    assert [check.holds for check in found] == holds
    assert checks.verdict(found) == ("reproduced" if all(holds) else "partly reproduced")


def test_a_cliff_is_not_smooth_and_order_may_not_matter() -> None:
    network = lesions("r", False, 2.0, [3.0])
    network.removed = {1: [3.0], 2: [80.0], 3: [85.0], 4: [90.0]}
    network.order = [(1, 0.9, 9.0), (2, 0.8, 5.0), (4, 0.5, 7.0)]
    assert [check.holds for check in check_lesions([network], 90.0)] == [True, False, False]


def test_verdict_of_responses() -> None:
    def network(name: str, plain: bool, stds: list[float]) -> Any:
        layers = [Response(str(i), std) for i, std in enumerate(stds)]
        return _Network(name, "", plain, layers, [])

    small, big = network("r", False, [0.5, 0.7]), network("p", True, [0.9, 1.1])
    deep = network("deep", False, [0.4, 0.5, 0.6, 0.5])
    assert [check.holds for check in check_responses([small, big, deep])] == [True, True]
    assert [check.holds for check in check_responses([network("r", False, [1.0, 1.2]), big])] == [False]
    assert check_responses([small, deep])[0].measured == "0.500 and 0.600"


def test_verdict_of_checks() -> None:
    yes, no = Check("a", "", True), Check("b", "", False)
    assert [checks.verdict(c) for c in ([], [yes], [yes, no], [no])] == [
        *("no claim", "reproduced", "partly reproduced", "not reproduced")
    ]
