"""How many blocks of keys and values a rank holds in forward: counted by the C library, not by us.

Every large tensor is an mmap of its own once the threshold is fixed, so the bytes that glibc has mapped are the tensors
that live. They are read at every entry of the block kernel. Values are narrow, so that what else is alive (the output)
is small beside a block.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqpar_ring import ring_attention
from seqpar_ring.kernels import ReferenceKernel, register, unregister
from seqpar_ring.parallel import SequenceParallel
from seqpar_ring.schedule import Call
from seqpar_ring.testing import Case, RankPool

THRESHOLD = 1 << 16
M_MMAP_THRESHOLD = -3
CASE = Case(4, 4, head_dim=256, value_dim=4, dtype=torch.float32)


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", *"abcde")]


def mapped() -> int:
    """Bytes in live blocks of memory above the threshold."""
    found = ctypes.CDLL(None).mallinfo2
    found.restype = _Mallinfo
    return int(found().hblkhd)


class Watched(ReferenceKernel):
    """The reference kernel, which notes what is alive when it is called, and computes nothing."""

    name = "watched"

    def __init__(self) -> None:
        self.seen: list[int] = []

    def forward(self, q_BSHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, call: Call, scores: Any) -> tuple[Tensor, Tensor]:
        """Zeros of the right shape."""
        self.seen.append(mapped())
        B, S, H, _ = q_BSHD.shape
        return q_BSHD.new_zeros((B, S, H, v_BSGE.shape[3])), q_BSHD.new_zeros((B, H, S))


def memory(worlds: Sequence[int] = (2, 4, 8)) -> list[dict[str, Any]]:
    """Peak of live blocks over ranks, for rings of several sizes and pieces of blocks."""
    rows = []
    for world in worlds:
        with RankPool(world, timeout=300) as pool:
            for pieces in (1, 4):
                tokens = 4096 * world
                size = 4096 // pieces
                peaks = pool.run(_peak, tokens, block_tokens=size)
                rows.append({"ranks": world, "block_tokens": size, "tokens_a_rank": 4096, "blocks": max(peaks)})
    return rows


def _peak(sp: SequenceParallel, tokens: int) -> float:
    """Blocks alive at the fullest moment, this rank's own among them."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, THRESHOLD)
    kernel = Watched()
    register(kernel)
    try:
        sp = SequenceParallel.over(sp.groups, sp.settings.model_copy(update={"kernel": "watched"}))
        plan = sp.plan(tokens)
        B, S, (H, D, E) = 1, plan.local_tokens, (CASE.kv_heads, CASE.head_dim, CASE.value_dim or 0)
        q, k, v = torch.zeros(B, S, H, D), torch.zeros(B, S, H, D), torch.zeros(B, S, H, E)
        block = k.nbytes + v.nbytes
        assert plan.forward_pass
        with torch.no_grad():
            ring_attention(q, k, v, plan)  # what is made once is not what is measured
            kernel.seen.clear()
            before = mapped()
            ring_attention(q, k, v, plan)
        return 1 + (max(kernel.seen) - before) / block
    finally:
        unregister("watched")
