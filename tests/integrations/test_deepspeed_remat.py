"""Checkpointed layers under DeepSpeed: the same training in every stage, and with attention kept one ring a layer."""

from __future__ import annotations

import ds_cases
import pytest
import remat_cases

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
