"""Layouts: which rank holds which tokens, as runs.

A layout takes any document lengths: nothing needs to be divisible by anything, ranks may hold unequal counts, and a
rank may hold nothing. One rule orders every rank's memory: by document, then by position; so whatever a rank computes
with is a slice. A layout says where tokens lie and nothing about who sends what.

Zigzag is the balanced causal layout of ring attention implementations (2W chunks, rank r holds chunks r and 2W-1-r);
striped is that of Striped Attention (arXiv 2311.09431).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from seqpar_ring.errors import ConfigError, PlanError, did_you_mean
from seqpar_ring.geometry import Run

Layout = tuple[tuple[Run, ...], ...]
"""For each rank its runs, in memory order."""

Piece = tuple[int, int, int, int]
"""(document, start, count, step), before it has a place in memory."""


def contiguous(lengths: Sequence[int], world: int) -> Layout:
    """The tokens of all documents in a row, cut into `world` nearly equal parts. Unbalanced under a causal mask."""
    pieces: list[list[Piece]] = [[] for _ in range(world)]
    border = _borders(sum(lengths), world, 0)
    base = 0
    for doc, n in enumerate(lengths):
        for r in range(world):
            a, b = max(border[r], base), min(border[r + 1], base + n)
            if a < b:
                pieces[r].append((doc, a - base, b - a, 1))
        base += n
    return _place(pieces)


def zigzag(lengths: Sequence[int], world: int) -> Layout:
    """Each document in 2 * world chunks; rank r has chunks r and 2 * world - 1 - r: equal work under a causal mask."""
    pieces: list[list[Piece]] = [[] for _ in range(world)]
    base = 0
    for doc, n in enumerate(lengths):
        if world == 1:
            pieces[0].append((doc, 0, n, 1))
            continue
        # The phase turns the places of the odd tokens from document to document: a plain floor would give a thousand
        # one-token documents all to rank 0.
        border = _borders(n, 2 * world, base % (2 * world))
        for r in range(world):
            for c in (r, 2 * world - 1 - r):
                pieces[r].append((doc, border[c], border[c + 1] - border[c], 1))
        base += n
    return _place(pieces)


def striped(lengths: Sequence[int], world: int) -> Layout:
    """Every world-th token; the stripes run on through all documents, so counts differ by one at most."""
    pieces: list[list[Piece]] = [[] for _ in range(world)]
    base = 0
    for doc, n in enumerate(lengths):
        for r in range(world):
            first = (r - base) % world
            if first < n:
                pieces[r].append((doc, first, (n - first + world - 1) // world, world))
        base += n
    return _place(pieces)


LAYOUTS: dict[str, Callable[[Sequence[int], int], Layout]] = {
    "contiguous": contiguous,
    "striped": striped,
    "zigzag": zigzag,
}
"""All layouts by name. A new layout is a function and a line here."""


def make(name: str, lengths: Sequence[int], world: int) -> Layout:
    """The layout of this name.

    Raises:
        ConfigError: no layout has this name.
        PlanError: no document, or one without tokens.
    """
    if name not in LAYOUTS:
        raise ConfigError("unknown layout", fix=did_you_mean(name, LAYOUTS), layout=name)
    if not lengths or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in lengths):
        raise PlanError(
            "document lengths must be whole numbers of at least 1",
            fix="Leave out empty documents; give plain integers.",
            lengths=tuple(lengths),
        )
    return LAYOUTS[name](lengths, world)


def tokens(layout: Layout) -> tuple[int, ...]:
    """How many tokens each rank holds."""
    return tuple(sum(run.n for run in runs) for runs in layout)


def offsets(lengths: Sequence[int]) -> tuple[int, ...]:
    """Where each document begins in the whole sequence."""
    out, base = [], 0
    for n in lengths:
        out.append(base)
        base += n
    return tuple(out)


def positions(runs: Sequence[Run]) -> Iterator[tuple[int, int]]:
    """(document, position) of each of a rank's rows, in memory order."""
    for run in runs:
        for i in range(run.n):
            yield run.doc, run.start + i * run.step


def _borders(length: int, parts: int, phase: int) -> list[int]:
    return [(length * c + phase) // parts for c in range(parts + 1)]


def _place(pieces: list[list[Piece]]) -> Layout:
    ranks = []
    for mine in pieces:
        at, runs = 0, []
        for doc, start, n, step in sorted(mine):
            if n:
                runs.append(Run(doc, start, n, step, at))
                at += n
        ranks.append(tuple(runs))
    return tuple(ranks)
