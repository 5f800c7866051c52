"""Visits: in which order a block goes round the ranks. A schedule is one such function; all else is derived.

The ring is that of Ring Attention (arXiv 2310.01889), the double ring that of LoongTrain (arXiv 2406.18485) and
BurstAttention (arXiv 2403.09347), the all-gather that of Llama 3 (arXiv 2407.21783, section 3.3.2). Each takes `hops`:
how many blocks arrive, and are computed with, in one step. Nothing here knows masks, layouts or rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Visit(NamedTuple):
    """At `step` the block is at `rank`; it was posted at step `post` by rank `source`."""

    step: int
    rank: int
    post: int
    source: int


class Fabric(NamedTuple):
    """What an order of visits may depend on.

    Attributes:
        world: ranks of the ring.
        node: ranks of one node; consecutive, and dividing the world.
        hops: blocks that arrive together in one step.
    """

    world: int
    node: int
    hops: int = 1


Builder = Callable[[int, Fabric], list[Visit]]
"""(owner, fabric) -> the visits of that owner's block away from home, those that pass a block on first."""


def ring(direction: int) -> Builder:
    """Blocks travel to the next rank, one hop a step; with `hops` h in jumps of h ranks, h blocks a step.

    In jumps, a rank gets the blocks of its h - 1 nearest neighbours from themselves, and from then on in each step the
    h blocks that the rank h places before it had in the step before.
    """

    def visits(owner: int, fabric: Fabric) -> list[Visit]:
        return _ring(owner, list(_circle(owner, fabric.world, direction)), fabric.hops, 0)

    return visits


def double_ring(direction: int) -> Builder:
    """A ring within each node, and one between the nodes in which every rank has a partner: all links work at once.

    A block is passed to the next node when it begins its round in this one, so a whole inner round hides that transfer.
    """

    def visits(owner: int, fabric: Fabric) -> list[Visit]:
        world, node, hops = fabric
        out: list[Visit] = []
        length = _steps(node - 1, hops) + 1
        nodes, start = world // node, owner
        for round_ in range(nodes):
            first = round_ * length
            if round_:
                source, start = start, (start + direction * node) % world
                out.append(Visit(first, start, first - length, source))
            home = start // node * node
            circle = [home + (start - home + direction * i) % node for i in range(node)]
            out += _ring(start, circle, hops, first)
        return out

    return visits


def direct(owner: int, fabric: Fabric) -> list[Visit]:
    """Each rank gets what it needs from the rank that owns it, posted one step ahead."""
    steps = [(s - 1) // fabric.hops + 1 for s in range(1, fabric.world)]
    return [Visit(step, (owner + s) % fabric.world, step - 1, owner) for s, step in enumerate(steps, 1)]


def all_gather(owner: int, fabric: Fabric) -> list[Visit]:
    """As `direct`, with everything posted at once: memory for all blocks, and no transfer waits for a computation."""
    return [visit._replace(post=0) for visit in direct(owner, fabric)]


BUILDERS: dict[str, dict[str, Builder]] = {
    "all_gather": {"": all_gather},
    "direct": {"": direct},
    "double_ring": {"up": double_ring(1), "down": double_ring(-1)},
    "ring": {"up": ring(1), "down": ring(-1)},
}
"""Schedules by name, each with its variants; of the variants the one that sends the fewest rows is taken."""


def _circle(owner: int, world: int, direction: int) -> range | list[int]:
    return [(owner + direction * s) % world for s in range(world)]


def _ring(owner: int, circle: list[int], hops: int, first: int) -> list[Visit]:
    """Visits of the ranks of a circle, which begins at the owner (or where the block came in), in jumps of `hops`."""
    out = []
    for s in range(1, len(circle)):
        step = first + _steps(s, hops)
        out.append(Visit(step, circle[s], step - 1, circle[s - hops] if s >= hops else owner))
    return out


def _steps(s: int, hops: int) -> int:
    """The step of the visit at distance s: with jumps the h - 1 nearest come first, then h in each step."""
    return s if hops == 1 else s // hops + 1 if s else 0
