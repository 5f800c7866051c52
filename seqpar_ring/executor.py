"""The executor: runs a schedule with one kernel and one transport, and obeys.

It knows no layout, mask or ring by name: what arrives when, and where it lies, is a `Run`'s; here are the calls of a
step and the sums of their results. Partial results are accumulated in fp32 (fp64 for fp64 inputs) and cast to the
inputs' dtype once; gradients travel in that precision too. Which side travels is the caller's choice. Autograd is next
door in `operator.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqpar_ring.cargo import Cargo, Fields, Parts
from seqpar_ring.kernels import Kept, Kernel, Resting, Scores
from seqpar_ring.kernels.delta import delta_of
from seqpar_ring.kernels.merge import Part, at_once, merge_, merge_parts_
from seqpar_ring.plan import Plan
from seqpar_ring.run import Run, Sum
from seqpar_ring.schedule import Call, Work
from seqpar_ring.views import in_dtype, rows_of

Pair = tuple[Tensor, Tensor]


def forward(plan: Plan, qkv: tuple[Tensor, Tensor, Tensor], kernel: Kernel, scores: Scores) -> Pair:
    """The forward pass: (out_BSHE in a wide dtype or q's, lse_BHS in fp32 or fp64)."""
    q, k, v = qkv
    scores = scores._replace(resting=Resting("q", {}, {}))
    partial = _Partial(q, v.shape[3])
    own, parts = (q,), Parts()

    def compute(work: Work, view: Fields) -> None:
        placed = _placed(scores, plan, work, plan.schedule.travels)
        for call in work.calls:
            rows = call.q0, call.q1
            (q_rows,), (keys, values) = parts.of(own, *rows), parts.of(view, call.k0, call.k1)
            partial.take(rows, *kernel.forward(q_rows, keys, values, call, _at(placed, call)))
        partial.merge()

    Run(plan, plan.forward_pass, (k, v)).go(compute)
    return partial.result()


def backward(
    plan: Plan, dout: Tensor, kept: Kept, kernel: Kernel, scores: Scores, queries_travel: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass: (dq, dk, dv) of this rank's tokens, wide where they are sums; `kept` holds the global out and
    lse."""
    return (_queries_travel if queries_travel else _keys_travel)(plan, dout, kept, kernel, scores)


def _keys_travel(
    plan: Plan, dout: Tensor, kept: Kept, kernel: Kernel, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values visit the queries; their gradients go back to them."""
    q, k, v, out, lse, _ = kept
    assert out is not None
    dq = _Home(Cargo((q,), lse.dtype), q.shape[1])
    scores = scores._replace(resting=Resting("q", {}, {}))
    own, parts = (q, dout, out), Parts()
    lse_rows: dict[tuple[int, int], Tensor] = {}
    run = Run(plan, plan.backward_pass, (k, v), lse.dtype)

    def compute(work: Work, view: Fields) -> None:
        placed, total = _placed(scores, plan, work, "kv"), run.gradient_of(work)
        for call in work.calls:
            rows, cols = (call.q0, call.q1), (call.k0, call.k1)
            if rows not in lse_rows:
                lse_rows[rows] = rows_of(lse, *rows, dim=2)
            (q_rows, dout_rows, out_rows), (keys, values) = parts.of(own, *rows), parts.of(view, *cols)
            kept = Kept(q_rows, keys, values, out_rows, lse_rows[rows])
            dq_part, *dkv = kernel.backward(dout_rows, kept, call, _at(placed, call))
            dq.add(*rows, (dq_part,))
            total.add(*cols, tuple(dkv))
        run.keep(work, total)

    run.go(compute)
    (dk, dv), (dq_whole,) = run.own_gradient(), dq.result()
    return dq_whole, dk, dv


def _queries_travel(
    plan: Plan, dout: Tensor, kept: Kept, kernel: Kernel, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries visit the keys, with dout and what softmax needs of their rows; dq goes back to them."""
    q, k, v, out, lse, delta = kept
    if delta is None:
        assert out is not None
        delta = delta_of(dout, out, lse.dtype)
    scores = scores._replace(resting=Resting("k", {}, {}))
    dkv = _Home(Cargo((k, v), lse.dtype), k.shape[1])
    run = Run(plan, plan.query_pass, (q, dout, lse.transpose(1, 2), delta.transpose(1, 2)), lse.dtype, gradients=1)

    def compute(work: Work, view: Fields) -> None:
        q, dout, lse, delta = view
        lse, delta = lse.transpose(1, 2), delta.transpose(1, 2)
        placed, total = _placed(scores, plan, work, "q"), run.gradient_of(work)
        for call in work.calls:
            rows, cols = (call.q0, call.q1), (call.k0, call.k1)
            of_rows = (rows_of(x, *rows, dim=2) for x in (lse, delta))
            kept = Kept(rows_of(q, *rows), rows_of(k, *cols), rows_of(v, *cols), None, *of_rows)
            dq_part, *dkv_part = kernel.backward(rows_of(dout, *rows), kept, call, _at(placed, call))
            total.add(*rows, (dq_part,))
            dkv.add(*cols, tuple(dkv_part))
        run.keep(work, total)

    run.go(compute)
    (dq,), (dk, dv) = run.own_gradient(), dkv.result()
    return dq, dk, dv


def _placed(scores: Scores, plan: Plan, work: Work, travels: str) -> Scores:
    """The scores with the positions of all rows of a step, where position biases ask for them."""
    if scores.slopes is None:
        return scores
    own, view = plan.positions_of(work.blocks, travels, scores.slopes.device)
    return scores._replace(q_positions=own, k_positions=view) if travels == "kv" else scores._replace(
        q_positions=view, k_positions=own
    )


def _at(scores: Scores, call: Call) -> Scores:
    if scores.q_positions is None or scores.k_positions is None:
        return scores
    return scores._replace(
        q_positions=scores.q_positions[call.q0 : call.q1], k_positions=scores.k_positions[call.k0 : call.k1]
    )


class _Partial:
    """The running (out, lse) of this rank's queries."""

    def __init__(self, q: Tensor, value_dim: int) -> None:
        self._q, self._value_dim = q, value_dim
        self._dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
        self._sum: Pair | None = None
        self._at_once = 0  # parts that are worth waiting for; 0 as long as nothing can be merged into the sum
        self._waiting: list[Part] = []
        self._views: dict[tuple[int, int], Pair] = {}  # of the sum, by rows

    def take(self, rows: tuple[int, int], out: Tensor, lse: Tensor) -> None:
        """A part of these rows' answer. It is merged at once, or on a GPU with others of the same step."""
        if not self._at_once:
            if self._sum is None and rows == (0, self._q.shape[1]):
                self._sum = out, lse  # nothing to merge with yet; with W = 1 this is the answer
                return
            self._sum = self._accumulators()
            self._at_once = at_once(self._sum[0])
        if self._at_once == 1:
            merge_(*self._of(rows), out, lse)
            return
        self._waiting.append(Part(rows[0], out, lse))
        if len(self._waiting) == self._at_once:
            self.merge()

    def merge(self) -> None:
        """Merge what waits."""
        if self._waiting and self._sum is not None:
            merge_parts_(*self._sum, self._waiting)
            self._waiting = []

    def _of(self, rows: tuple[int, int]) -> Pair:
        """These rows of the sum."""
        assert self._sum is not None
        if rows not in self._views:
            self._views[rows] = rows_of(self._sum[0], *rows), rows_of(self._sum[1], *rows, dim=2)
        return self._views[rows]

    def result(self) -> Pair:
        return self._accumulators() if self._sum is None else self._sum

    def _accumulators(self) -> Pair:
        """The sum so far, or nothing yet, where parts can be merged into it."""
        if self._sum is None:
            B, S, H, _ = self._q.shape
            out = self._q.new_zeros((B, S, H, self._value_dim), dtype=self._dtype)
            return out, self._q.new_full((B, H, S), -torch.inf, dtype=self._dtype)
        out, lse = in_dtype(self._sum[0], self._dtype), self._sum[1]
        return (out.contiguous(), lse.contiguous()) if out.is_cuda else (out, lse)  # as the kernel there reads them


class _Home:
    """The gradient of the rows that stay, over all calls. A first result for all rows is kept as it is, and becomes the
    sum if it is wide; if nothing else comes, it is the gradient."""

    def __init__(self, cargo: Cargo, rows: int) -> None:
        self._cargo, self._rows = cargo, rows
        self._first: Fields = ()
        self._sum: Sum | None = None

    def add(self, a: int, b: int, parts: Fields) -> None:
        if not self._first and self._sum is None and b - a == self._rows:
            self._first = parts
        else:
            self._summed().add(a, b, parts)

    def result(self) -> Fields:
        return self._first or self._summed().result()

    def _summed(self) -> Sum:
        if self._sum is None:
            first, self._first = self._first, ()
            if first and [x.dtype for x in first] == [kind.dtype for kind in self._cargo.kinds]:
                self._sum = Sum(first, begun=True)
            else:
                self._sum = Sum(self._cargo.apart(self._rows))
                if first:
                    self._sum.add(0, self._rows, first)
        return self._sum
