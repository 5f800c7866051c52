"""A simulated pass against times worked out by hand: what hides, what queues, what is shared."""

from __future__ import annotations

import numpy as np
import pytest

from seqpar_ring import layout as layouts
from seqpar_ring.config import Settings
from seqpar_ring.geometry import Mask
from seqpar_ring.planner.hardware import Attention, Device, Link, Machine, Pace
from seqpar_ring.planner.simulate import Place, Run, simulate
from seqpar_ring.schedule import Flows, Route, Sides

PACE = Pace(rate=1e12)
DEVICE = Device(
    name="a device",
    source="made up",
    peak=1e12,
    matmul=1e12,
    attention={"bf16": Attention(forward=PACE, backward=PACE)},
    memory=1e9,
    bandwidth=1e12,
    node=2,
)


def link(bandwidth: float, latency: float = 0.0, shared_by: int = 1, steals: float = 0.0) -> Link:
    return Link(name="l", source="made up", bandwidth=bandwidth, latency=latency, shared_by=shared_by, steals=steals)


def flows(world: int, backward: bool = False, tokens: int = 0, mask: Mask | None = None, **settings: object) -> Flows:
    """The traffic of a contiguous layout of 10 tokens a rank, everything seen, so that every hop is 10 rows."""
    lengths = (tokens or 10 * world,)
    chosen = Settings.parse({"size": world, "layout": "contiguous", **settings})
    side = layouts.make(chosen.layout, lengths, world)
    route = Route.of(chosen, Sides(side, side, (mask or Mask(causal=False)).regions(lengths)))
    return route.flows(backward, "kv")


def run(traffic: Flows, seconds: float, *, inner: Link, outer: Link | None = None, node: int = 64, **place: int) -> Run:
    """Every step in which a rank computes takes so many seconds; a row is 1 byte, and 2 where gradients return."""
    machine = Machine(device=DEVICE.model_copy(update={"node": node}), inner=inner, outer=outer or inner)
    compute = np.zeros((traffic.steps + 1, traffic.world))
    compute[traffic.uses.step, traffic.uses.rank] = seconds
    where = Place(machine, place.get("heads", 1), place.get("size", traffic.world * place.get("heads", 1)))
    return simulate(traffic, compute, (1.0, 2.0), where)


def test_a_hop_that_is_shorter_than_a_step_hides() -> None:
    assert run(flows(4), 1.0, inner=link(20)).seconds == pytest.approx(4.0)
    assert run(flows(4), 1.0, inner=link(10)).seconds == pytest.approx(4.0)


def test_of_a_longer_hop_the_rest_shows_at_every_step() -> None:
    done = run(flows(4), 1.0, inner=link(5))
    assert done.seconds == pytest.approx(3 * 2.0 + 1.0)
    assert done.waiting == pytest.approx(3.0)
    assert done.computing == pytest.approx(4.0)


def test_latency_comes_with_every_hop() -> None:
    assert run(flows(4), 1.0, inner=link(10, latency=0.5)).seconds == pytest.approx(3 * 1.5 + 1.0)


def test_gradients_share_the_link_with_what_follows_them() -> None:
    """Steps 0 to 3 compute; dkv leaves with step 1's kv at step 1, and the last comes home after the last step."""
    done = run(flows(2, backward=True), 1.0, inner=link(10))
    # kv 1 s hides under step 0; the gradient of step 1, 20 bytes, is sent after it and nothing hides it.
    assert done.seconds == pytest.approx(2.0 + 2.0)


def test_what_is_posted_together_shares_a_link_evenly() -> None:
    """An all-gather's three blocks of 10 bytes leave at once, and all are through when 30 bytes are."""
    done = run(flows(4, schedule="all_gather"), 0.0, inner=link(10))
    assert done.moves[1] == pytest.approx(np.full(12, 3.0))
    assert run(flows(4, schedule="direct"), 0.0, inner=link(10)).seconds == pytest.approx(3.0)


def test_of_two_that_share_a_link_the_shorter_is_through_first() -> None:
    """12 rows over 3 ranks, causal and contiguous: the ring sends upwards only; with 8 + 4 bytes shares show."""
    traffic = flows(3, schedule="all_gather")
    rows = np.where(traffic.kv.dst > traffic.kv.src, 4, 8)
    uneven = traffic._replace(kv=traffic.kv._replace(rows=rows))
    done = run(uneven, 0.0, inner=link(4))
    of_first = {
        int(dst): end for src, dst, end in zip(uneven.kv.src, uneven.kv.dst, done.moves[1], strict=True) if src == 1
    }
    # Rank 1 sends 4 bytes up and 8 down at 4 bytes/s: shared until 2 s, then the rest of the long one alone until 3 s;
    # where they arrive, rank 0 gets 8 + 8 and rank 2 gets 4 + 4.
    assert of_first == {0: pytest.approx(4.0), 2: pytest.approx(2.0)}


def test_links_within_a_node_and_between_nodes_are_told_apart() -> None:
    fast, slow = link(100), link(5)
    ring = run(flows(4), 1.0, inner=fast, outer=slow, node=2)
    assert ring.seconds == pytest.approx(3 * 2.0 + 1.0), "every hop waits for the one between nodes"
    double = run(flows(4, schedule="double_ring", node=2), 1.0, inner=fast, outer=slow, node=2)
    assert double.seconds == pytest.approx(4.0), "an inner round of two steps hides the hop between nodes"


def test_a_link_that_a_node_shares_is_as_slow_as_all_its_traffic() -> None:
    """In a double ring both ranks of a node send 10 bytes to the other node, over one link or each over its own."""
    traffic = flows(4, schedule="double_ring", node=2)
    own = run(traffic, 0.0, inner=link(1e9), outer=link(10), node=2)
    shared = run(traffic, 0.0, inner=link(1e9), outer=link(10, shared_by=2), node=2)
    assert (own.seconds, shared.seconds) == (pytest.approx(1.0), pytest.approx(2.0))


def test_ranks_that_share_heads_send_the_like_over_a_shared_link() -> None:
    """Four places of a ring, two devices each: a node of 4 holds two places, its link carries both devices' hops."""
    traffic = flows(4)
    alone = run(traffic, 0.0, inner=link(1e9), outer=link(10), node=4, heads=2)
    shared = run(traffic, 0.0, inner=link(1e9), outer=link(10, shared_by=4), node=4, heads=2)
    assert alone.seconds == pytest.approx(3.0)
    assert shared.seconds == pytest.approx(6.0)


def test_transfers_take_what_they_steal_from_computation() -> None:
    done = run(flows(2), 1.0, inner=link(20, steals=0.5))
    assert done.seconds == pytest.approx(1.0 + 0.5 * 0.5 + 1.0)


def test_a_rank_that_is_late_is_waited_for() -> None:
    """Only rank 0 computes long; the others wait for it where it sends or receives."""
    traffic = flows(3)
    compute = np.zeros((traffic.steps + 1, 3))
    compute[0, 0] = 5.0
    machine = Machine(device=DEVICE, inner=link(10), outer=link(10))
    done = simulate(traffic, compute, (1.0, 0.0), Place(machine, 1, 3))
    assert done.seconds == pytest.approx(6.0)
    assert done.begin[2] == pytest.approx([6.0, 6.0, 6.0])


def test_one_rank_alone_only_computes() -> None:
    assert run(flows(1), 1.5, inner=link(1)).seconds == pytest.approx(1.5)


def test_a_rank_without_tokens_costs_nothing() -> None:
    done = run(flows(4, tokens=2), 1.0, inner=link(1e9))
    assert done.seconds == pytest.approx(2.0, abs=1e-6)


def test_messages_of_one_step_between_the_same_ranks_follow_each_other() -> None:
    pieces = flows(2, block_tokens=5)  # 4 rows, 2 and 4
    assert pieces.kv.post.tolist() == [0, 0, 0, 0, 2, 2]
    ends = dict(zip(pieces.kv.piece.tolist(), run(pieces, 0.0, inner=link(10)).moves[1].tolist(), strict=True))
    assert ends == pytest.approx({0: 0.4, 1: 0.6, 2: 1.0}), "the first does not share with the second"
