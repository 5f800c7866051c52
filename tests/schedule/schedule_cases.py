"""Masks, layouts and schedules for the tests of this folder, drawn at random or listed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hypothesis import strategies as st

from seqpar_ring import layout as layouts
from seqpar_ring import schedule
from seqpar_ring.geometry import Mask
from seqpar_ring.schedule import BUILDERS, CUTS, Fabric, Granularity, Needs, Pieces, Sides, Traffic

lengths = st.lists(st.integers(1, 30), min_size=1, max_size=6)
worlds = st.sampled_from([1, 2, 3, 4, 6, 8])


@st.composite
def masks(draw: st.DrawFn, documents: int | None = None) -> Mask:
    """Any mask; those that say something by document only where their number is known."""
    kind = draw(st.sampled_from(["full", "causal", "window", "two-sided", "chunk", "prefix", "each"]))
    size = st.integers(1, 50)
    if kind == "each":
        if documents is None:
            return Mask()
        return Mask(window=tuple(draw(st.lists(st.none() | size, min_size=documents, max_size=documents))))
    made = {
        "full": lambda: Mask(causal=False),
        "causal": Mask,
        "window": lambda: Mask(window=draw(size)),
        "two-sided": lambda: Mask(causal=False, window=(draw(size) - 1, draw(size) - 1)),
        "chunk": lambda: Mask(chunk=draw(size), window=draw(st.none() | size)),
        "prefix": lambda: Mask(prefix=1),
    }
    return made[kind]()


class Drawn(NamedTuple):
    """One group's problem: where queries and keys lie, the mask, and the way the blocks go."""

    sides: Sides
    name: str
    fabric: Fabric
    pieces: Pieces

    def traffic(self, travels: str = "kv", returns: bool = False) -> Traffic:
        """The traffic without gradients, with keys or queries travelling."""
        q, k, regions = self.sides
        home, cargo, mask = (q, k, regions) if travels == "kv" else (k, q, regions.transposed())
        return schedule.choose(self.name, Needs(home, cargo, mask, self.pieces), self.fabric, travels, returns)[0]


@st.composite
def problems(draw: st.DrawFn) -> Drawn:
    """Documents, a mask, a layout of queries (and another of keys in cross-attention), a schedule."""
    n, world = draw(lengths), draw(worlds)
    name = draw(st.sampled_from(sorted(layouts.LAYOUTS)))
    q = k = layouts.make(name, n, world)
    if draw(st.integers(0, 4)) == 0:
        keys = draw(st.lists(st.integers(0, 30), min_size=len(n), max_size=len(n)))
        k = layouts.make(name, keys, world, least=0)
        regions = Mask(causal=False).regions(n, keys)
    else:
        regions = draw(masks(len(n))).regions(n)
    node = draw(st.sampled_from([d for d in (1, 2, 3, 4, 8) if world % d == 0]))
    pieces, hops = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2), (1, 3), (1, 7)]))
    cut = Pieces(pieces, draw(st.sampled_from(CUTS)))
    return Drawn(
        Sides(q, k, regions),
        draw(st.sampled_from(sorted(BUILDERS))),
        Fabric(world, node, hops),
        cut.with_taper() if draw(st.booleans()) else cut,
    )


def plain(
    name: str,
    lengths: Sequence[int],
    world: int,
    mask: Mask | None = None,
    how: str = "ring",
    cut: str = "even",
    **options: int,
) -> Drawn:
    """A problem of self-attention with the settings that one would write down."""
    layout = layouts.make(name, lengths, world)
    size = Granularity.of(options.get("block_tokens"), max(layout.sizes), world)
    fabric = Fabric(world, options.get("node", world), size.hops)
    return Drawn(Sides(layout, layout, (mask or Mask()).regions(lengths)), how, fabric, Pieces(size.pieces, cut))
