"""Merging partial attention on a GPU: several parts into an accumulator in one pass over it.

The same sum as `merge.merge_`, which is the oracle: there a part costs some ten passes over memory in plain torch
operators, here the accumulator is read and written once however many parts wait. Rows that saw nothing are read too:
of a row of nan libraries say -inf and nan, and the nan must stay. Imported only where triton is there and a GPU asks;
under TRITON_INTERPRET=1 it runs on the CPU, for tests. It knows fp32 accumulators only: fp64 is for the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqpar_ring.kernels.merge import AT_ONCE, Part

ROWS = 16
"""Rows of one head that a program merges."""


@triton.jit
def _with(acc, total, part, part_lse, q0, m, rows, columns, b, h, H, E: tl.constexpr):
    """The accumulated rows of one head and their lse, with those of one part."""
    inside = (rows >= q0) & (rows < q0 + m)
    at = (rows - q0).to(tl.int64)
    more = tl.load(part_lse + (b * H + h).to(tl.int64) * m + at, mask=inside, other=float("-inf"))
    seen = inside & (more != float("-inf"))  # nan is seen, and stays
    places = ((b.to(tl.int64) * m + at) * H + h)[:, None] * E + columns[None, :]
    values = tl.load(part + places, mask=inside[:, None] & (columns < E)[None, :], other=0.0).to(tl.float32)
    top = tl.maximum(total, more)
    top = tl.where(top == float("-inf"), 0.0, top)  # two rows that saw nothing
    old, new = tl.exp(total - top), tl.exp(more - top)
    weight = old + new
    scale = tl.where(weight == 0.0, 1.0, weight)
    acc = acc * (old / scale)[:, None] + values * (new / scale)[:, None]
    return acc, tl.where(seen, top + tl.log(scale), total)


# Not specialized: a row's number that is 1, or a multiple of 16, would be compiled for, anew for other documents.
@triton.jit(do_not_specialize=["S", "begin", "end", "q0", "m0", "q1", "m1", "q2", "m2", "q3", "m3"])
def _merge(
    out, lse, S, H, begin, end,
    part0, lse0, q0, m0, part1, lse1, q1, m1, part2, lse2, q2, m2, part3, lse3, q3, m3,
    N: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (i, h, b) merges ROWS rows of head h of batch row b."""
    b, h = tl.program_id(2), tl.program_id(1)
    rows = begin + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    live = rows < end
    row_lse = lse + (b * H + h).to(tl.int64) * S + rows
    places = out + ((b.to(tl.int64) * S + rows) * H + h)[:, None] * E + columns[None, :]
    there = live[:, None] & (columns < E)[None, :]
    acc = tl.load(places, mask=there, other=0.0)
    total = tl.load(row_lse, mask=live, other=float("-inf"))
    acc, total = _with(acc, total, part0, lse0, q0, m0, rows, columns, b, h, H, E)
    if N > 1:
        acc, total = _with(acc, total, part1, lse1, q1, m1, rows, columns, b, h, H, E)
    if N > 2:
        acc, total = _with(acc, total, part2, lse2, q2, m2, rows, columns, b, h, H, E)
    if N > 3:
        acc, total = _with(acc, total, part3, lse3, q3, m3, rows, columns, b, h, H, E)
    tl.store(places, acc, mask=there)
    tl.store(row_lse, total, mask=live)


def merge_parts_(out_BSHE: Tensor, lse_BHS: Tensor, parts: Sequence[Part]) -> None:
    """Merges parts into an accumulator, in place.

    Args:
        out_BSHE: the accumulator, fp32, contiguous.
        lse_BHS: its log-sum-exp, natural log, fp32, contiguous; -inf where nothing was seen.
        parts: what to merge; their rows may overlap.
    """
    B, S, H, E = out_BSHE.shape
    assert out_BSHE.is_contiguous()
    assert lse_BHS.is_contiguous()
    assert out_BSHE.dtype == lse_BHS.dtype == torch.float32
    for i in range(0, len(parts), AT_ONCE):
        some = [part for part in parts[i : i + AT_ONCE] if part.lse.numel()]
        if not some:
            continue
        begin, end = min(p.q0 for p in some), max(p.q0 + p.lse.shape[2] for p in some)
        arguments: list[Any] = []
        for part in [*some, *[some[0]] * (AT_ONCE - len(some))]:
            arguments += [part.out.contiguous(), part.lse.float().contiguous(), part.q0, part.lse.shape[2]]
        grid = (triton.cdiv(end - begin, ROWS), H, B)
        sizes = {"N": len(some), "E": E, "WIDTH": triton.next_power_of_2(E), "ROWS": ROWS}
        with torch.cuda.device_of(out_BSHE):  # Triton launches on the current device, whatever the tensors are on
            _merge[grid](out_BSHE, lse_BHS, S, H, begin, end, *arguments, **sizes)
