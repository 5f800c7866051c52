"""`seqpar-ring probe` hands on what was asked and prints what was found. What is measured, tests/probe looks at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from seqpar_ring import cli, probe
from seqpar_ring.planner.hardware import Machine, machine
from seqpar_ring.probe import Options

H100 = machine("h100", "nvlink+ndr")


def test_it_asks_for_what_the_options_say_and_prints_the_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def run(ranks: int, out: Path, options: Options, progress: Callable[[str], None]) -> Machine:
        asked.extend([ranks, out, options])
        progress("nodes")
        progress("messages between ranks")
        return H100

    monkeypatch.setattr(probe, "run", run)
    path = tmp_path / "machine.yaml"
    arguments = ["--ranks", "4", "--node", "2", "--quick", "--dtype", "bf16", "--dtype", "fp32", "--out", str(path)]
    assert cli.main(["probe", *arguments]) == 0
    assert asked == [4, path, Options(("bf16", "fp32"), 2, True)]
    said = capsys.readouterr()
    assert said.err.splitlines() == ["nodes ...", "messages between ranks ..."]
    for text in ("NVIDIA H100 SXM 80GB: 77.5 GiB of memory", "attention backward, bf16", "NVLink 4", str(path)):
        assert text in said.out
    assert "625,000.0" in said.out, "GFLOP/s of attention forward"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--ranks", "1"], "links need two ranks"),
        (["--dtype", "fp8"], "unknown dtype"),
        (["--ranks", "4", "--node", "3"], "do not divide the group"),
        (["--out", "/no/such/folder/machine.yaml"], "cannot be written"),
    ],
)
def test_what_cannot_be_measured_is_exit_code_2(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["probe", *arguments]) == 2
    assert text in capsys.readouterr().err
