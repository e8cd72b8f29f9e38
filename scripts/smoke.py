"""What an installed fastres has to do, wherever it is: `python -I smoke.py binary|pure`. Needs nothing else."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import fastres
from fastres.kernels import extension


def command(*arguments: str) -> str:
    """What the fastres command prints; it has to succeed."""
    script = Path(sys.executable).with_name("fastres")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([str(script), *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"fastres {' '.join(arguments)}: {done.stdout}{done.stderr}"
    return done.stdout


def installed(kind: str) -> None:
    place = Path(fastres.__file__)
    assert place.is_relative_to(sys.prefix), f"{place} is not what was installed"
    assert (place.parent / "py.typed").is_file() and (place.parent / "kernels" / "choices" / "README.md").is_file()
    if kind == "binary":
        assert extension.available(), extension.load_error()
    else:
        assert "FASTRES_BUILD_EXT=0" in str(extension.load_error()), extension.load_error()
    compiled = f"kernels of {extension.isa()}" if extension.available() else extension.load_error()
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, fastres {fastres.__version__}: {compiled}")


def numbers() -> None:
    """ResNet-18, inference and a training step, beside eager."""
    torch.manual_seed(0)
    eager = fastres.models.resnet18(num_classes=10, fused=False).to(memory_format=torch.channels_last)
    fused = copy.deepcopy(eager)
    report = fastres.fuse_(fused)
    assert report.fused > 30, str(report)
    x = torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)
    for model in (eager, fused):
        model.train()
        torch.nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
    worst = max(
        float((a.grad - b.grad).norm() / a.grad.norm().clamp_min(1e-6))
        for a, b in zip(eager.parameters(), fused.parameters(), strict=True)
    )
    with torch.no_grad():
        want, found = eager.eval()(x), fused.eval()(x)
    error = float((want - found).norm() / want.norm())
    assert error < 1e-4 and worst < 1e-2, (error, worst)
    assert type(fastres.unfuse_(fused)) is type(eager) and fused.state_dict().keys() == eager.state_dict().keys()
    print(f"fuse_: {report.fused} of {report.total} operations; errors: logits {error:.1e}, gradients {worst:.1e}")


def proof() -> None:
    certificate = fastres.verify(fastres.models.resnet18(num_classes=10), torch.randn(2, 3, 64, 64))
    assert certificate.ok, str(certificate)
    print(f"verify: {certificate.verdict()}")


def main() -> None:
    kind = sys.argv[1]
    torch.set_num_threads(2)
    installed(kind)
    numbers()
    proof()
    assert "torch" in command("doctor")
    assert "layer1" in command("models", "resnet18")
    assert json.dumps(fastres.__version__)[1:-1] in command("--version")
    print("commands: doctor, models, --version")


if __name__ == "__main__":
    main()
