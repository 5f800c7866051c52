"""`seqpar-ring schedule` prints what `python -m seqpar_ring.schedule` prints, and draws it."""

from __future__ import annotations

from pathlib import Path

import pytest

from seqpar_ring import cli
from seqpar_ring.schedule import __main__ as schedules

CASES = [
    ["--lengths", "40", "--size", "2"],
    ["--lengths", "50,30,12", "--size", "4", "--layout", "packed", "--schedule", "direct", "--check"],
    ["--lengths", "64", "--size", "4", "--schedule", "double_ring", "--node", "2", "--backward"],
    ["--lengths", "64", "--kv-lengths", "30", "--full", "--size", "2", "--calls", "1"],
    ["--lengths", "64", "--size", "4", "--window", "9", "--block-tokens", "8", "--queries", "--width", "90"],
    ["--lengths", "64", "--size", "2", "--chunk", "16", "--python"],
    ["--lengths", "64", "--size", "2", "--prefix", "16"],
    ["--lengths", "2x1K,300", "--size", "2", "--window", "1K", "--block-tokens", "512"],
    ["--lengths", "64", "--size", "4", "--block-tokens", "4", "--cut", "halves"],
]


@pytest.mark.parametrize("arguments", CASES, ids=" ".join)
def test_it_prints_what_the_module_prints(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert schedules.main(arguments) == 0
    expected = capsys.readouterr().out
    assert cli.main(["schedule", *arguments]) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--schedule", "rng"], 'Did you mean "ring"?'),
        (["--lengths", "3,y"], "this is no number of tokens"),
        (["--size", "0"], "size"),
        (["--size", "2", "--calls", "5"], "no such rank"),
        (["--size", "32", "--png", "x.png"], "cannot be drawn legibly"),
    ],
)
def test_the_impossible_is_exit_code_2(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schedule", *arguments]) == 2
    said = capsys.readouterr().err
    assert text in said
    assert "Traceback" not in said


def test_it_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "schedule.png"
    assert cli.main(["schedule", "--lengths", "40", "--size", "2", "--png", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert f"drawn: {path}" in capsys.readouterr().out
