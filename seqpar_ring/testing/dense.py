"""Attention on one device in plain torch, document by document: what the ring must equal.

Every score matrix is made whole, in the dtype of the inputs, so in fp64 this is the truth and in any dtype it is simple
enough to be read at a glance. It is differentiable by autograd. It is not fast and needs memory for S x S scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def dense_attention(  # noqa: PLR0913 - mirrors attention itself
    q_BSHD: Tensor,
    k_BSGD: Tensor,
    v_BSGE: Tensor,
    lengths: int | Sequence[int],
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention within each document.

    Args:
        q_BSHD, k_BSGD, v_BSGE: whole sequences, any floating dtype; H is a multiple of G.
        lengths: tokens of each document, or of the one document; they sum to S.
        causal: a query at position p sees keys up to p.
        window: with causal, only the last `window` of those keys; p's own included.
        scale: factor on q·k; None: 1 / sqrt(D).
        softcap: logits become softcap * tanh(logits / softcap), as in Gemma 2.

    Returns:
        out_BSHE and lse_BHS (natural logarithm), both in the dtype of `q_BSHD`.

    Raises:
        ValueError: lengths that do not sum to S, or a window without causality.
    """
    documents = [lengths] if isinstance(lengths, int) else list(lengths)
    if sum(documents) != q_BSHD.shape[1]:
        raise ValueError(f"lengths {documents} sum to {sum(documents)}, but there are {q_BSHD.shape[1]} tokens")
    if window is not None and not causal:
        raise ValueError(f"a window of {window} needs causal=True")
    group = q_BSHD.shape[2] // k_BSGD.shape[2]
    k_BSHD, v_BSHE = k_BSGD.repeat_interleave(group, dim=2), v_BSGE.repeat_interleave(group, dim=2)
    scale = q_BSHD.shape[3] ** -0.5 if scale is None else scale
    outs, lses = [], []
    for q, k, v in zip(*(x.split(documents, dim=1) for x in (q_BSHD, k_BSHD, v_BSHE)), strict=True):
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if causal:
            logits = logits.masked_fill(_hidden(q.shape[1], window, q.device), -torch.inf)
        lse = logits.logsumexp(-1)
        outs.append(torch.einsum("bhqk,bkhe->bqhe", (logits - lse[..., None]).exp(), v))
        lses.append(lse)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=2)


def _hidden(tokens: int, window: int | None, device: torch.device) -> Tensor:
    """True where a query (row) does not see a key (column)."""
    position = torch.arange(tokens, device=device)
    ahead = position[None] - position[:, None]
    return (ahead > 0) if window is None else (ahead > 0) | (ahead <= -window)
