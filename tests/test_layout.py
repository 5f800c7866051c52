"""Layouts: every token once, memory in order, work and tokens even where they promise it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqpar_ring import layout as layouts
from seqpar_ring.errors import ConfigError, PlanError
from seqpar_ring.geometry import area, by_document, causal, tile

documents = st.lists(st.integers(1, 40), min_size=1, max_size=7)


@pytest.mark.parametrize("name", sorted(layouts.LAYOUTS))
@given(lengths=documents, world=st.integers(1, 9))
def test_every_token_lies_on_one_rank_in_order_of_document_and_position(
    name: str, lengths: list[int], world: int
) -> None:
    layout = layouts.make(name, lengths, world)
    held = [list(layouts.positions(runs)) for runs in layout]
    assert sorted(t for rank in held for t in rank) == [(d, p) for d, n in enumerate(lengths) for p in range(n)]
    assert all(rank == sorted(rank) for rank in held)
    for runs in layout:
        assert [run.at for run in runs] == [sum(x.n for x in runs[:i]) for i in range(len(runs))]


@pytest.mark.parametrize("name", ["striped", "contiguous"])
@given(lengths=documents, world=st.integers(1, 9))
def test_token_counts_differ_by_one_at_most(name: str, lengths: list[int], world: int) -> None:
    counts = layouts.make(name, lengths, world).sizes
    assert max(counts) - min(counts) <= 1


def test_zigzag_spreads_many_tiny_documents() -> None:
    counts = layouts.make("zigzag", [1] * 1000, 8).sizes
    assert (min(counts), max(counts)) == (125, 125)


@pytest.mark.parametrize(("name", "bound"), [("zigzag", 1.01), ("striped", 1.01)])
def test_balanced_layouts_give_every_rank_equal_causal_work(name: str, bound: float) -> None:
    work = _causal_work(layouts.make(name, [4096], 8))
    assert max(work) * len(work) <= bound * sum(work)


def test_contiguous_gives_the_last_rank_nearly_twice_the_mean() -> None:
    work = _causal_work(layouts.make("contiguous", [4096], 8))
    assert max(work) * len(work) / sum(work) == pytest.approx(15 / 8, rel=0.01)


def test_a_rank_may_hold_nothing() -> None:
    assert sorted(layouts.make("striped", [3], 8).sizes) == [0, 0, 0, 0, 0, 1, 1, 1]
    assert 0 in layouts.make("zigzag", [3], 8).sizes


def test_an_unknown_layout_names_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match='Did you mean "zigzag"'):
        layouts.make("zigzg", [4], 2)


@pytest.mark.parametrize("lengths", [[], [3, 0], [-1], [2.0], [True]])
def test_lengths_that_are_no_positive_whole_numbers_are_refused(lengths: list[int]) -> None:
    with pytest.raises(PlanError, match="at least 1"):
        layouts.make("striped", lengths, 2)


def _causal_work(layout: layouts.Layout) -> list[int]:
    keys = [run for runs in layout for run in runs]
    return [
        sum(area(t) for k in keys for q in by_document(runs).get(k.doc, ()) if (t := tile(q, k, causal())))
        for runs in layout
    ]
