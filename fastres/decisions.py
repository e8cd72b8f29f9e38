"""What tune_ decided, as a report and as a small JSON file that ships with a model. Files are data from elsewhere: each
value is checked before it is used, and nothing in them is executed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastres.errors import UserError

FORMAT = 1
MOST_BYTES = 4 << 20
MOST_SITES = 10_000
_MODES, _LAYOUTS, _CHOICES = ("eval", "train"), ("channels_last", "contiguous"), ("fused", "eager")
_DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True)
class Site:
    """One fused block (or stem) on one kind of input.

    Attributes:
        name: its path in the model, "" for the model itself, whose site is its stem.
        mode: "eval", without gradients, or "train": forward and backward.
        shape, dtype, layout: of its input [N, C, H, W]; the dtype in which its convolutions compute; "channels_last"
            or "contiguous".
        eager_ms, fused_ms: medians, milliseconds.
        choice: "fused" or "eager".
    """

    name: str
    mode: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    eager_ms: float
    fused_ms: float
    choice: str


@dataclass
class TuneReport:
    """What tune_ measured, or what a file says.

    Attributes:
        machine: device ("cpu" or "cuda"), its name and instruction set (or sm_NN), and the number of CPU threads.
        versions: of fastres and torch.
        sites: one for every fused block and kind of input.
        network: median milliseconds of the whole model: "eager", "fused" (every block), "tuned" (each block by its own
            times; only where a block was slower fused). Not part of a file.
        kept: which of the three runs from now on; "" in a report about a file.
        applied: False for a file of another machine or version.
    """

    machine: dict[str, Any]
    versions: dict[str, str]
    sites: list[Site] = field(default_factory=list)
    network: dict[str, float] = field(default_factory=dict)
    kept: str = ""
    applied: bool = True

    @property
    def eager(self) -> list[Site]:
        """The sites that run eager from now on."""
        return [site for site in self.sites if site.choice == "eager"]

    def to_json(self) -> dict[str, Any]:
        """What the file holds, and `network` and `kept`."""
        return {
            "format": FORMAT,
            "versions": self.versions,
            "machine": self.machine,
            "network": {name: round(ms, 4) for name, ms in self.network.items()},
            "kept": self.kept,
            "sites": [
                asdict(s) | {"shape": list(s.shape), "eager_ms": round(s.eager_ms, 4), "fused_ms": round(s.fused_ms, 4)}
                for s in self.sites
            ],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file that `fastres.load_tuning_` reads, at once or not at all."""
        path, found = Path(path), self.to_json()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        lines = [f' "{name}": {json.dumps(found[name])}' for name in ("format", "versions", "machine")]
        sites = ",\n  ".join(json.dumps(site) for site in found["sites"])  # a line each: people read it
        lines.append(f' "sites": [\n  {sites}\n ]')
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        os.replace(temporary, path)

    def __str__(self) -> str:
        where = f"{self.machine['name']}, {self.machine['isa']}, {self.machine['threads']} threads"
        width = max([len(s.name or "(stem)") for s in self.sites], default=4)
        lines = [f"{len(self.sites)} sites, {len(self.eager)} of them eager from now on ({where})"]
        lines.append(
            f"  {'site':<{width}}  mode   input                                 eager ms  fused ms  ratio  runs"
        )
        for s in self.sites:
            what = f"{'x'.join(map(str, s.shape))} {s.dtype} {s.layout}"
            ratio = s.eager_ms / s.fused_ms if s.fused_ms else math.inf
            lines.append(
                f"  {s.name or '(stem)':<{width}}  {s.mode:<5}  {what:<36}  {s.eager_ms:>8.3f}  {s.fused_ms:>8.3f}"
                f"  {ratio:>5.2f}  {s.choice}"
            )
        if self.network:
            times = ", ".join(f"{name} {ms:.3f} ms" for name, ms in self.network.items())
            lines.append(f"  whole model: {times}; {self.kept} kept")
        return "\n".join(lines)


def versions() -> dict[str, str]:
    from fastres import __version__

    return {"fastres": __version__, "torch": str(torch.__version__)}


def read(path: str | os.PathLike[str]) -> TuneReport:
    """What a file says.

    Raises:
        UserError: (a ValueError) if it is too large, no JSON, or not of this format, with what is wrong.
        FileNotFoundError: if there is none.
    """
    path = Path(path)
    with path.open("rb") as file:
        raw = file.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise UserError(f"{path}: more than {MOST_BYTES} bytes")
    try:
        found = json.loads(raw.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_unique)
        return _report(found)
    except (ValueError, RecursionError) as error:
        message = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{path}: not a tuning file of format {FORMAT}: {message}") from None


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _report(found: Any) -> TuneReport:
    keys = {"format", "versions", "machine", "sites"}
    _object("the file", found, keys)
    if type(found["format"]) is not int or found["format"] != FORMAT:
        raise ValueError(f"format is {found['format']!r}")
    _object("versions", found["versions"], {"fastres", "torch"})
    _object("machine", found["machine"], {"device", "name", "isa", "threads"})
    for name in ("fastres", "torch"):
        _text(name, found["versions"][name])
    for name in ("device", "name", "isa"):
        _text(name, found["machine"][name])
    _size("threads", found["machine"]["threads"])
    if type(found["sites"]) is not list or len(found["sites"]) > MOST_SITES:
        raise ValueError(f"sites is not a list of at most {MOST_SITES}")
    sites = [_site(i, site) for i, site in enumerate(found["sites"])]
    kinds = [(s.name, s.mode, s.shape, s.dtype, s.layout) for s in sites]
    if len(set(kinds)) != len(kinds):
        raise ValueError("two sites are of one name and kind of input")
    return TuneReport(found["machine"], found["versions"], sites)


_SITE: dict[str, Callable[[str, Any], None]] = {
    "name": lambda what, value: _text(what, value, empty=True),
    "mode": lambda what, value: _one_of(what, value, _MODES),
    "shape": lambda what, value: _shape(what, value),
    "dtype": lambda what, value: _one_of(what, value, _DTYPES),
    "layout": lambda what, value: _one_of(what, value, _LAYOUTS),
    "eager_ms": lambda what, value: _milliseconds(what, value),
    "fused_ms": lambda what, value: _milliseconds(what, value),
    "choice": lambda what, value: _one_of(what, value, _CHOICES),
}


def _site(i: int, found: Any) -> Site:
    _object(f"site {i}", found, set(_SITE))
    for name, check in _SITE.items():
        check(f"{name} of site {i}", found[name])
    return Site(**found | {"shape": tuple(found["shape"])})


def _object(what: str, value: Any, keys: set[str]) -> None:
    if type(value) is not dict or set(value) != keys:
        raise ValueError(f"{what} is not an object of {', '.join(sorted(keys))}")


def _text(what: str, value: Any, empty: bool = False) -> None:
    if type(value) is not str or len(value) > 1000 or not (value or empty):
        raise ValueError(f"{what} is not a text of up to 1000 characters")


def _one_of(what: str, value: Any, known: tuple[str, ...]) -> None:
    if type(value) is not str or value not in known:
        raise ValueError(f"{what} is not one of {', '.join(known)}")


def _size(what: str, value: Any) -> None:
    if type(value) is not int or not 0 < value < 1 << 31:
        raise ValueError(f"{what} is not a whole number above 0")


def _shape(what: str, value: Any) -> None:
    if type(value) is not list or len(value) != 4:
        raise ValueError(f"{what} is not a list of 4 sizes")
    for size in value:
        _size(what, size)


def _milliseconds(what: str, value: Any) -> None:
    if type(value) not in (int, float) or not 0 <= value < 1e9:
        raise ValueError(f"{what} is not a time in milliseconds")
