from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

# Read when torch loads OpenMP: threads that spin while they wait make tests several times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
import torch

# The package of this checkout, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _torchvision  # noqa: E402

import fastres  # noqa: E402
from fastres.kernels import cpu  # noqa: E402

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state, whichever tests run with it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def freeze() -> Iterator[None]:
    """What a file leaves behind, compiled graphs above all, is not looked at by every later collection of garbage;
    those took seconds near the end."""
    yield
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # for destructors at exit, which some libraries count


@pytest.fixture(params=["reference", "cpu"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with each kernel that works on the CPU, and only with that one."""
    name = request.param
    if name == "cpu" and (reason := cpu.unavailable()):
        pytest.skip(f"no compiled kernels: {reason}")
    with fastres.use_kernels(name):
        yield name


@pytest.fixture(scope="session")
def torchvision() -> ModuleType:
    """The real torchvision package."""
    module, reason = _torchvision.load()
    if module is None:
        pytest.skip(reason)
    return module
