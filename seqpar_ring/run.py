"""A run: one pass of a plan under way on this rank, and the memory it holds meanwhile.

All memory is taken when the run begins, as much as the schedule's buffers say (`schedule.buffers`), and what arrives,
is made or is laid together has its planned place in it; so a step allocates nothing but what the kernel makes. It
knows stages, blocks and messages; what is computed with them is its caller's. Who sends what when stands in the pass.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from seqpar_ring.cargo import Cargo, Coded, Fields, Form, add_rows, part, within
from seqpar_ring.geometry import count
from seqpar_ring.passes import Pass
from seqpar_ring.plan import Plan
from seqpar_ring.schedule import Block, Move, Places, Posting, Work
from seqpar_ring.transport import Handle, Messenger, Recv, Send
from seqpar_ring.views import rows_of

SILENT: AbstractContextManager[None] = nullcontext()
"""Where nobody records."""

BACKWARD = {"kv": "backward", "q": "backward, queries travel"}
"""Names of the pass, by what travels, for who records."""


class Sum:
    """A sum of gradients over calls, in memory that is given; `begun` where something is in it already."""

    def __init__(self, fields: Fields, begun: bool = False) -> None:
        self._fields, self._begun = fields, begun

    def add(self, a: int, b: int, parts: Fields) -> None:
        """Add the gradients of rows `a` to `b`."""
        if not self._begun and b - a < self._fields[0].shape[1]:
            for x in self._fields:
                x.zero_()
            self._begun = True
        for total, x in zip(self._fields, parts, strict=True):
            if self._begun:
                rows_of(total, a, b).add_(x)
            else:
                total.copy_(x)
        self._begun = True

    def result(self) -> Fields:
        """The sum; zeros if nothing was added."""
        if not self._begun:
            for x in self._fields:
                x.zero_()
        return self._fields


class Held:
    """Memory of a run with the places of what lies in it, which is nothing if there are none."""

    def __init__(self, form: Form, places: Places) -> None:
        self._places, self._store = places, form.store(places.rows)
        self._known: dict[Move | Block, Fields] = {}

    def of(self, thing: Move | Block) -> Fields:
        """The memory of a block, or of what a transfer brings or takes."""
        found = self._known.get(thing)
        if found is None:
            found = self._known[thing] = self._store.at(*self._places.of[thing])
        return found


class Run:
    """The state of one run over a pass: what has arrived, what is under way, what has been made.

    Args:
        plan: whose ring, settings and recorder are used.
        what: the pass.
        own: this rank's rows of the side that travels.
        gradient_dtype: of the gradients that return, in backward.
        gradients: how many of `own` (from the first on) have one.
    """

    def __init__(
        self, plan: Plan, what: Pass, own: Fields, gradient_dtype: torch.dtype | None = None, gradients: int = 2
    ) -> None:
        self._ring: Messenger = plan.documents.ring
        self._recorder = plan.sequence.recorder
        self._label = "forward" if gradient_dtype is None else BACKWARD[what.traffic.travels]
        self._pass, self._own = what, own
        keys_travel, settings = what.traffic.travels == "kv", plan.documents.settings
        self._form: Form = Coded(own) if keys_travel and settings.kv_dtype == "int8" else Cargo(own)
        self._arrived: dict[Block, Fields] = {}
        self._written: set[Block] = set()
        self._under_way: dict[int, list[tuple[Posting, Handle, list[Fields]]]] = {}  # by the stage when they are due
        planned = what.buffers
        self._copies = self._must_copy()
        self._rows = Held(self._form, planned.rows_and_copies if self._copies else planned.rows)
        self._view = Cargo(own).store(planned.view if self._form.as_computed else planned.largest)
        if gradient_dtype is not None:
            sums = Cargo(own[:gradients], gradient_dtype)
            self._narrow = keys_travel and settings.dkv_dtype == "bf16"
            self._back = Cargo(own[:gradients], torch.bfloat16) if self._narrow else sums
            self._sums = Held(sums, planned.sums if self._narrow else planned.sums_and_returned)
            self._on_their_way = Held(self._back, planned.narrow) if self._narrow else self._sums
            self._gradient_of_view = sums.store(planned.view)
            self._total = tuple(x.zero_() for x in sums.store(own[0].shape[1]).at(0, own[0].shape[1]))

    def _must_copy(self) -> bool:
        """Whether own rows must be copied to be sent, also those that lie together."""
        return not all(self._form.ready(part(self._own, a, b)) for a, b in self._pass.in_place)

    def go(self, compute: Callable[[Work, Fields], None]) -> None:
        """Every stage in turn: wait for what is due, post what is to be posted, compute what is to be used."""
        if self._recorder is not None:
            self._recorder.start(self._label)
        for step, stage in enumerate(self._pass.stages):
            with self._noted("wait", step):
                for posting, handle, messages in self._under_way.pop(step, ()):
                    handle.wait()
                    self._take(posting, messages)
            with self._noted("post", step):
                for posting in stage.posts:
                    self._post(posting)
            if stage.uses:
                work = self._pass.work[step]
                with self._noted("compute", step):
                    compute(work, self._seen(work))
            for block in stage.drop:
                del self._arrived[block]

    def gradient_of(self, work: Work) -> Sum:
        """The sum for the gradient of a step's view: where it will be wanted, if it is of rows that lie together."""
        block = work.blocks[0]
        if work.slices or (block.owner == self._ring.rank and len(block.rows) > 1):
            return Sum(self._gradient_of_view.at(0, _rows_of(work)))
        if block.owner == self._ring.rank:
            return Sum(part(self._total, *block.rows[0]) if block.rows else part(self._total, 0, 0), begun=True)
        return Sum(self._sums.of(block))

    def keep(self, work: Work, gradient: Sum) -> None:
        """Take the gradient of a step's view: own rows are added up, others' held until they are sent."""
        fields, block = gradient.result(), work.blocks[0]
        if not work.slices:
            if block.owner == self._ring.rank and len(block.rows) > 1:
                add_rows(self._total, block.rows, fields)
            return
        at = 0
        for b, first, end in work.slices:
            block, rows = work.blocks[b], part(fields, at, at + end - first)
            if block.owner == self._ring.rank:
                for x, y, number in within(block.rows, first, end):
                    for total, one in zip(self._total, part(rows, number - first, number - first + y - x), strict=True):
                        total[:, x:y].add_(one)
            else:
                for there, one in zip(part(self._sums.of(block), first, end), rows, strict=True):
                    there.copy_(one)
            at += end - first

    def own_gradient(self) -> Fields:
        """The gradient of this rank's own rows, complete once the run is over."""
        return self._total

    def _noted(self, kind: str, step: int) -> AbstractContextManager[None]:
        return SILENT if self._recorder is None else self._recorder.span(kind, step)

    def _seen(self, work: Work) -> Fields:
        """The rows of a step's blocks as the calls see them: where they are, or laid together."""
        block = work.blocks[0]
        if not work.slices and block.owner != self._ring.rank and self._form.as_computed:
            return self._arrived[block]
        if not work.slices and block.owner == self._ring.rank and len(block.rows) == 1:
            return part(self._own, *block.rows[0])
        view, at = self._view.at(0, _rows_of(work)), 0
        for b, first, end in work.slices or ((0, 0, count(block.rows)),):
            block = work.blocks[b]
            if block.owner == self._ring.rank:
                for x, y, number in within(block.rows, first, end):
                    begin = at + number - first
                    for there, one in zip(part(view, begin, begin + y - x), part(self._own, x, y), strict=True):
                        there.copy_(one)
            else:
                self._form.read(part(self._arrived[block], first, end), part(view, at, at + end - first))
            at += end - first
        return view

    def _take(self, posting: Posting, messages: list[Fields]) -> None:
        """What has arrived of a posting: rows to compute with, or gradients to add."""
        for move, landed in zip(posting.moves, messages, strict=True):
            if move.dst == self._ring.rank and posting.gradients:
                self._take_gradient(move.block, landed)
            elif move.dst == self._ring.rank:
                self._arrived[move.block] = landed

    def _take_gradient(self, block: Block, landed: Fields) -> None:
        if block.owner == self._ring.rank:
            add_rows(self._total, block.rows, landed)
        else:
            for total, x in zip(self._sums.of(block), landed, strict=True):
                total.add_(x)

    def _post(self, posting: Posting) -> None:
        """Send and expect what a posting says; its tensors are held until it is due."""
        sends: list[Send] = []
        recvs: list[Recv] = []
        messages: list[Fields] = []
        for move in posting.moves:
            if move.src == self._ring.rank:
                message = self._gradient_out(move) if posting.gradients else self._rows_out(move)
                sends += [Send(move.dst, tensor) for tensor in message]
            else:
                message = (self._on_their_way if posting.gradients else self._rows).of(move)
                recvs += [Recv(move.src, tensor) for tensor in message]
            messages.append(message)
        handle = self._ring.exchange(sends, recvs, posting.lane)
        self._under_way.setdefault(posting.due, []).append((posting, handle, messages))

    def _rows_out(self, move: Move) -> Fields:
        """The message of a block: passed on as it came, or own rows from where they lie, or a copy of them."""
        block = move.block
        if block.owner != self._ring.rank:
            return self._arrived[block]
        if len(block.rows) == 1 and not self._copies:
            return part(self._own, *block.rows[0])
        message, at = self._rows.of(block), 0
        for a, b in block.rows if block not in self._written else ():
            self._form.write(part(message, at, at + b - a), part(self._own, a, b))
            at += b - a
        self._written.add(block)
        return message

    def _gradient_out(self, move: Move) -> Fields:
        made = self._sums.of(move.block)
        if not self._narrow:
            return made
        message = self._on_their_way.of(move)
        self._back.write(message, made)
        return message


def _rows_of(work: Work) -> int:
    return sum(end - first for _, first, end in work.slices) if work.slices else count(work.blocks[0].rows)
