"""A run: one pass of a plan under way on this rank, and the memory it holds meanwhile.

All memory is taken when the run begins, as much as the schedule's buffers say (`schedule.buffers`), and what arrives,
is made or is laid together has its planned place in it; so a step allocates nothing but what the kernel makes. It
knows stages, blocks and messages; what is computed with them is its caller's. Who sends what when stands in the pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from seqpar_ring.cargo import Cargo, Coded, Fields, Form, Laid, Parts, add_rows, part
from seqpar_ring.geometry import count
from seqpar_ring.passes import Message, Pass, Posted
from seqpar_ring.plan import Plan
from seqpar_ring.schedule import Block, Move, Place, Places, Work
from seqpar_ring.transport import Handle, Messenger, Recv, Send

BACKWARD = {"kv": "backward", "q": "backward, queries travel"}
"""Names of the pass, by what travels, for who records."""


class Sum:
    """A sum of gradients over calls, in memory that is given; `begun` where something is in it already."""

    def __init__(self, fields: Fields, begun: bool = False) -> None:
        self._fields, self._begun, self._parts = fields, begun, Parts()

    def add(self, a: int, b: int, parts: Fields) -> None:
        """Add the gradients of rows `a` to `b`."""
        if not self._begun and b - a < self._fields[0].shape[1]:
            for x in self._fields:
                x.zero_()
            self._begun = True
        for total, x in zip(self._parts.of(self._fields, a, b), parts, strict=True):
            if self._begun:
                total.add_(x)
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
        self._known: dict[Place, Laid] = {}  # several things have the same place, one after the other

    def of(self, thing: Move | Block) -> Laid:
        """The memory of a block, or of what a transfer brings or takes."""
        place = self._places.of[thing]
        found = self._known.get(place)
        if found is None:
            found = self._known[place] = self._store.laid(*place)
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
        self._plain = Cargo(own)
        self._form: Form = Coded(own) if keys_travel and settings.kv_dtype == "int8" else self._plain
        self._arrived: dict[Block, Laid] = {}
        self._written: set[Block] = set()
        self._under_way: dict[int, list[tuple[Posted, Handle, list[Laid]]]] = {}  # by the stage when they are due
        planned = what.buffers
        self._copies = self._must_copy()
        self._rows = Held(self._form, planned.rows_and_copies if self._copies else planned.rows)
        self._view = self._plain.store(planned.view if self._form.as_computed else planned.largest)
        if gradient_dtype is not None:
            sums = Cargo(own[:gradients], gradient_dtype)
            self._narrow = keys_travel and settings.dkv_dtype == "bf16"
            self._back = Cargo(own[:gradients], torch.bfloat16) if self._narrow else sums
            self._sums = Held(sums, planned.sums if self._narrow else planned.sums_and_returned)
            self._on_their_way = Held(self._back, planned.narrow) if self._narrow else self._sums
            self._gradient_of_view = sums.store(planned.view)
            self._total = tuple(x.zero_() for x in sums.apart(own[0].shape[1]))

    def _must_copy(self) -> bool:
        """Whether own rows must be copied to be sent, also those that lie together."""
        return not all(self._form.ready(part(self._own, a, b)) for a, b in self._pass.in_place)

    def go(self, compute: Callable[[Work, Fields], None]) -> None:
        """Every stage in turn: wait for what is due, post what is to be posted, compute what is to be used."""
        if self._recorder is not None:
            self._recorder.start(self._label)
        wait, post = self._noted("wait", self._wait), self._noted("post", self._post_all)
        use = self._noted("compute", self._use(compute))
        for step, stage in enumerate(self._pass.stages):
            wait(step)
            post(step)
            if stage.uses:
                use(step)
            for block in stage.drop:
                del self._arrived[block]

    def gradient_of(self, work: Work) -> Sum:
        """The sum for the gradient of a step's view: where it will be wanted, if it is of one block."""
        block = work.blocks[0]
        if block.owner == self._ring.rank:
            [(a, b)] = block.rows
            return Sum(part(self._total, a, b), begun=True)
        return Sum(self._gradient_of_view.at(0, _rows_of(work)) if work.slices else self._sums.of(block).fields)

    def keep(self, work: Work, gradient: Sum) -> None:
        """Take the gradient of a step's view: where several blocks lie together in it, each has its part held apart."""
        fields, at = gradient.result(), 0
        for b, first, end in work.slices:
            held, rows = part(self._sums.of(work.blocks[b]).fields, first, end), part(fields, at, at + end - first)
            for there, one in zip(held, rows, strict=True):
                there.copy_(one)
            at += end - first

    def own_gradient(self) -> Fields:
        """The gradient of this rank's own rows, complete once the run is over."""
        return self._total

    def _noted(self, kind: str, act: Callable[[int], None]) -> Callable[[int], None]:
        """What a stage does, as it is recorded where somebody does so."""
        recorder = self._recorder
        if recorder is None:
            return act

        def noted(step: int) -> None:
            with recorder.span(kind, step):
                act(step)

        return noted

    def _use(self, compute: Callable[[Work, Fields], None]) -> Callable[[int], None]:
        def use(step: int) -> None:
            work = self._pass.work[step]
            compute(work, self._seen(work))

        return use

    def _wait(self, step: int) -> None:
        for posted, handle, laid in self._under_way.pop(step, ()):
            handle.wait()
            for message, landed in zip(posted.messages, laid, strict=True):
                if message.out:
                    continue
                if posted.gradients:
                    self._take_gradient(message, landed)
                else:
                    self._arrived[message.move.block] = landed

    def _post_all(self, step: int) -> None:
        for posted in self._pass.posts[step]:
            self._post(posted)

    def _seen(self, work: Work) -> Fields:
        """The rows of a step's blocks as the calls see them: where they are, or laid together."""
        block = work.blocks[0]
        if block.owner == self._ring.rank:  # by themselves, and one range: the checker says so
            [(a, b)] = block.rows
            return part(self._own, a, b)
        if not work.slices and self._form.as_computed:
            return self._arrived[block].fields
        view, at = self._view.at(0, _rows_of(work)), 0
        slices = work.slices or ((0, 0, _rows_of(work)),)
        parts = [part(self._arrived[work.blocks[b]].fields, first, end) for b, first, end in slices]
        if self._form.as_computed:
            for whole, *some in zip(view, *parts, strict=True):
                torch.cat(some, 1, out=whole)  # one launch, where copies would be one for each part
            return view
        for fields in parts:
            rows = fields[0].shape[1]
            self._form.read(fields, part(view, at, at + rows))
            at += rows
        return view

    def _take_gradient(self, message: Message, landed: Laid) -> None:
        block = message.move.block
        if message.home:
            add_rows(self._total, block.rows, landed.fields)
        else:  # of as many rows, so both lie alike
            for total, x in zip(self._sums.of(block).pieces, landed.pieces, strict=True):
                total.add_(x)

    def _post(self, posted: Posted) -> None:
        """Send and expect what a posting says; its tensors are held until it is due.

        Both sides know without asking what tensors a transfer is made of: own rows that lie together are sent from
        where they are, field by field; all else lies in memory of the run, and is sent as it lies there.
        """
        sends: list[Send] = []
        recvs: list[Recv] = []
        held: list[Laid] = []
        for message in posted.messages:
            if not message.out:
                laid = (self._on_their_way if posted.gradients else self._rows).of(message.move)
            elif posted.gradients:
                laid = self._gradient_out(message.move)
            else:
                laid = self._rows_out(message)
            for tensor in laid.fields if message.in_place and self._form.as_computed else laid.pieces:
                if message.out:
                    sends.append(Send(message.peer, tensor))
                else:
                    recvs.append(Recv(message.peer, tensor))
            held.append(laid)
        handle = self._ring.exchange(sends, recvs, posted.lane)
        self._under_way.setdefault(posted.due, []).append((posted, handle, held))

    def _rows_out(self, message: Message) -> Laid:
        """The message of a block: passed on as it came, or own rows from where they lie, or a copy of them."""
        block = message.move.block
        if not message.home:
            return self._arrived[block]
        if len(block.rows) == 1 and not self._copies:
            return Laid(part(self._own, *block.rows[0]), ())
        copied, at = self._rows.of(block), 0
        for a, b in block.rows if block not in self._written else ():
            self._form.write(part(copied.fields, at, at + b - a), part(self._own, a, b))
            at += b - a
        self._written.add(block)
        return copied

    def _gradient_out(self, move: Move) -> Laid:
        made = self._sums.of(move.block)
        if not self._narrow:
            return made
        message = self._on_their_way.of(move)
        self._back.write(message.fields, made.fields)
        return message


def _rows_of(work: Work) -> int:
    return sum(end - first for _, first, end in work.slices) if work.slices else count(work.blocks[0].rows)
