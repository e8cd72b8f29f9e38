"""Every Python block of README.md and docs/ runs, from top to bottom of its file, in one namespace; every example runs;
links between documents lead somewhere."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def torchvision_error():
    try:
        import torchvision  # noqa: F401
    except Exception as error:  # a binary for another PyTorch fails in many ways
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize(
    "path", [p for p in DOCUMENTS if BLOCK.search(p.read_text())], ids=lambda path: str(path.relative_to(ROOT))
)
def test_code_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = path.read_text()
    if "import torch, torchvision" in text and (why := torchvision_error()):
        pytest.skip(f"torchvision does not work here: {why}")
    scope = {"__name__": "__document__"}
    for match in BLOCK.finditer(text):
        before = text.count("\n", 0, match.start(1))  # so that a traceback names the line of the document
        exec(compile("\n" * before + match[1], str(path), "exec"), scope)


@pytest.mark.parametrize("path", EXAMPLES, ids=names(EXAMPLES))
def test_example_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [path.name, "--quick"])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


def test_there_are_examples():
    assert len(EXAMPLES) == 5


@pytest.mark.parametrize("path", DOCUMENTS, ids=names(DOCUMENTS))
def test_links_lead_somewhere(path):
    missing = [link for link in LINK.findall(path.read_text()) if not (path.parent / link).exists()]
    assert not missing
