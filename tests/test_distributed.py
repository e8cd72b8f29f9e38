"""Several processes, as torchrun starts them: a test for each thing that they check (tests/_distributed*.py). All of
them run in one launch for 2 processes, and one for 3."""

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("PyTorch without torch.distributed", allow_module_level=True)

import _distributed_fsdp  # noqa: F401
import _distributed_synchronised  # noqa: F401
import _distributed_train  # noqa: F401
import _distributed_wrapped  # noqa: F401
from _distributed import CHECKS, SIZES, found, outcome


@pytest.mark.parametrize(
    ("name", "world"),
    [
        (name, world)
        for name in CHECKS
        for world in SIZES[name]
        if not name.startswith("synchronised: ")  # in test_synchronised.py
    ],
)
def test_processes(name: str, world: int) -> None:
    if wrong := outcome(world, name, found(world)):
        pytest.fail(wrong, pytrace=False)
