"""The command line: what it prints, and what its exit codes say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from seqpar_ring import __version__, cli, environment
from seqpar_ring.commands import doctor
from seqpar_ring.environment import Finding


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(one) for one in arguments])


def test_help_names_every_command() -> None:
    text = run("--help").output
    assert all(name in text for name in ("plan", "doctor", "schedule"))
    assert "--install-completion" in text


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_plain_help_with_examples_and_exit_codes(command: str) -> None:
    text = run(command, "--help").output
    assert "Examples:" in text
    assert f"seqpar-ring {command}" in text
    assert "Exit codes: 0" in text
    assert not set(text) & set("╭│─\x1b"), "no boxes, no colours"


def test_doctor_looks_at_the_machine_and_finds_it_fit() -> None:
    done = run("doctor")
    assert done.exit_code == 0, done.output
    for what in ("Python", "torch", 'kernel "cpu"', "transformers", "gloo", "cores"):
        assert what in done.output


def test_doctor_prints_json_alone_on_standard_output() -> None:
    command = [sys.executable, "-m", "seqpar_ring.cli", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    found = json.loads(done.stdout)["environment"]
    assert {one["level"] for one in found} <= {"ok", "note", "problem"}
    assert next(one["found"] for one in found if one["what"] == "torch") == torch.__version__


def test_a_problem_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Finding("problem", "torch", "1.0", "Install another.")
    monkeypatch.setattr(environment, "findings", lambda: iter([broken]))
    done = run("doctor")
    assert done.exit_code == 1
    assert "PROBLEM torch" in done.output
    assert "-> Install another." in done.output


@pytest.mark.parametrize(
    ("version", "level"),
    [("2.5.1", "problem"), ("2.9.0", "note"), ("2.13.0+cpu", "ok"), ("2.15.1+cu132", "ok"), ("2.16.0", "note")],
)
def test_versions_of_torch_are_judged(monkeypatch: pytest.MonkeyPatch, version: str, level: str) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert environment._torch().level == level


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "/no/such/folder"], "no model there"),
        (["--model", "{here}", "--documents", "3,x"], "no list of lengths"),
        (["--model", "{here}", "--documents", "1,1,1"], "too few tokens"),
        (["--model", "{here}", "--dtype", "float8"], "unknown dtype"),
        (["--model", "{here}", "--setting", "layuot=packed"], 'Did you mean "layout"?'),
        (["--model", "{here}", "--setting", "layout"], "--setting has no value"),
    ],
)
def test_what_cannot_be_asked_is_one_message_and_exit_code_2(
    arguments: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(doctor, "_link", lambda: Finding("ok", "gloo", "not asked"))
    code = cli.main(["doctor", *(one.format(here=tmp_path) for one in arguments)])
    said = capsys.readouterr().err
    assert code == 2
    assert text in said
    assert "Traceback" not in said


def test_the_version_is_told(capsys: Any) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"seqpar_ring {__version__}\n"
