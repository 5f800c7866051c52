"""Packed documents: whole where short, shared by nested groups where long; even in tokens and in attention work."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqpar_ring import layout as layouts
from seqpar_ring.geometry import Mask, area
from seqpar_ring.packing import Balance, assign
from seqpar_ring.schedule import tiles
from seqpar_ring.testing import run_lockstep


def heavy_tailed(count: int, seed: int) -> list[int]:
    """As many tokens in each octave from 350 to 131,072."""
    draw = random.Random(seed)
    return [int(1 / (1 / 350 - draw.random() * (1 / 350 - 1 / 131_072))) for _ in range(count)]


def work_of(layout: layouts.Layout, lengths: list[int]) -> list[int]:
    """Allowed pairs of each rank's queries, causal."""
    regions = Mask().regions(lengths)
    keys: dict[int, list[layouts.Run]] = {}
    for runs in layout:
        for run in runs:
            keys.setdefault(run.doc, []).append(run)
    return [
        sum(area(t) for run in runs for t in tiles([run], keys[run.doc], regions)) for runs in layout
    ]


@pytest.mark.parametrize("world", [8, 64])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_thousand_documents_are_even_in_tokens_and_in_work(world: int, seed: int) -> None:
    lengths = heavy_tailed(1000, seed)
    layout = layouts.make("packed", lengths, world)
    work = work_of(layout, lengths)
    assert max(layout.sizes) * world <= 1.01 * sum(layout.sizes)
    assert max(work) * world <= 1.03 * sum(work)


def test_most_documents_stay_whole_and_long_ones_lie_on_aligned_groups() -> None:
    lengths = heavy_tailed(1000, seed=1)
    first, size = assign(np.array(lengths), 64, Balance())
    assert (size == 1).mean() > 0.8
    assert set(size.tolist()) <= {1, 2, 4, 8, 16, 32, 64}
    assert not (first % size).any()
    assert size[int(np.argmax(lengths))] == size.max()


def test_looser_tolerances_share_fewer_documents() -> None:
    lengths = np.array(heavy_tailed(60, seed=3))
    strict, loose = (assign(lengths, 8, Balance(x, y)).size.sum() for x, y in ((1.001, 1.005), (1.2, 1.5)))
    assert loose < strict


def test_the_tolerances_are_settings() -> None:
    lengths = heavy_tailed(60, seed=3)

    def whole(balance: float) -> int:
        how = {"layout": "packed", "balance_tokens": balance, "balance_area": balance}
        plans = run_lockstep(lambda sp: sp.plan(lengths), 8, **how)
        return sum(len(runs) for runs in plans[0].layout)

    assert whole(1.5) < whole(1.001)


@given(lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=30), world=st.integers(1, 12))
def test_every_document_has_a_group_within_the_ranks_and_the_same_one_each_time(lengths: list[int], world: int) -> None:
    n = np.array(lengths)
    first, size = assign(n, world, Balance())
    again = assign(n, world, Balance())
    assert (first >= 0).all()
    assert (first + size <= world).all()
    assert (first == again.first).all()
    assert (size == again.size).all()


def test_one_long_document_is_a_zigzag() -> None:
    assert layouts.make("packed", [4000], 8) == layouts.make("zigzag", [4000], 8)
