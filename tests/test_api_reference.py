"""docs/api.md says what the docstrings say, and they say enough."""

import inspect
import sys
from pathlib import Path

import pytest

import fastres
from fastres import functional, models, nn

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import api_reference

    yield api_reference
    sys.modules.pop("api_reference", None)


def test_reference_is_current(script):
    assert script.text() == script.PLACE.read_text(encoding="utf-8"), "run python scripts/api_reference.py"


def test_every_public_thing_is_described_with_its_arguments(script):
    """A docstring of its own, which names each argument, or says whose arguments they are like."""
    poor = []
    for module in (fastres, functional, nn, models):
        for name in script.names_of(module):
            thing = getattr(module, name)
            if inspect.ismodule(thing) or not (inspect.isclass(thing) or inspect.isfunction(thing)):
                continue
            text = thing.__doc__ or ""
            poor += [f"{module.__name__}.{name}"] if not text.strip() else []
            if inspect.isfunction(thing) and "as in" not in text.lower():
                missing = [p for p in inspect.signature(thing).parameters if p not in text]
                poor += [f"{module.__name__}.{name}: {', '.join(missing)}"] if missing else []
    assert not poor


def test_everything_exported_is_in_it(script):
    text = script.text()
    for module in (fastres, functional, nn, models):
        for name in script.names_of(module):
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                assert f"### {module.__name__}.{name}\n" in text
    assert "0x" not in text and str(Path.home()) not in text
