"""The bytes of a row on its way: what the rules say is what a run sends, rank by rank, in each pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_route import route_of

from seqpar_ring import SequenceParallel, ring_attention
from seqpar_ring.config import Settings
from seqpar_ring.geometry import Mask
from seqpar_ring.schedule import Flows, Row
from seqpar_ring.testing import run_lockstep

LENGTHS, BATCH = [23, 6, 14], 2
Sent = tuple[dict[str, int], dict[str, int]]
"""Bytes by lane, of the forward and of the backward pass."""


def sent_by(flows: Flows, row: Row, backward: bool) -> list[dict[str, int]]:
    """Bytes that each rank sends in a pass, by lane, as a planner adds them up."""
    what = flows.travels
    lanes = {"kv": (flows.kv, row.out(what))} | ({"dkv": (flows.dkv, row.home(what))} if backward else {})
    rows = {lane: np.bincount(moves.src, moves.rows, flows.world) for lane, (moves, _) in lanes.items()}
    each = {lane: (rows[lane] * lanes[lane][1] * BATCH).astype(int).tolist() for lane in lanes}
    return [{lane: each[lane][rank] for lane in each if each[lane][rank]} for rank in range(flows.world)]


def run(row: Row, asked: dict[str, Any], window: int | None) -> list[Sent]:
    """Bytes that each rank sent in a forward and a backward pass of attention."""
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[row.itemsize]

    def body(sp: SequenceParallel) -> Sent:
        plan = sp.plan(LENGTHS, window=window)
        torch.manual_seed(sp.rank)
        shapes = [(row.heads, row.head_dim), (row.kv_heads, row.head_dim), (row.kv_heads, row.value_dim)]
        q, k, v = (torch.randn(BATCH, plan.local_tokens, *s, dtype=dtype, requires_grad=True) for s in shapes)
        sp.reset_report()
        out = ring_attention(q, k, v, plan)
        forward = sp.report().bytes_sent
        sp.reset_report()
        out.sum().backward()
        return forward, sp.report().bytes_sent

    return run_lockstep(body, world=asked["size"], **{k: v for k, v in asked.items() if k != "size"})


@pytest.mark.parametrize(
    ("row", "asked", "window"),
    [
        (Row(4, 2, 8, 8, 8), {"size": 3}, None),
        (Row(4, 2, 8, 8, 2), {"size": 4, "block_tokens": 5}, None),
        (Row(4, 4, 8, 12, 4), {"size": 3, "backward": "q"}, None),
        (Row(4, 1, 16, 8, 8), {"size": 4, "backward": "q", "layout": "striped", "schedule": "direct"}, None),
        (Row(2, 2, 8, 8, 2), {"size": 4, "layout": "packed", "schedule": "all_gather"}, 9),
        (Row(2, 1, 8, 8, 4), {"size": 4, "schedule": "double_ring", "node": 2}, None),
        (Row(2, 1, 8, 8, 8), {"size": 4, "layout": "contiguous", "block_tokens": 40, "node": 2}, 9),
    ],
    ids=str,
)
def test_a_run_sends_the_bytes_that_the_rules_add_up_to(row: Row, asked: dict[str, Any], window: int | None) -> None:
    route = route_of(Settings(**asked), LENGTHS, Mask(window=window))
    default = row.cheaper(sum(LENGTHS), sum(LENGTHS))
    travels = asked.get("backward", default)
    forward = sent_by(route.flows(), row, backward=False)
    backward = sent_by(route.flows(backward=True, travels=travels), row, backward=True)
    found = run(row, asked, window)
    # A double ring has lanes of its own between nodes; what is counted here is what a rank sends, on whichever lane.
    assert [merged(f) for f, _ in found] == forward
    assert [merged(b) for _, b in found] == backward
    assert sum(map(len, forward)), "nothing was sent"
    # The fault: a rule that forgets that gradients are wide, or that a value may be wider than a key.
    wrong = row._replace(itemsize=row.itemsize + 1), row._replace(value_dim=row.value_dim + 1)
    assert all(sent_by(route.flows(), other, backward=False) != forward for other in wrong)


def merged(lanes: dict[str, int]) -> dict[str, int]:
    """Bytes by what they are, near and far together; nothing sent is no entry."""
    total: dict[str, int] = {}
    for lane, size in lanes.items():
        if size and lane.split("_")[0] in ("kv", "dkv"):
            total[lane.split("_")[0]] = total.get(lane.split("_")[0], 0) + size
    return total


def test_where_heads_are_shared_out_each_ring_sends_its_share() -> None:
    row, asked = Row(4, 2, 8, 8, 8), {"size": 4, "heads": 2}
    route = route_of(Settings(**asked), LENGTHS, Mask())
    backward = sent_by(route.flows(backward=True), row.shared(2), backward=True)
    # Heads are exchanged on the lane of keys and values too; gradients have theirs to themselves.
    assert [b.get("dkv", 0) for _, b in run(row, asked, None)] == [backward[rank // 2]["dkv"] for rank in range(4)]


@pytest.mark.parametrize(
    ("row", "heads", "share"),
    [
        (Row(32, 8, 128, 128, 2), 4, Row(8, 2, 128, 128, 2)),
        (Row(32, 2, 128, 128, 2), 8, Row(4, 1, 128, 128, 2)),
        (Row(9, 3, 64, 64, 2), 2, Row(5, 2, 64, 64, 2)),
        (Row(9, 3, 64, 64, 2), 1, Row(9, 3, 64, 64, 2)),
    ],
)
def test_a_share_of_the_heads_is_the_largest_and_has_a_key_head(row: Row, heads: int, share: Row) -> None:
    assert row.shared(heads) == share


def test_the_bytes_of_a_row_are_these() -> None:
    llama = Row(32, 8, 128, 128, 2)
    assert (llama.out("kv"), llama.home("kv")) == (8 * 2 * 256, 8 * 4 * 256)
    assert (llama.out("q"), llama.home("q")) == (32 * (2 * 256 + 8), 32 * 4 * 128)
    assert llama.both("kv") == 12 * 8 * 128, "12 G D"
    assert llama.both("q") == 8 * 32 * 128 + 8 * 32, "8 H D + 8 H"
    assert llama.wide == 4
    assert Row(1, 1, 1, 1, 8).wide == 8


def test_queries_travel_where_they_are_fewer_bytes() -> None:
    many, few = Row(32, 32, 128, 128, 2), Row(32, 8, 128, 128, 2)
    assert many.cheaper(100, 100) == "q", "as many key heads as query heads: 8 H D + 8 H against 12 H D"
    assert few.cheaper(100, 100) == "kv"
    assert few.cheaper(100, 1000) == "q", "few queries and many keys"
    assert many.cheaper(0, 0) == "kv"
