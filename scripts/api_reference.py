#!/usr/bin/env python3
"""Writes docs/api.md from the signatures and docstrings of what is public; --check only says whether it is current.

python scripts/api_reference.py [--check]
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fastres
from fastres import config, errors, functional, models, nn, report
from fastres.verify import certificate

PLACE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
HEAD = """# API reference

Made by `python scripts/api_reference.py` from the docstrings; a test says when it is no longer what they say.
Shapes are written `[N, C, H, W]`: images, channels, height and width.
"""


def names_of(module: ModuleType) -> list[str]:
    """__all__, or what the module defines itself, in its order."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    own = [
        n for n, v in vars(module).items() if not n.startswith("_") and getattr(v, "__module__", "") == module.__name__
    ]
    return [name for name in own if inspect.isclass(vars(module)[name]) or inspect.isfunction(vars(module)[name])]


def sections() -> Iterator[tuple[str, str, list[str]]]:
    """Heading, introduction, and the text of each entry."""
    top = [name for name in fastres.__all__ if not inspect.ismodule(getattr(fastres, name))]
    yield "fastres", "", [entry("fastres", name, getattr(fastres, name)) for name in sorted(top, key=str.lower)]
    for module in (functional, nn, models):
        entries = [entry(module.__name__, name, getattr(module, name)) for name in names_of(module)]
        yield module.__name__, inspect.getdoc(module) or "", [text for text in entries if text]
    yield "fastres.config", inspect.getdoc(config) or "", list(settings())
    rest = [
        (errors, "UserError"),
        (report, "Row"),
        (certificate, "Certificate"),
        (certificate, "Row"),
        (certificate, "Site"),
    ]
    yield "What else is answered or raised", "", [entry(m.__name__, name, getattr(m, name)) for m, name in rest]


def settings() -> Iterator[str]:
    """The variables of fastres.config, with the comments above them."""
    text = inspect.getsource(config)
    for comment, name, kind, value in re.findall(r"((?:^#: .*\n|^#  ?.*\n)+)^(\w+): (.+?) = (.+)$", text, re.MULTILINE):
        about = " ".join(line.lstrip("#: ") for line in comment.splitlines())
        yield f"### `{name}: {kind} = {value}`\n\n{about}\n"


def entry(module: str, name: str, thing: Any) -> str:
    """A heading with the signature, and the docstring. Nothing for plain values."""
    if inspect.isclass(thing):
        return class_entry(module, name, thing)
    if inspect.isfunction(thing):
        return f"### {module}.{name}\n\n{signature(name, thing)}\n{docstring(thing)}"
    return ""


def class_entry(module: str, name: str, cls: Any) -> str:
    fields = dataclasses.is_dataclass(cls) or issubclass(cls, tuple)
    inside = [signature(name, cls)] if fields or "__init__" in vars(cls) else []
    parts = [f"### {module}.{name}\n", *inside, docstring(cls)]
    for member, value in vars(cls).items():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if member.startswith("_") or not inspect.isfunction(function) or not inspect.getdoc(function):
            continue
        shown = f"`{member}`" if isinstance(value, property) else f"`{member}{arguments(function)}`"
        parts.append(f"- {shown}: {' '.join(docstring(function).split())}")
    return "\n".join(parts).rstrip() + "\n"


class _Bare(str):
    """A hint as it is written, without quotes."""

    def __repr__(self) -> str:
        return str(self)


def arguments(function: Any) -> str:
    """The signature as it is written, without the defaults' addresses in memory."""
    try:
        found = inspect.signature(function)
    except (TypeError, ValueError):
        return "(...)"
    hints = [p.replace(annotation=bare(p.annotation)) for p in found.parameters.values() if p.name != "self"]
    return re.sub(
        r" at 0x[0-9a-f]+", "", str(found.replace(parameters=hints, return_annotation=bare(found.return_annotation)))
    )


def bare(hint: Any) -> Any:
    return _Bare(hint) if isinstance(hint, str) else hint


def signature(name: str, function: Any) -> str:
    text = f"{name}{arguments(function)}".replace("(self, ", "(").replace(
        ") -> None", ")" if inspect.isclass(function) else ") -> None"
    )
    if len(text) > 100:  # one argument a line
        inner, depth, start, pieces = text[text.index("(") + 1 : text.rindex(")")], 0, 0, []
        for at, sign in enumerate(inner + ","):
            depth += (sign in "([{") - (sign in ")]}")
            if sign == "," and depth == 0:
                pieces.append(inner[start:at].strip())
                start = at + 1
        text = f"{name}(\n" + "".join(f"    {piece},\n" for piece in pieces) + text[text.rindex(")") :]
    return f"```text\n{text}\n```\n"


def docstring(thing: Any) -> str:
    """Cleaned up, with Sphinx's roles as code and the sections as words in bold; indented lists become lists."""
    text = inspect.getdoc(thing) or ""
    if dataclasses.is_dataclass(thing) and text.startswith(f"{getattr(thing, '__name__', '')}("):
        text = ""  # the one that dataclass makes
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    lines: list[str] = []
    section = ""
    for line in text.splitlines():
        if found := re.fullmatch(r"(Args|Returns|Raises|Attributes|Source|Example):\s*(.*)", line):
            section = found[1]
            lines += [
                *([""] if lines and lines[-1] else []),
                f"**{section}**" + (f": {found[2]}" if found[2] else ""),
                "",
            ]
        elif section in ("Args", "Attributes", "Raises") and (
            item := re.match(r"    ([\w*]+(?:, [\w*]+)*):( .*|$)", line)
        ):
            lines.append(f"- `{item[1]}`:{item[2]}")
        elif section and line.startswith("    "):
            lines.append(("  " if lines[-1].startswith(("- ", "  ")) else "") + line.strip())
        else:
            lines.append(line)
    return "\n".join(lines).strip() + "\n"


def text() -> str:
    parts = [HEAD]
    for heading, about, entries in sections():
        parts += [f"## {heading}\n", *([about + "\n"] if about else []), *entries]
    return "\n".join(parts)


def main() -> None:
    typing.cast(Any, sys.stdout).reconfigure(encoding="utf-8")
    wanted = text()
    if "--check" not in sys.argv[1:]:
        PLACE.write_text(wanted, encoding="utf-8")
        return
    there = PLACE.read_text(encoding="utf-8") if PLACE.exists() else ""
    if there != wanted:
        print(
            *difflib.unified_diff(
                there.splitlines(), wanted.splitlines(), "docs/api.md", "docstrings", lineterm="", n=1
            ),
            sep="\n",
        )
        sys.exit("docs/api.md is not current: run python scripts/api_reference.py")


if __name__ == "__main__":
    main()
