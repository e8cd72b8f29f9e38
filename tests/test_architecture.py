"""The structure the project promises: imports run downwards only, `import fastres` is lean, FLOP counters see fused
convolutions."""

import ast
import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastres

PACKAGE = Path(fastres.__file__).parent

#: Lowest first. A module may import from its own layer and from those below.
LAYERS = (
    ("errors", "error_notes", "hooks", "config", "reasons", "observe", "layout"),
    ("reference", "reference_algebraic", "reference_join", "reference_pool", "synchronised_reference"),
    ("kernels",),
    ("ops",),
    ("arguments", "memory", "running_statistics", "snapshot"),
    ("functional",),
    ("replay", "batch_norm", "managed", "switches"),
    ("folding",),
    ("guard",),
    ("graphs", "report", "sites", "saved", "decisions"),
    ("nn", "recipes", "models", "factory", "fuse", "explain", "summary", "images", "testing", "aside", "forms"),
    ("verify", "bench", "doctor", "train", "tune", "canary"),
    ("analysis", "transfer"),
    ("cli", "cli_models", "cli_tune", "cli_verify", "__main__", "__init__"),
)
#: Imported when a function runs, not when its module is loaded, so no cycle: a model fuses itself.
LATE = {("models", "fuse")}


def layer_of(part):
    return next((i for i, names in enumerate(LAYERS) if part in names), None)


def imported_parts(path):
    """(first part below fastres of every fastres import in a file)."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module] if node.module != "fastres" else [f"fastres.{alias.name}" for alias in node.names]
        for name in names:
            if name == "fastres" or name.startswith("fastres."):
                yield (name.split(".") + ["__init__"])[1]


def test_every_module_has_a_layer():
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert not [part for part in sorted(parts) if layer_of(part) is None]


def test_imports_run_downwards():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for target in imported_parts(path):
            level = layer_of(target)  # None: a function of the package itself, such as fastres.fuse_
            if (
                level is not None
                and target != part
                and level > layer_of(part)
                and (part, target) not in LATE
                and target != "__init__"
            ):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {target}")
    assert not wrong


def test_import_is_lean():
    code = (
        "import sys, torch.utils.flop_counter\n"  # imports triton itself, where it is installed
        "before = set(sys.modules)\n"
        "import fastres\n"
        "heavy = ('triton', 'torchvision', 'timm', 'matplotlib', 'sklearn', 'PIL', 'rich', 'onnx', 'scipy')\n"
        "heavy += ('torch._dynamo',)\n"
        "loaded = [name for name in heavy if name in set(sys.modules) - before]\n"
        "loaded += [name for name in sys.modules if name.startswith('fastres.kernels.triton.')]\n"
        "assert not loaded, loaded\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr


def test_flop_counter_counts_fused_convolutions():
    model = fastres.models.resnet18(fused=False)
    fused = copy.deepcopy(model)
    fastres.fuse_(fused)
    x = torch.randn(2, 3, 32, 32)
    for training in (True, False):
        counts = []
        for m in (model.train(training), fused.train(training)):
            with FlopCounterMode(display=False) as counter:
                m(x).sum().backward()
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0
    with torch.no_grad():
        counts = []
        for m in (model, fused):
            with FlopCounterMode(display=False) as counter:
                m(x)
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    "module", [nn.Identity(), nn.Linear(2, 2), nn.Sequential(nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3))]
)
def test_fuse_leaves_what_it_does_not_know_and_says_so(module):
    report = fastres.fuse_(module)
    assert report.fused == 0 and all(row.reason for row in report.rows)
    assert str(report).startswith("0 of")
