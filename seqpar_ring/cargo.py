"""Cargo: the tensors that travel of each row.

In forward a row is its key and value; where queries travel in backward it is query, dout, lse and delta; gradients
are cargo too. All tensors hold rows along dim 1, and each travels as a message of its own: so rows that lie together
are sent from where they are and used where they land, without a copy. Rows may travel in another form than the one
they are computed with (`Form`): keys and values as one byte a number, gradients as bf16, where the user trades
exactness for a slow link. Memory is taken for many rows at once and parts of it handed out (`Store`). It knows shapes
and rows, not what they mean.
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


class Store:
    """Memory for so many rows, not written yet. Any range of rows lies together, so it can be a message."""

    def __init__(self, kinds: Sequence[Kind], rows: int, device: torch.device) -> None:
        # Rows of a batch of one lie together as they are. Of a larger one they would not, so there the memory is flat.
        self._kinds, self._flat = kinds, any(kind.batch != 1 for kind in kinds)
        shapes = [(rows * _numbers(kind),) if self._flat else (1, rows, *kind.rest) for kind in kinds]
        self._memory = [
            torch.empty(shape, dtype=kind.dtype, device=device) for shape, kind in zip(shapes, kinds, strict=True)
        ]

    def at(self, first: int, rows: int) -> Fields:
        """So many rows of it, from this one on."""
        if not self._flat:
            return tuple([rows_of(x, first, first + rows) for x in self._memory])
        return tuple(
            flat[first * _numbers(kind) : (first + rows) * _numbers(kind)].view(kind.batch, rows, *kind.rest)
            for kind, flat in zip(self._kinds, self._memory, strict=True)
        )


def _numbers(kind: Kind) -> int:
    return kind.batch * prod(kind.rest)


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
