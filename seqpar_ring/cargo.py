"""Cargo: the tensors that travel of each row, and how they are packed into messages.

In forward a row is its key and value; where queries travel in backward it is query, dout, lse and delta; gradients are
cargo too. All tensors hold rows along dim 1. A message is one flat tensor for each dtype, so that a block is one
transfer, and two where precisions differ. It knows shapes and rows, not what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from seqpar_ring.geometry import Rows

Fields = tuple[Tensor, ...]
"""The tensors of some rows: (B, rows, ...) each."""

Message = tuple[Tensor, ...]
"""The same, flat: one tensor for each dtype."""


class Cargo:
    """Packs and unpacks rows that look like these tensors' rows."""

    def __init__(self, like: Sequence[Tensor], dtype: torch.dtype | None = None) -> None:
        self._device = like[0].device
        self._batch = like[0].shape[0]
        self._shapes = [tuple(x.shape[2:]) for x in like]
        self._dtypes = [dtype or x.dtype for x in like]
        self._kinds = list(dict.fromkeys(self._dtypes))

    def pack(self, fields: Fields) -> Message:
        """Some rows as a message, copied."""
        return tuple(
            torch.cat([x.reshape(-1) for x, kind in zip(fields, self._dtypes, strict=True) if kind is dtype])
            for dtype in self._kinds
        )

    def room(self, rows: int) -> Message:
        """A message of so many rows, to be received into."""
        return tuple(
            torch.empty(self._numel(rows, dtype), dtype=dtype, device=self._device) for dtype in self._kinds
        )

    def unpack(self, message: Message, rows: int) -> Fields:
        """A message as its tensors, without a copy."""
        at = dict.fromkeys(self._kinds, 0)
        fields = []
        for shape, dtype in zip(self._shapes, self._dtypes, strict=True):
            size = self._batch * rows * math.prod(shape)
            flat = message[self._kinds.index(dtype)]
            fields.append(flat[at[dtype] : at[dtype] + size].view(self._batch, rows, *shape))
            at[dtype] += size
        return tuple(fields)

    def cast(self, fields: Fields) -> Fields:
        """The tensors in the cargo's dtypes."""
        return tuple(x.to(dtype) for x, dtype in zip(fields, self._dtypes, strict=True))

    def zeros(self, rows: int) -> Fields:
        """Zeros of so many rows, one tensor for each field."""
        shapes = ((self._batch, rows, *shape) for shape in self._shapes)
        return tuple(
            torch.zeros(shape, dtype=dtype, device=self._device)
            for shape, dtype in zip(shapes, self._dtypes, strict=True)
        )

    def _numel(self, rows: int, dtype: torch.dtype) -> int:
        widths = (math.prod(shape) for shape, kind in zip(self._shapes, self._dtypes, strict=True) if kind is dtype)
        return self._batch * rows * sum(widths)


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
