"""The executor: runs a schedule with one kernel and one transport, and obeys.

It knows no layout, mask or ring by name: it waits for what is due, posts what is to be posted, computes what is to be
used. Partial results are accumulated in fp32 (fp64 for fp64 inputs) and cast to the inputs' dtype once; gradients
travel in that precision too. Which side travels is the caller's choice. Autograd is next door in `operator.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from seqpar_ring.cargo import Cargo, Coded, Fields, Form, add_rows, pick
from seqpar_ring.geometry import count
from seqpar_ring.kernels import Kept, Kernel, Scores
from seqpar_ring.kernels.merge import Part, at_once, merge_parts_
from seqpar_ring.plan import Pass, Plan
from seqpar_ring.schedule import Block, Call, Move, Stage, Work
from seqpar_ring.transport import Handle, Messenger, Recv, Send

Pair = tuple[Tensor, Tensor]

SILENT: AbstractContextManager[None] = nullcontext()
"""Where nobody records."""

BACKWARD = {"kv": "backward", "q": "backward, queries travel"}
"""Names of the pass, by what travels, for who records."""


def forward(plan: Plan, qkv: tuple[Tensor, Tensor, Tensor], kernel: Kernel, scores: Scores) -> Pair:
    """The forward pass: (out_BSHE in a wide dtype or q's, lse_BHS in fp32 or fp64)."""
    q, k, v = qkv
    partial = _Partial(q, v.shape[3])

    def compute(work: Work, view: Fields) -> None:
        keys, values = view
        placed = _placed(scores, plan, work, plan.schedule.travels)
        for call in work.calls:
            rows, cols = slice(call.q0, call.q1), slice(call.k0, call.k1)
            part = kernel.forward(q[:, rows], keys[:, cols], values[:, cols], call, _at(placed, call))
            partial.take(Part(call.q0, *part))
        partial.merge()

    _Run(plan, plan.forward_pass, (k, v)).go(compute)
    return partial.result()


def backward(
    plan: Plan, dout: Tensor, kept: Kept, kernel: Kernel, scores: Scores, queries_travel: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass: (dq, dk, dv) of this rank's tokens in a wide dtype; `kept` holds the global out and lse."""
    assert kept.out is not None  # of this rank's own rows
    if kept.delta is None:
        kept = kept._replace(delta=(dout.to(kept.lse.dtype) * kept.out.to(kept.lse.dtype)).sum(-1).transpose(1, 2))
    return (_queries_travel if queries_travel else _keys_travel)(plan, dout, kept, kernel, scores)


def _keys_travel(
    plan: Plan, dout: Tensor, kept: Kept, kernel: Kernel, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values visit the queries; their gradients go back to them."""
    q, k, v, out, lse, delta = kept
    assert out is not None
    assert delta is not None
    dq = _Total(Cargo((q,), lse.dtype), q.shape[1])
    run = _Run(plan, plan.backward_pass, (k, v), lse.dtype)

    def compute(work: Work, view: Fields) -> None:
        keys, values = view
        placed, total = _placed(scores, plan, work, "kv"), run.gradient_of(keys.shape[1])
        for call in work.calls:
            rows, cols = slice(call.q0, call.q1), slice(call.k0, call.k1)
            part = Kept(q[:, rows], keys[:, cols], values[:, cols], out[:, rows], lse[:, :, rows], delta[:, :, rows])
            dq_part, *dkv = kernel.backward(dout[:, rows], part, call, _at(placed, call))
            dq.add(call.q0, call.q1, (dq_part,))
            total.add(call.k0, call.k1, tuple(dkv))
        run.keep(work, total.result())

    run.go(compute)
    (dk, dv), (dq_whole,) = run.own_gradient(), dq.result()
    return dq_whole, dk, dv


def _queries_travel(
    plan: Plan, dout: Tensor, kept: Kept, kernel: Kernel, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries visit the keys, with dout and what softmax needs of their rows; dq goes back to them."""
    q, k, v, _, lse, delta = kept
    assert delta is not None
    dkv = _Total(Cargo((k, v), lse.dtype), k.shape[1])
    run = _Run(plan, plan.query_pass, (q, dout, lse.transpose(1, 2), delta.transpose(1, 2)), lse.dtype, gradients=1)

    def compute(work: Work, view: Fields) -> None:
        q, dout, lse, delta = view
        lse, delta = lse.transpose(1, 2), delta.transpose(1, 2)
        placed, total = _placed(scores, plan, work, "q"), run.gradient_of(q.shape[1])
        for call in work.calls:
            rows, cols = slice(call.q0, call.q1), slice(call.k0, call.k1)
            part = Kept(q[:, rows], k[:, cols], v[:, cols], None, lse[:, :, rows], delta[:, :, rows])
            dq_part, *dkv_part = kernel.backward(dout[:, rows], part, call, _at(placed, call))
            total.add(call.q0, call.q1, (dq_part,))
            dkv.add(call.k0, call.k1, tuple(dkv_part))
        run.keep(work, total.result())

    run.go(compute)
    (dq,), (dk, dv) = run.own_gradient(), dkv.result()
    return dq, dk, dv


def _placed(scores: Scores, plan: Plan, work: Work, travels: str) -> Scores:
    """The scores with the positions of all rows of a step, where position biases ask for them."""
    if scores.slopes is None:
        return scores
    own, view = plan.positions_of(work.blocks, travels)
    own, view = own.to(scores.slopes.device), view.to(scores.slopes.device)
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
        self._out: Tensor | None = None
        self._lse: Tensor | None = None
        self._waiting: list[Part] = []

    def take(self, part: Part) -> None:
        """A part of these rows' answer. It is merged at once, or on a GPU with others of the same step."""
        if self._out is None and part.lse.shape[2] == self._q.shape[1]:
            _, self._out, self._lse = part  # nothing to merge with yet; with W = 1 this is the answer
            return
        self._waiting.append(part)
        if len(self._waiting) == at_once(self._accumulators()[0]):
            self.merge()

    def merge(self) -> None:
        """Merge what waits."""
        if self._waiting:
            merge_parts_(*self._accumulators(), self._waiting)
            self._waiting = []

    def result(self) -> Pair:
        return self._accumulators() if self._out is None or self._lse is None else (self._out, self._lse)

    def _accumulators(self) -> Pair:
        B, S, H, _ = self._q.shape
        if self._out is None or self._lse is None:
            self._out = self._q.new_zeros((B, S, H, self._value_dim), dtype=self._dtype)
            self._lse = self._q.new_full((B, H, S), -torch.inf, dtype=self._dtype)
        elif self._out.dtype is not self._dtype:
            self._out = self._out.to(self._dtype)
        if self._q.is_cuda:  # as the kernel that merges there reads them
            self._out, self._lse = self._out.contiguous(), self._lse.contiguous()
        return self._out, self._lse


class _Total:
    """A sum of gradients over calls; the first that covers all rows becomes the sum."""

    def __init__(self, cargo: Cargo, rows: int) -> None:
        self._cargo, self._rows = cargo, rows
        self._parts: Fields | None = None

    def add(self, a: int, b: int, parts: Fields) -> None:
        if self._parts is None:
            if b - a == self._rows:
                self._parts = self._cargo.cast(parts)
                return
            self._parts = self._cargo.zeros(self._rows)
        for total, part in zip(self._parts, parts, strict=True):
            total[:, a:b].add_(part)

    def result(self) -> Fields:
        return self._cargo.zeros(self._rows) if self._parts is None else self._parts


class _Run:
    """The state of one run over a pass: what has arrived, what is under way, what has been made.

    `own` are this rank's rows of the side that travels; `gradients` how many of them (from the first on) have one.
    """

    def __init__(
        self, plan: Plan, what: Pass, own: Fields, gradient_dtype: torch.dtype | None = None, gradients: int = 2
    ) -> None:
        self._ring: Messenger = plan.documents.ring
        self._recorder = plan.sequence.recorder
        self._label = "forward" if gradient_dtype is None else BACKWARD[what.traffic.travels]
        self._pass, self._node, self._own = what, plan.fabric.node, own
        keys_travel, settings = what.traffic.travels == "kv", plan.documents.settings
        self._out: Form = Coded(own) if keys_travel and settings.kv_dtype == "int8" else Cargo(own)
        self._arrived: dict[Block, Fields] = {}
        self._made: dict[Block, Fields] = {}
        self._under_way: dict[tuple[str, Move], tuple[Handle, Fields]] = {}
        self._gradient_dtype = gradient_dtype
        if gradient_dtype is not None:
            self._returns = Cargo(own[:gradients], gradient_dtype)
            narrow = keys_travel and settings.dkv_dtype == "bf16"
            self._back: Form = Cargo(own[:gradients], torch.bfloat16) if narrow else self._returns
            self._total = self._returns.zeros(own[0].shape[1])

    def go(self, compute: Callable[[Work, Fields], None]) -> None:
        """Every stage in turn: wait for what is due, post what is to be posted, compute what is to be used."""
        if self._recorder is not None:
            self._recorder.start(self._label)
        for step, stage in enumerate(self._pass.stages):
            with self._noted("wait", step):
                self._settle(stage)
            with self._noted("post", step):
                self._post("kv", stage.post_kv)
                self._post("dkv", stage.post_dkv)
            if stage.uses:
                work = self._pass.work[step]
                with self._noted("compute", step):
                    compute(work, self._view(work))
            for block in stage.drop:
                del self._arrived[block]

    def _noted(self, kind: str, step: int) -> AbstractContextManager[None]:
        return SILENT if self._recorder is None else self._recorder.span(kind, step)

    def _settle(self, stage: Stage) -> None:
        """Wait for what is due. A name of its own, so that no local variable keeps a buffer alive that is done with."""
        for move in stage.due_kv:
            landed = self._finish("kv", move)
            if move.dst == self._ring.rank:
                self._arrived[move.block] = landed
        for move in stage.due_dkv:
            landed = self._finish("dkv", move)
            if move.dst == self._ring.rank:
                self._take_gradient(move.block, landed)

    def gradient_of(self, rows: int) -> _Total:
        """An empty sum for the gradient of a view of so many rows."""
        return _Total(self._returns, rows)

    def keep(self, work: Work, gradient: Fields) -> None:
        """Take the gradient of a step's view: add what belongs to own rows, hold the rest until it is sent."""
        for block, part in zip(work.blocks, self._apart(work, gradient), strict=True):
            if block.owner == self._ring.rank:
                add_rows(self._total, block.rows, part)
            else:
                self._made[block] = tuple(x.contiguous() for x in part)

    def own_gradient(self) -> Fields:
        """The gradient of this rank's own rows, complete once the run is over."""
        return self._total

    def _view(self, work: Work) -> Fields:
        """The rows of a step's blocks as the calls see them."""
        buffers = [self._fields(block) for block in work.blocks]
        if not work.slices:
            return buffers[0]
        columns = ([buffers[b][i][:, x:y] for b, x, y in work.slices] for i in range(len(buffers[0])))
        return tuple(torch.cat(column, 1) for column in columns)

    def _apart(self, work: Work, gradient: Fields) -> list[Fields]:
        """The gradient of a view as those of its blocks, row for row."""
        if not work.slices:
            return [gradient]
        parts = [self._returns.zeros(count(block.rows)) for block in work.blocks]
        at = 0
        for b, x, y in work.slices:
            for part, whole in zip(parts[b], gradient, strict=True):
                part[:, x:y] = whole[:, at : at + y - x]
            at += y - x
        return parts

    def _fields(self, block: Block) -> Fields:
        if block.owner != self._ring.rank:
            return self._out.unpacked(self._arrived[block])
        return pick(self._own, block.rows)

    def _post(self, kind: str, moves: tuple[Move, ...]) -> None:
        """All transfers of one stage and lane that are due together, with one handle; those due first go first."""
        groups: dict[tuple[int, str], list[Move]] = {}
        for move in moves:
            groups.setdefault((move.due, self._lane(kind, move)), []).append(move)
        for (_, lane), together in sorted(groups.items()):
            sends, recvs, messages = [], [], []
            for move in together:
                if move.src == self._ring.rank:
                    messages.append(self._message(kind, move.block))
                    sends += [Send(move.dst, tensor) for tensor in messages[-1]]
                else:
                    form = self._out if kind == "kv" else self._back
                    messages.append(form.room(count(move.block.rows)))
                    recvs += [Recv(move.src, tensor) for tensor in messages[-1]]
            handle = self._ring.exchange(sends, recvs, lane)
            for move, message in zip(together, messages, strict=True):
                self._under_way[kind, move] = handle, message

    def _lane(self, kind: str, move: Move) -> str:
        """What goes between nodes has lanes of its own, where the transport made them."""
        far = move.src // self._node != move.dst // self._node and f"{kind}_far" in self._ring.lanes
        return f"{kind}_far" if far else kind

    def _finish(self, kind: str, move: Move) -> Fields:
        handle, message = self._under_way.pop((kind, move))
        handle.wait()
        return message

    def _message(self, kind: str, block: Block) -> Fields:
        if kind == "dkv":
            return self._back.packed(self._made.pop(block))
        return self._out.packed(pick(self._own, block.rows)) if block.owner == self._ring.rank else self._arrived[block]

    def _take_gradient(self, block: Block, landed: Fields) -> None:
        if block.owner == self._ring.rank:
            add_rows(self._total, block.rows, landed)
        else:
            for total, part in zip(self._made[block], landed, strict=True):
                total.add_(part)
