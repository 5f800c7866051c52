"""Trainer over sequence groups: the losses of one process, step by step."""

from __future__ import annotations

from pathlib import Path

import pytest
import trainer_cases as cases
from trainer_cases import Run

from seqpar_ring.testing import RankPool

NEAR = 1e-5
"""Relative error of a loss, in fp32, after up to 20 steps of Adam."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["packed", "padded", "masked"])
def test_twenty_steps_are_those_of_one_process(pool2: RankPool, tmp_path: Path, kind: str) -> None:
    run = Run(size=2, kind=kind)
    expected = cases.one_process(run, 1)
    for losses, _, _ in pool2.run(cases.train, run, str(tmp_path)):
        assert losses == pytest.approx(expected, rel=NEAR)
