"""`seqpar-ring timeline` draws what is predicted, what was measured, or both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seqpar_ring import cli
from seqpar_ring.trace import Span, Trace, save

JOB = ("--model", "llama-3.1-8b", "--seq-len", "16K", "--gpus", "8", "--hardware", "h100", "--fabric", "nvlink+ndr")


def height(path: Path) -> int:
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert picture.std() > 10, "not blank"
    return int(picture.shape[0])


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["timeline", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Two ranks, a forward pass three times and a backward pass once."""
    spans = []
    for rank in range(2):
        for run, lasts in enumerate((1.0, 3.0, 2.0)):
            at = 10.0 * run
            spans.append(Span(rank, "wait", at, at + 0.25 * lasts, 0, "forward", run))
            spans.append(Span(rank, "compute", at + 0.25 * lasts, at + lasts, 0, "forward", run))
        spans.append(Span(rank, "compute", 30.0, 35.0, 0, "backward", 3))
    path = tmp_path / "trace.json"
    save(Trace(2, tuple(spans)), path)
    return path


def test_a_prediction_is_drawn_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.png"
    code, out, _ = run(capsys, *JOB, "--out", path, "--setting", "heads=2")
    assert code == 0
    assert height(path) > 100
    assert "llama-3.1-8b, 16,384 tokens, 8 ranks (h100+nvlink+ndr): ring, zigzag, heads over 2: efficiency" in out
    assert "forward, " in out
    assert f"drawn: {path}" in out


def test_a_trace_is_drawn_by_the_median_of_each_pass(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "--trace", trace, "--out", tmp_path / "t.png")
    assert code == 0
    assert "forward, 2 s, the median of 3" in out
    assert "backward, 5 s\n" in out
    assert "efficiency 92.9%, exposed 7.1% of 7 s" in out


def test_both_stand_under_each_other(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, both = tmp_path / "one.png", tmp_path / "both.png"
    run(capsys, "--trace", trace, "--out", one)
    code, out, _ = run(capsys, *JOB, "--trace", trace, "--out", both)
    assert code == 0
    assert out.count("efficiency") == 2
    assert height(both) > 1.5 * height(one)


def test_a_saved_plan_says_what_to_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, path = tmp_path / "plan.yaml", tmp_path / "t.png"
    assert cli.main(["plan", *JOB, "--setting", "size=4", "--setting", "heads=1", "--save", str(plan)]) == 0
    code, out, _ = run(capsys, "--config", plan, "--out", path)
    assert code == 0
    assert "16,384 tokens, 4 ranks" in out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "there is nothing to draw"),
        (["--trace", "{here}/none.json"], "there is no such trace"),
        ([*JOB, "--setting", "layout=zigzg"], 'Did you mean "zigzag"?'),
        ([*JOB, "--out", "{here}/no/folder.png"], "the picture cannot be written"),
        (["--gpus", "8"], "nothing says which model"),
    ],
)
def test_what_cannot_be_drawn_is_exit_code_2(
    arguments: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ["--out", tmp_path / "t.png"] if "--out" not in arguments else []
    code, _, said = run(capsys, *(one.format(here=tmp_path) for one in arguments), *at)
    assert code == 2
    assert text in said
