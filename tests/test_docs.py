"""The documents tell the truth: their code runs or at least parses, their links lead somewhere, their names exist."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

import seqpar_ring
from seqpar_ring import errors

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def relative_links(page: Path) -> list[str]:
    """Files of this repository that a page links to."""
    return [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()) if "://" not in link]


def test_the_getting_started_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = "\n".join(blocks(ROOT / "docs" / "getting-started.md", "python"))
    exec(compile(code, "getting-started.md", "exec"), {"__name__": "getting_started"})
    printed = capsys.readouterr().out
    assert "forward: 3 ranks" in printed
    assert "'kv': " in printed


def test_the_attention_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = ROOT / "docs" / "attention.md"
    exec(compile("\n".join(blocks(page, "python")), page.name, "exec"), {"__name__": "attention"})
    assert capsys.readouterr().out.splitlines()[0] == "Tile(q0=0, q1=4, k0=0, k1=4, lo=-1, hi=0) (1, 0)"


def test_the_schedule_on_the_attention_page_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    from seqpar_ring.schedule.__main__ import main

    (shown,) = (text for text in blocks(ROOT / "docs" / "attention.md", "text") if text.startswith("$ python"))
    command, _, output = shown.partition("\n")
    assert main([*command.split()[4:], "--width", "118"]) == 0
    assert capsys.readouterr().out.rstrip() == output.rstrip()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_code_in_documents_parses_and_names_public_things(page: Path) -> None:
    trees = [ast.parse(code) for code in blocks(page, "python")]
    for node in (n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)):
        if node.module and node.module.startswith("seqpar_ring"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)
    for text in blocks(page, "json"):
        json.loads(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_documents_lead_somewhere(page: Path) -> None:
    assert [link for link in relative_links(page) if not (page.parent / link).exists()] == []


def test_the_architecture_names_every_module_of_the_core() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    modules = {p.stem for p in (ROOT / "seqpar_ring").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert {name for name in modules - {"__init__"} if f"`{name}`" not in text} == set()


def page_and_its_maker(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ModuleType]:
    """What docs/reference.md holds, and the script that writes it."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    return (ROOT / "docs" / "reference.md").read_text(), importlib.import_module("make_reference")


def test_the_reference_is_what_the_docstrings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    page, maker = page_and_its_maker(monkeypatch)
    assert maker.text() == page, "run `make reference`"


def test_the_reference_has_all_names_that_the_package_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    _, maker = page_and_its_maker(monkeypatch)
    modules = {name for name in seqpar_ring.__all__ if inspect.ismodule(getattr(seqpar_ring, name))}
    assert set(maker.PUBLIC["seqpar_ring"]) == set(seqpar_ring.__all__) - modules
    assert {f"seqpar_ring.{name}" for name in modules} < set(maker.PUBLIC)
    kinds = {name for name, found in vars(errors).items() if isinstance(found, type) and issubclass(found, Exception)}
    assert set(maker.PUBLIC["seqpar_ring.errors"]) == kinds
    for module, names in maker.PUBLIC.items():
        for name, members in names.items():
            found = getattr(importlib.import_module(module), name)
            assert all(hasattr(found, member) for member in members)
