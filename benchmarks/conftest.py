"""Options of the operator benchmarks, and how one is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastres operator benchmarks")
    group.addoption("--batch", type=int, default=16, help="images (default: 16)")
    group.addoption("--dtype", default="float32", help="float32, bfloat16 or float16 (default: float32)")
    group.addoption("--rounds", type=int, default=12, help="timed calls of every benchmark (default: 12)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """pytest-benchmark's own tables, eight columns of everything, only with --benchmark-verbose: see the summary
    below."""
    config.option.benchmark_quiet = True


@pytest.fixture
def batch(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--batch")


@pytest.fixture
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return getattr(torch, request.config.getoption("--dtype"))


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest, batch: int) -> Callable[..., None]:
    """Times a call, and adds what it moved or computed a second, and how often it occurs in the network.

    Bytes are those that the operator cannot avoid, whoever computes it; so GB/s compare providers, and a fused
    operator can come close to what the memory gives.
    """

    def run(call: Callable[[], Any], *, shape: tuple[int, ...], count: int, bytes_: int = 0, flops: int = 0) -> None:
        rounds = request.config.getoption("--rounds")
        benchmark.pedantic(call, warmup_rounds=2, rounds=rounds, iterations=1)
        info = benchmark.extra_info
        info |= {
            "batch": batch,
            "shape": "x".join(map(str, shape)),
            "times in ResNet": count,
            "threads": torch.get_num_threads(),
        }
        if benchmark.stats is None:  # --benchmark-disable: only whether it runs
            return
        median = benchmark.stats.stats.median
        if bytes_:
            info["GB/s"] = round(bytes_ / median / 1e9, 2)
        if flops:
            info["GFLOP/s"] = round(flops / median / 1e9, 1)

    return run


_UNITS = ("GB/s", "GFLOP/s")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """One line an operator and shape: both providers beside each other, which pytest-benchmark's own table does not
    show."""
    session = getattr(config, "_benchmarksession", None)
    rows: dict[str, dict[str, Any]] = {}
    for bench in session.benchmarks if session else []:
        if "provider" in (bench.params or {}) and not bench.has_error:
            key = bench.name.replace(f"{bench.params['provider']}-", "").replace(f"-{bench.params['provider']}", "")
            rows.setdefault(key, {})[bench.params["provider"]] = bench
    if not rows:
        return
    terminalreporter.section("eager and fastres (median)")
    terminalreporter.write_line(f"{'operator and shape':<52}{'eager':>10}{'fastres':>10}{'ratio':>7}  eager -> fastres")
    for key, both in rows.items():
        if set(both) != {"eager", "fastres"}:
            continue
        eager, ours = (both[name].stats.median for name in ("eager", "fastres"))
        unit = next((unit for unit in _UNITS if unit in both["eager"].extra_info), "")
        rate = f"{both['eager'].extra_info.get(unit, '')} -> {both['fastres'].extra_info.get(unit, '')} {unit}"
        terminalreporter.write_line(
            f"{key.removeprefix('test_'):<52}{eager * 1e3:>7.2f} ms{ours * 1e3:>7.2f} ms{eager / ours:>6.2f}x  {rate}"
        )
