"""Attention on one device in plain torch, document by document: what the ring must equal.

Every score matrix is made whole, in the dtype of the inputs, so in fp64 this is the truth and in any dtype it is simple
enough to be read at a glance. Masks are written out from their definitions, pair by pair, not from the regions that the
package plans with. It is differentiable by autograd. It is not fast and needs memory for S x S scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seqpar_ring.geometry import Mask


def dense_attention(  # noqa: PLR0913 - mirrors attention itself
    q_BSHD: Tensor,
    k_BSGD: Tensor,
    v_BSGE: Tensor,
    lengths: int | Sequence[int],
    causal: bool = True,
    window: int | Sequence[int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    *,
    chunk: int | None = None,
    prefix: int | Sequence[int] | None = None,
    kv_lengths: Sequence[int] | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention within each document.

    Args:
        q_BSHD, k_BSGD, v_BSGE: whole sequences, any floating dtype; H is a multiple of G.
        lengths: tokens of each document, or of the one document; they sum to S.
        causal, window, chunk, prefix, kv_lengths: the mask, as in `SequenceParallel.plan`.
        scale: factor on q·k; None: 1 / sqrt(D).
        softcap: logits become softcap * tanh(logits / softcap), as in Gemma 2.
        sinks: (H,) one more logit for each head, of value zero.
        alibi_slopes: (H,) or (B, H): `- slope * distance` is added to the logits.

    Returns:
        out_BSHE and lse_BHS (natural logarithm), both in the dtype of `q_BSHD`.

    Raises:
        ValueError: lengths that do not sum to S, or a mask that does not exist.
    """
    documents = [lengths] if isinstance(lengths, int) else list(lengths)
    keys = documents if kv_lengths is None else list(kv_lengths)
    if sum(documents) != q_BSHD.shape[1] or sum(keys) != k_BSGD.shape[1]:
        counts = f"{q_BSHD.shape[1]} queries and {k_BSGD.shape[1]} keys"
        raise ValueError(f"lengths {documents} and {keys} do not sum to {counts}")
    mask = Mask.make(causal, window, chunk, prefix)
    group = q_BSHD.shape[2] // k_BSGD.shape[2]
    k_BSHD, v_BSHE = k_BSGD.repeat_interleave(group, dim=2), v_BSGE.repeat_interleave(group, dim=2)
    scale = q_BSHD.shape[3] ** -0.5 if scale is None else scale
    split = q_BSHD.split(documents, 1), k_BSHD.split(keys, 1), v_BSHE.split(keys, 1)
    outs, lses = [], []
    for document, (q, k, v) in enumerate(zip(*split, strict=True)):
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        ahead = _distance(q.shape[1], k.shape[1], q.device)
        if alibi_slopes is not None:
            logits = logits - alibi_slopes.to(logits.dtype)[..., None, None] * ahead.abs()
        logits = logits.masked_fill(~visible(mask, document, ahead), -torch.inf)
        if sinks is not None:
            column = sinks.to(logits.dtype)[None, :, None, None].expand(*logits.shape[:3], 1)
            logits, v = torch.cat([logits, column], -1), torch.cat([v, torch.zeros_like(v[:, :1])], 1)
        lse = logits.logsumexp(-1) if logits.shape[-1] else logits.new_full(logits.shape[:3], -torch.inf)
        weights = (logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
        outs.append(torch.einsum("bhqk,bkhe->bqhe", weights, v))
        lses.append(lse)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=2)


def visible(mask: Mask, document: int, ahead_MN: Tensor) -> Tensor:
    """True where a query (row) sees a key (column) that is so many positions ahead of it, by the mask's definition."""
    window, prefix = (x[document] if isinstance(x, tuple) and mask.causal else x for x in (mask.window, mask.prefix))
    row = torch.arange(ahead_MN.shape[0], device=ahead_MN.device)[:, None]
    column = row + ahead_MN
    if not mask.causal:
        if not isinstance(window, tuple):
            return torch.ones_like(ahead_MN, dtype=torch.bool)
        before, after = window
        return (-ahead_MN <= (before or 0)) & (ahead_MN <= (after or 0))
    seen = ahead_MN <= 0
    if isinstance(window, int):
        seen &= ahead_MN > -window
    if mask.chunk is not None:
        seen &= row // mask.chunk == column // mask.chunk
    if isinstance(prefix, int):
        seen |= column < prefix
    return seen


def _distance(queries: int, keys: int, device: torch.device) -> Tensor:
    """How many positions each key (column) is ahead of each query (row)."""
    return torch.arange(keys, device=device)[None] - torch.arange(queries, device=device)[:, None]
