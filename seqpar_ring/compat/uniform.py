"""One sequence a batch row, of equal length on every rank: the names of ring-flash-attn's batch functions.

`ring_` holds consecutive tokens on a rank, `zigzag_ring_` two chunks of 2 W, `stripe_` every W-th token. All three give
attention over the whole sequence, causal or not; zigzag and stripe differ from ring in balance only. Each function is
collective over the group. In the shapes, S is what this rank holds of the sequence: W S tokens.
"""

# ruff: noqa: PLR0913 - the argument lists are those of ring-flash-attn

from __future__ import annotations

from torch import Tensor

from seqpar_ring.compat.arguments import BOTH, Options, Tensors, Window
from seqpar_ring.compat.rings import Group, Result, ring_of


def _attend(layout: str, tensors: Tensors, options: Options, group: Group) -> Result:
    ring = ring_of(group)
    return ring.attend(tensors, options, lambda tokens: ring.equally(layout, (tokens,)))


def ring_flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = BOTH,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Result:
    """Exact attention; rank r holds tokens r S .. (r + 1) S of the sequence.

    Args:
        q: queries (B, S, H, D) of this rank's tokens.
        k: keys (B, S, G, D); G divides H.
        v: values (B, S, G, D).
        dropout_p: must be 0.
        softmax_scale: factor of the logits; None: 1 / sqrt(D).
        causal: whether a query sees only keys up to its own position in the whole sequence.
        window_size: how many keys before and after its own position a query sees, -1 for all; with `causal` none after.
        alibi_slopes: (H,) or (B, H): `- slope * distance` is added to the logits; without gradient.
        deterministic: results are, on a CPU; on a GPU where `torch.use_deterministic_algorithms(True)` was called.
        return_attn_probs: also return the log-sum-exp, as ring-flash-attn does (it never returns probabilities).
        group: the ranks that share the sequence; None: the default group; one rank without torch.distributed.

    Returns:
        out (B, S, H, D) in q's dtype; with `return_attn_probs` (out, softmax_lse, None): softmax_lse (B, H, S) is the
        natural log-sum-exp of the logits, fp32 (fp64 for fp64).

    Raises:
        PlanError: shapes that do not fit, or a window that does not exist.
        UnsupportedError: dropout, or what no kernel can do exactly.
        DisagreementError: the ranks called with different shapes, dtypes or options.
        GroupError: a group that this rank does not belong to.
        TransportError: a rank died or did not arrive within the group's timeout.
    """
    options = Options(dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs)
    return _attend("parts", (q, k, v), options, group)


def ring_flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = BOTH,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Result:
    """`ring_flash_attn_func` with kv (B, S, 2, G, D)."""
    options = Options(dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs)
    return _attend("parts", (q, kv), options, group)


def ring_flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = BOTH,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Result:
    """`ring_flash_attn_func` with qkv (B, S, 3, H, D)."""
    options = Options(dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs)
    return _attend("parts", (qkv,), options, group)


def zigzag_ring_flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = BOTH,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Result:
    """`ring_flash_attn_func` where rank r holds chunks r and 2 W - 1 - r of 2 W equal ones; S is even."""
    options = Options(dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs)
    return _attend("zigzag", (q, k, v), options, group)


def zigzag_ring_flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = BOTH,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Result:
    """`zigzag_ring_flash_attn_func` with kv (B, S, 2, G, D)."""
    options = Options(dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs)
    return _attend("zigzag", (q, kv), options, group)


def zigzag_ring_flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = BOTH,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Result:
    """`zigzag_ring_flash_attn_func` with qkv (B, S, 3, H, D)."""
    options = Options(dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs)
    return _attend("zigzag", (qkv,), options, group)


def stripe_flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = BOTH,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Result:
    """`ring_flash_attn_func` where rank r holds tokens r, r + W, r + 2 W, ..."""
    options = Options(dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs)
    return _attend("striped", (q, k, v), options, group)


def stripe_flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = BOTH,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Result:
    """`stripe_flash_attn_func` with kv (B, S, 2, G, D)."""
    options = Options(dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs)
    return _attend("striped", (q, kv), options, group)


def stripe_flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = BOTH,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Result:
    """`stripe_flash_attn_func` with qkv (B, S, 3, H, D)."""
    options = Options(dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs)
    return _attend("striped", (qkv,), options, group)
