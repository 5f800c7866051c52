"""Route: how the blocks of some documents go round a group, as its settings ask for it.

What a plan runs and what the planner prices is made here for both: the plan takes it as tuples for the ranks that run
it, the planner as columns. It decides nothing itself; layouts, needs and orders of visits do.
"""

from __future__ import annotations

from typing import NamedTuple

from seqpar_ring.config import Settings
from seqpar_ring.schedule.build import Granularity, choose
from seqpar_ring.schedule.flows import Flows, flows, return_flows
from seqpar_ring.schedule.needs import Needs
from seqpar_ring.schedule.pieces import Pieces
from seqpar_ring.schedule.timetable import AHEAD
from seqpar_ring.schedule.traffic import Traffic
from seqpar_ring.schedule.transpose import transpose
from seqpar_ring.schedule.visits import Fabric
from seqpar_ring.schedule.work import Sides


class Route(NamedTuple):
    """The way of the blocks.

    Attributes:
        sides: layouts of queries and keys over the ring, and the mask.
        granularity: in how many pieces a block travels, or how many blocks arrive together.
        pieces: how blocks are cut in backward; in forward with a taper.
        fabric: ranks of the ring, ranks of a node, blocks a step.
        schedule: the name of the order of visits.
    """

    sides: Sides
    granularity: Granularity
    pieces: Pieces
    fabric: Fabric
    schedule: str

    @staticmethod
    def of(settings: Settings, sides: Sides) -> Route:
        """The route of these settings."""
        ring = len(sides.k)
        asked = None if settings.block_tokens == "auto" else settings.block_tokens
        granularity = Granularity.of(asked, max(sides.k.sizes), ring)
        node = max(1, (settings.node or settings.size) // settings.head_degree)
        pieces = Pieces(granularity.pieces, settings.cut)
        return Route(sides, granularity, pieces, Fabric(ring, min(node, ring), granularity.hops), settings.schedule)

    def cut(self, backward: bool) -> Pieces:
        """How blocks are cut in a pass."""
        return self.pieces if backward else self.pieces.with_taper()

    def needs(self, travels: str = "kv", backward: bool = False) -> Needs:
        """What the ranks need of each other where keys travel, or queries."""
        q, k, regions = self.sides
        if travels == "q":
            return Needs(k, q, regions.transposed(), self.cut(backward))
        return Needs(q, k, regions, self.cut(backward))

    def forward(self, travels: str = "kv") -> tuple[Traffic, str]:
        """The forward traffic, and why this variant of the schedule."""
        return choose(self.schedule, self.needs(travels), self.fabric, travels)

    def backward(self, travels: str = "kv") -> Traffic:
        """The backward traffic in which keys travel, or queries."""
        outward, _ = choose(self.schedule, self.needs(travels, backward=True), self.fabric, travels, returns=True)
        return transpose(outward, self.fabric.node, self._flight)

    def returned(self, forward: Traffic) -> Traffic:
        """The backward traffic of what travelled this route in forward; of whole blocks without building it anew."""
        if self.granularity.pieces > 1:
            return self.backward(forward.travels)
        return transpose(forward, self.fabric.node, self._flight)

    def flows(self, backward: bool = False, travels: str = "kv") -> Flows:
        """The same as columns."""
        outward = flows(self.schedule, self.needs(travels, backward), self.fabric, travels, returns=backward)
        return return_flows(outward, self.fabric.node, self._flight) if backward else outward

    @property
    def _flight(self) -> int:
        return AHEAD if self.granularity.pieces > 1 else 1
