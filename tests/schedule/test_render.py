"""The printed schedule: every use and every transfer stands where it happens, and nothing else does."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st
from schedule_cases import plain

from seqpar_ring import layout
from seqpar_ring.schedule import Block, Move, Pieces, Traffic, Use, transpose
from seqpar_ring.schedule.render import render

HERE, THERE = Block(0, ((0, 3),)), Block(1, ((0, 1), (2, 4)))


def traffic_of(name: str, lengths: list[int], world: int, pieces: int = 1) -> Traffic:
    return plain(name, lengths, world)._replace(pieces=Pieces(pieces)).traffic()


def test_a_small_schedule_is_printed_in_full() -> None:
    uses = (Use(0, 0, HERE), Use(0, 1, THERE), Use(2, 0, THERE))
    traffic = Traffic(world=2, steps=3, uses=uses, kv=(Move(0, 2, 1, 0, THERE),))
    assert render(traffic).splitlines() == [
        "forward: 2 ranks, 3 steps, 3 uses, KV sent 1 times (3 rows)",
        "",
        "        step 0             step 1  step 2",
        "rank 0  0[0:3]             -       1[0:1 2:4]",
        "rank 1  1[0:1 2:4]         -       -",
        "        1[0:1 2:4] → 0 @2",
    ]


def test_a_backward_schedule_shows_gradients_on_their_way() -> None:
    text = render(transpose(traffic_of("contiguous", [2], 2), node=2))
    assert "backward: 2 ranks, 3 steps, 3 uses, KV sent 1 times (1 rows), dKV sent 1 times (1 rows)" in text
    assert "d 0[0:1] ⇒ 0" in text


def test_a_schedule_in_which_queries_travel_says_so() -> None:
    text = render(transpose(plain("striped", [12], 3).traffic("q"), node=3))
    assert text.startswith("backward, queries travel: 3 ranks, 4 steps, 9 uses, Q sent 6 times")
    assert "dQ sent 6 times" in text


def test_a_narrow_page_cuts_the_steps_into_bands_and_loses_none() -> None:
    text = render(traffic_of("zigzag", [41], 5, pieces=2), width=50)
    assert max(len(line) for line in text.splitlines()[1:]) <= 50
    assert re.findall(r"step (\d+)", text) == [str(step) for step in range(9)]


@given(
    name=st.sampled_from(sorted(layout.LAYOUTS)),
    lengths=st.lists(st.integers(1, 23), min_size=1, max_size=4),
    world=st.integers(1, 5),
    pieces=st.integers(1, 3),
)
def test_every_use_and_every_transfer_is_printed_once(name: str, lengths: list[int], world: int, pieces: int) -> None:
    for traffic in (forward := traffic_of(name, lengths, world, pieces), transpose(forward, node=world)):
        body = render(traffic, width=1 << 20).split("\n\n")[1]
        sends = re.findall(r"(d )?(\d+)\[([\d: ]+)\] [→⇒] (\d+)", body)
        blocks = re.findall(r"\d+\[[\d: ]+\]", body)
        assert sorted(sends) == sorted(
            (mark, str(move.block.owner), " ".join(f"{a}:{b}" for a, b in move.block.rows), str(move.dst))
            for mark, moves in (("", traffic.kv), ("d ", traffic.dkv))
            for move in moves
        )
        assert len(blocks) - len(sends) == len(traffic.uses)
