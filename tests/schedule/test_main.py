"""The command that prints a schedule: what it prints is what the library plans, and bad input ends with the fix."""

from __future__ import annotations

import subprocess
import sys

import pytest

from seqpar_ring import SequenceParallel
from seqpar_ring.schedule import Block, Move, Traffic, Use
from seqpar_ring.schedule.__main__ import main
from seqpar_ring.testing import run_lockstep

NAMES = {"Traffic": Traffic, "Use": Use, "Move": Move, "Block": Block}


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*arguments, "--width", "160"]) == 0
    return capsys.readouterr().out


def test_a_schedule_is_printed_with_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--lengths", "64", "--size", "4")
    assert text.splitlines()[:3] == [
        "1 document, 64 tokens over 4 ranks, causal, zigzag",
        "tokens of a rank: 16 to 16; at most 1.000 of the mean work; at most 1 kernel call a step",
        "ring: 0.88 of what a full ring sends (ring up: fewest rows sent (up 168 rows, down 168 rows))",
    ]
    assert "forward: 4 ranks, 4 steps, 16 uses" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--schedule", "direct", "--layout", "packed", "--lengths", "9,9,9,9"), "direct: 0.00 of what a full ring"),
        (("--schedule", "double_ring", "--size", "8", "--node", "4", "--check"), "proven: every allowed pair once"),
        (("--backward",), "dKV sent"),
        (("--queries", "--check"), "backward, queries travel"),
        (("--full", "--lengths", "8,5", "--kv-lengths", "3,0"), "2 documents, 13 tokens over 4 ranks, full"),
        (("--window", "5"), "causal with a window of 5"),
        (("--chunk", "512"), "causal with chunks of 512"),
        (("--prefix", "100"), "causal with a prefix of 100"),
        (("--block-tokens", "512"), "11 steps"),
        (("--size", "1"), "nothing to send"),
        (("--window", "9", "--lengths", "40,30,20"), "at most 3 kernel calls a step"),
        (("--calls", "1", "--lengths", "64"), "step 1, blocks of 0: q 0:16, k 0:8, window (all, all), 1 segments"),
    ],
)
def test_every_option_shows(arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in printed(capsys, *arguments)


def test_python_data_can_be_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--lengths", "24", "--size", "2", "--python").splitlines()[-1]
    assert isinstance(eval(text, NAMES), Traffic)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--schedule", "rnig"), 'Did you mean "ring"'),
        (("--layout", "zig"), "unknown layout"),
        (("--size", "0"), "at least 1"),
        (("--lengths", "4,0"), "at least 1"),
        (("--node", "3"), "does not divide"),
        (("--window", "0"), "at least one key"),
        (("--calls", "4"), "Give 0 to 3"),
        (("--kv-lengths", "3"), "no causal mask"),
        (("--full", "--lengths", "8,5", "--kv-lengths", "3"), "different numbers of documents"),
        (("--block-tokens", "0"), "block_tokens below 1"),
    ],
)
def test_bad_input_ends_with_the_fix(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_lengths_are_read_as_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    plain = printed(capsys, "--lengths", "1024,1024,300", "--window", "1024", "--block-tokens", "2048")
    assert printed(capsys, "--lengths", "2x1K,300", "--window", "1K", "--block-tokens", "2K") == plain


def test_what_is_no_number_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--lengths", "4,y"])
    assert end.value.code == 2
    assert "argument --lengths: this is no number of tokens [value='y']" in capsys.readouterr().err


@pytest.mark.parametrize("travels", [(), ("--queries",)])
def test_a_run_with_these_settings_executes_what_is_printed(
    travels: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--full", "--lengths", "30,21", "--kv-lengths", "9,12", "--size", "3", "--block-tokens", "6")
    text = printed(capsys, *options, "--backward", "--python", *travels).splitlines()[-1]

    def planned(sp: SequenceParallel) -> Traffic:
        plan = sp.plan([30, 21], causal=False, kv_lengths=[9, 12])
        return plan.query_schedule if travels else plan.backward_schedule

    assert run_lockstep(planned, world=3, block_tokens=6) == [eval(text, NAMES)] * 3


def test_it_runs_as_a_module_and_without_torch() -> None:
    code = "\n".join(
        [
            "import runpy, sys",
            "sys.argv = ['schedule', '--lengths', '8', '--size', '2']",
            "try: runpy.run_module('seqpar_ring.schedule', run_name='__main__')",
            "except SystemExit as end: assert not end.code",
            "assert 'torch' not in sys.modules",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "rank 1" in done.stdout
