"""What all varlen flash kernels on a GPU have in common: a call becomes packed rows, cumulative lengths and one window.

Their libraries agree on that form and differ in names, orders and traps; a backend's file holds only those. Here rows
are packed (a batch becomes more segments), widths are padded with zeros to what the library takes, log-sum-exps come
back in one layout with -inf where a row sees nothing and go in with +inf there (exp(s - inf) is 0, with -inf it would
be nan). Cumulative lengths go to the device once for each call of a plan, so a step never waits for the host.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from seqpar_ring.geometry import INF
from seqpar_ring.kernels.base import Capabilities, Kept, Scores, Traits, admit_traits, traits_of, wide
from seqpar_ring.kernels.delta import stand_in
from seqpar_ring.kernels.library import Library
from seqpar_ring.kernels.remembered import remembered
from seqpar_ring.schedule import Call
from seqpar_ring.views import columns_of, in_dtype

READ = 16
"""Bytes that libraries read at once: where a tensor begins, and each of its rows, is a multiple of it in memory."""

ALIGNED = 8
"""Head widths are multiples of it: `READ` bytes of 16-bit numbers."""

HALVES = (torch.bfloat16, torch.float16)
"""What tensor cores compute with, and so the dtypes of these kernels."""

Views = dict[tuple[int, object], tuple[Tensor, Tensor]]
"""See `Resting.views`."""

KEPT = ("bytes of log-sum-exps",)
"""A note: how many are kept for the pass."""

UNBOUNDED = -1
"""How flash-attention writes a side of a window that cuts nothing."""


class Packed(NamedTuple):
    """A call as varlen kernels take it.

    Attributes:
        cu_q, cu_k: int32 cumulative lengths on the device, one more than segments.
        max_q, max_k: the longest segment of each side.
        left, right: the window, aligned bottom right; `UNBOUNDED` where it cuts nothing.
        blind: whether there is a query that sees nothing.
    """

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    left: int
    right: int
    blind: bool

    @property
    def causal(self) -> bool:
        """Whether it is the window that kernels have a fast path for."""
        return self.left == UNBOUNDED and self.right == 0


class Rows(NamedTuple):
    """Packed rows of queries, keys and values: (T, heads, width), the last dimension of stride 1."""

    q: Tensor
    k: Tensor
    v: Tensor


class Results(NamedTuple):
    """What backward takes beside the inputs: dout and out as queries, lse (H, T) in fp32, +inf for an empty row."""

    dout: Tensor
    out: Tensor
    lse: Tensor


def pack(call: Call, batch: int, device: torch.device) -> Packed:
    """The segments of a call, once for each row of the batch."""
    left, right = (UNBOUNDED if side >= INF else side for side in (call.left, call.right))
    lengths_q, lengths_k = ([b - a for a, b in pairwise(cu)] for cu in (call.cu_q, call.cu_k))
    starts_q, starts_k = (_repeated(cu, batch, device) for cu in (call.cu_q, call.cu_k))
    # The first query of a segment sees the fewest keys: those up to number n - m + right, if there is one.
    blind = any(m and (not n or n - m + call.right < 0) for m, n in zip(lengths_q, lengths_k, strict=True))
    return Packed(starts_q, starts_k, max(lengths_q, default=0), max(lengths_k, default=0), left, right, blind)


def _repeated(cu: tuple[int, ...], batch: int, device: torch.device) -> Tensor:
    rows = [b * cu[-1] + x for b in range(batch) for x in cu[:-1]] + [batch * cu[-1]]
    starts = torch.tensor(rows, dtype=torch.int32, device="cpu")  # whatever the default device is
    return starts if device.type == "cpu" else starts.pin_memory().to(device, non_blocking=True)


class VarlenKernel:
    """The half of a kernel that does not depend on its library; a backend gives `can`, `attend` and `differentiate`.

    Args:
        library: where its functions are.
        devices: the device types it takes; another than "cuda" is for tests.
        cached: packed calls to remember: those of some plans.
    """

    name: ClassVar[str]
    can: ClassVar[Capabilities]

    def __init__(self, library: Library, devices: tuple[str, ...] = ("cuda",), cached: int = 1024) -> None:
        self._library, self._devices = library, devices
        self._pack, self._admitted = remembered(pack, cached), remembered(self._admit, cached)

    @cached_property
    def capabilities(self) -> Capabilities:
        """What it can do on this machine."""
        return replace(self.can, devices=self._devices, absent=self._library.absent)

    def attend(self, rows: Rows, packed: Packed, scores: Scores) -> tuple[Tensor, Tensor]:
        """(out as q with v's width, lse (H, T)); rows that see nothing may have any infinity for an lse."""
        raise NotImplementedError

    def differentiate(self, rows: Rows, results: Results, packed: Packed, scores: Scores) -> Iterable[Tensor]:
        """(dq, dk, dv) of packed rows; dk and dv with the heads of k and v."""
        raise NotImplementedError

    def as_read(self, packed: Packed) -> Packed:
        """With lengths and a window that the library reads as they are meant."""
        return packed

    def widths(self, head: int, value: int) -> tuple[int, int]:
        """The widths to pad q, k and v to; most libraries want one, a multiple of 8."""
        width = -(-max(head, value) // ALIGNED) * ALIGNED
        return width, width

    def forward(
        self, q_BSHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, call: Call, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        packed = self._admitted(call, traits_of((q_BSHD, k_BSGD, v_BSGE), scores))
        (B, S, H, _), E = q_BSHD.shape, v_BSGE.shape[3]
        if not q_BSHD.numel() or not k_BSGD.numel():  # nothing to see: libraries differ in what they do with no rows
            return q_BSHD.new_zeros((B, S, H, E)), q_BSHD.new_full((B, H, S), -torch.inf, dtype=wide(q_BSHD.dtype))
        out, lse_HT = self.attend(self._rows(q_BSHD, k_BSGD, v_BSGE, _views(scores)), packed, scores)
        lse_BHS = lse_HT.unsqueeze(0) if B == 1 else lse_HT.view(H, B, S).transpose(0, 1)
        if packed.blind:
            lse_BHS = lse_BHS.masked_fill(lse_BHS == torch.inf, -torch.inf)
        return columns_of(out.view(B, S, H, -1), E), lse_BHS

    def backward(self, dout_BSHE: Tensor, kept: Kept, call: Call, scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`. Gradients come in the inputs' dtype, as these kernels write them."""
        packed = self._admitted(call, traits_of(kept[:3], scores))
        if not kept.q.numel() or not kept.k.numel():
            dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in kept[:3])
            return dq, dk, dv
        (B, S, H, D), E = kept.q.shape, kept.v.shape[3]
        dtype, width = kept.q.dtype, self.widths(D, E)[1]
        views = _views(scores)
        if kept.out is None:
            out = _flat(stand_in(dout_BSHE.to(wide(dtype)), kept.delta).to(dtype), width)
        else:
            out = _flat(kept.out, width, views, dtype)
        results = Results(_flat(dout_BSHE, width, views, dtype), out, _lse(kept.lse, packed, scores))
        rows = self._rows(*kept[:3], views)
        dq, dk, dv = self.differentiate(rows, results, packed, scores)
        keys, groups = kept.k.shape[1:3]
        return (
            columns_of(dq.view(B, S, H, -1), D),
            columns_of(dk.view(B, keys, groups, -1), D),
            columns_of(dv.view(B, keys, groups, -1), E),
        )

    def _admit(self, call: Call, traits: Traits) -> Packed:
        """What a call comes to, if the kernel may answer it; see `admit`."""
        admit_traits(call, self, traits)
        (q, _, _), _, device, *_ = traits
        return self.as_read(self._pack(call, q[0], device))

    def _rows(self, q_BSHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, views: Views | None) -> Rows:
        head, value = self.widths(q_BSHD.shape[3], v_BSGE.shape[3])
        return Rows(_flat(q_BSHD, head, views), _flat(k_BSGD, head, views), _flat(v_BSGE, value, views))


def room(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for dq, dk and dv, for libraries that write into what they are given."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in rows)
    return dq, dk, dv


def _views(scores: Scores) -> Views | None:
    return None if scores.resting is None else scores.resting.views


def _flat(x_BSHD: Tensor, width: int, views: Views | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """(B * S, H, width) in this dtype, as libraries read it; a view where the batch is of one row of that width.

    A view of what a pass gives to many calls is made once: it takes the host as long as a launch.
    """
    key = id(x_BSHD), width
    if views is not None and key in views:
        return views[key][1]
    x = readable(x_BSHD if dtype is None else in_dtype(x_BSHD, dtype), width)
    flat = x[0] if x.shape[0] == 1 else x.flatten(0, 1)
    if views is not None and flat.data_ptr() == x_BSHD.data_ptr():  # no copy, which what arrives next would not be in
        views[key] = x_BSHD, flat
    return flat


def _lse(lse_BHS: Tensor, packed: Packed, scores: Scores) -> Tensor:
    """(H, B * S) in the precision of sums, together in memory, +inf where a row sees nothing.

    Of rows that stay it is made once for most calls: what is kept for the pass is no more than two of a rank's.
    """
    resting = scores.resting
    rests = resting is not None and resting.side == "q"  # else they travel
    key = id(lse_BHS), packed.blind
    if resting is not None and rests and key in resting.views:
        return resting.views[key][1]
    B, H, S = lse_BHS.shape
    lse_HT = lse_BHS[0] if B == 1 else lse_BHS.transpose(0, 1).reshape(H, B * S)
    lse_HT = in_dtype(lse_HT, wide(lse_HT.dtype)).contiguous()
    if packed.blind:  # else every row sees a key in this call, and its lse over all of them is finite
        lse_HT = lse_HT.masked_fill(lse_HT == -torch.inf, torch.inf)
    if resting is not None and rests:
        kept = resting.notes.get(KEPT, 0.0) + lse_HT.nbytes
        if kept <= 2 * lse_BHS.untyped_storage().nbytes():
            resting.notes[KEPT], resting.views[key] = kept, (lse_BHS, lse_HT)
    return lse_HT


def readable(x_BSHD: Tensor, width: int) -> Tensor:
    """As libraries read it: of this width, the last dimension of stride 1, all rows at multiples of `READ` bytes.

    A copy only where it is not. Rows that arrived need not be: values lie behind as many keys as there are, and where
    the two differ in width, one may be `ALIGNED` and not the other. Nor need parts of a caller's own tensors.
    """
    x = padded(x_BSHD, width)
    return x.clone(memory_format=torch.contiguous_format) if _askew(x) else x


def _askew(x_BSHD: Tensor) -> bool:
    """Whether the last dimension is not of stride 1, or a row not at a multiple of `READ` bytes."""
    if x_BSHD.data_ptr() % READ:
        return True
    if x_BSHD.is_contiguous():  # nearly always, and quicker asked than found out
        return False
    *steps, last = x_BSHD.stride()
    rows = zip(x_BSHD.shape, steps, strict=False)
    return last != 1 or any(n > 1 and step * x_BSHD.itemsize % READ for n, step in rows)


def padded(x_BSHD: Tensor, width: int) -> Tensor:
    """With zeros up to this width: they add nothing to q . k, and columns of v that are cut off again."""
    return x_BSHD if x_BSHD.shape[3] == width else torch.nn.functional.pad(x_BSHD, (0, width - x_BSHD.shape[3]))
