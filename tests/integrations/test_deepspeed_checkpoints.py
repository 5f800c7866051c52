"""A run that is saved by some ranks goes on with others, as if nothing had happened."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import ds_cases
import ds_resume
import pytest
from ds_cases import ACCUMULATION, Run
from seqpar_ring.integrations import deepspeed_checkpoints as checkpoints

from seqpar_ring import SequenceParallel
from seqpar_ring.errors import ConfigError
from seqpar_ring.testing import RankPool

BEFORE, STEPS = 4, 8
NEAR = 1e-6
"""Relative error of a loss against the run that never stopped, in one process."""


@pytest.fixture(scope="module")
def pool1() -> Iterator[RankPool]:
    """One rank as a process."""
    with RankPool(1, timeout=280) as pool:
        yield pool


@pytest.fixture(scope="module", params=[0, 1, 2, 3])
def saved(request: pytest.FixtureRequest, kept4: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str]:
    """The stage, and the folder of a checkpoint saved by four ranks of one sequence."""
    folder = str(tmp_path_factory.mktemp(f"stage{request.param}"))
    kept4.run(ds_resume.saved_after, folder, Run(request.param, 4, "adamw", BEFORE))
    return request.param, folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "size", "layout"), [(4, 2, "striped"), (2, 2, "contiguous"), (2, 1, "zigzag"), (1, 1, "zigzag")]
)
def test_the_loss_goes_on_at_another_size_and_layout(
    saved: tuple[int, str], ranks: int, size: int, layout: str, request: pytest.FixtureRequest
) -> None:
    stage, folder = saved
    pool: RankPool = request.getfixturevalue(f"pool{ranks}")
    expected = ds_cases.one_process(Run(stage, 1, "adamw", STEPS))[0][BEFORE * ACCUMULATION :]
    for losses, state in pool.run(ds_resume.gone_on, folder, Run(stage, size, "adamw", STEPS, layout=layout), BEFORE):
        assert losses == pytest.approx(expected, rel=NEAR)
        assert state["rows seen"] == 7


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_frozen_parameters_buffers_and_groups_of_the_optimizer_go_on_at_another_size(
    stage: int, pool1: RankPool, pool2: RankPool, tmp_path: Path
) -> None:
    """DeepSpeed leaves the first two as they are, and ZeRO 3 gave all groups the weight decay of the first."""
    expected, said = pool2.run(ds_resume.of_many_kinds, str(tmp_path), stage, 0, False)[0]
    assert said == [[(0.5, 1e-2), (0.0, 1e-3)], [7.0, 7.0, 7.0]]
    for losses, found in pool1.run(ds_resume.of_many_kinds, str(tmp_path), stage, 2, True):
        assert losses == pytest.approx(expected[2 * ACCUMULATION :], rel=NEAR)
        assert found == said


@pytest.mark.slow
def test_a_save_that_is_cut_off_leaves_the_one_before(pool2: RankPool, tmp_path: Path) -> None:
    run = Run(2, 2, "adamw", BEFORE)
    pool2.run(ds_resume.saved_after, str(tmp_path), run, True)
    assert (tmp_path / f"global_step{BEFORE + 1}").exists()
    expected = ds_cases.one_process(Run(2, 1, "adamw", STEPS))[0][BEFORE * ACCUMULATION :]
    for losses, _ in pool2.run(ds_resume.gone_on, str(tmp_path), Run(2, 2, "adamw", STEPS), BEFORE):
        assert losses == pytest.approx(expected, rel=NEAR)


@pytest.mark.slow
def test_a_tag_that_is_written_again_by_fewer_ranks_holds_what_was_written_last(
    pool1: RankPool, pool2: RankPool, tmp_path: Path
) -> None:
    """Files of the ranks that are no more, and the conversion of what was there before, are gone."""
    folder, two, one = str(tmp_path), Run(1, 2, "adamw", 1), Run(1, 1, "adamw", BEFORE)
    pool2.run(ds_resume.saved_under, folder, two, ("best", "other"))
    pool1.run(ds_resume.gone_on, folder, Run(1, 1, "adamw", 1), 1, "best")
    assert (tmp_path / "best_universal").exists()
    assert (tmp_path / "latest_universal").read_text() == "best_universal"
    pool1.run(ds_resume.saved_under, folder, one, ("best",))
    assert not (tmp_path / "best_universal").exists()
    expected = ds_cases.one_process(Run(1, 1, "adamw", STEPS))[0][BEFORE * ACCUMULATION :]
    for pool, size in ((pool1, 1), (pool2, 2)):
        for losses, _ in pool.run(ds_resume.gone_on, folder, Run(1, size, "adamw", STEPS), BEFORE, "best"):
            assert losses == pytest.approx(expected, rel=NEAR)


@pytest.mark.slow
def test_states_that_are_newer_than_their_conversion_are_converted_again(
    pool1: RankPool, pool2: RankPool, tmp_path: Path
) -> None:
    """`engine.save_checkpoint` knows nothing of conversions."""
    folder = str(tmp_path)
    pool2.run(ds_resume.saved_under, folder, Run(1, 2, "adamw", 1), ("best", "other"))
    pool1.run(ds_resume.gone_on, folder, Run(1, 1, "adamw", 1), 1, "best")
    pool2.run(ds_resume.saved_under, folder, Run(1, 2, "adamw", BEFORE), ("best",), True)
    assert (tmp_path / "best_universal").exists()
    expected = ds_cases.one_process(Run(1, 1, "adamw", STEPS))[0][BEFORE * ACCUMULATION :]
    for losses, _ in pool1.run(ds_resume.gone_on, folder, Run(1, 1, "adamw", STEPS), BEFORE, "best"):
        assert losses == pytest.approx(expected, rel=NEAR)


@pytest.mark.parametrize(
    ("what", "texts"),
    [
        ("stage", ("whose files this one cannot load", "saved_in_stage=1", "stage=3", '"stage": 1')),
        ("vocabulary", ("another vocabulary", "checkpoint=97", "model=100")),
        ("width", ("with other parameters", "layers.0.mlp.gate_proj.weight", "model=[7, 5]")),
        ("tag", ("no such checkpoint", "global_step99", f"global_step{BEFORE}")),
        ("overwritten", ("would be overwritten", "Give another tag")),
        ("no sequence group", ("no sequence group",)),
    ],
)
def test_what_cannot_go_on_is_refused_before_anything_is_loaded(
    pool2: RankPool, tmp_path_factory: pytest.TempPathFactory, what: str, texts: tuple[str, ...]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "refused"
    run = Run(1, 2, "adamw", BEFORE)
    if not folder.exists():
        pool2.run(ds_resume.saved_after, str(folder), run)
    for message in pool2.run(ds_resume.not_loaded, str(folder), run, what):
        assert all(text in message for text in texts), message


@pytest.mark.slow
def test_an_optimizer_with_states_that_are_not_converted_is_refused(
    pool1: RankPool, pool2: RankPool, tmp_path: Path
) -> None:
    """They were dropped, and the first step failed with a KeyError."""
    run = Run(1, 2, "amsgrad", 1)
    pool2.run(ds_resume.saved_after, str(tmp_path), run)
    (message,) = pool1.run(ds_resume.not_loaded, str(tmp_path), Run(1, 1, "amsgrad", 1), "")
    assert "states that DeepSpeed cannot convert" in message
    assert "max_exp_avg_sq" in message
    assert "Load it with 2 ranks" in message
    for losses, _ in pool2.run(ds_resume.gone_on, str(tmp_path), Run(1, 2, "amsgrad", 2), 1):
        assert len(losses) == ACCUMULATION


CONVERSION = """
import pathlib, sys
for _ in range(3000):
    sys.stderr.write("a bar of progress that is as long as those of tqdm are, and is written again\\r\\n" * 2)
{end}
"""


@pytest.mark.parametrize("fails", [False, True])
def test_a_conversion_may_say_more_than_a_pipe_holds(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waited for somebody to read its bars of progress, and the ranks for it."""
    script = CONVERSION.format(end="sys.exit('no room')" if fails else "pathlib.Path(sys.argv[-1]).mkdir()")
    target = str(tmp_path / "tag_universal")
    monkeypatch.setattr(checkpoints, "conversion", lambda folder, tag: [sys.executable, "-c", script, target])
    monkeypatch.setattr(checkpoints, "HEARTBEAT", 0.05)
    (tmp_path / "tag").mkdir()
    if fails:
        with pytest.raises(ConfigError, match=r"could not be converted.*no room"):
            checkpoints._convert(SequenceParallel(1), tmp_path, "tag", 2)
    else:
        checkpoints._convert(SequenceParallel(1), tmp_path, "tag", 2)
        assert Path(target).is_dir()
