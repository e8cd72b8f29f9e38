"""What CI sees of fastres.verify: the first site that fails, JUnit XML, the pytest plugin, models that bring inputs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from _compare import network, some_kernels
from test_verify import images
from torch import nn

import fastres
from fastres import cli, cli_verify, factory, sites
from fastres.errors import UserError
from fastres.verify import Certificate, Fault, Row, Site, junit, verify

pytest_plugins = ("pytester",)

#: A module of a user's, whose wrong model is one with a fault injected into every fused site.
MODULE = """
import torch
from fastres import models, sites

def make():
    model = models.CifarResNet(models.BasicBlock, (1, 2, 1))
    return model, torch.randn(2, 3, 16, 16)

def make_wrong():
    right = sites.conv_bn_act
    sites.conv_bn_act = lambda *args, **options: right(*args, **options) * 1.001
    return make()

def without_inputs():
    return make()[0]

class Models:
    make = staticmethod(make)
"""


@pytest.fixture(autouse=True)
def _fast_path() -> Iterator[None]:
    with some_kernels():
        yield


def certificate(**rows: float) -> Certificate:
    """Sites of a small network in the order of the forward; of those that are given, the output's error."""
    found = [Row(site, "output", "output", 1e-7, error, 1e-6) for site, error in rows.items()]
    reported = [Site(name, True) for name in ("stem", "layer1.0", "layer2.0", "layer2.0.downsample")]
    return Certificate("Net", "eval", "float32", "cpu", (1, 3, 8, 8), 0, rows=found, sites=reported)


def test_the_first_site_is_named() -> None:
    assert certificate(**{"stem": 0.0}).first is None
    assert certificate(**{"(model)": 1.0}).first == "(model)"
    assert certificate(**{"(model)": 1.0, "layer2.0": 2e-6, "layer1.0": 1.5e-6}).first == "layer1.0"
    inner = certificate(**{"layer2.0": 1.0, "layer2.0.downsample": 1.0})
    assert inner.first == "layer2.0.downsample"
    assert "first at layer2.0.downsample" in inner.verdict() and inner.to_json()["first"] == inner.first
    faulty = certificate()
    faulty.faults.append(Fault("layer1.0", "the fused model raised"))
    assert faulty.first == "layer1.0" and faulty.problems == ["layer1.0: the fused model raised"]
    assert "layer2.0, output: error 1.0e+00, budget 1.0e-06" in inner.failure()


def test_junit(tmp_path: Path) -> None:
    broken = certificate(**{"(model)": 1e-8, "layer1.0": 2e-6, "layer2.0": 1.0})
    broken.sites[0] = Site("stem", False, "hooks on bn1")
    broken.faults.append(Fault("layer2.0", 'does not run <fused> alone: "&"'))
    junit.write([certificate(**{"stem": 0.0}), broken], tmp_path / "new" / "parity.xml")
    right, wrong = ElementTree.parse(tmp_path / "new" / "parity.xml").getroot()
    assert (right.get("tests"), right.get("failures"), right.get("skipped")) == ("5", "0", "0")
    assert (wrong.get("tests"), wrong.get("failures"), wrong.get("skipped")) == ("5", "2", "1")
    assert [case.get("name") for case in wrong] == ["stem", "layer1.0", "layer2.0", "layer2.0.downsample", "(model)"]
    cases = {case.get("name"): case for case in wrong}
    first = cases["layer1.0"].find("failure")
    assert first is not None and first.get("message", "").startswith("output: error 2.0e-06, budget 1.0e-06")
    assert "first in the order" in first.get("message", "")
    second = cases["layer2.0"].find("failure")
    assert second is not None and second.get("message") == 'does not run <fused> alone: "&"'
    assert second.text == 'does not run <fused> alone: "&"\noutput: error 1.0e+00, budget 1.0e-06 (eager: 1.0e-07)'
    skipped = cases["stem"].find("skipped")
    assert skipped is not None and skipped.get("message") == "not fused: hooks on bn1"


class Scaled(nn.Module):
    """A network with a second input, which has a gradient, and a third that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, x: torch.Tensor, scale: torch.Tensor, power: int) -> torch.Tensor:
        y: torch.Tensor = self.network(x * scale) ** power
        return y


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_several_inputs(mode: str) -> None:
    found = verify(Scaled(), (images(), torch.tensor(1.5), 1), mode=mode)
    assert found.ok, str(found)
    assert found.input_shape == (4, 3, 32, 32)
    assert mode == "eval" or ("(model)", "input1") in {(row.site, row.tensor) for row in found.rows}
    with pytest.raises(TypeError, match="got torch.int64, int"):
        verify(Scaled(), (torch.tensor(1), 1))


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current folder, which is not on the path."""
    (tmp_path / "my_models.py").write_text(MODULE)
    (tmp_path / "broken_models.py").write_text("import nothing_of_this_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.setattr(sites, "conv_bn_act", sites.conv_bn_act)  # put back afterwards
    for name in ("my_models", "broken_models"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "my_models"


def test_factories(mine: str) -> None:
    model, inputs = factory.make(f"{mine}:make")
    assert isinstance(model, nn.Module) and inputs is not None and inputs[0].shape == (2, 3, 16, 16)
    assert factory.make(f"{mine}:Models.make")[1] is not None
    assert factory.make(f"{mine}:without_inputs")[1] is None
    for spec, says in (
        ("broken_models:make", "importing broken_models: ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        (f"{mine}:nothing", "AttributeError: module 'my_models' has no attribute 'nothing'"),
        ("builtins:dict", "gave a dict, not an nn.Module"),
    ):
        with pytest.raises(UserError, match="no model|gave") as error:
            factory.make(spec)
        assert says in str(error.value)


def test_the_command_on_a_model_that_brings_inputs(mine: str, capsys: Any, tmp_path: Path) -> None:
    assert cli.main(["verify", f"{mine}:make", "--mode", "eval", "--junit", "parity.xml", "--seed", "3"]) == 0
    assert "input 2x3x16x16" in capsys.readouterr().out
    assert len(ElementTree.parse(tmp_path / "parity.xml").getroot()[0]) > 5
    for option in ("--batch", "--size"):
        assert cli.main(["verify", f"{mine}:make", option, "4"]) == 2
        assert f"{option} has no meaning: my_models:make comes with inputs" in capsys.readouterr().err
    assert cli.main(["verify", f"{mine}:make_wrong", "--mode", "eval"]) == 1
    out = capsys.readouterr().out
    assert "first at stem" in out


def test_explain_fails_when_fusions_are_lost(mine: str, capsys: Any, tmp_path: Path) -> None:
    assert cli.main(["explain", f"{mine}:make", "--require", "95%", "--html", "page.html"]) == 0
    assert (tmp_path / "page.html").stat().st_size > 5000
    edited = MODULE.replace("return model, torch", "model.layer2[1].relu = torch.nn.ReLU6()\n    return model, torch")
    (tmp_path / "edited.py").write_text(edited)
    capsys.readouterr()
    assert cli.main(["explain", "edited:make", "--require", "99%"]) == 1
    out = capsys.readouterr().out
    assert "\nlost: layer2.1.relu [act]: no-pattern: ReLU6" in out
    assert "of the operations run fused, 99 % are required" in out
    assert cli.main(["explain", "edited:make", "--require", "50"]) == 0
    assert cli.main(["explain", "edited:make", "--require", "950%"]) == 2


PLUGIN = ("-p", "fastres_pytest", "-p", "no:cacheprovider")


def test_plugin_does_not_import_torch() -> None:
    root = Path(fastres.__file__).parents[1]
    code = "import sys, fastres_pytest; print([m for m in ('torch', 'fastres', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "[]", done.stderr


def test_plugin_adds_the_models_of_the_ini_file(mine: str, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(my_models=MODULE, test_nothing="def test_nothing(): pass")
    pytester.makeini("[pytest]\nfastres_verify =\n    my_models:make\n    my_models:without_inputs\n    missing:make\n")
    pytester.runpytest_inprocess(*PLUGIN).assert_outcomes(passed=1)
    found = pytester.runpytest_inprocess(*PLUGIN, "--fastres-verify", "-k", "eval")
    found.assert_outcomes(passed=1, failed=2, deselected=4)
    found.stdout.fnmatch_lines(
        [
            "*my_models:without_inputs returns no inputs: return (model, inputs)*",
            "*no model missing:make: importing missing: ModuleNotFoundError: No module named 'missing'*",
        ]
    )
    pytester.makeini("[pytest]\n")
    empty = pytester.runpytest_inprocess(*PLUGIN, "--fastres-verify")
    assert empty.ret == pytest.ExitCode.USAGE_ERROR
    empty.stderr.fnmatch_lines(["*the ini option fastres_verify lists no model*"])


def test_plugin_names_what_is_wrong(mine: str, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(my_models=MODULE)
    pytester.makeini("[pytest]\nfastres_verify = my_models:make_wrong\n")
    found = pytester.runpytest_inprocess(*PLUGIN, "--fastres-verify", "-k", "eval")
    found.assert_outcomes(failed=1, deselected=1)
    found.stdout.fnmatch_lines(["*eval mode, float32: FAIL:*first at stem*", "*stem, output: error 1.0e-03, budget*"])


def test_fixture(mine: str, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        my_models=MODULE,
        test_parity="""
        import my_models, pytest, torch

        @pytest.mark.parametrize("make", [my_models.make, my_models.make_wrong])
        def test_parity(make, assert_parity):
            model, x = make()
            certificate = assert_parity(model, x, mode="eval", dtype=torch.float32, seed=1)
            assert certificate.seed == 1 and certificate.ok
        """,
    )
    found = pytester.runpytest_inprocess(*PLUGIN)
    found.assert_outcomes(passed=1, failed=1)
    found.stdout.fnmatch_lines(["E*AssertionError: CifarResNet, eval mode, float32: FAIL*", "E*layer*error*budget*"])


def test_images_are_channels_last_unless_asked_otherwise() -> None:
    for options, order in (((), torch.channels_last), (("--layout", "contiguous"), torch.contiguous_format)):
        model, (x,), _ = cli_verify._workload(cli._parser().parse_args(["explain", "resnet20", *options]))
        assert x.is_contiguous(memory_format=order) and model.conv1.weight.is_contiguous(memory_format=order)
