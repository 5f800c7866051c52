"""Checkpointed layers under DeepSpeed: the same training in every stage, and with attention kept one ring a layer."""

from __future__ import annotations

import ds_cases
import pytest
import remat_cases
import torch

from seqpar_ring.testing import RankPool

LAYERS = 2
MODES = ("none", "recompute", "kept", "kept, reentrant")
PASSES = 2 * ds_cases.ACCUMULATION


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_ring_runs_once_a_layer_and_training_is_the_same(pool2: RankPool, stage: int) -> None:
    found = {mode: pool2.run(remat_cases.step, stage, mode) for mode in MODES}
    plain = found["none"][0][0]
    for mode, by_rank in found.items():
        for losses, runs in by_rank:
            assert losses == pytest.approx(plain, rel=1e-6)
            assert runs == LAYERS * PASSES * (2 if mode == "recompute" else 1)


@pytest.mark.parametrize("keep", [True, False])
def test_deepspeeds_own_checkpointing_is_exact_with_inputs_flattened(pool2: RankPool, keep: bool) -> None:
    plain = pool2.run(remat_cases.partitioned, False, False)[0][0]
    for grads, runs in pool2.run(remat_cases.partitioned, True, keep):
        for found, expected in zip(grads, plain, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert runs == (3 if keep else 6)


def test_cpu_checkpointing_is_refused_on_a_cpu(pool2: RankPool) -> None:
    for said in pool2.run(remat_cases.refused):
        assert "cpu_checkpointing does not work on a CPU" in said
