"""Packed documents, each cut alike: the names of ring-flash-attn's varlen functions.

Every document is spread over all ranks, which hold equal parts of it: `ring_` one contiguous part, `zigzag_ring_` two
chunks of 2 W. So `cu_seqlens` are those of a rank, the same on all, and a document is W times as long as they say. Each
function is collective over the group. T is the number of tokens of this rank.
"""

# ruff: noqa: PLR0913 - the argument lists are those of ring-flash-attn

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from seqpar_ring.compat.arguments import BOTH, Options, Tensors, Window, borders, expect_longest, expect_tokens
from seqpar_ring.compat.rings import Group, Result, Ring, ring_of
from seqpar_ring.plan import Documents


def _attend(
    layout: str, tensors: Tensors, lengths: tuple[Tensor, int], options: Options, group: Group
) -> Result:
    ring = ring_of(group)
    return ring.attend(tensors, options, lambda tokens: _documents(ring, layout, lengths, tokens), varlen=True)


def _documents(ring: Ring, layout: str, lengths: tuple[Tensor, int], tokens: int) -> Documents:
    row = borders("cu_seqlens", lengths[0])
    expect_tokens("cu_seqlens", row, tokens)
    expect_longest("max_seqlen", lengths[1], row)
    return ring.equally(layout, tuple(end - start for start, end in pairwise(row)))


def ring_flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = BOTH,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Result:
    """Exact attention within each document; rank r holds part r of the W equal parts of every document.

    Args:
        q: queries (T, H, D) of this rank's tokens, documents one after the other.
        k: keys (T, G, D); G divides H.
        v: values (T, G, D).
        cu_seqlens: int32 (documents + 1,): where each document begins among this rank's tokens, and T.
        max_seqlen: the longest document's tokens on this rank, or more.
        dropout_p: must be 0.
        softmax_scale: factor of the logits; None: 1 / sqrt(D).
        causal: whether a query sees only keys up to its own position in its document.
        window_size: how many keys before and after its own position a query sees, -1 for all; with `causal` none after.
        alibi_slopes: (H,): `- slope * distance` is added to the logits; without gradient.
        deterministic: results are, on a CPU; on a GPU where `torch.use_deterministic_algorithms(True)` was called.
        return_attn_probs: also return the log-sum-exp, as ring-flash-attn does (it never returns probabilities).
        group: the ranks that share the documents; None: the default group; one rank without torch.distributed.

    Returns:
        out (T, H, D) in q's dtype; with `return_attn_probs` (out, softmax_lse, None): softmax_lse (H, T) is the natural
        log-sum-exp of the logits, fp32 (fp64 for fp64).

    Raises:
        PlanError: shapes or lengths that do not fit, or a window that does not exist.
        UnsupportedError: dropout, slopes of each document, `deterministic` that torch was not told, or what no kernel
            can do exactly.
        DisagreementError: the ranks called with different lengths, shapes, dtypes or options.
        GroupError: a group that this rank does not belong to.
        TransportError: a rank died or did not arrive within the group's timeout.
    """
    options = Options(dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs)
    return _attend("parts", (q, k, v), (cu_seqlens, max_seqlen), options, group)


def ring_flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = BOTH,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Result:
    """`ring_flash_attn_varlen_func` with kv (T, 2, G, D)."""
    options = Options(dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs)
    return _attend("parts", (q, kv), (cu_seqlens, max_seqlen), options, group)


def ring_flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = BOTH,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Result:
    """`ring_flash_attn_varlen_func` with qkv (T, 3, H, D)."""
    options = Options(dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs)
    return _attend("parts", (qkv,), (cu_seqlens, max_seqlen), options, group)


def zigzag_ring_flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = BOTH,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Result:
    """`ring_flash_attn_varlen_func` where rank r holds chunks r and 2 W - 1 - r of the 2 W of every document."""
    options = Options(dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs)
    return _attend("zigzag", (q, k, v), (cu_seqlens, max_seqlen), options, group)


def zigzag_ring_flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = BOTH,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Result:
    """`zigzag_ring_flash_attn_varlen_func` with kv (T, 2, G, D)."""
    options = Options(dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs)
    return _attend("zigzag", (q, kv), (cu_seqlens, max_seqlen), options, group)


def zigzag_ring_flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = BOTH,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Result:
    """`zigzag_ring_flash_attn_varlen_func` with qkv (T, 3, H, D)."""
    options = Options(dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs)
    return _attend("zigzag", (qkv,), (cu_seqlens, max_seqlen), options, group)
