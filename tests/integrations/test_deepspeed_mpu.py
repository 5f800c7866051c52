"""DeepSpeed with an mpu of the user's own: sequence groups inside its data groups, gradients of one process."""

from __future__ import annotations

from pathlib import Path

import mpu_cases
import pytest

from seqpar_ring.testing import RankPool, relative_error


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("parts", "size"), [(2, 2), (1, 2), (2, 1), (1, 4)])
def test_a_model_in_parts_trains_as_one_process(pool4: RankPool, stage: int, parts: int, size: int) -> None:
    """Parts of the model times ranks of a sequence times data ranks are four."""
    loss, norm, grads = mpu_cases.alone(4 // parts // size)
    for found_loss, found_norm, found in pool4.run(mpu_cases.train, stage, parts, size):
        assert found_loss == pytest.approx(loss, rel=1e-6)
        assert found_norm is None if stage == 0 else found_norm == pytest.approx(norm, rel=1e-5)
        assert found.keys() == grads.keys()
        for name, grad in grads.items():
            assert relative_error(found[name], grad) <= 1e-5, name


@pytest.mark.parametrize(("size", "then"), [(2, 1), (1, 2)])
def test_a_model_in_parts_goes_on_from_a_checkpoint_at_another_size(
    pool4: RankPool, tmp_path: Path, size: int, then: int
) -> None:
    expected = mpu_cases.alone_in_steps(6)
    for losses, told in pool4.run(mpu_cases.stopped_and_gone_on, str(tmp_path), size, then):
        assert losses == pytest.approx(expected, rel=1e-6)
        assert "saved by another number of ranks [saved_by=1, ranks=2]" in told
        assert "ds_to_universal" in told


REFUSALS = {
    "methods": ("UnsupportedError", "get_data_parallel_group", "mpu='mine'"),
    "sequence": ("UnsupportedError", "declares sequence parallelism", "get_sequence_parallel_world_size=2"),
    "pipeline": ("UnsupportedError", "pipeline parallelism", "get_pipe_parallel_world_size=2"),
    "context": ("UnsupportedError", "context parallelism of its own", "get_context_parallel_world_size=2"),
    "others in between": ("GroupError", "one rank of each", "model_parallel_group=["),
    "size": ("GroupError", "must divide the data-parallel groups", "size=4"),
    "crossed": ("GroupError", "no grid of parts of the model and data ranks", "model_parallel_group="),
    "other ranks": ("UnsupportedError", "over other ranks than the mpu averages", "sequence_groups=4"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_an_mpu_that_sequence_groups_do_not_fit_into_is_refused(pool4: RankPool, what: str) -> None:
    for message in pool4.run(mpu_cases.refused, what):
        assert all(text in message for text in REFUSALS[what]), message
