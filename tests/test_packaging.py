"""What is installed: both ways of installing give the core and, beside it, the integrations and the descriptions."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SHOW = """
import importlib, pathlib, sys
for name in ("seqpar_ring", "seqpar_ring.kernels", "seqpar_ring.integrations", "seqpar_ring.data"):
    print(pathlib.Path(importlib.import_module(name).__file__).parent)
"""
DESCRIBED = """
from seqpar_ring.planner import data
for kind in ("hardware", "models"):
    for name in data.names(kind):
        print(kind, name, data.named(kind, name)["source" if kind == "hardware" else "model_type"])
"""
KINDS = ("hardware", "models")
DESCRIPTIONS = {kind: sorted(p.stem for p in (ROOT / "configs" / kind).glob("*.yaml")) for kind in KINDS}


def alone(code: str, folder: Path, path: Path | None = None) -> list[str]:
    """The lines that a fresh interpreter prints, started in this folder and with only this one on the path."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def homes(folder: Path, path: Path | None = None) -> list[Path]:
    """Where a fresh interpreter, started in this folder, finds core, kernels, integrations and descriptions."""
    return [Path(line) for line in alone(SHOW, folder, path)]


def described(folder: Path, path: Path | None = None) -> dict[str, list[str]]:
    """The names of the descriptions that it finds, by kind, each of which it has read."""
    lines = [line.split() for line in alone(DESCRIBED, folder, path)]
    return {kind: [name for found, name, *_ in lines if found == kind] for kind in DESCRIPTIONS}


def test_the_editable_install_leads_to_this_checkout(tmp_path: Path) -> None:
    core = ROOT / "seqpar_ring"
    assert homes(tmp_path) == [core, core / "kernels", ROOT / "integrations", ROOT / "configs"]
    assert described(tmp_path) == DESCRIPTIONS


def test_there_are_descriptions_to_install() -> None:
    assert len(DESCRIPTIONS["hardware"]) >= 16
    assert len(DESCRIPTIONS["models"]) >= 11


def test_a_checkout_that_is_not_installed_finds_its_descriptions(tmp_path: Path) -> None:
    # -S: without site-packages nothing of this project is installed; what it depends on is put back on the path.
    for name in ("seqpar_ring", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "configs" / "hardware" / "mine.yaml").write_text("kind: link\nsource: mine\n")
    start = f"import sys; sys.path += [{str(tmp_path)!r}, {str(Path(yaml.__file__).parents[1])!r}]\n"
    command = [sys.executable, "-S", "-c", start + DESCRIBED]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "hardware mine mine" in done.stdout.splitlines()
    assert "models llama-3.1-8b llama" in done.stdout.splitlines()


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of a wheel built from a copy of the sources."""
    copy, built = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in ("seqpar_ring", "integrations", "configs"):
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
    assert homes(tmp_path, unpacked_wheel) == [core, core / "kernels", core / "integrations", core / "data"]


def test_a_wheel_holds_the_descriptions_and_no_other_config(unpacked_wheel: Path, tmp_path: Path) -> None:
    assert described(tmp_path, unpacked_wheel) == DESCRIPTIONS
    data = unpacked_wheel / "seqpar_ring" / "data"
    found = {str(p.relative_to(data)) for p in data.rglob("*") if p.is_file()}
    assert found == {"__init__.py", *(f"{kind}/{name}.yaml" for kind in DESCRIPTIONS for name in DESCRIPTIONS[kind])}


def test_a_wheel_holds_every_source_file_and_says_that_it_is_typed(unpacked_wheel: Path) -> None:
    expected = {p.relative_to(ROOT / "seqpar_ring") for p in (ROOT / "seqpar_ring").rglob("*.py")}
    expected |= {p.relative_to(ROOT) for p in (ROOT / "integrations").rglob("*.py")}
    expected |= {Path("data", p.relative_to(ROOT / "configs")) for p in (ROOT / "configs").rglob("*.py")}
    found = {p.relative_to(unpacked_wheel / "seqpar_ring") for p in (unpacked_wheel / "seqpar_ring").rglob("*.py")}
    assert found == expected
    assert (unpacked_wheel / "seqpar_ring" / "py.typed").exists()
    assert not (unpacked_wheel / "tests").exists()
