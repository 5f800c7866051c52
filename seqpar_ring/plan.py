"""Plan: what one rank knows about one set of documents: its tokens, the schedule of the group, its own kernel calls.

A plan is made once for given lengths and mask, cached by `SequenceParallel.plan`, and then travels with the data as
an argument; there is no current plan anywhere. Attention is a torch operator, and those take plain values only, so a
plan is also interned under a number while somebody holds it: the one registry of this package. A plan computes
nothing itself.
"""

from __future__ import annotations

import itertools
import weakref
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from seqpar_ring import layout as layouts
from seqpar_ring.config import Settings
from seqpar_ring.errors import PlanError
from seqpar_ring.geometry import Band, causal, full
from seqpar_ring.kernels import Choice, Request, select
from seqpar_ring.schedule import Block, Call, Stage, calls, choose, needs, program, transpose
from seqpar_ring.sharding import TokenOrder, gather_tokens, shard_tokens
from seqpar_ring.transport import Transport


class Reason(NamedTuple):
    """One choice, what it came to, and why."""

    choice: str
    value: str
    reason: str


class Mask(NamedTuple):
    """Which keys of its own document a query sees."""

    causal: bool = True
    window: int | None = None

    def band(self) -> Band:
        """The mask as a band.

        Raises:
            PlanError: a window below 1, or a window without causality.
        """
        if self.window is None:
            return causal() if self.causal else full()
        if not self.causal or self.window < 1:
            raise PlanError(
                "a sliding window needs a causal mask and at least one key",
                fix="Give window >= 1 with causal=True, or window=None.",
                causal=self.causal,
                window=self.window,
            )
        return causal(self.window)

    def __str__(self) -> str:
        if self.window is not None:
            return f"causal with a window of {self.window}"
        return "causal" if self.causal else "full"


class Documents:
    """The documents of a batch and who holds which of their tokens: what the plans of all masks share.

    Raises:
        ConfigError: an unknown layout.
        PlanError: no document, or one without tokens.
    """

    def __init__(self, lengths: tuple[int, ...], settings: Settings, ring: Transport) -> None:
        self.lengths, self.settings, self.ring = lengths, settings, ring
        self.layout = layouts.make(settings.layout, lengths, ring.world)
        self.sizes = layouts.tokens(self.layout)
        self._plans: dict[Mask, Plan] = {}
        self._met: set[object] = set()

    @cached_property
    def order(self) -> TokenOrder:
        """Index tensors between the whole sequence and the ranks."""
        return TokenOrder(self.lengths, self.layout, self.ring.rank)

    def plan(self, mask: Mask) -> Plan:
        """The plan of these documents under a mask; the same object each time."""
        if mask not in self._plans:
            self._plans[mask] = Plan(self, mask)
        return self._plans[mask]

    def first_time(self, what: object) -> bool:
        """Whether this is the first time that these documents are used with this."""
        new = what not in self._met
        self._met.add(what)
        return new


class Plan:
    """One rank's plan for one set of documents and one mask. Made by `SequenceParallel.plan`; hashable by identity.

    Attributes:
        documents: lengths, layout and settings, shared by the plans of all masks.
        mask: which keys a query sees.
        schedule: the forward traffic of the group.
        backward_schedule: the backward traffic.
        reasons: the choices made, each with its reason.
        handle: the number under which attention's operator finds the plan.
    """

    def __init__(self, documents: Documents, mask: Mask) -> None:
        self.documents, self.mask, self.band = documents, mask, mask.band()
        largest, asked = max(documents.sizes), documents.settings.block_tokens
        pieces = 1 if asked == "auto" else -(-largest // asked)
        wanted = needs(documents.layout, self.band)
        self.schedule, why = choose(documents.settings.schedule, wanted, documents.sizes, pieces)
        self.backward_schedule = transpose(self.schedule, node=documents.ring.world)
        self.reasons = (
            Reason("layout", documents.settings.layout, f"{min(documents.sizes)} to {largest} tokens a rank"),
            Reason("schedule", documents.settings.schedule, why),
            Reason("block_tokens", str(asked), f"a rank's block travels in {pieces} message" + "s" * (pieces > 1)),
            Reason("backward", "dKV travels", "partial sums go on with their block, in fp32 (fp64 for fp64)"),
        )
        self.handle = _intern(self)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document."""
        return self.documents.lengths

    @property
    def layout(self) -> layouts.Layout:
        """Runs of tokens of every rank."""
        return self.documents.layout

    @property
    def ring(self) -> Transport:
        """The transport of the sequence group."""
        return self.documents.ring

    @cached_property
    def tokens(self) -> int:
        """Tokens of all documents together."""
        return sum(self.lengths)

    @property
    def local_tokens(self) -> int:
        """Tokens that this rank holds; may be 0."""
        return self.documents.sizes[self.ring.rank]

    @cached_property
    def position_ids(self) -> Tensor:
        """Position of each of this rank's tokens within its document, int64 (1, S_local), on the CPU."""
        return self.documents.order.positions[None]

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens of a whole tensor, in the plan's order. `x` is the same on every rank of the group.

        Differentiable: the gradient of the whole tensor is gathered, so it is the same on every rank.

        Raises:
            PlanError: `x` has not as many entries along `dim` as the plan has tokens.
        """
        self._expect(x, dim, self.tokens, "the whole sequence")
        return shard_tokens(x, dim, self.documents.order, self.ring)

    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """The whole tensor, in the order of the sequence, from every rank's tokens. Collective over the sequence group.

        Differentiable: the gradient is that of the sum over the ranks of what they do with the whole tensor.

        Raises:
            PlanError: `x` has not as many entries along `dim` as this rank has tokens.
        """
        self._expect(x, dim, self.local_tokens, "this rank's tokens")
        return gather_tokens(x, dim, self.documents.order, self.ring)

    def masked(self, causal: bool = True, window: int | None = None) -> Plan:
        """The plan of the same documents in the same layout under another mask, for a layer that differs. Cached."""
        return self.documents.plan(Mask(causal, window))

    def explain(self) -> str:
        """The choices of the plan with their reasons, a line each."""
        documents = f"{len(self.lengths)} document" + "s" * (len(self.lengths) > 1)
        head = f"{documents}, {self.tokens} tokens over {self.ring.world} ranks, {self.mask}"
        return "\n".join([head, *(f"  {r.choice}: {r.value} ({r.reason})" for r in self.reasons)])

    @cached_property
    def forward_program(self) -> tuple[Stage, ...]:
        """This rank's stages of the forward traffic."""
        return program(self.schedule, self.ring.rank)

    @cached_property
    def backward_program(self) -> tuple[Stage, ...]:
        """This rank's stages of the backward traffic."""
        return program(self.backward_schedule, self.ring.rank)

    @cached_property
    def calls(self) -> dict[Block, tuple[Call, ...]]:
        """This rank's kernel calls for each block it uses."""
        mine = self.layout[self.ring.rank]
        used = [use.block for use in self.schedule.uses if use.rank == self.ring.rank]
        return {block: calls(mine, self.layout[block.owner], block.rows, self.band) for block in used}

    @cached_property
    def windowed(self) -> bool:
        """Whether the kernel needs a lower edge for this plan: the same answer on every rank."""
        return self.mask.window is not None and self.mask.window < max(self.lengths)

    def kernel(self, request: Request) -> Choice:
        """The kernel for tensors of this kind, with the reason.

        Raises:
            UnsupportedError: no kernel, or not the one that the settings name, can do this exactly.
        """
        return select(request, self.documents.settings.kernel)

    def __repr__(self) -> str:
        shown = self.lengths if len(self.lengths) < 9 else (*self.lengths[:8], "...")
        return f"Plan(lengths={shown}, {self.mask}, rank {self.ring.rank} of {self.ring.world})"

    def _expect(self, x: Tensor, dim: int, tokens: int, what: str) -> None:
        if not -x.dim() <= dim < x.dim() or x.shape[dim] != tokens:
            raise PlanError(
                f"a tensor does not hold {what} along dim {dim}",
                fix=f"Give a tensor with {tokens} entries along that dim, or make a plan for these lengths.",
                shape=tuple(x.shape),
                expected=tokens,
                plan=self,
            )


_PLANS: weakref.WeakValueDictionary[int, Plan] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count(1)


def _intern(plan: Plan) -> int:
    handle = next(_NUMBERS)
    _PLANS[handle] = plan
    return handle


def plan_of(handle: int) -> Plan:
    """The plan interned under this number.

    Raises:
        PlanError: nobody holds the plan any more.
    """
    plan = _PLANS.get(handle)
    if plan is None:
        raise PlanError(
            "a plan is gone before the pass that needs it",
            fix="Keep the plan (or the batch that carries it) until backward is done.",
            handle=handle,
        )
    return plan
