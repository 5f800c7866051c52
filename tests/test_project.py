"""The project's own promises: files and functions stay short, what is declared exists, what is pinned fits."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = sorted(p for folder in ("seqpar_ring", "integrations", "examples") for p in (ROOT / folder).rglob("*.py"))
LINES_OF_A_FILE, LINES_OF_A_FUNCTION = 350, 60


def too_long(name: str, source: str) -> list[str]:
    """What in this source is longer than the project allows."""
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    sizes = [(f.name, (f.end_lineno or f.lineno) - f.lineno + 1) for f in functions]
    found = [f"{name}: {function} has {n} lines" for function, n in sizes if n > LINES_OF_A_FUNCTION]
    lines = len(source.splitlines())
    return found + ([f"{name}: {lines} lines"] if lines > LINES_OF_A_FILE else [])


def test_no_file_and_no_function_is_too_long() -> None:
    assert len(SOURCES) > 20, "the sources were not found"
    assert [line for p in SOURCES for line in too_long(str(p.relative_to(ROOT)), p.read_text())] == []


def test_the_length_check_sees_a_long_function_and_a_long_file() -> None:
    long = "def f():\n" + "    x = 1\n" * 60
    assert too_long("a.py", long) == ["a.py: f has 61 lines"]
    assert too_long("b.py", "x = 1\n" * 351) == ["b.py: 351 lines"]
    assert too_long("c.py", "def f():\n" + "    x = 1\n" * 59) == []


def test_every_module_says_what_it_is() -> None:
    silent = [str(p.relative_to(ROOT)) for p in SOURCES if not ast.get_docstring(ast.parse(p.read_text()))]
    assert silent == []


def test_every_package_folder_is_declared_so_that_a_wheel_holds_it() -> None:
    homes = {"seqpar_ring": (), "integrations": ("seqpar_ring", "integrations"), "configs": ("seqpar_ring", "data")}
    folders = {p.parent.relative_to(ROOT).parts for name in homes for p in (ROOT / name).rglob("*.py")}
    names = {".".join((*(homes[first] or (first,)), *rest)) for first, *rest in folders}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == names


def test_no_line_about_unfinished_work_is_left() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError\(\))")
    assert [str(p.relative_to(ROOT)) for p in SOURCES if marks.search(p.read_text())] == []


def pins() -> dict[str, list[Requirement]]:
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            found.setdefault(plain((r := Requirement(line)).name), []).append(r)
    return found


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


UNPINNED = ("interpreter",)
"""Extras that are not part of the tested set of versions: `pyproject.toml` says why."""


def declared() -> list[Requirement]:
    project = PROJECT["project"]
    lists = [project["dependencies"], *(v for k, v in project["optional-dependencies"].items() if k not in UNPINNED)]
    return [r for one in lists for r in map(Requirement, one) if r.name != "seqpar-ring"]


@pytest.mark.parametrize("wanted", declared(), ids=lambda r: r.name)
def test_every_dependency_is_pinned_to_one_version_within_its_range(wanted: Requirement) -> None:
    for pin in pins()[plain(wanted.name)]:
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert exact.version in wanted.specifier
        assert "+" not in exact.version, "a local version would tie the pin to one build"


@pytest.mark.parametrize(("given", "constraints"), [("", "constraints.txt"), ("torch==2.6.0", "new/constraints.txt")])
def test_a_torch_of_ones_own_choice_is_not_replaced_by_the_pinned_one(given: str, constraints: str) -> None:
    make = ["make", "--dry-run", "install", "install-dev", "VENV=new", f"TORCH={given}"]
    commands = subprocess.run(make, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    pip = [c for c in commands if " -m pip install " in c]
    assert {c.split(" -c ")[1].split()[0] for c in pip if " -c " in c} == {constraints}
    assert ("grep -v '^torch==' constraints.txt > new/constraints.txt" in commands) == bool(given)
    assert any(c.startswith("test -z") and c.endswith(f" {given}") for c in pip)
