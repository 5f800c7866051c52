"""Cargo: the tensors that travel of each row.

In forward a row is its key and value; where queries travel in backward it is query, dout, lse and delta; gradients are
cargo too. All tensors hold rows along dim 1, and each travels as a message of its own: so rows that lie together are
sent from where they are and used where they land, without a copy. It knows shapes and rows, not what they mean.
"""

from __future__ import annotations

from collections.abc import Sequence

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
