"""Imports point down, the core imports no framework, and the part that plans imports no torch."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FRAMEWORKS = {"accelerate", "deepspeed", "flash_attn", "flash_attn_interface", "megatron", "transformers"}
PLANNER = sorted(p.stem for p in (ROOT / "seqpar_ring" / "planner").glob("*.py") if p.stem != "__init__")
MODULES = sorted(p.stem for p in (ROOT / "seqpar_ring").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists())


def imported_by(*modules: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after importing these."""
    code = f"import sys, {', '.join(modules)}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the contracts of this folder's setup.cfg over its sources."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_layering_contract_holds() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "statement", "broken"),
    [
        ("schedule/traffic.py", "import seqpar_ring.parallel", "Imports point down"),
        ("transport/__init__.py", "import seqpar_ring.kernels", "Imports point down"),
        ("batch.py", "import integrations.deepspeed", "Imports point down"),
        ("parallel.py", "import transformers", "The core imports no framework"),
        ("geometry/runs.py", "import torch", "Everything up to the schedule"),
        ("planner/model.py", "import torch", "Everything up to the schedule, and the planner"),
        ("planner/hardware.py", "import seqpar_ring.kernels", "Imports point down"),
        ("planner/hardware.py", "import seqpar_ring.plan", "Imports point down"),
    ],
)
def test_the_contract_refuses_a_forbidden_import(tmp_path: Path, module: str, statement: str, broken: str) -> None:
    for name in ("seqpar_ring", "integrations"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    with (tmp_path / "seqpar_ring" / module).open("a") as f:
        f.write(f"\n\ndef _seeded() -> None:\n    {statement}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(rf"{broken}.*BROKEN", done.stdout)


def test_every_module_has_a_place_in_the_layers() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    placed = re.findall(r"seqpar_ring\.(\w+)", config["importlinter:contract:layers"]["layers"])
    assert sorted(placed) == [name for name in MODULES if name != "__init__"]


def test_importing_the_package_imports_no_framework_and_no_torch() -> None:
    assert not imported_by("seqpar_ring") & (FRAMEWORKS | {"torch"})


def test_no_module_of_the_core_imports_a_framework() -> None:
    assert not imported_by(*(f"seqpar_ring.{name}" for name in MODULES)) & FRAMEWORKS


@pytest.mark.parametrize("name", ["errors", "config", "geometry", "packing", "layout", "schedule"])
def test_the_part_that_plans_imports_no_torch(name: str) -> None:
    assert "torch" not in imported_by(f"seqpar_ring.{name}")


def test_no_module_of_the_planner_imports_torch() -> None:
    assert len(PLANNER) > 5, "the planner was not found"
    assert "torch" not in imported_by(*(f"seqpar_ring.planner.{name}" for name in PLANNER))


def test_the_integrations_are_found_under_the_package_and_import_no_framework() -> None:
    assert not imported_by("seqpar_ring.integrations") & FRAMEWORKS
