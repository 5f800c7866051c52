"""The executor: runs a schedule with one kernel and one transport, and obeys.

It knows no layout, mask or ring by name: it waits for what is due, posts what is to be posted, computes what is to be
used. Partial results are accumulated in fp32 (fp64 for fp64 inputs) and cast to the inputs' dtype once; dK and dV
travel in that precision too. Autograd is next door in `attention.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar_ring.geometry import Rows, count
from seqpar_ring.kernels import Kept, Kernel, Scores
from seqpar_ring.kernels.merge import merge_
from seqpar_ring.plan import Plan
from seqpar_ring.schedule import Block, Move, Stage
from seqpar_ring.transport import Handle, Recv, Send

Pair = tuple[Tensor, Tensor]
"""Keys and values (or their gradients) of some rows: (B, rows, G, D) and (B, rows, G, E)."""


@dataclass(frozen=True)
class Shape:
    """Sizes of this call: batch, key/value heads, key width, value width."""

    B: int
    G: int
    D: int
    E: int

    @staticmethod
    def of(k_BSGD: Tensor, v_BSGE: Tensor) -> Shape:
        """From this rank's keys and values."""
        return Shape(k_BSGD.shape[0], k_BSGD.shape[2], k_BSGD.shape[3], v_BSGE.shape[3])

    def unpack(self, flat: Tensor) -> Pair:
        """A message as its two tensors, without a copy."""
        rows = flat.numel() // (self.B * self.G * (self.D + self.E) or 1)
        border = self.B * rows * self.G * self.D
        return flat[:border].view(self.B, rows, self.G, self.D), flat[border:].view(self.B, rows, self.G, self.E)

    def numel(self, rows: int) -> int:
        """Elements of a message of so many rows."""
        return self.B * rows * self.G * (self.D + self.E)


def forward(plan: Plan, qkv: tuple[Tensor, Tensor, Tensor], kernel: Kernel, scores: Scores) -> Pair:
    """The forward pass: (out_BSHE in q's dtype, lse_BHS in fp32 or fp64)."""
    q, k, v = qkv
    partial = _Partial(q, v.shape[3])

    def compute(block: Block, keys: Tensor, values: Tensor) -> None:
        for call in plan.calls[block]:
            part = kernel.forward(
                q[:, call.q0 : call.q1], keys[:, call.k0 : call.k1], values[:, call.k0 : call.k1], call, scores
            )
            partial.merge(call.q0, call.q1, *part)

    _Pass(plan, k, v).run(plan.forward_program, compute)
    return partial.result()


def backward(plan: Plan, dout: Tensor, kept: Kept, kernel: Kernel, scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass: (dq, dk, dv) of this rank's tokens, inputs' dtype; `kept` holds the global out and lse."""
    q, k, v, out, lse, _ = kept
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(1, 2)
    dq = _Sum(q, lse.dtype)
    travelling = _Pass(plan, k, v, lse.dtype)

    def compute(block: Block, keys: Tensor, values: Tensor) -> None:
        for call in plan.calls[block]:
            rows, cols = slice(call.q0, call.q1), slice(call.k0, call.k1)
            part = Kept(q[:, rows], keys[:, cols], values[:, cols], out[:, rows], lse[:, :, rows], delta[:, :, rows])
            dq_part, dk_part, dv_part = kernel.backward(dout[:, rows], part, call, scores)
            dq.add(call.q0, call.q1, dq_part)
            travelling.add_gradient(block, call.k0, call.k1, (dk_part, dv_part))

    travelling.run(plan.backward_program, compute)
    dk, dv = travelling.own_gradient()
    return dq.result(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


class _Partial:
    """The running (out, lse) of this rank's queries."""

    def __init__(self, q: Tensor, value_dim: int) -> None:
        self._q, self._value_dim = q, value_dim
        self._dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def merge(self, q0: int, q1: int, out: Tensor, lse: Tensor) -> None:
        if self._out is None and q1 - q0 == self._q.shape[1]:
            self._out, self._lse = out, lse  # nothing to merge with yet; with W = 1 this is the answer
            return
        whole_out, whole_lse = self._accumulators()
        merge_(whole_out[:, q0:q1], whole_lse[:, :, q0:q1], out, lse)

    def result(self) -> Pair:
        if self._out is None or self._lse is None:
            out, lse = self._accumulators()
            return out.to(self._q.dtype), lse
        return self._out.to(self._q.dtype), self._lse

    def _accumulators(self) -> Pair:
        B, S, H, _ = self._q.shape
        if self._out is None or self._lse is None:
            self._out = self._q.new_zeros((B, S, H, self._value_dim), dtype=self._dtype)
            self._lse = self._q.new_full((B, H, S), -torch.inf, dtype=self._dtype)
        elif self._out.dtype is not self._dtype:
            self._out = self._out.to(self._dtype)
        return self._out, self._lse


class _Sum:
    """A gradient summed over parts, in the accumulation dtype."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self._total = torch.zeros(like.shape, dtype=dtype, device=like.device)

    def add(self, a: int, b: int, part: Tensor) -> None:
        self._total[:, a:b].add_(part)

    def result(self, dtype: torch.dtype) -> Tensor:
        return self._total.to(dtype)


class _Pass:
    """The state of one run over a program: what has arrived, what is under way, what has been made."""

    def __init__(self, plan: Plan, k: Tensor, v: Tensor, gradient_dtype: torch.dtype | None = None) -> None:
        self._ring, self._k, self._v, self._gradient_dtype = plan.ring, k, v, gradient_dtype
        self._shape = Shape.of(k, v)
        self._arrived: dict[Block, Tensor] = {}
        self._made: dict[Block, Tensor] = {}
        self._under_way: dict[tuple[str, Move], tuple[Handle, Tensor]] = {}
        if gradient_dtype is not None:
            self._dk, self._dv = (torch.zeros(x.shape, dtype=gradient_dtype, device=x.device) for x in (k, v))

    def run(self, stages: tuple[Stage, ...], compute: Callable[[Block, Tensor, Tensor], None]) -> None:
        """Every stage in turn: wait for what is due, post what is to be posted, compute what is to be used."""
        for stage in stages:
            for move in stage.due_kv:
                landed = self._finish("kv", move)
                if move.dst == self._ring.rank:
                    self._arrived[move.block] = landed
            for move in stage.due_dkv:
                landed = self._finish("dkv", move)
                if move.dst == self._ring.rank:
                    self._take_gradient(move.block, landed)
            self._post("kv", stage.post_kv)
            self._post("dkv", stage.post_dkv)
            for block in stage.uses:
                compute(block, *self._keys_and_values(block))
            for block in stage.drop:
                del self._arrived[block]

    def add_gradient(self, block: Block, k0: int, k1: int, parts: Pair) -> None:
        """Add one call's (dk, dv) for rows k0:k1 of a block."""
        if block.owner == self._ring.rank:
            _add_rows((self._dk, self._dv), block.rows, parts, k0)
            return
        if block not in self._made:
            size = self._shape.numel(count(block.rows))
            self._made[block] = torch.zeros(size, dtype=self._gradient_dtype, device=self._k.device)
        for total, part in zip(self._shape.unpack(self._made[block]), parts, strict=True):
            total[:, k0:k1].add_(part)

    def own_gradient(self) -> Pair:
        """(dk, dv) of this rank's own tokens, complete once the program has run."""
        return self._dk, self._dv

    def _keys_and_values(self, block: Block) -> Pair:
        if block.owner != self._ring.rank:
            return self._shape.unpack(self._arrived[block])
        return _pick(self._k, block.rows), _pick(self._v, block.rows)

    def _post(self, lane: str, moves: tuple[Move, ...]) -> None:
        """All transfers of one stage and lane together; one handle stands for them all."""
        sends, recvs, tensors = [], [], []
        for move in moves:
            if move.src == self._ring.rank:
                tensors.append(self._message(lane, move.block))
                sends.append(Send(move.dst, tensors[-1]))
            else:
                tensors.append(self._room(lane, move.block))
                recvs.append(Recv(move.src, tensors[-1]))
        if moves:
            handle = self._ring.exchange(sends, recvs, lane)
            for move, tensor in zip(moves, tensors, strict=True):
                self._under_way[lane, move] = handle, tensor

    def _finish(self, lane: str, move: Move) -> Tensor:
        handle, tensor = self._under_way.pop((lane, move))
        handle.wait()
        return tensor

    def _message(self, lane: str, block: Block) -> Tensor:
        if lane == "dkv":
            return self._made.pop(block)
        if block.owner != self._ring.rank:
            return self._arrived[block]
        return torch.cat([part.reshape(-1) for part in self._keys_and_values(block)])

    def _room(self, lane: str, block: Block) -> Tensor:
        dtype = self._k.dtype if lane == "kv" else self._gradient_dtype
        return torch.empty(self._shape.numel(count(block.rows)), dtype=dtype, device=self._k.device)

    def _take_gradient(self, block: Block, landed: Tensor) -> None:
        if block.owner == self._ring.rank:
            _add_rows((self._dk, self._dv), block.rows, self._shape.unpack(landed), 0)
        else:
            self._made[block].add_(landed)


def _pick(x: Tensor, rows: Rows) -> Tensor:
    """These rows of a rank's own tensor; a view where they are one range."""
    if len(rows) == 1:
        return x[:, rows[0][0] : rows[0][1]]
    return torch.cat([x[:, a:b] for a, b in rows], 1)


def _add_rows(totals: Pair, rows: Rows, parts: Pair, k0: int) -> None:
    """Add parts, which hold a block's buffer rows from k0 on, to the owner's rows that they stand for."""
    at, k1 = 0, k0 + parts[0].shape[1]
    for a, b in rows:
        lo, hi = max(at, k0), min(at + b - a, k1)
        if lo < hi:
            for total, part in zip(totals, parts, strict=True):
                total[:, a + lo - at : a + hi - at].add_(part[:, lo - k0 : hi - k0])
        at += b - a
