"""The route of some settings: what a plan runs and what the planner prices are one and the same."""

from __future__ import annotations

from typing import Any

import pytest
from test_flows import of_flows, of_traffic

from seqpar_ring import SequenceParallel
from seqpar_ring import layout as layouts
from seqpar_ring.config import Settings
from seqpar_ring.geometry import Mask
from seqpar_ring.schedule import Fabric, Granularity, Route, Sides, Traffic, check
from seqpar_ring.testing import run_lockstep

LENGTHS = [37, 5, 22]
SETTINGS: list[dict[str, Any]] = [
    {"size": 1},
    {"size": 3},
    {"size": 4, "layout": "packed", "schedule": "direct"},
    {"size": 4, "heads": 2, "block_tokens": 6},
    {"size": 4, "schedule": "double_ring", "node": 2},
    {"size": 4, "layout": "striped", "schedule": "all_gather", "block_tokens": 40},
    {"size": 4, "layout": "contiguous", "block_tokens": 4, "node": 2},
    {"size": 8, "heads": 2, "node": 4, "schedule": "double_ring"},
]


def route_of(settings: Settings, lengths: list[int], mask: Mask) -> Route:
    """The route as the planner makes it: from settings and lengths, without ranks."""
    layout = layouts.make(settings.layout, lengths, settings.size // settings.heads)
    return Route.of(settings, Sides(layout, layout, mask.regions(lengths)))


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("asked", SETTINGS, ids=str)
def test_a_plan_runs_what_the_route_of_its_settings_says(asked: dict[str, Any], window: int | None) -> None:
    def planned(sp: SequenceParallel) -> tuple[Traffic, Traffic, Traffic]:
        plan = sp.plan(LENGTHS, window=window)
        return plan.schedule, plan.backward_schedule, plan.query_schedule

    route = route_of(Settings(**asked), LENGTHS, Mask(window=window))
    others = {key: value for key, value in asked.items() if key != "size"}
    expected = (route.forward()[0], route.backward(), route.backward("q"))
    assert run_lockstep(planned, world=asked["size"], **others) == [expected] * asked["size"]


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("asked", SETTINGS, ids=str)
def test_every_pair_is_computed_once_whichever_side_travels(asked: dict[str, Any], window: int | None) -> None:
    route = route_of(Settings(**asked), LENGTHS, Mask(window=window))
    for traffic in (route.forward()[0], route.backward(), route.backward("q")):
        check(traffic, route.sides)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("asked", SETTINGS, ids=str)
def test_its_columns_are_its_tuples(asked: dict[str, Any], window: int | None) -> None:
    route = route_of(Settings(**asked), LENGTHS, Mask(window=window))
    for travels in ("kv", "q"):
        needs, back = route.needs(travels), route.needs(travels, backward=True)
        assert of_flows(route.flows(travels=travels), needs) == of_traffic(route.forward(travels)[0], needs)
        assert of_flows(route.flows(True, travels), back) == of_traffic(route.backward(travels), back)


@pytest.mark.parametrize(
    ("asked", "fabric", "granularity"),
    [
        ({"size": 4}, Fabric(4, 4, 1), Granularity()),
        ({"size": 4, "node": 2}, Fabric(4, 2, 1), Granularity()),
        ({"size": 4, "block_tokens": 8}, Fabric(4, 4, 1), Granularity(pieces=2)),
        ({"size": 4, "block_tokens": 32}, Fabric(4, 4, 2), Granularity(hops=2)),
        ({"size": 4, "block_tokens": 999}, Fabric(4, 4, 3), Granularity(hops=3)),
        ({"size": 8, "heads": 2, "node": 4}, Fabric(4, 2, 1), Granularity()),
        ({"size": 8, "heads": 4, "node": 2}, Fabric(2, 1, 1), Granularity()),
        ({"size": 8, "heads": 8}, Fabric(1, 1, 1), Granularity()),
    ],
    ids=str,
)
def test_ranks_that_share_heads_count_once_in_the_ring_and_in_its_nodes(
    asked: dict[str, Any], fabric: Fabric, granularity: Granularity
) -> None:
    ring = asked["size"] // asked.get("heads", 1)
    route = route_of(Settings(**asked), [16 * ring], Mask())
    assert (route.fabric, route.granularity) == (fabric, granularity)


def test_blocks_are_cut_by_the_keys_in_both_passes() -> None:
    q, k = layouts.make("zigzag", [64], 4), layouts.make("zigzag", [16], 4, least=0)
    sides = Sides(q, k, Mask(causal=False).regions([64], [16]))
    route = Route.of(Settings(size=4, block_tokens=2), sides)
    assert route.granularity.pieces == 2
    assert route.needs("q", backward=True).pieces == route.needs("kv", backward=True).pieces == 2
    assert route.needs("q").pieces == route.needs("kv").pieces == 3
