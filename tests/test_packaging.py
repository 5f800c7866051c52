"""What is installed: both ways of installing give the core and, beside it, the integrations under one name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHOW = """
import importlib, pathlib, sys
for name in ("seqpar_ring", "seqpar_ring.kernels", "seqpar_ring.integrations"):
    print(pathlib.Path(importlib.import_module(name).__file__).parent)
"""


def homes(folder: Path, path: Path | None = None) -> list[Path]:
    """Where a fresh interpreter, started in this folder, finds the core, the kernels and the integrations."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, "-c", SHOW], cwd=folder, env=env, capture_output=True, text=True, check=True)
    return [Path(line) for line in done.stdout.splitlines()]


def test_the_editable_install_leads_to_this_checkout(tmp_path: Path) -> None:
    assert homes(tmp_path) == [ROOT / "seqpar_ring", ROOT / "seqpar_ring" / "kernels", ROOT / "integrations"]


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of a wheel built from a copy of the sources."""
    copy, built = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in ("seqpar_ring", "integrations"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(built), str(copy)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(built / "files")
    return built / "files"


def test_a_wheel_holds_the_integrations_under_the_package(unpacked_wheel: Path, tmp_path: Path) -> None:
    core = unpacked_wheel / "seqpar_ring"
    assert homes(tmp_path, unpacked_wheel) == [core, core / "kernels", core / "integrations"]


def test_a_wheel_holds_every_source_file_and_says_that_it_is_typed(unpacked_wheel: Path) -> None:
    expected = {p.relative_to(ROOT / "seqpar_ring") for p in (ROOT / "seqpar_ring").rglob("*.py")}
    expected |= {p.relative_to(ROOT) for p in (ROOT / "integrations").rglob("*.py")}
    found = {p.relative_to(unpacked_wheel / "seqpar_ring") for p in (unpacked_wheel / "seqpar_ring").rglob("*.py")}
    assert found == expected
    assert (unpacked_wheel / "seqpar_ring" / "py.typed").exists()
    assert not (unpacked_wheel / "tests").exists()
