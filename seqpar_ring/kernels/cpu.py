"""Block attention by torch's own CPU flash kernel, which needs nothing installed.

The kernel is a private op of aten, so it is named in this file only. It knows full blocks, top-left causal blocks and
additive masks; so each segment of a call is cut (`geometry.split`) into full parts, causal parts of as many rows as
keys or more, and masked slabs of a window, and parts that share query rows are merged in fp32. It has four traps,
closed here: an empty block kills the process (no part is ever empty), rows of stride other than 1 are read wrongly
(copied first), without GQA (older torch) key heads must be repeated, and a row whose logits are all nan or -inf gets
out 0 and lse 0 where there are few keys, which a merge would take for a row that saw something (what may overflow goes
to the reference). Keys or values that are narrower are padded with zeros, since it wants one width. It does no softcap
and no position biases. 16-bit inputs are mostly computed in fp32, see `_narrow`. Keys and values are copied so that the
rows of a head lie together, which makes the op 1 to 2 % faster, forward and backward; a copy of queries, of which every
row is read once, gains no more than it costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from seqpar_ring.geometry import Part, split
from seqpar_ring.kernels.base import Capabilities, Kept, Resting, Scores, admit, wide
from seqpar_ring.kernels.delta import stand_in
from seqpar_ring.kernels.merge import merge_
from seqpar_ring.kernels.reference import ReferenceKernel
from seqpar_ring.schedule import Call

OP = "_scaled_dot_product_flash_attention_for_cpu"
"""(q_BHSD, k_BGSD, v_BGSD, dropout, causal, *, attn_mask, scale) -> (out_BHSD, lse_BHS); `OP + "_backward"` with it."""

LARGE = 1 << 25
"""Pairs from which on a block is computed in 16 bits, however short the documents."""

FAST_IN_16_BITS = "AVX512" in torch.backends.cpu.get_cpu_capability()
"""Whether the op's backward is the faster for 16-bit inputs, see `_narrow`."""

_can = getattr(torch.cpu, "get_capabilities", None)
TILES = bool(_can and _can().get("amx_bf16"))
"""Whether the processor multiplies tiles of bf16 (AMX), which makes the op's forward the faster in it, too. Older torch
does not say; forward is in fp32 there."""

LONG = 16384
"""Keys of every document from which on a block is computed in 16 bits, however small it is.

The op rounds while it sums over its own blocks of keys, and the longer its sum the larger that error; so in a large
block, or in one of many blocks of a long document, one more rounding at the end adds nothing. Of the error of one call
over all keys dq has 0.78 to 0.98 and dk and dv 0.43 to 0.92 at 16,384 tokens over 2 to 8 ranks, whole blocks or pieces;
dq would have up to 1.06 at 8,192, 1.13 at 4,096, and at 1,031 1.19, with 1.36 for dk and dv.
"""

Op = Callable[..., Any]
"""An aten op: its signature is torch's own and private."""

Heads = tuple[Tensor, Tensor, Tensor]
"""Three tensors by head, (B, heads, S, width), or (B, heads, S) for a log-sum-exp."""

Masks = dict[tuple[int, int, int, int], Tensor]
"""Additive masks made so far in this call, by (rows, columns, lo, hi): the slabs of a window are mostly alike."""


class Rows(NamedTuple):
    """Query rows `q0:q1` of a call and the one or more parts they see. Two different ones share no row."""

    q0: int
    q1: int
    parts: tuple[Part, ...]


@lru_cache(maxsize=256)  # some steps of some plans; a thousand documents cost 7 ms and half a megabyte a call
def cut(call: Call, tall: bool) -> tuple[Rows, ...]:
    """The call's parts, in rows of the call's slices, grouped by the query rows they share. Pure, hence cached.

    `split` gives parts whose query rows are equal or disjoint; the grouping relies on it.
    """
    found: list[Rows] = []
    for q0, q1, k0, k1 in zip(call.cu_q, call.cu_q[1:], call.cu_k, call.cu_k[1:], strict=False):
        parts = [
            p._replace(q0=p.q0 + q0, q1=p.q1 + q0, k0=p.k0 + k0, k1=p.k1 + k0)
            for p in split(q1 - q0, k1 - k0, call.left, call.right, tall=tall)
        ]
        found += [Rows(*rows, tuple(same)) for rows, same in groupby(parts, key=lambda p: (p.q0, p.q1))]
    return tuple(found)


class CpuKernel:
    """torch's CPU flash kernel. See the module."""

    name = "cpu"

    def __init__(self, op: str = OP) -> None:
        forward, backward = _aten(op), _aten(op + "_backward")
        self._forward, self._backward = cast(Op, forward), cast(Op, backward)
        self._reference = ReferenceKernel()
        self._shares_heads: bool | None = None  # whether the op does GQA; found out when first needed
        self._tall: bool | None = None  # the same of causal parts of more rows than keys
        self.capabilities = Capabilities(
            dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
            devices=("cpu",),
            unequal_value_dim=True,
            priority=100,
            absent="" if forward and backward else f"aten.{op} (torch is {torch.__version__})",
            notes="torch's CPU flash kernel; a window is computed as masked slabs of rows",
        )

    def forward(
        self, q_BSHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, call: Call, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        admit(self, (q_BSHD, k_BSGD, v_BSGE), call, scores)
        if not _bounded(q_BSHD, k_BSGD, scores):
            return self._reference.forward(q_BSHD, k_BSGD, v_BSGE, call, scores)
        width, value_width = max(q_BSHD.shape[3], v_BSGE.shape[3]), v_BSGE.shape[3]
        batch, length, heads, _ = q_BSHD.shape
        masks: Masks = {}
        found = self._cut(call) if q_BSHD.numel() else ()
        narrow = TILES and bool(found) and _narrow(q_BSHD.dtype, (p for rows in found for p in rows.parts), scores.keys)
        qkv = self._by_head((q_BSHD, k_BSGD, v_BSGE), q_BSHD.dtype if narrow else wide(q_BSHD.dtype), width)
        if len(found) == 1 and found[0].q1 - found[0].q0 == length:
            out, lse = self._attend(qkv, found[0], scores.scale, masks)
            return out[..., :value_width], lse
        dtype = wide(q_BSHD.dtype)
        out_BSHE = q_BSHD.new_zeros((batch, length, heads, width), dtype=dtype)
        lse_BHS = q_BSHD.new_full((batch, heads, length), -torch.inf, dtype=dtype)
        for rows in found:
            out, lse = self._attend(qkv, rows, scores.scale, masks)
            out_BSHE[:, rows.q0 : rows.q1] = out
            lse_BHS[:, :, rows.q0 : rows.q1] = lse
        return out_BSHE[..., :value_width], lse_BHS

    def backward(self, dout_BSHE: Tensor, kept: Kept, call: Call, scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`. Gradients come in fp32 (fp64), of large blocks or long documents in the inputs'."""
        admit(self, kept[:3], call, scores)
        if not _bounded(kept.q, kept.k, scores):
            return self._reference.backward(dout_BSHE, kept, call, scores)
        dtype = wide(kept.q.dtype)
        parts = [p for rows in (self._cut(call) if kept.q.numel() else ()) for p in rows.parts]
        narrow = FAST_IN_16_BITS and kept.out is not None and _narrow(kept.q.dtype, parts, scores.keys)
        computed = kept.q.dtype if narrow else dtype
        head_width, value_width = kept.q.shape[3], kept.v.shape[3]
        width = max(head_width, value_width)
        qkv = self._by_head(kept[:3], computed, width)
        out_BSHE = stand_in(dout_BSHE.to(computed), kept.delta) if kept.out is None else kept.out
        dout, out = (_padded(_readable(x.to(computed)), width).transpose(1, 2) for x in (dout_BSHE, out_BSHE))
        lse = kept.lse.masked_fill(kept.lse == -torch.inf, torch.inf)  # exp(s - inf) is 0, with -inf it would be nan
        masks: Masks = {}
        if len(parts) == 1 and _covers(parts[0], kept.q.shape[1], kept.k.shape[1]):
            dq, dk, dv = self._differentiate(qkv, (dout, out, lse), parts[0], scores.scale, masks)
        else:
            dq, dk, dv = (torch.zeros(x.transpose(1, 2).shape, dtype=dtype) for x in qkv)
            for p in parts:
                part_dq, part_dk, part_dv = self._differentiate(qkv, (dout, out, lse), p, scores.scale, masks)
                dq[:, p.q0 : p.q1] += part_dq
                dk[:, p.k0 : p.k1] += part_dk
                dv[:, p.k0 : p.k1] += part_dv
        groups = kept.k.shape[2]
        return dq[..., :head_width], _fold(dk, groups)[..., :head_width], _fold(dv, groups)[..., :value_width]

    def _cut(self, call: Call) -> tuple[Rows, ...]:
        if self._tall is None:
            self._tall = takes_tall(self._forward, self._backward)
        return cut(call, self._tall)

    def _attend(self, qkv: Heads, rows: Rows, scale: float, masks: Masks) -> tuple[Tensor, Tensor]:
        """(out_BSHE, lse_BHS) of some rows: the op's own for a single part, else the parts merged."""
        q, k, v = qkv
        q = q[:, :, rows.q0 : rows.q1]
        done: tuple[Tensor, Tensor] | None = None
        for p in rows.parts:
            k_part, v_part, mask = k[:, :, p.k0 : p.k1], v[:, :, p.k0 : p.k1], _mask(p, q.dtype, masks)
            out, lse = self._forward(q, k_part, v_part, 0.0, p.kind == "causal", attn_mask=mask, scale=scale)
            out = out.transpose(1, 2)
            if len(rows.parts) == 1:
                return out, lse
            if done is None:
                done = out.to(wide(out.dtype)), lse
            else:
                merge_(*done, out, lse)
        assert done is not None, "rows without parts are not made by cut"
        return done

    def _differentiate(self, qkv: Heads, results: Heads, p: Part, scale: float, masks: Masks) -> Heads:
        """(dq, dk, dv) of one part, rows first; `results` are (dout, out, lse) of all the call's rows, by head."""
        rows, columns = slice(p.q0, p.q1), slice(p.k0, p.k1)
        dout, out, lse = (x[:, :, rows] for x in results)
        q, k, v = qkv[0][:, :, rows], qkv[1][:, :, columns], qkv[2][:, :, columns]
        mask = _mask(p, q.dtype, masks)
        dq, dk, dv = self._backward(dout, q, k, v, out, lse, 0.0, p.kind == "causal", attn_mask=mask, scale=scale)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)

    def _by_head(self, qkv: Heads, dtype: torch.dtype, width: int) -> Heads:
        """q, k, v as the op reads them, of this dtype and width; key heads repeated if it cannot share them."""
        q, k, v = (_heads_first(x, dtype, width) for x in qkv)
        if q.shape[1] != k.shape[1]:
            if self._shares_heads is None:
                self._shares_heads = shares_heads(self._forward)
            if not self._shares_heads:
                times = q.shape[1] // k.shape[1]
                k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        return q, k.contiguous(), v.contiguous()


def shares_heads(forward: Op) -> bool:
    """Whether the op lets query heads share a key head (GQA).

    Asked of the op itself and not of torch's version. An op without GQA need not raise: it may read past the last key
    head. What it would read there is here a second head of the same memory, filled with another value.
    """
    k_BHSD = torch.ones(1, 2, 1, 8, device="cpu")
    k_BHSD[:, 1] = 2.0
    q_BHSD, k_BGSD = torch.ones_like(k_BHSD), k_BHSD[:, :1]
    try:
        out, _ = forward(q_BHSD, k_BGSD, k_BGSD, 0.0, False, attn_mask=None, scale=1.0)
    except (RuntimeError, ValueError):
        return False
    return bool((out == 1.0).all())


def takes_tall(forward: Op, backward: Op) -> bool:
    """Whether the op takes causal blocks of more rows than keys, in which the rows below the square see all keys.

    Asked of the op itself, in fp64: the answer of three rows and two keys beside that of the square and the last row.
    """
    generator = torch.Generator("cpu").manual_seed(0)  # whatever the default device
    q, k, v, dout = torch.randn(4, 1, 1, 3, 8, generator=generator, dtype=torch.float64, device="cpu")
    k, v = k[:, :, :2], v[:, :, :2]

    def answer(rows: slice, causal: bool) -> tuple[Tensor, ...]:
        of_rows, gradient = q[:, :, rows], dout[:, :, rows]
        out, lse = forward(of_rows, k, v, 0.0, causal, attn_mask=None, scale=1.0)
        return out, *backward(gradient, of_rows, k, v, out, lse, 0.0, causal, attn_mask=None, scale=1.0)

    try:
        whole = answer(slice(3), True)
    except (RuntimeError, ValueError):
        return False
    square, last = answer(slice(2), True), answer(slice(2, 3), False)
    by_rows = [torch.cat(both, 2) for both in zip(square[:2], last[:2], strict=True)]
    by_keys = [a + b for a, b in zip(square[2:], last[2:], strict=True)]
    return all(torch.allclose(x, y, 1e-9, 1e-12) for x, y in zip(whole, by_rows + by_keys, strict=True))


def _aten(name: str) -> Op | None:
    """The op, or None where this torch lacks it: then `absent` is set and every call is refused before it."""
    found = getattr(torch.ops.aten, name, None)
    return None if found is None else cast(Op, found.default)


def _narrow(dtype: torch.dtype, parts: Iterable[Part], keys: int) -> bool:
    """Whether these parts of 16-bit inputs are computed in 16 bits, if that is fast, and not, as all else, in fp32.

    In 16 bits the op rounds each partial result before it is merged or added up. In backward that makes up to a third
    more error at 8 ranks than one call over all keys has, in fp32 there is less; but of large blocks and long documents
    (`LARGE`, `LONG`) the error is the op's own. In forward the roundings of all parts together are at most one more
    like that of the final result: 1.26 times the error of one call, of whole blocks in a zigzag over 2 to 8 ranks 1.03
    to 1.1. Measured: with AVX-512, forward takes the same time in fp32, backward 1.35 times as long. With AMX forward
    takes 2.9 times as long in fp32. With AVX2 only it is 16 bits that take 4 times as long, so nothing is computed in
    them there. fp16 never is: its gradients have numbers below the smallest that it holds in full.
    """
    return dtype is torch.bfloat16 and (keys >= LONG or all(_large(p) for p in parts))


def _large(p: Part) -> bool:
    return (p.q1 - p.q0) * (p.k1 - p.k0) >= LARGE


def _heads_first(x_BSHD: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    """(B, H, S, width) of this dtype, widths of stride 1; the rows of a head together where it is a copy.

    Not for dout, which backward copies where it is not laid out as (B, S, H, D).
    """
    return _readable(_padded(x_BSHD.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format), width))


def _bounded(q: Tensor, k: Tensor, scores: Scores) -> bool:
    """Whether no logit can be infinite or nan, whatever the order of its sum. No memory, and one read of each, of the
    rows that rest one a pass."""
    largest_q, largest_k = (_noted(side, x, scores.resting) for side, x in (("q", q), ("k", k)))
    most = largest_q * largest_k * q.shape[-1] * 2 * max(scores.scale, 1.0)  # twice: kernels take powers of 2 of them
    return most < torch.finfo(wide(q.dtype)).max  # nan is not, nor what is inf


def _noted(side: str, x: Tensor, resting: Resting | None) -> float:
    if resting is None or resting.side != side:
        return _largest(x)
    key = x.data_ptr(), x.shape, x.stride()
    if key not in resting.notes:
        resting.notes[key] = _largest(x)
    return resting.notes[key]


def _largest(x: Tensor) -> float:
    """The largest absolute value; nan if there is one; 0 of nothing."""
    if not x.numel():
        return 0.0
    in_memory = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))  # nine times as fast as across it
    low, high = map(float, in_memory.aminmax())
    return torch.nan if low != low else max(-low, high)


def _padded(x: Tensor, width: int) -> Tensor:
    """With zeros up to this width: they add nothing to q . k, and columns of v that are cut off again."""
    return x if x.shape[-1] == width else torch.nn.functional.pad(x, (0, width - x.shape[-1]))


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _covers(p: Part, queries: int, keys: int) -> bool:
    return (p.q1 - p.q0, p.k1 - p.k0) == (queries, keys)


def _mask(p: Part, dtype: torch.dtype, masks: Masks) -> Tensor | None:
    """0 where a row sees a column and -inf elsewhere, as the op adds it to logits; None for the kinds it knows."""
    if p.kind != "band":
        return None
    key = (p.q1 - p.q0, p.k1 - p.k0, p.lo, p.hi)
    if key not in masks:
        distance = torch.arange(key[1]) - torch.arange(key[0]).unsqueeze(1)
        hidden = (distance < p.lo) | (distance > p.hi)
        masks[key] = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
    return masks[key]


def _fold(x_BSHD: Tensor, groups: int) -> Tensor:
    """Gradients of repeated key heads, summed to those of the heads they were repeated from."""
    if x_BSHD.shape[2] == groups:
        return x_BSHD
    return torch.unflatten(x_BSHD, 2, (groups, -1)).sum(3, dtype=wide(x_BSHD.dtype))
