"""Timetable: the step of each visit, and of a rank's own rows, where blocks travel in pieces.

A builder says in which order a block goes round; this says when, for all pieces of it. Pieces go round two by two, a
step of one and a step of the other in turn, so that each transfer has two computations to hide under and a link always
has the next one waiting. A rank's own rows are shared out among the pairs, each of which has its share before it, so
that the link never waits for a long computation in between. A forward pass ends with what came last: nothing of its own
is left by then. A pass whose gradients return keeps a part of its own rows for the time in which the last gradients are
on their way home: under a causal mask the one with the most work, which of keys is the first, of queries the last.
Whole blocks go one step after the other, and own rows come first. It knows no layout or schedule by name.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

AHEAD = 2
"""Computations that a transfer of a piece may take."""


class Own(NamedTuple):
    """At `step` every rank computes with the parts `first .. end` of its own rows, which are as many as pieces."""

    step: int
    first: int
    end: int


class Timetable(NamedTuple):
    """When which piece of all blocks is where.

    Attributes:
        own: the computations with own rows.
        first: of each piece, the step of the visits that a builder counts as its step 1.
        stride: of each piece, steps from one such visit to the next.
        ahead: steps that a piece leaves its owner before the first of them.
    """

    own: tuple[Own, ...]
    first: tuple[int, ...]
    stride: tuple[int, ...]
    ahead: int = 1

    def step(self, piece: int, step: int) -> int:
        """The step that a builder counts as `step` for this piece; 0 is its departure."""
        if step == 0:
            return max(0, self.first[piece] - self.ahead)
        return self.first[piece] + self.stride[piece] * (step - 1)


def timetable(pieces: int, visits: int, returning: str | None = None) -> Timetable:
    """The timetable of so many pieces, each of which visits others in so many steps.

    Args:
        pieces: of each block.
        visits: steps.
        returning: what travels, "kv" or "q", in a pass in which gradients return; None: none do.
    """
    if pieces == 1:
        return Timetable((Own(0, 0, 1),), (1,), (1,))
    pairs = -(-pieces // 2)
    shared = pieces if returning is None else pieces - 1
    shares = [-(-shared * i // pairs) for i in range(pairs + 1)]  # the earlier the larger, where they differ
    own, first, stride, step = [], [], [], 0
    for pair, (begin, end) in enumerate(pairwise(shares)):
        own.append(Own(step, pieces - end, pieces - begin) if returning == "kv" else Own(step, begin, end))
        step += 1
        together = min(2, pieces - 2 * pair)
        first += [step + i for i in range(together)]
        stride += [together] * together
        step += together * visits
    if returning is not None:
        own.append(Own(step, 0, 1) if returning == "kv" else Own(step, pieces - 1, pieces))
    return Timetable(tuple(own), tuple(first), tuple(stride), AHEAD)
