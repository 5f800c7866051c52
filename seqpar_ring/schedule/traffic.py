"""Traffic: who sends which rows to whom, and who uses them, at which step. Plain frozen data for the whole group.

This is the one description that the executor runs, the checker proves, the planner prices and the pictures draw. It
holds integers only, prints as itself (`eval(repr(t)) == t`) and hashes. It does not say which pairs of a tile are
allowed: a rank derives its kernel calls from the layout and the mask (`seqpar_ring.schedule.calls`).
"""

from __future__ import annotations

from typing import NamedTuple

from seqpar_ring.geometry import Rows


class Block(NamedTuple):
    """Rows of one rank's keys and values: `rows` of the memory of `owner`."""

    owner: int
    rows: Rows


class Use(NamedTuple):
    """At `step`, `rank` computes its queries against `block`."""

    step: int
    rank: int
    block: Block


class Move(NamedTuple):
    """A transfer of `block` from rank `src` to rank `dst`: posted at the start of step `post`, there at the start of
    `due`.

    A dKV move carries the gradient of the block's rows; it is added to what the receiver has.
    """

    post: int
    due: int
    src: int
    dst: int
    block: Block


class Traffic(NamedTuple):
    """One pass (forward, or backward when `dkv` is not empty) of a group of `world` ranks.

    `travels` says whose rows the blocks are: "kv", as the fields are named, or "q" in a backward pass in which queries
    and what belongs to them travel in place of keys, and dq returns in place of dKV.
    """

    world: int
    steps: int
    uses: tuple[Use, ...]
    kv: tuple[Move, ...]
    dkv: tuple[Move, ...] = ()
    travels: str = "kv"
