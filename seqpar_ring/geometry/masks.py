"""Masks: what a query may see, as regions: rectangles of a document's positions, each with a band.

A plain mask (full, causal, a sliding window) is one region a document. Chunked attention (Llama 4) is one causal region
for each chunk; a prefix-LM is a full rectangle over the prefix and a causal square after it; in cross-attention the
rectangle is as high as the document's queries and as wide as its keys. Regions of one document never share a pair, so
whatever is true of one band holds for all masks. Positions and integers only: nothing here knows ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqpar_ring.errors import PlanError
from seqpar_ring.geometry.bands import INF, Tile, area

Ints = NDArray[np.int64]
"""A column of whole numbers."""


class Region(NamedTuple):
    """Queries at positions `q0 .. q1` of a document see its keys at `k0 .. k1` where `lo <= k - q <= hi`."""

    doc: int
    q0: int
    q1: int
    k0: int
    k1: int
    lo: int
    hi: int


class Regions:
    """Regions as columns, ordered by document. Iterating gives them one by one as `Region`."""

    def __init__(self, columns: Sequence[Ints], plain: bool) -> None:
        self.doc, self.q0, self.q1, self.k0, self.k1, self.lo, self.hi = columns
        self.plain = plain  # one region a document, which holds all of it: its number is the document's

    @staticmethod
    def of(regions: Sequence[Region]) -> Regions:
        """From single regions."""
        return Regions(list(np.array(regions, dtype=np.int64).reshape(-1, 7).T), plain=False)

    def __len__(self) -> int:
        return len(self.doc)

    def __iter__(self) -> Iterator[Region]:
        columns = (self.doc, self.q0, self.q1, self.k0, self.k1, self.lo, self.hi)
        return map(Region._make, zip(*(column.tolist() for column in columns), strict=True))

    @cached_property
    def by_document(self) -> dict[int, list[tuple[int, Region]]]:
        """The regions of each document with their numbers."""
        found: dict[int, list[tuple[int, Region]]] = {}
        for number, region in enumerate(self):
            found.setdefault(region.doc, []).append((number, region))
        return found

    def bands(self, regions: Ints) -> tuple[Ints | int, Ints | int]:
        """lo and hi of these regions, by number; one pair of numbers where all regions have the same."""
        if self._one_band is not None:
            return self._one_band
        return self.lo[regions], self.hi[regions]

    @cached_property
    def _one_band(self) -> tuple[int, int] | None:
        same = len(self) and (self.lo == self.lo[0]).all() and (self.hi == self.hi[0]).all()
        return (int(self.lo[0]), int(self.hi[0])) if same else None

    @property
    def lower_edge(self) -> bool:
        """Whether some region hides keys for being too far back, which only kernels with windows can compute."""
        return bool((self.lo > -INF).any())

    def transposed(self) -> Regions:
        """The same pairs with queries and keys in each other's place."""
        return Regions((self.doc, self.k0, self.k1, self.q0, self.q1, -self.hi, -self.lo), self.plain)

    def pairs(self) -> int:
        """Number of (query, key) pairs that all regions allow."""
        return sum(region_area(region) for region in self)


def region_area(region: Region) -> int:
    """Number of (query, key) pairs that a region allows."""
    m, n, shift = region.q1 - region.q0, region.k1 - region.k0, region.q0 - region.k0
    return area(Tile(0, m, 0, n, max(region.lo + shift, -m), min(region.hi + shift, n))) if m > 0 and n > 0 else 0


@dataclass(frozen=True)
class Mask:
    """Which keys of its own document a query sees. Documents never see each other.

    Attributes:
        causal: only keys up to the query's own position.
        window: of those only the last so many, the query's own included; one number, or one for each document (None
            where a document has none). With `causal=False` a pair (before, after): how many keys on either side.
        chunk: only keys of the same chunk: chunk i holds positions `i * chunk` to `(i + 1) * chunk` of a document
            (the chunked attention of Llama 4). Causal.
        prefix: the first so many keys are seen by every query, the rest causally (prefix-LM, arXiv 1910.10683 section
            3.2.1); one number, or one for each document.
    """

    causal: bool = True
    window: int | tuple[int | None, ...] | None = None
    chunk: int | None = None
    prefix: int | tuple[int, ...] | None = None

    @staticmethod
    def make(
        causal: bool = True,
        window: int | Sequence[int | None] | None = None,
        chunk: int | None = None,
        prefix: int | Sequence[int] | None = None,
    ) -> Mask:
        """The mask with lists as tuples, so that it hashes.

        Raises:
            PlanError: options that do not go together, or `causal` that is neither True nor False.
        """
        if not isinstance(causal, bool):  # "no" would be causal
            raise PlanError("causal is neither True nor False", fix="Give one of them.", causal=causal)
        mask = Mask(causal, *(_whole(n, x) for n, x in (("window", window), ("chunk", chunk), ("prefix", prefix))))
        mask._check()
        return mask

    def regions(self, lengths: Sequence[int], kv_lengths: Sequence[int] | None = None) -> Regions:
        """The mask over documents of these lengths.

        Args:
            lengths: queries of each document.
            kv_lengths: keys of each document in cross-attention; None: the queries' own.

        Raises:
            PlanError: a list of another length than the documents, a number that is no length, a mask that
                cross-attention does not have.
        """
        self._check()
        if kv_lengths is not None and (self.causal or self.window or self.chunk or self.prefix):
            raise PlanError(
                "cross-attention has no order between queries and keys, so no causal mask",
                fix="Give causal=False, and no window, chunk or prefix, with kv_lengths.",
                mask=str(self),
            )
        if kv_lengths is not None and len(kv_lengths) != len(lengths):
            raise PlanError(
                "queries and keys are of different numbers of documents",
                fix="Give one number of keys for each document; 0 where it has none.",
                lengths=tuple(lengths),
                kv_lengths=tuple(kv_lengths),
            )
        if self.chunk is not None:
            return self._chunked(lengths)
        if self.prefix is not None:
            return self._prefixed(lengths)
        n = np.array(lengths, dtype=np.int64)
        keys = n if kv_lengths is None else np.array(kv_lengths, dtype=np.int64)
        zero = np.zeros_like(n)
        return Regions((np.arange(len(n)), zero, n, zero, keys, *self._bands(lengths)), plain=True)

    def __str__(self) -> str:
        if not self.causal:
            return "full" if self.window is None else f"a window of {self.window} keys before and after"
        extra = [
            f"{name} {value if isinstance(value, int) else 'by document'}"
            for name, value in (("a window of", self.window), ("chunks of", self.chunk), ("a prefix of", self.prefix))
            if value is not None
        ]
        return "causal" + (" with " + " and ".join(extra) if extra else "")

    def _check(self) -> None:
        pair = self.window if isinstance(self.window, tuple) else ()
        two_sided = len(pair) == 2 and all(side is not None and side >= 0 for side in pair)
        if not self.causal and self.window is not None and not two_sided:
            raise PlanError(
                "without causality a window is a pair: how many keys before and how many after the query",
                fix="Give window=(before, after), both at least 0, or causal=True.",
                causal=self.causal,
                window=self.window,
            )
        if not self.causal and (self.chunk is not None or self.prefix is not None):
            raise PlanError("chunks and prefixes are causal", fix="Give causal=True.", mask=repr(self))
        if self.prefix is not None and (self.window is not None or self.chunk is not None):
            raise PlanError(
                "a prefix beside a window or chunks has no one meaning",
                fix="Give one of prefix, window and chunk; window and chunk go together.",
                mask=repr(self),
            )
        causal_windows = self.window if isinstance(self.window, tuple) else (self.window,)
        if self.causal and any(w is not None and w < 1 for w in causal_windows):
            raise PlanError(
                "a causal window holds at least one key, the query's own",
                fix="Give one number that counts it, or None for no window: flash-attention's (3, 0) is window=4.",
                window=self.window,
            )
        if self.chunk is not None and self.chunk < 1:
            raise PlanError("a chunk holds at least one position", fix="Give chunk >= 1.", chunk=self.chunk)

    def _bands(self, lengths: Sequence[int]) -> tuple[Ints, Ints]:
        """lo and hi of each document; an edge that cuts nothing is infinite."""
        n = np.array(lengths, dtype=np.int64)
        if not self.causal:
            window = self.window if isinstance(self.window, tuple) else (INF, INF)
            before, after = (min(side or 0, INF) for side in window)
            return np.where(before >= n - 1, -INF, -before), np.where(after >= n - 1, INF, after)
        if self.window is None:
            return np.full_like(n, -INF), np.zeros_like(n)
        each = np.array([INF if w is None else min(w, INF) for w in self._each("window", len(n))], dtype=np.int64)
        return np.where(each >= n, -INF, 1 - each), np.zeros_like(n)

    def _chunked(self, lengths: Sequence[int]) -> Regions:
        assert self.chunk is not None
        regions = []
        for doc, (n, lo, hi) in enumerate(zip(lengths, *(x.tolist() for x in self._bands(lengths)), strict=True)):
            for a in range(0, n, self.chunk):
                b = min(n, a + self.chunk)
                regions.append(Region(doc, a, b, a, b, lo if -lo < b - a - 1 else -INF, hi))
        return Regions.of(regions)

    def _prefixed(self, lengths: Sequence[int]) -> Regions:
        regions = []
        for doc, (n, p) in enumerate(zip(lengths, self._each("prefix", len(lengths)), strict=True)):
            if p is None or not 0 <= p <= n:
                raise PlanError(
                    "a prefix is longer than its document, or negative",
                    fix="Give 0 to the document's length.",
                    prefix=p,
                    length=n,
                    document=doc,
                )
            if p:
                regions.append(Region(doc, 0, n, 0, p, -INF, INF))
            if p < n:
                regions.append(Region(doc, p, n, p, n, -INF, 0))
        return Regions.of(regions)

    def _each(self, name: str, documents: int) -> tuple[int | None, ...]:
        value = getattr(self, name)
        if not isinstance(value, tuple):
            return (value,) * documents
        if len(value) != documents:
            raise PlanError(
                f"one {name} for each document was asked for, but the numbers differ",
                fix=f"Give one {name} for all documents, or exactly one for each.",
                **{name: value, "documents": documents},
            )
        return value


def _whole(name: str, value: Any) -> Any:
    """A number, or a tuple of numbers and None, as plain whole numbers.

    Raises:
        PlanError: it is not a whole number, or not a list of such.
    """
    if hasattr(value, "tolist"):  # of numpy or torch
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_whole(name, one) for one in value)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise PlanError(f"{name} is no whole number", fix="Give an int, or one for each document.", **{name: value})
