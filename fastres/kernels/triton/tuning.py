"""Block sizes that were measured, for who asks for it: without a file of choices plain functions decide (rows_of in
tiles.py; blocks in product.py, row_product.py and gram.py).

    tuning.tune(lambda: step(x), "choices.json")    # measures on this device, once
    fastres.config.triton_choices = "choices.json"    # from now on, in this process

The file is JSON, for every device what was chosen for a kernel and a class of shapes:

    {"NVIDIA H200": {"rows: 64 channels, 2^19 rows, bfloat16, channels_last": {"values": 4096, "programs": 4}}}

Results repeat bit for bit with the same choices; other choices sum in another order.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastres import config
from fastres.errors import UserError

Choice = dict[str, int]

#: What tune() tries now, and which choices were asked for, with their candidates.
_tried: dict[tuple[str, str], Choice] = {}
_asked: dict[tuple[str, str], Sequence[Choice]] | None = None


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def _read(path: str) -> dict[str, dict[str, Choice]]:
    """The file, read once in a process."""
    try:
        choices = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"config.triton_choices: {path} cannot be read: {error}") from error
    if not isinstance(choices, dict) or not all(map(_choices_of_device, choices.values())):
        raise UserError(f"config.triton_choices: {path} is not a file of tune()")
    return choices


def _choices_of_device(found: object) -> bool:
    """Whether it is what tune() writes for a device; `choose` compares the numbers with what works."""
    return isinstance(found, dict) and all(
        isinstance(choice, dict) and all(type(value) is int for value in choice.values()) for choice in found.values()
    )


def choose(
    key: Callable[[], str], device: torch.device, plain: Choice, candidates: Callable[[], Sequence[Choice]]
) -> Choice:
    """The candidate to use; without a measured choice the plain one.

    Args:
        key: says the kernel and the class of shapes.
        plain: what the plain function says, one of the candidates.
        candidates: what works for all calls with this key. It and key are called only where there may be a choice.

    Raises:
        UserError: config.triton_choices names a file that cannot be read, or a choice that is no candidate.
    """
    if _asked is not None:
        at = (_name(device), key())
        _asked[at] = candidates()
        return _tried.get(at, plain)
    if config.triton_choices is None:
        return plain
    path, name = str(config.triton_choices), key()
    chosen = _read(path).get(_name(device), {}).get(name, plain)
    if chosen != plain and chosen not in candidates():
        raise UserError(f"config.triton_choices: {path}: {name}: {chosen} is none of {list(candidates())}")
    return chosen


def choose_tile(key: Callable[[], str], x: Tensor, plain: Choice, results: tuple[str, ...], steps: str) -> Choice:
    """The tile of a matrix product: the plain one, half as large on either side, with half as long steps and one stage
    of the pipeline more, or with a stage less.

    Args:
        key: as of choose; the dtype of x and the plain tile are added.
        plain: BLOCK_..., num_warps and num_stages.
        results, steps: the names of the tile's sides, and of what a step sums up.
    """

    def candidates() -> list[Choice]:
        halves = [{side: plain[side] // 2} for side in results]
        halves.append({steps: plain[steps] // 2, "num_stages": plain["num_stages"] + 1})
        smaller = [plain | half for half in halves if next(iter(half.values())) >= 16]
        return [plain, *smaller, plain | {"num_stages": plain["num_stages"] - 1}]

    def name() -> str:
        sides = " x ".join(str(plain[side]) for side in (*results, steps))
        return f"{key()}, {str(x.dtype).removeprefix('torch.')}, plain {sides}, {plain['num_warps']} warps"

    return choose(name, x.device, plain, candidates)


def _milliseconds(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, return_mode="median"))


def tune(
    run: Callable[[], object],
    path: str | Path,
    time: Callable[[Callable[[], object]], float] = _milliseconds,
) -> dict[str, dict[str, Choice]]:
    """Times all candidates of every choice that `run` asks for, one after another, and adds the fastest to the file.

    Args:
        run: an op, or a few; the less it does besides, the better the differences show.
        path: of the file of choices; what it has for other devices, kernels and shapes stays.
        time: how long a call of its argument takes.

    Returns:
        What the file has now.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    global _asked
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("block sizes cannot be tuned while a CUDA graph is captured")
    path = Path(path)
    choices = dict(_read(str(path))) if path.exists() else {}
    asked = _asked = {}
    try:
        run()
        for at, candidates in list(asked.items()):
            times = []
            for candidate in candidates:
                _tried[at] = candidate
                times.append(time(run))
            _tried[at] = candidates[times.index(min(times))]  # what is tuned next runs with it
            device, key = at
            choices[device] = {**choices.get(device, {}), key: _tried[at]}
    finally:
        _asked = None
        _tried.clear()
    path.write_text(json.dumps(choices, indent=2, sort_keys=True) + "\n")
    _read.cache_clear()
    return choices
