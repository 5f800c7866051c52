"""Cargo: the tensors that travel of each row.

In forward a row is its key and value; where queries travel in backward it is query, dout, lse and delta; gradients
are cargo too. All tensors hold rows along dim 1. What a rank sends of its own rows lies where the caller put it, so
each tensor is a message of its own, and needs no copy; what it passes on, or has made, lies together and is one message
for each dtype. Rows may travel in another form than the one they are computed with (`Form`): keys and values as one
byte a number, gradients as bf16, where the user trades exactness for a slow link. Memory is taken for many rows at once
and parts of it handed out (`Store`). It knows shapes and rows, not what they mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from seqpar_ring.geometry import Rows
from seqpar_ring.views import rows_of

Fields = tuple[Tensor, ...]
"""The tensors of some rows: (B, rows, ...) each."""


class Kind(NamedTuple):
    """One tensor of some cargo: (batch, rows, *rest) of this dtype."""

    batch: int
    rest: tuple[int, ...]
    dtype: torch.dtype


class Laid(NamedTuple):
    """Fields that lie in a store, and the memory that holds them and nothing else: one piece for each dtype."""

    fields: Fields
    pieces: Fields


class Store:
    """Memory for so many rows, not written yet. The fields of a range of rows lie one after the other, so what has one
    dtype can be one message."""

    def __init__(self, kinds: Sequence[Kind], rows: int, device: torch.device) -> None:
        a_row: dict[torch.dtype, int] = {}  # numbers
        self._views: list[tuple[Kind, int, tuple[int, ...]]] = []  # numbers that lie before it of each row; strides
        for kind in kinds:
            strides = tuple(prod(kind.rest[i:]) for i in range(len(kind.rest) + 1))
            before = a_row.get(kind.dtype, 0)
            self._views.append((kind, before, strides))
            a_row[kind.dtype] = before + kind.batch * strides[0]
        self._memory = {
            dtype: (torch.empty(rows * n, dtype=dtype, device=device), n) for dtype, n in a_row.items()
        }

    def at(self, first: int, rows: int) -> Fields:
        """So many rows of it, from this one on. Rows are found again only as the range that they were written as: where
        a field lies depends on it."""
        found = []
        for kind, before, strides in self._views:
            flat, a_row = self._memory[kind.dtype]
            shape = (kind.batch, rows, *kind.rest)
            found.append(flat.as_strided(shape, (rows * strides[0], *strides), first * a_row + rows * before))
        return tuple(found)

    def laid(self, first: int, rows: int) -> Laid:
        """The same, and the memory."""
        pieces = [flat[first * n : (first + rows) * n] for flat, n in self._memory.values()]
        return Laid(self.at(first, rows), tuple(pieces))


class Form(Protocol):
    """How rows are written for their way, and read where they are used. What is passed on is passed on as it came.

    A `Cargo` is one: rows travel as they are, or in its dtype.
    """

    as_computed: bool
    """Whether rows are computed with as they came."""

    def store(self, rows: int) -> Store:
        """Memory for messages of so many rows together."""

    def ready(self, fields: Fields) -> bool:
        """Whether rows can be sent from where they are."""

    def write(self, message: Fields, fields: Fields) -> None:
        """Write as many rows as there are as a message, or as a part of one."""

    def read(self, message: Fields, fields: Fields) -> None:
        """Write the rows of a message, or of a part of one, where they are computed with."""


class Cargo:
    """Tensors for rows that look like these tensors' rows."""

    as_computed = True

    def __init__(self, like: Sequence[Tensor], dtype: torch.dtype | None = None) -> None:
        self.kinds = [Kind(x.shape[0], tuple(x.shape[2:]), dtype or x.dtype) for x in like]
        self.device = like[0].device

    def store(self, rows: int) -> Store:
        """See `Form.store`."""
        return Store(self.kinds, rows, self.device)

    def apart(self, rows: int) -> Fields:
        """Memory for so many rows, of its own for each tensor: for results, which others hold one without another."""
        return tuple(
            torch.empty((kind.batch, rows, *kind.rest), dtype=kind.dtype, device=self.device) for kind in self.kinds
        )

    def ready(self, fields: Fields) -> bool:
        """See `Form.ready`: in the cargo's dtypes, and together."""
        return all(x.dtype == kind.dtype and x.is_contiguous() for x, kind in zip(fields, self.kinds, strict=True))

    def write(self, message: Fields, fields: Fields) -> None:
        """See `Form.write`."""
        for there, x in zip(message, fields, strict=True):
            there.copy_(x)

    def read(self, message: Fields, fields: Fields) -> None:
        """See `Form.read`."""
        self.write(fields, message)


class Coded:
    """Each token's row of each head as int8 with one fp32 scale: its largest number over 127.

    A number is off by at most half a step, 1 / 254 of the largest of its row: 0.6 % of a row of normal numbers (64 to
    128 of them) in the mean square, where fp8 (e4m3) is off by 2.7 % at nearly the same bytes.
    """

    as_computed = False

    def __init__(self, like: Sequence[Tensor]) -> None:
        numbers, scales = Cargo(like, torch.int8), Cargo([x[..., 0] for x in like], torch.float32)
        self._kinds, self._device = numbers.kinds + scales.kinds, numbers.device

    def store(self, rows: int) -> Store:
        """See `Form.store`."""
        return Store(self._kinds, rows, self._device)

    def ready(self, fields: Fields) -> bool:
        """See `Form.ready`."""
        return False

    def write(self, message: Fields, fields: Fields) -> None:
        """See `Form.write`."""
        least = torch.finfo(torch.float32).tiny  # of a row of zeros
        for numbers, scale, x in zip(message[: len(fields)], message[len(fields) :], fields, strict=True):
            scale.copy_((x.abs().amax(-1).to(torch.float32) / 127).clamp_(min=least))
            numbers.copy_((x / scale.unsqueeze(-1)).round_().clamp_(-127, 127))

    def read(self, message: Fields, fields: Fields) -> None:
        """See `Form.read`."""
        for numbers, scale, x in zip(message[: len(fields)], message[len(fields) :], fields, strict=True):
            x.copy_(numbers * scale.unsqueeze(-1))


def part(fields: Fields, a: int, b: int) -> Fields:
    """Rows `a` to `b`, as views; the tensors themselves where those are all."""
    return tuple([rows_of(x, a, b) for x in fields])


class Parts:
    """Rows of fields, each made once: every operator of torch takes the host a microsecond or more, also one that makes
    nothing but a view, and a pass asks for the same few again and again. It holds what it is given."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int, int], tuple[Fields, Fields]] = {}

    def of(self, fields: Fields, a: int, b: int) -> Fields:
        """As `part`."""
        key = id(fields), a, b  # nothing else has this id, as long as the fields are held here
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = fields, part(fields, a, b)
        return found[1]


def within(rows: Rows, first: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Of a block of these rows, those numbered from `first` to `end`: (a, b) in memory, and which number a has."""
    at = 0
    for a, b in rows:
        low, high = max(first, at), min(end, at + b - a)
        if low < high:
            yield a + low - at, a + high - at, low
        at += b - a


def add_rows(totals: Fields, rows: Rows, parts: Fields) -> None:
    """Add parts, one row for each of these rows, to the tensors that the rows are of."""
    for a, b, at in within(rows, 0, parts[0].shape[1]):
        for total, x in zip(totals, parts, strict=True):
            rows_of(total, a, b).add_(rows_of(x, at, at + b - a))
