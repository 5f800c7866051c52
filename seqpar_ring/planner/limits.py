"""Limits: how many tokens a rank must hold so that computation hides a ring's transfers, as a formula with its source.

Ring Attention (arXiv 2310.01889, section 3) asks of a block of c tokens that computing with it takes as long as the
next one takes to come: c >= F / B for as many key heads as query heads in 16 bits, F in FLOP per second and B in
bytes per second. With H query and G key heads it is F G / (B H); a causal zigzag computes half of each block, hence
twice as many tokens: 2 F / (g B), g = H / G. In backward gradients return as well, and there is 2.5 times as much to
compute.
"""

from __future__ import annotations

from typing import NamedTuple

from seqpar_ring.planner.hardware import BACKWARD, Attention, Link
from seqpar_ring.schedule import Row


class Enough(NamedTuple):
    """Tokens a rank from which on transfers hide, in each pass."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        """For both passes."""
        return max(self)


def overlap_tokens(row: Row, paces: Attention, link: Link, node: int, causal: bool = True) -> Enough:
    """From how many tokens a rank on one hop of a ring hides under one step's computation.

    Args:
        row: heads of the layer.
        paces: of the device; only the rates of large blocks count here.
        link: over which the hop goes.
        node: devices of a node, some of which may share the link.
        causal: whether half of each block is masked.
    """
    bandwidth = link.bandwidth / min(link.shared_by, node)
    travels = row.cheaper(1, 1)
    flop = row.heads * (row.head_dim + row.value_dim) * (1.0 if causal else 2.0)
    forward = row.out("kv") * paces.forward.rate / (flop * bandwidth)
    backward = row.both(travels) * paces.backward.rate / (BACKWARD * flop * bandwidth)
    return Enough(forward, backward)
