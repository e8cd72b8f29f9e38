"""Results of benchmarks/gpu.py as plain text: rich may be missing where a GPU is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import gpu_ops

from fastres.bench import harness, report


def text(stage: str, result: dict[str, Any]) -> str:
    """What a unit gave."""
    if "failed" in result:
        return f"failed: {result['failed']}"
    return _STAGES[stage](result)


def ours_failed(unit: dict[str, Any]) -> bool:
    """Whether fastres itself failed somewhere in a unit."""
    contenders = [row for row in unit.get("contenders", []) if row["name"].startswith(harness.OURS)]
    cases = [one["times"].get(name, {}) for one in unit.get("rows", []) for name in ("fastres", "cuda")]
    return any(row["status"] == "failed" for row in contenders) or any("failed" in times for times in cases)


def columns(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns, the first to the left."""
    table = [list(head), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    lines = []
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _microseconds(times: dict[str, Any], name: str) -> str:
    found = times.get(name, {})
    return f"{found['seconds'] * 1e6:,.1f}" if "seconds" in found else "failed" if "failed" in found else "-"


def _failures(rows: Sequence[dict[str, Any]]) -> str:
    """Each reason once, with what it stopped and how often."""
    found: dict[str, int] = {}
    for one in rows:
        for name, times in one["times"].items():
            if "failed" in times:
                key = f"{name} failed: {times['failed']}"
                found[key] = found.get(key, 0) + 1
    return "".join(f"\n{key} ({count} of {len(rows)})" for key, count in found.items())


def ceilings(result: dict[str, Any]) -> str:
    copies = [f"{rate / 1e9:,.0f} ({int(size) / 2**20:,.0f} MiB)" for size, rate in result["bandwidth"].items()]
    products = [f"{name} {rate / 1e12:,.1f}" for name, rate in result["flops"].items()]
    return f"GB/s of a copy: {', '.join(copies)}\nTFLOP/s, {result['size']} cubed: {', '.join(products)}"


def ops(result: dict[str, Any]) -> str:
    head = ("op", "C x H x W", *(f"{name} us" for name in gpu_ops.PROVIDERS))
    head += ("GB/s", "of copy", "cuda of copy", "persistent x cuda", "x eager", "x compile")
    rows = [
        (
            f"{one['op']} {one['mode']}",
            " x ".join(map(str, one["shape"])),
            *(_microseconds(one["times"], name) for name in gpu_ops.PROVIDERS),
            _number(one["bandwidth"] and one["bandwidth"] / 1e9, "{:,.0f}"),
            _number(one["of_copy"], "{:.0%}"),
            _number(one["shares"].get("cuda"), "{:.0%}"),
            _number(one.get("persistent_vs_cuda"), "{:.2f}"),
            _number(one["vs_eager"], "{:.2f}"),
            _number(one["vs_compile"], "{:.2f}"),
        )
        for one in result["rows"]
    ]
    sums = [
        (
            f"all of {one['network']}, {one['mode']}",
            *(_number(one[name] and one[name] * 1e3, "{:.3f}") for name in gpu_ops.PROVIDERS),
        )
        for one in gpu_ops.totals(result)
    ]
    total = columns(("batch norms together", *(f"{name} ms" for name in gpu_ops.PROVIDERS)), sums)
    about = f"batch {result['batch']}, {result['dtype']}, channels_last"
    left_out = "".join(f"\n{name} is left out: {why}" for name, why in result["left_out"].items())
    return f"{about}\n{columns(head, rows)}{_failures(result['rows'])}{left_out}\n\n{total}"


def convolutions(result: dict[str, Any]) -> str:
    names = ["forward", "relu", "add_relu", "grad_input", "grad_weight"]
    names += dict.fromkeys(name for one in result["rows"] for name in one["times"] if name.startswith("ours"))
    rows = []
    for one in result["rows"]:
        cells = []
        for name in names:
            rate = one["rates"].get(name)
            cells.append(
                f"{rate / 1e12:,.1f} {one['of_peak'][name]:4.0%}" if rate else _microseconds(one["times"], name)
            )
        floor = f"{one['floor_seconds'] * 1e6:,.1f} {one['limit']}"
        rows.append((one["shape"], floor, _microseconds(one["times"], "forward"), *cells))
    head = ("convolution", "floor us", "forward us", *names)
    why = f"\nour kernels are left out: {result['why_not_ours']}" if result["why_not_ours"] else ""
    about = f"batch {result['batch']}, {result['dtype']}, channels_last; TFLOP/s and share of the product's"
    return f"{about}\n{columns(head, rows)}{_failures(result['rows'])}{why}"


def algebraic(result: dict[str, Any]) -> str:
    names = ("gram", "our gram", "addmm", "conv_add_relu", "ordinary forward", "op forward")
    names += ("mask", "grad_weight", "grad_input", "ordinary backward", "op backward")
    rows = [
        (
            one["shape"],
            *(_microseconds(one["times"], name) for name in names),
            _number(one["forward_ratio"], "{:.2f}"),
            _number(one["backward_ratio"], "{:.2f}"),
        )
        for one in result["rows"]
    ]
    head = ("expansion, times in us", *names, "x forward", "x backward")
    about = (
        f"batch {result['batch']}, {result['dtype']}; library products for the algebraic batch norm beside the ordinary"
        " way (x: its time to theirs)"
    )
    return f"{about}\n{columns(head, rows)}{_failures(result['rows'])}"


def networks(table: dict[str, Any]) -> str:
    head = ("contender", "ms", "images/s", "x eager", "x best peer", "set-up s", "peak GiB", "saved GiB", "x", "error")
    good = [row for row in table["contenders"] if row["status"] == "ok"]
    rows = [
        (
            row["title"],
            f"{row['median_seconds'] * 1e3:.3f}",
            f"{row['images_per_second']:,.0f}",
            report.ratio(row.get("vs_eager")),
            report.ratio(row.get("vs_best_peer")),
            f"{row['setup_seconds']:.1f}",
            f"{row['peak_bytes'] / 2**30:.2f}",
            _number(row.get("saved_bytes") and row["saved_bytes"] / 2**30, "{:.2f}"),
            _number(row.get("saved_ratio"), "{:.2f}"),
            _number(row.get("error"), "{:.1e}"),
        )
        for row in good
    ]
    others = [f"{row['title']}: {row['status']}: {row['reason']}" for row in table["contenders"] if row not in good]
    title = f"{table['title']}, {table['dtype']}, {table['size']} px"
    return "\n".join([title, columns(head, rows), *others, *report.warnings(table)])


def split(result: dict[str, Any]) -> str:
    kinds = list(result["contenders"][0]["kinds"])
    rows = [
        (
            row["name"],
            f"{row['launches']:g}",
            *(f"{value * 1e3:.3f}" for value in (row["seconds"], *row["kinds"].values())),
        )
        for row in result["contenders"]
    ]
    head = ("contender", "launches", "all", *kinds)
    parts = [f"{result['title']}: ms of a step's kernels\n{columns(head, rows)}"]
    for row in result["contenders"]:
        longest = [
            (one["name"][:90], one["kind"], f"{one['seconds'] * 1e3:.3f}", f"{one['calls']:g}")
            for one in row["longest"][:12]
        ]
        parts.append(columns((f"longest of {row['name']}", "kind", "ms", "calls"), longest))
    return "\n\n".join(parts)


_STAGES = {
    "ceilings": ceilings,
    "split": split,
    "ops": ops,
    "networks": networks,
    "parity": networks,
    "convolutions": convolutions,
    "algebraic": algebraic,
}
