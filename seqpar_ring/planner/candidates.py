"""Candidates: the degrees, layouts, schedules and block sizes that could carry a sequence, in an order of preference.

What cannot be is left out with the reason; what is the same under another name is left out silently. Nothing is priced
here. The order counts where prices are equal: what is plain comes first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

from seqpar_ring.planner.hardware import Machine
from seqpar_ring.planner.job import Workload

PIECES, HOPS = (2, 4, 8), (2, 4)
"""Parts that a block may travel in, and blocks that may arrive together."""


class Degree(NamedTuple):
    """Ranks that share a sequence, ranks of them that share out the heads, and why that cannot be; "" where it can."""

    size: int
    heads: int
    why_not: str = ""

    @property
    def ring(self) -> int:
        """Ranks of the ring."""
        return self.size // self.heads


def sizes(gpus: int, workload: Workload, machine: Machine, asked: int | None) -> Iterator[Degree]:
    """Sizes of a sequence group, with one head degree each."""
    for size in divisors(gpus) if asked is None else [asked]:
        why = f"the sequence has {workload.tokens} tokens" if size > workload.tokens else ""
        if straddles(size, gpus, machine.node):
            why = f"a node has {machine.node} devices, and groups of {size} one after the other would be of two nodes"
        yield Degree(size, 1, why)


def straddles(size: int, gpus: int, node: int) -> bool:
    """Whether some groups of so many devices, one after the other, are of two nodes though one could hold them."""
    return size < node < gpus and node % size != 0


def head_degrees(size: int, workload: Workload, machine: Machine, asked: int | None) -> Iterator[Degree]:
    """Head degrees of a size."""
    model, node = workload.model, machine.node
    for heads in divisors(size) if asked is None else [asked]:
        why = ""
        if model.heads % heads:
            why = f"{model.heads} query heads cannot be shared out among {heads} ranks"
        elif model.kv_heads % heads and heads % model.kv_heads:
            why = f"{model.kv_heads} key heads cannot be shared out among {heads} ranks"
        elif heads > node:
            why = f"heads are exchanged all to all, and a node has {node} devices"
        elif size > node and node % heads:
            why = f"a node has {node} devices, and ranks that share heads would be of two nodes"
        yield Degree(size, heads, why)


def base(degree: Degree, workload: Workload, machine: Machine) -> dict[str, Any]:
    """The plainest settings of a degree: a ring of whole blocks."""
    many = len(workload.lengths) > 1
    layout = "packed" if many else "zigzag" if workload.causal else "contiguous"
    inside = degree.size <= machine.node or machine.node % degree.heads or degree.size % machine.node
    return {
        "size": degree.size,
        "heads": degree.heads,
        "layout": layout,
        "schedule": "ring",
        "block_tokens": "auto",
        "node": None if inside else machine.node,
    }


def details(degree: Degree, workload: Workload, machine: Machine) -> Iterator[Mapping[str, Any]]:
    """Other layouts, schedules and block sizes of a degree; the plainest first."""
    if degree.ring == 1:
        return
    many = len(workload.lengths) > 1
    layouts = ["zigzag" if workload.causal else "contiguous", *(["packed"] if many else [])]
    far = base(degree, workload, machine)["node"] is not None
    schedules = ["ring", *(["double_ring"] if far else []), "direct", "all_gather"]
    block = -(-workload.tokens // degree.ring)
    several = [block * h for h in HOPS if h < degree.ring]
    pieces = [-(-block // p) for p in PIECES if block >= 64 * p]
    blocks: list[int | str] = ["auto", *several, *pieces]
    for tokens, schedule, layout in product(blocks, schedules, reversed(layouts)):
        if schedule == "all_gather" and isinstance(tokens, int) and tokens < block:
            continue  # everything is posted at once, in however many pieces
        if many and layout == "zigzag" and (tokens, schedule) != ("auto", "ring"):
            continue  # sends more than packed in every schedule; one is enough to tell by how much
        yield {"layout": layout, "schedule": schedule, "block_tokens": tokens}


def divisors(n: int) -> list[int]:
    """All of them, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]
