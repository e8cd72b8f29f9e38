#!/usr/bin/env python3
"""Fuzzes what reads files, guided by coverage: `python scripts/fuzz.py TARGET [--seconds 60]`, with atheris.

    pip install atheris
    python scripts/fuzz.py --list

The targets, and the good files to start from, are those of tests/_fuzz.py. Anything but a UserError of one line, or an
input that takes over 10 seconds or 2 GB, ends the run and is left in build/fuzz/TARGET.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--list", action="store_true", help="print the targets and stop")
    given = parser.parse_args()
    import atheris
    import torch  # before: what it and its libraries do is not what is looked at

    with atheris.instrument_imports(include=["fastres"]):
        import _fuzz
    targets = {name: target for name, target in _fuzz.TARGETS.items() if target.there()}
    if given.list or given.target not in targets:
        sys.exit("\n".join(targets) if given.list else f"one of: {', '.join(targets)}")
    target = targets[given.target]
    place = ROOT / "build" / "fuzz" / given.target.replace(" ", "-")
    corpus = place / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(target.seeds()):
        (corpus / f"good-{number}").write_bytes(content)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    def one(data: bytes) -> None:
        _fuzz.check(target.read(place, data))

    limits = ["-timeout=10", "-rss_limit_mb=2048", "-max_len=100000", f"-max_total_time={given.seconds}"]
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={place}/", str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
