"""Timetable: the step of each visit, and of a rank's own rows, where blocks travel in pieces.

A builder says in which order a block goes round; this says when, for all pieces of it. Pieces go round two by two, a
step of one and a step of the other in turn, so that each transfer has two computations to hide under and a link always
has the next one waiting. A rank computes with its own rows three times: with half of them before anything has arrived,
with most of the rest half way, and with the last of them at the end, when gradients are on their way home. Whole
blocks go one step after the other, and own rows come first. It knows no mask, layout or schedule by name.
"""

from __future__ import annotations

from typing import NamedTuple

AHEAD = 2
"""Computations that a transfer of a piece may take."""


class Own(NamedTuple):
    """At `step` every rank computes with the pieces `first .. end` of its own rows."""

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


def timetable(pieces: int, visits: int) -> Timetable:
    """The timetable of so many pieces, each of which visits others in so many steps."""
    if pieces == 1:
        return Timetable((Own(0, 0, 1),), (1,), (1,))
    half = pieces // 2
    middle = half + half % 2  # pairs are not parted
    own, first, stride, step = [], [], [], 0
    for pair in range(0, pieces, 2):
        if pair == 0:
            own.append(Own(step, 0, half))
            step += 1
        if pair == middle and half < pieces - 1:
            own.append(Own(step, half, pieces - 1))
            step += 1
        together = min(2, pieces - pair)
        first += [step + i for i in range(together)]
        stride += [together] * together
        step += together * visits
    own.append(Own(step, pieces - 1, pieces))
    return Timetable(tuple(own), tuple(first), tuple(stride), AHEAD)
