"""DeepSpeed with the block trains as one process does: every loss, gradient norm and gradient, in every ZeRO stage."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import ds_cases
import ds_resume
import pytest
import torch
from ds_cases import Run
from torch import Tensor

from seqpar_ring.testing import RankPool, relative_error

STAGES = [0, 1, 2, 3]
LOSS = {"sgd": 1e-6, "adamw": 1e-5}


@lru_cache
def reference(run: Run) -> tuple[list[float], list[float], dict[str, Tensor]]:
    return ds_cases.one_process(run)


def one_process_of(run: Run) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """The reference knows neither stages nor ranks, so all set-ups share it."""
    return reference(Run(0, 1, run.optimizer, run.steps, run.bf16, run.weigh_step, run.clip, kind=run.kind))


def worst(found: list[float], truth: list[float]) -> float:
    assert len(found) == len(truth)
    return max(abs(a - b) / abs(b) for a, b in zip(found, truth, strict=True))


def assert_trains_alike(pool: RankPool, run: Run) -> None:
    losses, norms, grads = one_process_of(run)
    for found_losses, found_norms, found_grads in pool.run(ds_cases.train, run):
        assert worst(found_losses, losses) <= LOSS[run.optimizer]
        assert worst(found_norms, norms) <= 1e-4
        for name, grad in grads.items():
            assert relative_error(found_grads[name], grad) <= 1e-5, name
    assert run.kind != "packed" or max(norms) > run.clip > min(norms)


def test_the_reference_learns_so_that_a_wrong_update_would_show() -> None:
    for optimizer in LOSS:
        losses = one_process_of(Run(0, 1, optimizer))[0]
        again = ds_cases.ACCUMULATION * ds_cases.PERIOD * 4
        assert losses[again] < 0.9 * losses[0]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_of_one_sequence_train_as_one_process(pool2: RankPool, stage: int, optimizer: str) -> None:
    assert_trains_alike(pool2, Run(stage, 2, optimizer))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stage", STAGES)
def test_four_ranks_of_one_sequence_train_as_one_process(pool4: RankPool, stage: int, optimizer: str) -> None:
    assert_trains_alike(pool4, Run(stage, 4, optimizer))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stage", STAGES)
def test_two_sequences_of_two_ranks_train_as_one_process(pool4: RankPool, stage: int, optimizer: str) -> None:
    assert_trains_alike(pool4, Run(stage, 2, optimizer))


@pytest.mark.parametrize("kind", ["padded", "masked"])
@pytest.mark.parametrize("stage", STAGES)
def test_padded_and_masked_rows_train_as_in_one_process(pool4: RankPool, stage: int, kind: str) -> None:
    assert_trains_alike(pool4, Run(stage, 2 if stage % 2 else 4, "adamw", kind=kind))


@pytest.mark.parametrize("way", ["num_items_in_batch", "sp.loss"])
@pytest.mark.parametrize("stage", [1, 3])
def test_targets_can_be_weighed_over_the_whole_optimizer_step(pool4: RankPool, stage: int, way: str) -> None:
    run = Run(stage, 2, steps=4, weigh_step=way)
    assert_trains_alike(pool4, run)
    assert worst(one_process_of(Run(stage, 2, steps=4))[0], one_process_of(run)[0]) > 1e-2


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_checkpoint_goes_on_with_another_size_of_the_sequence_group(
    pool4: RankPool, stage: int, tmp_path: Path
) -> None:
    before, after = Run(stage, 4, "adamw", steps=2), Run(stage, 2, "adamw", steps=4)
    for losses in pool4.run(ds_resume.resumed, str(tmp_path), before, after):
        assert worst(losses, one_process_of(after)[0]) <= LOSS["adamw"]


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_is_as_near_to_fp32_as_one_process_in_bf16(pool2: RankPool, stage: int) -> None:
    exact = one_process_of(Run(0, 1, steps=1))[2]
    alone = one_process_of(Run(0, 1, steps=1, bf16=True))[2]
    found = pool2.run(ds_cases.train, Run(stage, 2, steps=1, bf16=True))[0][2]

    def error(grads: dict[str, Tensor]) -> float:
        return relative_error(*(torch.cat([g[name].flatten() for name in exact]) for g in (grads, exact)))

    assert error(found) <= 1.1 * error(alone)


def test_a_model_made_in_shards_trains_as_one_process(pool2: RankPool) -> None:
    assert_trains_alike(pool2, Run(3, 2, steps=3, zero_init=True))


def test_an_engine_without_the_block_beside_one_with_it_disturbs_neither(pool2: RankPool) -> None:
    run = Run(1, 2, steps=3)
    for losses, with_block, without in pool2.run(ds_cases.two_engines, run):
        assert worst(losses, one_process_of(run)[0]) <= LOSS["sgd"]
        assert (with_block, without) == (ds_cases.ACCUMULATION, 2)


@pytest.mark.parametrize("fault", ["mean of means", "declared sequence group"])
def test_a_wrong_weight_of_the_gradients_would_be_seen(pool2: RankPool, fault: str) -> None:
    run = Run(1, 2, steps=1, fault=fault)
    truth = one_process_of(run)[2]
    for _, _, grads in pool2.run(ds_cases.train, run):
        assert max(relative_error(grads[name], truth[name]) for name in truth) > 1e-2


@pytest.mark.slow
def test_bf16_gradients_of_two_groups_under_zero_3_point_where_those_of_one_process_do(pool4: RankPool) -> None:
    """Over four steps of the same weights: in one, bf16's own rounding moves the norm by a thousandth."""
    run = Run(3, 2, "still", steps=ds_cases.PERIOD, bf16=True)
    expected, exact = (ds_cases.one_process(replace(run, bf16=bf16))[2] for bf16 in (True, False))
    for _, _, ours in pool4.run(ds_cases.train, run):
        found, one, true = (torch.cat([grads[n].flatten() for n in expected]) for grads in (ours, expected, exact))
        for reference in (one, true):
            assert torch.nn.functional.cosine_similarity(found.double(), reference.double(), dim=0) >= 0.9999
        assert relative_error(found, true) <= 1.05 * relative_error(one, true)
        assert found.norm().item() == pytest.approx(one.norm().item(), rel=1e-3)
