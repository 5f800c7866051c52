"""All documents in a row, cut contiguously: the names of ring-flash-attn's functions after Llama 3 (arXiv 2407.21783).

Each rank is told only of the documents that it touches, by `llama3_flash_attn_prepare_cu_seqlens`. Plans are made for
all documents, so every call begins with the ranks telling each other the borders that they know, one small message
more; then everyone checks what it was given against the whole. Each function is collective over the group. T is the
number of tokens of a rank, the same on all.
"""

# ruff: noqa: PLR0913 - the argument lists are those of ring-flash-attn

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from seqpar_ring.compat.arguments import (
    BOTH,
    Options,
    Tensors,
    Window,
    borders,
    expect_longest,
    expect_tokens,
    unpack,
    whole,
)
from seqpar_ring.compat.rings import Group, Result, Ring, ring_of
from seqpar_ring.errors import PlanError
from seqpar_ring.plan import Documents


class Prepared(NamedTuple):
    """What `llama3_flash_attn_prepare_cu_seqlens` returns for one rank; an ordinary tuple to those who unpack it.

    Attributes:
        cu_seqlens_q: int32, from 0 to T: the rank's tokens, by document.
        cu_seqlens_k: int32: the keys that these need, by document; the slice's length is its last number.
        max_seqlen_q, max_seqlen_k: the longest of each.
        local_k_slice: which keys of all ranks' in a row those are.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    local_k_slice: slice


class _Cut(NamedTuple):
    """The same in whole numbers."""

    q: list[int]
    k: list[int]
    start: int
    stop: int


def _cut(row: Sequence[int], causal: bool, rank: int, world: int) -> _Cut:
    """What a rank holds of documents with these borders, and which keys that needs."""
    tokens = row[-1] // world
    begin, end = rank * tokens, (rank + 1) * tokens
    # From the last border at or before the rank's first token to the first at or behind its last.
    touched = row[bisect_right(row, begin) - 1 : bisect_left(row, end) + 1]
    start, stop = touched[0], end if causal else touched[-1]
    q = [min(max(border, begin), end) - begin for border in touched]
    return _Cut(q, [min(border, stop) - start for border in touched], start, stop)


def llama3_flash_attn_prepare_cu_seqlens(cu_seqlens: Tensor, causal: bool, rank: int, world_size: int) -> Prepared:
    """What a rank holds of packed documents that are cut contiguously, and which keys its queries need.

    Args:
        cu_seqlens: int32 or int64 (documents + 1,): the cumulative lengths of all documents, from 0. Documents without
            tokens are left out.
        causal: whether attention will be: then no key behind the rank's last token is needed.
        rank: of the group.
        world_size: ranks of the group; divides the number of tokens.

    Returns:
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, local_k_slice; see `Prepared`. Under a causal mask the
        last query and the last key of each document are the same token.

    Raises:
        PlanError: lengths that do not ascend from 0 or that the ranks cannot share equally; no such rank.
    """
    row = borders("cu_seqlens", cu_seqlens)
    if not whole(world_size) or not whole(rank) or not 0 <= rank < world_size:
        raise PlanError("there is no such rank", fix="Give 0 <= rank < world_size.", rank=rank, world_size=world_size)
    if row[-1] % world_size:
        raise PlanError(
            "the tokens of all documents cannot be shared equally",
            fix="Pad to a multiple of world_size, or use SequenceParallel, which takes any lengths.",
            tokens=row[-1],
            world_size=world_size,
        )
    q, k, start, stop = _cut(row, causal, rank, world_size)
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32, device=cu_seqlens.device) for x in (q, k))
    longest_q, longest_k = (max(b - a for a, b in pairwise(x)) for x in (q, k))
    return Prepared(cu_q, cu_k, longest_q, longest_k, slice(start, stop))


def _attend(tensors: Tensors, given: tuple[Prepared, int], options: Options, group: Group) -> Result:
    ring = ring_of(group)
    prepared, stride = given
    mine: _Cut | None = None
    problem: Exception | None = None
    try:
        mine = _read(unpack(tensors, varlen=True)[1], prepared, stride)
    except Exception as error:
        problem = error
    known = _gather(ring, tensors[0], mine)
    if known is None:  # the same on all ranks
        ring.transport.agree("llama3_flash_attn_varlen_func", {}, problem)
    assert mine is not None
    assert known is not None  # agree raised otherwise
    return ring.attend(tensors, options, lambda _: _documents(ring, known, mine, options.causal), varlen=True)


def _read(k: Tensor, prepared: Prepared, stride: int) -> _Cut:
    """What a rank was given, as whole numbers that fit its tokens."""
    tokens, heads = k.shape[1:3]
    q_row, k_row = borders("cu_seqlens_q", prepared.cu_seqlens_q), borders("cu_seqlens_k", prepared.cu_seqlens_k)
    expect_tokens("cu_seqlens_q", q_row, tokens)
    expect_longest("max_seqlen_q", prepared.max_seqlen_q, q_row)
    expect_longest("max_seqlen_k", prepared.max_seqlen_k, k_row)
    if not whole(stride) or not 1 <= stride <= heads or heads % stride:
        fix = f"Give {', '.join(str(n) for n in range(1, heads + 1) if heads % n == 0)}."
        raise PlanError("heads_k_stride must divide the key heads", fix=fix, heads_k_stride=stride, key_heads=heads)
    keys = prepared.local_k_slice
    if not isinstance(keys, slice) or not whole(keys.start) or not whole(keys.stop) or keys.step not in (None, 1):
        raise PlanError(
            "local_k_slice is not a slice of the keys of all ranks",
            fix="Give slice(start, stop) as llama3_flash_attn_prepare_cu_seqlens returns it.",
            local_k_slice=keys,
        )
    return _Cut(q_row, k_row, keys.start, keys.stop)


def _gather(ring: Ring, like: Tensor, mine: _Cut | None) -> list[list[int]] | None:
    """By rank its number of tokens and the borders that it knows, in whole numbers; None where a rank has a problem.

    All ranks go the same way: the number that says how much follows also says that a rank has nothing to say.
    """
    said = [] if mine is None else [mine.q[-1], *(mine.start + border for border in mine.k[:-1])]
    count, row = (torch.tensor(x, dtype=torch.int64, device=like.device) for x in ([len(said)], said))
    counts: list[int] = ring.transport.all_gather(count, [1] * ring.transport.world).tolist()
    if min(counts) == 0:
        return None
    return [part.tolist() for part in ring.transport.all_gather(row, counts).split(counts)]


def _documents(ring: Ring, known: list[list[int]], mine: _Cut, causal: bool) -> Documents:
    """The documents that all ranks know together, if this rank's own numbers follow from them."""
    tokens = [row[0] for row in known]
    if len(set(tokens)) > 1:
        raise PlanError("the ranks hold unequal numbers of tokens", fix="Give each the same number.", tokens=tokens)
    row = [*sorted({border for _, *rest in known for border in rest}), sum(tokens)]
    rank, world = ring.transport.rank, ring.transport.world
    right = _cut(row, causal, rank, world) if row[0] == 0 and row[-2] < row[-1] else None
    if mine != right:
        raise PlanError(
            "what this rank was given does not follow from the documents that all ranks know",
            fix="Take it from llama3_flash_attn_prepare_cu_seqlens, with the same documents and causal on all ranks.",
            given=tuple(mine),
            expected=None if right is None else tuple(right),
            cu_seqlens=row,
            causal=causal,
            rank=rank,
        )
    return ring.documents("contiguous", tuple(b - a for a, b in pairwise(row)))


def llama3_flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads_k_stride: int,
    local_k_slice: slice,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = BOTH,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Result:
    """Exact attention within each document; rank r holds tokens r T .. (r + 1) T of all documents in a row.

    Args:
        q: queries (T, H, D) of this rank's tokens.
        k: keys (T, G, D) of this rank's tokens; G divides H.
        v: values (T, G, D).
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, local_k_slice: of this rank, from
            `llama3_flash_attn_prepare_cu_seqlens` with the same `causal`.
        heads_k_stride: divides G. It was how many heads were gathered at a time; here blocks travel, all heads at once.
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group: as in
            `ring_flash_attn_varlen_func`.

    Returns:
        out (T, H, D) in q's dtype; with `return_attn_probs` (out, softmax_lse, None): softmax_lse (H, T) is the natural
        log-sum-exp of the logits, fp32 (fp64 for fp64).

    Raises:
        PlanError: also where what was prepared does not belong together, or to these tokens, this rank and `causal`.
        UnsupportedError, DisagreementError, GroupError, TransportError: as in `ring_flash_attn_varlen_func`.
    """
    options = Options(dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs)
    given = Prepared(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, local_k_slice)
    return _attend((q, k, v), (given, heads_k_stride), options, group)


def llama3_flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads_k_stride: int,
    local_k_slice: slice,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = BOTH,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Result:
    """`llama3_flash_attn_varlen_func` with kv (T, 2, G, D)."""
    options = Options(dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs)
    given = Prepared(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, local_k_slice)
    return _attend((q, kv), (given, heads_k_stride), options, group)


def llama3_flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads_k_stride: int,
    local_k_slice: slice,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = BOTH,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Result:
    """`llama3_flash_attn_varlen_func` with qkv (T, 3, H, D)."""
    options = Options(dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs)
    given = Prepared(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, local_k_slice)
    return _attend((qkv,), (given, heads_k_stride), options, group)
