"""GPU libraries as they read in source, computed on the CPU in plain torch: names, orders, layouts, and every trap.

What a wrapper gets wrong (an argument in the wrong place, a window that the library reads otherwise, an infinity of
the wrong sign) gives wrong numbers here as it would there. Sources: csrc/flash_attn/flash_api.cpp and
hopper/flash_api.cpp of flash-attention, flash_attn/cute/interface.py of flash-attn-4 4.0.0b36, the operators' schemas
of torch 2.13, cudnn/sdpa/fwd/torch_op.py of nvidia-cudnn-frontend 1.32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from seqpar_ring.kernels import (
    CudnnKernel,
    Flash2Kernel,
    Flash3Kernel,
    Flash4Kernel,
    Kernel,
    TorchCudnnKernel,
    TorchFlashKernel,
    register,
    registered,
    unregister,
)
from seqpar_ring.kernels.gapless import Gapless
from seqpar_ring.kernels.library import Function, Library
from seqpar_ring.kernels.squares import Squares
from seqpar_ring.kernels.varlen import VarlenKernel

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Allowed = Callable[[Tensor, Tensor, int, int], Tensor]
"""(row i, column j, m queries, n keys of the segment) -> which pairs are seen."""


def band(left: int, right: int) -> Allowed:
    """Aligned bottom right; a negative side cuts nothing."""

    def allowed(i: Tensor, j: Tensor, m: int, n: int) -> Tensor:
        d = j - i - (n - m)
        return ((d >= -left) | (left < 0)) & ((d <= right) | (right < 0))

    return allowed


def top_left(causal: bool) -> Allowed:
    """cuDNN's diagonal."""
    return lambda i, j, m, n: (j <= i) | (not causal)


def logits(q: Tensor, k: Tensor, allowed: Allowed, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """(logits (H, m, n) in fp64, their derivative by q . k) of one segment."""
    m, n = q.shape[0], k.shape[0]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = torch.einsum("ihd,jhd->hij", q.double(), k.double()) * scale
    slope = torch.full_like(s, scale)
    if softcap:
        bent = torch.tanh(s / softcap)
        s, slope = softcap * bent, scale * (1 - bent * bent)
    seen = allowed(torch.arange(m).unsqueeze(1), torch.arange(n).unsqueeze(0), m, n).expand(m, n)
    return s.masked_fill(~seen, -torch.inf), slope


def attend(
    qkv: tuple[Tensor, Tensor, Tensor],
    cu: tuple[Tensor, Tensor],
    allowed: Allowed,
    scores: tuple[float, float],
    empty: float,
) -> tuple[Tensor, Tensor]:
    """(out (T, H, E), lse (H, T)); `empty` is the lse of a row that sees nothing."""
    q, k, v = qkv
    out = torch.full((q.shape[0], q.shape[1], v.shape[2]), torch.nan, dtype=q.dtype)
    lse = torch.full(
        (q.shape[1], q.shape[0]), torch.nan, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32
    )
    for a, b, c, d in segments(*cu):
        if a == b:
            continue
        s, _ = logits(q[a:b], k[c:d], allowed, *scores)
        row = torch.logsumexp(s, -1) if d > c else torch.full(s.shape[:2], -torch.inf, dtype=torch.float64)
        p = torch.exp(s - row.masked_fill(row == -torch.inf, torch.inf).unsqueeze(-1))
        values = v[c:d].double().repeat_interleave(q.shape[1] // v.shape[1], 1)
        out[a:b] = torch.einsum("hij,jhe->ihe", p, values).to(q.dtype)
        lse[:, a:b] = row.masked_fill(row == -torch.inf, empty).to(lse.dtype)
    return out, lse


def differentiate(
    dout: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor],
    cu: tuple[Tensor, Tensor],
    allowed: Allowed,
    scores: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in q's dtype from out and lse as they are given: an lse of -inf makes nan, as on a GPU."""
    check_reads(dout, results[0])
    (q, k, v), (out, lse) = qkv, results
    dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float64) for x in qkv)
    times = q.shape[1] // k.shape[1]
    for a, b, c, d in segments(*cu):
        if a == b or c == d:
            continue
        s, slope = logits(q[a:b], k[c:d], allowed, *scores)
        p = torch.exp(s - lse[:, a:b, None].double())
        values, keys = (x[c:d].double().repeat_interleave(times, 1) for x in (v, k))
        do = dout[a:b].double()
        delta = (do * out[a:b].double()).sum(-1).T.unsqueeze(-1)
        ds = p * (torch.einsum("ihe,jhe->hij", do, values) - delta) * slope
        dq[a:b] += torch.einsum("hij,jhd->ihd", ds, keys)
        dk[c:d] += torch.einsum("hij,ihd->jhd", ds, q[a:b].double()).unflatten(1, (-1, times)).sum(2)
        dv[c:d] += torch.einsum("hij,ihe->jhe", p, do).unflatten(1, (-1, times)).sum(2)
    dq, dk, dv = (x.to(q.dtype) for x in (dq, dk, dv))
    return dq, dk, dv


def segments(cu_q: Tensor, cu_k: Tensor) -> list[tuple[int, int, int, int]]:
    """(first query, end, first key, end) of each."""
    q, k = cu_q.tolist(), cu_k.tolist()
    return list(zip(q, q[1:], k, k[1:], strict=False))


def check(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest: tuple[int, int]) -> None:
    """What all these libraries assert of packed rows, or take for granted."""
    assert all(x.dim() == 3 for x in (q, k, v))
    check_reads(q, k, v)
    assert all(x.shape[-1] % 8 == 0 for x in (q, k, v))
    assert q.dtype == k.dtype == v.dtype
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q.shape == cu_k.shape
    assert cu_q.is_contiguous()
    assert cu_k.is_contiguous()
    assert int(cu_q[-1]) == q.shape[0]
    assert int(cu_k[-1]) == k.shape[0] == v.shape[0]
    assert longest[0] >= max(b - a for a, b, *_ in segments(cu_q, cu_k))
    assert longest[1] >= max(d - c for *_, c, d in segments(cu_q, cu_k))


def check_reads(*tensors: Tensor) -> None:
    """That 16 bytes can be read at once wherever a row begins."""
    for x in tensors:
        steps = [step * x.itemsize for n, step in zip(x.shape[:-1], x.stride(), strict=False) if n > 1]
        assert x.stride(-1) == 1
        assert not any(place % 16 for place in (x.data_ptr(), *steps)), "a row at no multiple of 16 bytes"


class StandIn(Library):
    """A library that is there; keeps the arguments of each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    @property
    def absent(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    def function(self, name: str) -> Function:
        implementation = getattr(self, name)

        @wraps(implementation)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            return implementation(*args, **kwargs)

        return recorded


def window_of_flash2(
    longest: tuple[int, int], causal: bool, left: int, right: int, shares_heads: bool
) -> tuple[Allowed, bool]:
    """What flash-attention 2 makes of a window, and whether the call takes its path for segments of one query."""
    if longest[0] == 1:
        causal = False
    right = 0 if causal else right
    swapped = longest[0] == 1 and shares_heads and left < 0 and right < 0
    left = -1 if left >= longest[1] else left
    right = -1 if right >= longest[1] else right
    if left < 0 <= right and right != 0:
        left = longest[1]
    if left >= 0 > right:
        right = longest[1]
    return band(left, right), swapped


class FlashAttn2(StandIn):
    """flash_attn.flash_attn_interface of 2.8."""

    def _flash_attn_varlen_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        return_softmax: bool = False,
        block_table: Tensor | None = None,
        leftpad_k: Tensor | None = None,
        seqused_k: Tensor | None = None,
        zero_tensors: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        longest = max_seqlen_q, max_seqlen_k
        check(q, k, v, cu_seqlens_q, cu_seqlens_k, longest)
        assert q.shape[2] == k.shape[2] == v.shape[2]
        assert dropout_p == 0.0
        allowed, swapped = window_of_flash2(
            longest, causal, window_size_left, window_size_right, q.shape[1] > k.shape[1]
        )
        out, lse = attend((q, k, v), (cu_seqlens_q, cu_seqlens_k), allowed, (softmax_scale, softcap), torch.inf)
        if swapped and any(a == b for a, b, *_ in segments(cu_seqlens_q, cu_seqlens_k)):
            out.fill_(torch.nan)
        return out, lse, torch.empty(0), torch.zeros(2, dtype=torch.int64)

    def _flash_attn_varlen_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dq: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Tensor | None,
        deterministic: bool,
        rng_state: Tensor | None = None,
        zero_tensors: bool = False,
    ) -> Tensor:
        longest = max_seqlen_q, max_seqlen_k
        check(q, k, v, cu_seqlens_q, cu_seqlens_k, longest)
        assert dout.shape == out.shape == q.shape
        assert softmax_lse.shape == (q.shape[1], q.shape[0])
        assert softmax_lse.is_contiguous()
        allowed, _ = window_of_flash2(longest, causal, window_size_left, window_size_right, False)
        found = differentiate(
            dout, (q, k, v), (out, softmax_lse), (cu_seqlens_q, cu_seqlens_k), allowed, (softmax_scale, softcap)
        )
        for target, gradient in zip((dq, dk, dv), found, strict=True):
            assert target is not None
            target.copy_(gradient)
        return torch.empty(0)


class FlashAttn3(StandIn):
    """flash_attn_interface of hopper/."""

    def _flash_attn_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_new: Tensor | None = None,
        v_new: Tensor | None = None,
        qv: Tensor | None = None,
        out_: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        cu_seqlens_k_new: Tensor | None = None,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        page_table: Tensor | None = None,
        kv_batch_idx: Tensor | None = None,
        leftpad_k: Tensor | None = None,
        rotary_cos: Tensor | None = None,
        rotary_sin: Tensor | None = None,
        seqlens_rotary: Tensor | None = None,
        q_descale: Tensor | None = None,
        k_descale: Tensor | None = None,
        v_descale: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size_left: int = -1,
        window_size_right: int = -1,
        attention_chunk: int = 0,
        softcap: float = 0.0,
        rotary_interleaved: bool = True,
        scheduler_metadata: Tensor | None = None,
        num_splits: int = 1,
        pack_gqa: bool | None = None,
        sm_margin: int = 0,
    ) -> tuple[Tensor, ...]:
        assert cu_seqlens_q is not None
        assert cu_seqlens_k is not None
        assert max_seqlen_q is not None
        assert max_seqlen_k is not None
        assert softmax_scale is not None
        check(q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k))
        allowed = window_of_flash3((max_seqlen_q, max_seqlen_k), causal, window_size_left, window_size_right)
        cu = cu_seqlens_q, cu_seqlens_k
        return (*attend((q, k, v), cu, allowed, (softmax_scale, softcap), -torch.inf), torch.empty(0), torch.empty(0))

    def _flash_attn_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        sequed_q: Tensor | None = None,
        sequed_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        dq: Tensor | None = None,
        dk: Tensor | None = None,
        dv: Tensor | None = None,
        softmax_scale: float | None = None,
        is_causal: bool = False,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
        deterministic: bool = False,
        sm_margin: int = 0,
    ) -> Tensor:
        assert cu_seqlens_q is not None
        assert cu_seqlens_k is not None
        assert max_seqlen_q is not None
        assert max_seqlen_k is not None
        assert softmax_scale is not None
        assert not (deterministic and q.shape[2] > 192)
        check(q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k))
        allowed = window_of_flash3((max_seqlen_q, max_seqlen_k), is_causal, window_size_left, window_size_right)
        cu = cu_seqlens_q, cu_seqlens_k
        found = differentiate(dout, (q, k, v), (out, softmax_lse), cu, allowed, (softmax_scale, softcap))
        for target, gradient in zip((dq, dk, dv), found, strict=True):
            assert target is not None
            target.copy_(gradient)
        return torch.empty(0)


class FlashAttn3Of2025(FlashAttn3):
    """flash_attn_interface of hopper/ as flash-attention 2.8.3 has it: a window is a pair, and few have a default."""

    def _flash_attn_forward(  # type: ignore[override]
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_new: Tensor | None,
        v_new: Tensor | None,
        qv: Tensor | None,
        out: Tensor | None,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        cu_seqlens_k_new: Tensor | None,
        seqused_q: Tensor | None,
        seqused_k: Tensor | None,
        max_seqlen_q: int,
        max_seqlen_k: int,
        page_table: Tensor | None,
        kv_batch_idx: Tensor | None,
        leftpad_k: Tensor | None,
        rotary_cos: Tensor | None,
        rotary_sin: Tensor | None,
        seqlens_rotary: Tensor | None,
        q_descale: Tensor | None,
        k_descale: Tensor | None,
        v_descale: Tensor | None,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int] = (-1, -1),
        attention_chunk: int = 0,
        softcap: float = 0.0,
        rotary_interleaved: bool = True,
        scheduler_metadata: Tensor | None = None,
        num_splits: int = 1,
        pack_gqa: bool | None = None,
        sm_margin: int = 0,
    ) -> tuple[Tensor, ...]:
        unused = k_new, v_new, qv, out, cu_seqlens_k_new, seqused_q, seqused_k, page_table, kv_batch_idx, leftpad_k
        unused += rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale
        assert all(x is None for x in unused)
        check(q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k))
        allowed = window_of_flash3((max_seqlen_q, max_seqlen_k), causal, *window_size)
        found = attend((q, k, v), (cu_seqlens_q, cu_seqlens_k), allowed, (softmax_scale, softcap), -torch.inf)
        return (*found, torch.empty(0), torch.empty(0))

    def _flash_attn_backward(  # type: ignore[override]
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        sequed_q: Tensor | None,
        sequed_k: Tensor | None,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
        sm_margin: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert sequed_q is sequed_k is None
        allowed = window_of_flash3((max_seqlen_q, max_seqlen_k), causal, *window_size)
        cu = cu_seqlens_q, cu_seqlens_k
        found = differentiate(dout, (q, k, v), (out, softmax_lse), cu, allowed, (softmax_scale, softcap))
        for target, gradient in zip((dq, dk, dv), found, strict=True):
            target.copy_(gradient)
        return dq, dk, dv, torch.empty(0)


def window_of_flash3(longest: tuple[int, int], causal: bool, left: int, right: int) -> Allowed:
    """What flash-attention 3 makes of a window."""
    left = -1 if left >= longest[1] - 1 else left
    right = -1 if right >= longest[0] - 1 else right
    if longest[0] == 1 and left == -1 and right == -1:
        causal = False
    return band(left, 0 if causal else right)


class FlashAttn4(StandIn):
    """flash_attn.cute.interface of 4.0.0b36."""

    def _flash_attn_fwd(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qv: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        softcap: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        return_lse: bool = False,
    ) -> tuple[Tensor | None, ...]:
        assert cu_seqlens_q is not None
        assert cu_seqlens_k is not None
        assert max_seqlen_q is not None
        assert max_seqlen_k is not None
        assert softmax_scale is not None
        check(q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k))
        allowed = window_of_flash4(causal, window_size_left, window_size_right)
        scores = softmax_scale, softcap or 0.0
        out, lse = attend((q, k, v), (cu_seqlens_q, cu_seqlens_k), allowed, scores, -torch.inf)
        return out, lse if return_lse else None, None, None, None

    def _flash_attn_bwd(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        softcap: float = 0.0,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        *,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        deterministic: bool = False,
        dq: Tensor | None = None,
        dk: Tensor | None = None,
        dv: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        assert cu_seqlens_q is not None
        assert cu_seqlens_k is not None
        assert max_seqlen_q is not None
        assert max_seqlen_k is not None
        assert softmax_scale is not None
        check(q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k))
        assert q.shape[2] == v.shape[2] or q.shape[1] == k.shape[1], "GQA backward requires head_dim == head_dim_v"
        allowed = window_of_flash4(causal, window_size_left, window_size_right)
        cu = cu_seqlens_q, cu_seqlens_k
        found = differentiate(dout, (q, k, v), (out, lse), cu, allowed, (softmax_scale, softcap))
        for target, gradient in zip((dq, dk, dv), found, strict=True):
            if target is not None:
                target.copy_(gradient)
        return (*found, torch.empty(0))


def window_of_flash4(causal: bool, left: int | None, right: int | None) -> Allowed:
    """What flash-attention 4 makes of a window: a negative side beside a finite one is a number like any other."""
    if left is not None and right is not None and left < 0 and right < 0:
        left = right = None
    right = 0 if causal else right

    def allowed(i: Tensor, j: Tensor, m: int, n: int) -> Tensor:
        d = j - i - (n - m)
        seen = torch.ones_like(d, dtype=torch.bool)
        if left is not None:
            seen = seen & (d >= -left)
        return seen if right is None else seen & (d <= right)

    return allowed


class AtenFlash(StandIn):
    """aten's varlen flash attention: the arguments are first bound by the operator's own schema."""

    def _flash_attention_forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        a = bound("_flash_attention_forward", args, kwargs)
        q, k, v, cu = a["query"], a["key"], a["value"], (a["cum_seq_q"], a["cum_seq_k"])
        longest = a["max_q"], a["max_k"]
        check(q, k, v, *cu, longest)
        allowed, swapped = window_of_flash2(longest, a["is_causal"], *_sides(a), q.shape[1] > k.shape[1])
        out, lse = attend((q, k, v), cu, allowed, (a["scale"], 0.0), torch.inf)
        if swapped and any(x == y for x, y, *_ in segments(*cu)):
            out.fill_(torch.nan)
        return out, lse, torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)

    def _flash_attention_backward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        a = bound("_flash_attention_backward", args, kwargs)
        qkv, cu = (a["query"], a["key"], a["value"]), (a["cum_seq_q"], a["cum_seq_k"])
        longest = a["max_q"], a["max_k"]
        check(*qkv, *cu, longest)
        allowed, _ = window_of_flash2(longest, a["is_causal"], *_sides(a), False)
        return differentiate(a["grad_out"], qkv, (a["out"], a["logsumexp"]), cu, allowed, (a["scale"], 0.0))


def _sides(a: dict[str, Any]) -> tuple[int, int]:
    left, right = a["window_size_left"], a["window_size_right"]
    return -1 if left is None else left, -1 if right is None else right


class AtenCudnn(StandIn):
    """aten's cuDNN attention, dense, its diagonal at the top left."""

    def _scaled_dot_product_cudnn_attention(self, *args: Any, **kwargs: Any) -> tuple[Tensor | int | None, ...]:
        a = bound("_scaled_dot_product_cudnn_attention", args, kwargs)
        check_reads(a["query"], a["key"], a["value"])
        assert a["compute_log_sumexp"]
        parts = [
            attend(self._one(a, b), self._cu(a), top_left(a["is_causal"]), (a["scale"], 0.0), -torch.inf)
            for b in range(len(a["query"]))
        ]
        out, lse = (torch.stack(x) for x in zip(*parts, strict=True))
        zero = torch.zeros((), dtype=torch.int64)
        return out.transpose(1, 2), lse.unsqueeze(-1), None, None, 0, 0, zero, zero, None

    def _scaled_dot_product_cudnn_attention_backward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        a = bound("_scaled_dot_product_cudnn_attention_backward", args, kwargs)
        check_reads(a["query"], a["key"], a["value"], a["grad_out"], a["out"])
        assert a["logsumexp"].shape == (*a["query"].shape[:3], 1)
        assert (a["max_q"], a["max_k"]) == (a["query"].shape[2], a["key"].shape[2])
        found = []
        for b in range(len(a["query"])):
            results = a["out"][b].transpose(0, 1), a["logsumexp"][b, :, :, 0]
            dout = a["grad_out"][b].transpose(0, 1)
            scores = a["scale"], 0.0
            found.append(differentiate(dout, self._one(a, b), results, self._cu(a), top_left(a["is_causal"]), scores))
        return tuple(torch.stack(x).transpose(1, 2) for x in zip(*found, strict=True))

    @staticmethod
    def _one(a: dict[str, Any], b: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (a[name][b].transpose(0, 1) for name in ("query", "key", "value"))
        return q, k, v

    @staticmethod
    def _cu(a: dict[str, Any]) -> tuple[Tensor, Tensor]:
        q, k = (torch.tensor([0, a[name].shape[2]], dtype=torch.int32) for name in ("query", "key"))
        return q, k


def bound(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, as the operator of this torch takes them; what it does not take raises."""
    schema = getattr(torch.ops.aten, name).default._schema
    found: dict[str, Any] = {}
    places = [argument for argument in schema.arguments if not argument.kwarg_only]
    assert len(args) <= len(places)
    for argument, value in zip(places, args, strict=False):
        found[argument.name] = value
    for key, value in kwargs.items():
        assert any(argument.name == key for argument in schema.arguments), key
        found[key] = value
    for argument in schema.arguments:
        if argument.name not in found:
            assert argument.has_default_value(), f"{argument.name} is missing"
            found[argument.name] = argument.default_value
        kind = str(argument.type)
        assert kind != "Tensor" or found[argument.name] is None or isinstance(found[argument.name], Tensor)
        assert kind != "int" or isinstance(found[argument.name], int)
        assert kind != "bool" or isinstance(found[argument.name], bool)
    return found


class CudnnFrontend(StandIn):
    """The operators of nvidia-cudnn-frontend on packed rows, diagonal at the top left."""

    def sdpa_fwd(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_scale: float,
        is_causal: bool = False,
        causal_bottom_right: bool = False,
        window_left: int = -1,
        window_right: int = -1,
        sinks: Tensor | None = None,
        seq_len_q: Tensor | None = None,
        seq_len_kv: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        max_seqlen_q: int = 0,
        max_seqlen_kv: int = 0,
        return_lse: bool = True,
    ) -> tuple[Tensor, Tensor]:
        assert cu_seqlens_q is not None
        assert cu_seqlens_kv is not None
        check(q, k, v, cu_seqlens_q, cu_seqlens_kv, (max_seqlen_q, max_seqlen_kv))
        cu = cu_seqlens_q, cu_seqlens_kv
        out, lse = attend((q, k, v), cu, top_left(is_causal), (attn_scale, 0.0), -torch.inf)
        return out, lse.transpose(0, 1).unsqueeze(-1)

    def thd_lse_to_padded(self, lse_th: Tensor, cu_seqlens_q: Tensor, max_seqlen_q: int) -> Tensor:
        padded = torch.zeros(len(cu_seqlens_q) - 1, lse_th.shape[1], max_seqlen_q, 1, dtype=lse_th.dtype)
        for i, (a, b) in enumerate(zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], strict=False)):
            padded[i, :, : b - a, 0] = lse_th[a:b].T
        return padded

    def sdpa_bwd(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        attn_scale: float,
        is_causal: bool = False,
        causal_bottom_right: bool = False,
        window_left: int = -1,
        window_right: int = -1,
        sinks: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        max_seqlen_q: int = 0,
        max_seqlen_kv: int = 0,
        is_deterministic: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert cu_seqlens_q is not None
        assert cu_seqlens_kv is not None
        assert lse.shape == (len(cu_seqlens_q) - 1, q.shape[1], max_seqlen_q, 1)
        check(q, k, v, cu_seqlens_q, cu_seqlens_kv, (max_seqlen_q, max_seqlen_kv))
        packed = torch.cat(
            [lse[i, :, : b - a, 0] for i, (a, b, *_) in enumerate(segments(cu_seqlens_q, cu_seqlens_kv))], 1
        )
        cu = cu_seqlens_q, cu_seqlens_kv
        return differentiate(grad_out, (q, k, v), (o, packed), cu, top_left(is_causal), (attn_scale, 0.0))


def gpu_kernels() -> tuple[VarlenKernel | TorchCudnnKernel, ...]:
    """The GPU's kernels, each over a stand-in for its library."""
    return (
        Flash2Kernel(FlashAttn2(), ("cpu",)),
        Flash3Kernel(FlashAttn3(), ("cpu",)),
        Flash4Kernel(FlashAttn4(), ("cpu",)),
        TorchFlashKernel(AtenFlash(), ("cpu",)),
        TorchCudnnKernel(AtenCudnn(), ("cpu",)),
        CudnnKernel(CudnnFrontend(), ("cpu",)),
    )


@contextmanager
def only(kernels: Iterable[Kernel]) -> Iterator[None]:
    """These are the kernels that there are; afterwards those of before."""
    before = registered()
    for kernel in before:
        unregister(kernel.name)
    for kernel in kernels:
        register(kernel)
    try:
        yield
    finally:
        for kernel in registered():
            unregister(kernel.name)
        for kernel in before:
            register(kernel)


def on_cpu(kernel: VarlenKernel | TorchCudnnKernel) -> Kernel:
    """A GPU's kernel over a stand-in for its library, in any dtype and the same bits each time, as it is selected."""
    kernel.capabilities = replace(kernel.capabilities, dtypes=DTYPES, max_deterministic_dim=None)
    can = kernel.capabilities
    return Squares(kernel) if can.square else kernel if can.empty_segments else Gapless(kernel)
