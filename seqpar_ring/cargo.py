"""Cargo: the tensors that travel of each row.

In forward a row is its key and value; where queries travel in backward it is query, dout, lse and delta; gradients
are cargo too. All tensors hold rows along dim 1, and each travels as a message of its own: so rows that lie together
are sent from where they are and used where they land, without a copy. Rows may travel in another form than the one
they are computed with (`Form`): keys and values as one byte a number, gradients as bf16, where the user trades
exactness for a slow link. It knows shapes and rows, not what they mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from seqpar_ring.geometry import Rows

Fields = tuple[Tensor, ...]
"""The tensors of some rows: (B, rows, ...) each."""


class Cargo:
    """Makes tensors for rows that look like these tensors' rows."""

    def __init__(self, like: Sequence[Tensor], dtype: torch.dtype | None = None) -> None:
        self._device = like[0].device
        self._shapes = [(x.shape[0], tuple(x.shape[2:])) for x in like]
        self._dtypes = [dtype or x.dtype for x in like]

    def room(self, rows: int) -> Fields:
        """Memory for so many rows, not written yet."""
        return tuple(torch.empty(shape, dtype=dtype, device=self._device) for shape, dtype in self._kinds(rows))

    def zeros(self, rows: int) -> Fields:
        """Zeros of so many rows."""
        return tuple(torch.zeros(shape, dtype=dtype, device=self._device) for shape, dtype in self._kinds(rows))

    def cast(self, fields: Fields) -> Fields:
        """The tensors in the cargo's dtypes."""
        return tuple(x.to(dtype) for x, dtype in zip(fields, self._dtypes, strict=True))

    def packed(self, fields: Fields) -> Fields:
        """See `Form.packed`: in the cargo's dtypes; without a copy where they are that and lie together."""
        return tuple(x.contiguous() for x in self.cast(fields))

    def unpacked(self, message: Fields) -> Fields:
        """See `Form.unpacked`: as they came, for sums take narrower numbers as they are."""
        return message

    def _kinds(self, rows: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [((batch, rows, *rest), dtype) for (batch, rest), dtype in zip(self._shapes, self._dtypes, strict=True)]


def pick(fields: Fields, rows: Rows) -> Fields:
    """These rows of a rank's own tensors; views where they are one range."""
    if len(rows) == 1:
        return tuple(x[:, rows[0][0] : rows[0][1]] for x in fields)
    return tuple(torch.cat([x[:, a:b] for a, b in rows], 1) for x in fields)


def add_rows(totals: Fields, rows: Rows, parts: Fields) -> None:
    """Add parts, one row for each of these rows, to the tensors that the rows are of."""
    at = 0
    for a, b in rows:
        for total, part in zip(totals, parts, strict=True):
            total[:, a:b].add_(part[:, at : at + b - a])
        at += b - a


class Form(Protocol):
    """How rows are written for their way, and read where they are used. What is passed on is passed on as it came.

    A `Cargo` is one: rows travel as they are, or in its dtype.
    """

    def room(self, rows: int) -> Fields:
        """Memory for a message of so many rows."""

    def packed(self, fields: Fields) -> Fields:
        """Rows as messages; contiguous."""

    def unpacked(self, message: Fields) -> Fields:
        """What is computed with."""


class Coded:
    """Each token's row of each head as int8 with one fp32 scale: its largest number over 127.

    A number is off by at most half a step, 1 / 254 of the largest of its row: 0.6 % of a row of normal numbers (64 to
    128 of them) in the mean square, where fp8 (e4m3) is off by 2.7 % at nearly the same bytes.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        self._dtypes = [x.dtype for x in like]
        numbers, scales = Cargo(like, torch.int8), Cargo([x[..., 0] for x in like], torch.float32)
        self._kinds = numbers, scales

    def room(self, rows: int) -> Fields:
        """See `Form.room`."""
        return tuple(x for kind in self._kinds for x in kind.room(rows))

    def packed(self, fields: Fields) -> Fields:
        """See `Form.packed`."""
        least = torch.finfo(torch.float32).tiny  # of a row of zeros
        scales = [(x.abs().amax(-1).to(torch.float32) / 127).clamp_(min=least) for x in fields]
        numbers = [
            (x / scale.unsqueeze(-1)).round_().clamp_(-127, 127).to(torch.int8)
            for x, scale in zip(fields, scales, strict=True)
        ]
        return tuple(x.contiguous() for x in (*numbers, *scales))

    def unpacked(self, message: Fields) -> Fields:
        """See `Form.unpacked`."""
        half = len(message) // 2
        return tuple(
            (numbers * scale.unsqueeze(-1)).to(dtype)
            for numbers, scale, dtype in zip(message[:half], message[half:], self._dtypes, strict=True)
        )
