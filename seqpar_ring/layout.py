"""Layouts: which rank holds which tokens, as runs.

A layout takes any document lengths: nothing needs to be divisible by anything, ranks may hold unequal counts, and a
rank may hold nothing. One rule orders every rank's memory: by document, then by position; so whatever a rank computes
with is a slice. A layout says where tokens lie and nothing about who sends what.

Zigzag is the balanced causal layout of ring attention implementations (2W chunks, rank r holds chunks r and 2W-1-r);
striped is that of Striped Attention (arXiv 2311.09431); `packed` (see `packing`) keeps short documents whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from hashlib import sha256
from itertools import pairwise

import numpy as np

from seqpar_ring.errors import ConfigError, PlanError, did_you_mean
from seqpar_ring.geometry import Ints, Run, RunColumns
from seqpar_ring.packing import Balance, Groups, assign


class Layout:
    """For each rank its runs, in memory order: as columns for planning, and one by one as `layout[rank]`.

    Attributes:
        runs: the runs of all ranks, one rank after the other.
        rank: the rank of each run.
        bounds: where each rank's runs begin, and the end; world + 1 numbers.
    """

    def __init__(self, world: int, rank: Ints, runs: RunColumns) -> None:
        self.rank, self.runs = rank, runs
        self.bounds = np.searchsorted(rank, np.arange(world + 1))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, rank: int) -> tuple[Run, ...]:
        return self._by_rank[rank]

    def __iter__(self) -> Iterator[tuple[Run, ...]]:
        return iter(self._by_rank)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self._by_rank == other._by_rank

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"Layout({self.sizes} tokens by rank)"

    def columns(self, rank: int) -> RunColumns:
        """The runs of one rank."""
        return self.runs.take(slice(int(self.bounds[rank]), int(self.bounds[rank + 1])))

    @cached_property
    def digest(self) -> str:
        """A text that layouts which place a token differently do not share."""
        columns = (self.bounds, self.rank, *self.runs)
        return sha256(b"".join(np.asarray(column, dtype=np.int64).tobytes() for column in columns)).hexdigest()

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """How many tokens each rank holds."""
        return tuple(np.bincount(self.rank, weights=self.runs.n, minlength=len(self)).astype(np.int64).tolist())

    @cached_property
    def first_rows(self) -> Ints:
        """Rows of all earlier ranks together, for each rank and the end: a row's number among those of all ranks."""
        first: Ints = np.r_[0, np.cumsum(self.sizes)].astype(np.int64)
        return first

    @cached_property
    def _by_rank(self) -> tuple[tuple[Run, ...], ...]:
        every = list(map(Run._make, zip(*(column.tolist() for column in self.runs), strict=True)))
        return tuple(tuple(every[a:b]) for a, b in pairwise(self.bounds.tolist()))


def contiguous(lengths: Sequence[int], world: int, _balance: Balance) -> Layout:
    """The tokens of all documents in a row, cut into `world` nearly equal parts. Unbalanced under a causal mask."""
    n = np.array(lengths, dtype=np.int64)
    ends = n.cumsum()
    border = np.arange(world + 1) * (int(ends[-1]) if len(ends) else 0) // world
    # Every border of a rank or a document begins a run.
    cuts = np.unique(np.r_[0, ends, border])
    begin, count = cuts[:-1], np.diff(cuts)
    doc = np.searchsorted(ends, begin, "right")
    rank = np.searchsorted(border, begin, "right") - 1
    return place(world, rank, doc, begin - (ends - n)[doc], count)


def zigzag(lengths: Sequence[int], world: int, _balance: Balance) -> Layout:
    """Each document in 2 * world chunks; rank r has chunks r and 2 * world - 1 - r: equal work under a causal mask."""
    n = np.array(lengths, dtype=np.int64)
    return spread(n, world, Groups.everywhere(n, world))


def striped(lengths: Sequence[int], world: int, _balance: Balance) -> Layout:
    """Every world-th token; the stripes run on through all documents, so counts differ by one at most."""
    n = np.array(lengths, dtype=np.int64)
    base = n.cumsum() - n
    rank = np.repeat(np.arange(world), len(n))
    first = ((np.arange(world)[:, None] - base) % world).ravel()
    count = np.maximum(0, (np.tile(n, world) - first + world - 1) // world)
    return place(world, rank, np.tile(np.arange(len(n)), world), first, count, world)


def packed(lengths: Sequence[int], world: int, balance: Balance) -> Layout:
    """Short documents whole on one rank, long ones zigzagged over nested groups of 2, 4, .. world ranks."""
    n = np.array(lengths, dtype=np.int64)
    return spread(n, world, assign(n, world, balance))


LAYOUTS: dict[str, Callable[[Sequence[int], int, Balance], Layout]] = {
    "contiguous": contiguous,
    "packed": packed,
    "striped": striped,
    "zigzag": zigzag,
}
"""All layouts by name. A new layout is a function and a line here."""

BALANCE = Balance()
"""The tolerances of `packed` that the settings have unless somebody gives others."""


def make(name: str, lengths: Sequence[int], world: int, balance: Balance = BALANCE, least: int = 1) -> Layout:
    """The layout of this name.

    Args:
        name: one of `LAYOUTS`.
        lengths: tokens of each document.
        world: ranks.
        balance: how even `packed` must be.
        least: shortest document allowed; 0 for the keys of cross-attention.

    Raises:
        ConfigError: no layout has this name.
        PlanError: no document, or one without tokens.
    """
    if name not in LAYOUTS:
        raise ConfigError("unknown layout", fix=did_you_mean(name, LAYOUTS), layout=name)
    if not lengths or any(not isinstance(n, int) or isinstance(n, bool) or n < least for n in lengths):
        raise PlanError(
            f"document lengths must be whole numbers of at least {least}",
            fix="Leave out empty documents; give plain integers.",
            lengths=tuple(lengths),
        )
    return LAYOUTS[name](lengths, world, balance)


def spread(n: Ints, world: int, groups: Groups) -> Layout:
    """Each document zigzagged over the ranks of its group; a group of one holds it whole."""
    base = n.cumsum() - n
    parts: list[tuple[Ints, ...]] = []
    for m in np.unique(groups.size).tolist():
        docs = np.flatnonzero(groups.size == m)
        if m == 1:
            parts.append((groups.first[docs], docs, np.zeros_like(docs), n[docs]))
            continue
        # The phase turns the places of the odd tokens from document to document: a plain floor would give a thousand
        # one-token documents all to rank 0.
        phase = base[docs] % (2 * m)
        border = (n[docs, None] * np.arange(2 * m + 1) + phase[:, None]) // (2 * m)
        member = np.arange(m)
        for chunk in (member, 2 * m - 1 - member):
            rank = groups.first[docs] + member[:, None]
            start, end = border[:, chunk].T, border[:, chunk + 1].T
            parts.append(tuple(x.ravel() for x in (rank, np.broadcast_to(docs, rank.shape), start, end - start)))
    rank, doc, start, count = (np.concatenate(column) for column in zip(*parts, strict=True))
    return place(world, rank, doc, start, count)


def place(world: int, rank: Ints, doc: Ints, start: Ints, count: Ints, step: int = 1) -> Layout:
    """A layout from pieces in any order: each rank's memory by document, then by position; empty pieces left out."""
    there = np.flatnonzero(count)
    rank, doc, start, count = (x[there] for x in (rank, doc, start, count))
    key = (rank * (int(doc.max(initial=0)) + 1) + doc) * (int(start.max(initial=0)) + 1) + start
    order = np.argsort(key, kind="stable") if (key[1:] < key[:-1]).any() else slice(None)
    rank, doc, start, count = (x[order] for x in (rank, doc, start, count))
    before = count.cumsum() - count
    first = np.searchsorted(rank, np.arange(world))
    at = before - np.r_[before, 0][first][rank] if len(before) else before
    return Layout(world, rank, RunColumns(doc, start, count, np.full_like(count, step), at))


def split(layout: Layout, parts: int) -> Layout:
    """Each rank's memory cut into `parts` nearly equal slices, which the ranks `parts * rank + i` hold."""
    if parts == 1:
        return layout
    sizes = np.array(layout.sizes, dtype=np.int64)
    begin = (sizes[:, None] * np.arange(parts) // parts).ravel()
    end = (sizes[:, None] * np.arange(1, parts + 1) // parts).ravel()
    runs, which = cut(layout, np.repeat(np.arange(len(layout)), parts), begin, end)
    return Layout(len(layout) * parts, which, runs._replace(at=runs.at - begin[which]))


def cut(layout: Layout, owner: Ints, begin: Ints, end: Ints) -> tuple[RunColumns, Ints]:
    """The runs within rows `begin .. end` of the owner's memory, for many such ranges, and the range of each.

    `at` stays the row in the owner's memory.
    """
    base = layout.first_rows[owner]
    at = layout.runs.at + layout.first_rows[layout.rank]
    first = np.searchsorted(at + layout.runs.n, base + begin, "right")
    counts = np.maximum(np.searchsorted(at, base + end, "left") - first, 0) * (end > begin)
    which = np.repeat(np.arange(len(owner)), counts)
    offset = counts.cumsum() - counts
    index = np.arange(len(which)) - np.repeat(offset - first, counts)
    run = layout.runs.take(index)
    low, high = np.maximum(begin[which], run.at), np.minimum(end[which], run.at + run.n)
    return RunColumns(run.doc, run.start + (low - run.at) * run.step, high - low, run.step, low), which


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
