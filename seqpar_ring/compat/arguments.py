"""Arguments of ring-flash-attn, read and checked: packed tensors, cu_seqlens, and the tail that all functions share.

What cannot be followed exactly is refused here, with the name that the caller used. Nothing here communicates, and
nothing knows layouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor

from seqpar_ring.errors import PlanError, UnsupportedError
from seqpar_ring.geometry import Mask
from seqpar_ring.kernels.base import deterministic

Tensors = tuple[Tensor, ...]
"""(q, k, v), (q, kv) or (qkv,), as they were given."""

Window = tuple[int, int]
"""How many keys before and after a query it sees; -1: all."""

BOTH: Window = (-1, -1)
"""No window."""

SHAPES = {
    1: "qkv (B, S, 3, H, D)",
    2: "q (B, S, H, D) and kv (B, S, 2, G, D)",
    3: "q (B, S, H, D), k (B, S, G, D) and v (B, S, G, D)",
}
"""What the functions take, by the number of their tensors."""


class Options(NamedTuple):
    """The arguments with which every function of ring-flash-attn ends, but the group.

    `deterministic`: the order of the ring's sums is fixed by the plan, and so is what a CPU computes. Kernels of GPUs
    are told by torch's own switch, so that it must be on for what is asked here.
    """

    dropout_p: float
    softmax_scale: float | None
    causal: bool
    window_size: Window
    alibi_slopes: Tensor | None
    deterministic: bool
    return_attn_probs: bool

    def check(self, device: str, packed_documents: int | None = None) -> None:
        """Refuse what has no exact answer here.

        Args:
            device: the type of device that the tensors are on.
            packed_documents: documents in a row, where the batch is made of those.

        Raises:
            PlanError: a window that does not exist.
            UnsupportedError: dropout; slopes of each packed document; `deterministic` on a GPU, if torch is not told.
        """
        if self.dropout_p:
            raise UnsupportedError(
                "attention dropout is not done",
                fix="Give dropout_p=0.0.",
                dropout_p=self.dropout_p,
            )
        if self.deterministic and device == "cuda" and not deterministic():
            raise UnsupportedError(
                "kernels give the same bits each time only where torch is told to",
                fix="Call torch.use_deterministic_algorithms(True), or leave deterministic out.",
                deterministic=True,
            )
        window = self.window_size
        if not isinstance(window, Sequence) or len(window) != 2 or any(not whole(n) or n < -1 for n in window):
            raise PlanError(
                "a window is how many keys before and how many after the query",
                fix="Give window_size=(left, right), whole numbers of at least 0, or -1 for no limit.",
                window_size=window,
            )
        slopes = self.alibi_slopes
        if packed_documents is not None and packed_documents > 1 and slopes is not None and slopes.dim() != 1:
            raise UnsupportedError(
                "packed documents share their ALiBi slopes",
                fix="Give alibi_slopes of shape (heads,), or attend to one document at a time.",
                alibi_slopes=tuple(slopes.shape),
                documents=packed_documents,
            )

    def mask(self, longest: int) -> Mask:
        """The mask of documents of up to so many tokens. As in flash-attn, `causal` makes the window's right side 0."""
        left, right = self.window_size
        if self.causal:
            return Mask.make(True, None if left < 0 else left + 1)
        if left < 0 and right < 0:
            return Mask.make(False)
        return Mask.make(False, (longest if left < 0 else left, longest if right < 0 else right))


def unpack(tensors: Tensors, varlen: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q_BSHD, k_BSGD and v_BSGD out of (q, k, v), (q, kv) or (qkv,); tokens without a batch get one of size 1.

    Args:
        tensors: kv (B, S, 2, G, D) or (T, 2, G, D); qkv (B, S, 3, H, D) or (T, 3, H, D); others without that dimension.
        varlen: whether tokens come without a batch dimension.

    Raises:
        PlanError: a tensor of another number of dimensions, or packed in another way.
    """
    first = 1 if varlen else 2  # the dimension that packed tensors have and others have not
    parts = 4 - len(tensors)  # how many tensors the last one holds
    *single, last = tensors
    dims = [first + 2] * len(single) + [first + 2 + (parts > 1)]
    if [x.dim() for x in tensors] != dims or (parts > 1 and last.shape[first] != parts):
        raise PlanError(
            "the tensors are not of the shapes that this function takes",
            fix=f"Give {SHAPES[len(tensors)]}.".replace("B, S", "T" if varlen else "B, S"),
            shapes=[tuple(x.shape) for x in tensors],
        )
    whole = [*single, *(last.unbind(first) if parts > 1 else (last,))]
    q, k, v = (x.unsqueeze(0) for x in whole) if varlen else whole
    return q, k, v


def borders(name: str, cu_seqlens: Tensor) -> list[int]:
    """Cumulative lengths as whole numbers, each once: documents without tokens are left out.

    Raises:
        PlanError: not an ascending row of whole numbers from 0, or no token in it.
    """
    integers = isinstance(cu_seqlens, Tensor) and cu_seqlens.dtype in (torch.int32, torch.int64)
    if not integers or cu_seqlens.dim() != 1:
        raise PlanError(
            f"{name} is not a row of cumulative lengths",
            fix="Give an int32 tensor (documents + 1,) that begins with 0.",
            **{name: cu_seqlens},
        )
    row: list[int] = cu_seqlens.tolist()
    if not row or row[0] != 0 or row[-1] < 1 or any(a > b for a, b in pairwise(row)):
        raise PlanError(
            f"{name} does not ascend from 0",
            fix="Give the cumulative lengths of the documents: 0, n0, n0 + n1, ...",
            **{name: row},
        )
    return list(dict.fromkeys(row))


def expect_longest(name: str, stated: int, row: Sequence[int]) -> None:
    """Check that no document is longer than the caller says.

    Raises:
        PlanError: one is, or the number is no number.
    """
    longest = max(b - a for a, b in pairwise(row))
    try:
        number = index(stated)  # of Python, numpy or torch
    except TypeError:
        raise PlanError(f"{name} is no whole number", fix=f"Give {longest}.", **{name: stated}) from None
    if number < longest:
        raise PlanError(
            f"{name} is smaller than the longest document", fix=f"Give {longest}.", **{name: number, "longest": longest}
        )


def expect_tokens(name: str, row: Sequence[int], tokens: int) -> None:
    """Check that the borders end where the tokens do.

    Raises:
        PlanError: they do not.
    """
    if row[-1] != tokens:
        raise PlanError(
            f"{name} does not end with the number of this rank's tokens",
            fix="Give the borders of the documents among this rank's tokens.",
            **{name: list(row), "tokens": tokens},
        )


def whole(number: object) -> bool:
    """Whether this is a plain whole number."""
    return isinstance(number, int) and not isinstance(number, bool)
