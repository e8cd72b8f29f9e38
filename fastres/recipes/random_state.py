"""Whether code draws random numbers: the states of all generators before and after it."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes


def read() -> list[Any]:
    state = [torch.get_rng_state(), random.getstate()]
    if "numpy" in sys.modules:
        state.append(sys.modules["numpy"].random.get_state())
    return state


def changed(before: list[Any]) -> bool:
    """Whether random numbers were drawn; puts the state back if so."""
    with _disable_current_modes():  # FakeTensorMode takes no tensor that is not of its own
        drawn = not torch.equal(torch.get_rng_state(), before[0])
        if drawn:
            torch.set_rng_state(before[0])
    if random.getstate() != before[1]:
        random.setstate(before[1])
        drawn = True
    if len(before) > 2:
        numpy = sys.modules["numpy"].random
        now = numpy.get_state()
        if now[2:] != before[2][2:] or (now[1] != before[2][1]).any():
            numpy.set_state(before[2])
            drawn = True
    return drawn
