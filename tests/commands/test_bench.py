"""`seqpar-ring bench` times a ring against one process, and says what the planner expected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from seqpar_ring import cli
from seqpar_ring.commands import bench
from seqpar_ring.commands.bench import Case, Took
from seqpar_ring.config import Settings
from seqpar_ring.schedule import Row
from seqpar_ring.testing import RankPool

CASE = Case((96, 33), Row(4, 2, 16, 16, 4), "fp32", True, 3)


def test_every_rank_times_each_pass(pool2: RankPool) -> None:
    for forward, backward in pool2.run(bench._attention, CASE, size=2, layout="packed"):
        assert len(forward) == len(backward) == 3
        assert min(forward) > 0
        assert min(backward) > 0


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Case, Settings]]:
    """What was timed; a ring of n is sqrt(n) times as fast as one process."""
    seen: list[tuple[Case, Settings]] = []

    def timed(case: Case, settings: Settings) -> Took:
        seen.append((case, settings))
        return Took(settings.size, 1.0 / settings.size**0.5, 3.0 / settings.size**0.5)

    monkeypatch.setattr(bench, "_timed", timed)
    return seen


def test_one_process_is_compared_with_the_ring(
    timed: list[tuple[Case, Settings]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "--ranks", "4", "--seq-len", "4K", "--setting", "layout=striped", "--full"]) == 0
    (case, alone), (_, ring) = timed
    assert (case.lengths, case.causal) == ((4096,), False)
    assert (alone.size, ring.size, ring.layout) == (1, 4, "striped")
    out = capsys.readouterr().out
    assert "one process       1 s        3 s    4 s      1,024       1.00" in out
    assert "4 ranks        500 ms      1.5 s    2 s      2,048       2.00" in out


def test_with_hardware_the_prediction_stands_beside_it(
    timed: list[tuple[Case, Settings]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "--hardware", "cpu", "--fabric", "loopback", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == 1
    assert found["tokens"] == 8192
    one, two = found["timed"]
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert two["speed_up"] == pytest.approx(2**0.5)
    assert 0 < two["predicted"]["forward"] < one["predicted"]["forward"]


def test_every_key_of_its_json_is_in_the_documentation(
    timed: list[tuple[Case, Settings]], capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["bench", "--documents", "300,20", "--hardware", "cpu", "--fabric", "loopback", "--json"])
    found = json.loads(capsys.readouterr().out)
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    keys = {*found, *found["timed"][0]}
    assert {key for key in keys if f"`{key}`" not in page} == set()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--dtype", "fp8"], "unknown dtype"),
        (["--heads", "8", "--kv-heads", "3"], "key heads must divide heads"),
        (["--setting", "layuot=zigzag"], 'Did you mean "layout"?'),
        (["--setting", "size=4"], "the size is the number of ranks here"),
        (["--fabric", "nvlink"], "a fabric alone predicts nothing"),
        (["--hardware", "cpu"], "nothing says what joins the devices"),
        (["--seq-len", "0"], "--seq-len is no number of tokens"),
    ],
)
def test_what_makes_no_sense_is_exit_code_2(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *arguments]) == 2
    assert text in capsys.readouterr().err
