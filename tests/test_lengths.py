"""Lengths are read as people write them, and what is none is refused with an example."""

from __future__ import annotations

import pytest

from seqpar_ring import SequenceParallel
from seqpar_ring.errors import ConfigError, PlanError
from seqpar_ring.lengths import MOST_DOCUMENTS, MOST_TOKENS, of_each, tokens, tokens_of_each


@pytest.mark.parametrize(
    ("written", "number"),
    [("1M", 2**20), ("128K", 131072), ("128k", 131072), ("1.5M", 3 * 2**19), ("1_000_000", 10**6), ("7", 7)],
)
def test_lengths_count_in_powers_of_two(written: str, number: int) -> None:
    assert tokens(written) == number


@pytest.mark.parametrize("written", ["", "-1", "0", "1.3", "K", "1KB", "1e6", "one"])
def test_what_is_no_length_is_refused(written: str) -> None:
    with pytest.raises(ConfigError, match="is no number of tokens"):
        tokens(written)


def test_zero_is_a_length_where_it_may_be() -> None:
    assert tokens("0", least=0) == 0
    assert tokens_of_each("0,2x0", least=0) == [0, 0, 0]
    with pytest.raises(ConfigError, match="--kv-lengths is no number of tokens"):
        tokens_of_each("-1", "--kv-lengths", least=0)


def test_several_lengths_are_listed_and_repeated() -> None:
    assert tokens_of_each("8K") == [8192]
    assert tokens_of_each("2x1K,300, 1x7") == [1024, 1024, 300, 7]


@pytest.mark.parametrize("written", ["0x5", "x5", "ax5", "1.5x8K", f"{MOST_DOCUMENTS + 1}x1"])
def test_what_is_no_list_is_refused(written: str) -> None:
    with pytest.raises(ConfigError, match="--documents is no list of lengths"):
        tokens_of_each(written)


@pytest.mark.parametrize("lengths", [[2**70], [MOST_TOKENS, 1], MOST_TOKENS + 1])
def test_more_tokens_than_can_be_counted_are_refused(lengths: int | list[int]) -> None:
    """2**70 ended in numpy's own error, and less in areas below zero."""
    with pytest.raises(PlanError, match=f"lengths are more tokens than can be counted.*most={MOST_TOKENS}"):
        of_each(lengths, "lengths", PlanError)


def test_as_many_tokens_as_can_be_counted_are_planned() -> None:
    plan = SequenceParallel(1).plan([MOST_TOKENS], causal=False)
    assert plan.keys_per_query == MOST_TOKENS
