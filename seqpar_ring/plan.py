"""Plan: what one rank knows about one set of documents: its tokens, the schedule of the group, its own kernel calls.

A plan is made once for given lengths and mask, cached by `SequenceParallel.plan`, and then travels with the data as
an argument; there is no current plan anywhere. Attention is a torch operator, and those take plain values only, so a
plan is also interned under a number (`handles`). A plan computes nothing itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqpar_ring import layout as layouts
from seqpar_ring.config import Settings
from seqpar_ring.errors import PlanError
from seqpar_ring.geometry import Mask
from seqpar_ring.handles import OfThisProcess, find, intern
from seqpar_ring.kernels import Choice, Request, refuse_impossible, select
from seqpar_ring.packing import Balance
from seqpar_ring.passes import Pass, pass_of
from seqpar_ring.schedule import Block, Route, Row, Sides, Traffic, Work, view_runs
from seqpar_ring.sharding import TokenOrder, agree_to_gather, gather_tokens, row_positions, shard_tokens
from seqpar_ring.transport import Messenger, Subgroup, Transport
from seqpar_ring.transport.agreement import Shown

TRAVELS = {"q": "queries travel", "kv": "keys and values travel"}
"""What may travel in backward."""


class Reason(NamedTuple):
    """One choice, what it came to, and why."""

    choice: str
    value: str
    reason: str


class Documents:
    """The documents of a batch and who holds which of their tokens: what the plans of all masks share.

    Attributes:
        lengths: tokens (in cross-attention: queries) of each document.
        kv_lengths: keys of each document in cross-attention, else None.
        sequence: transport of the sequence group.
        ring: the ranks that a block visits: those with this rank's heads, or the whole group without head sharding.
        members: the ranks that hold, together, the tokens that this rank attends with, and share out the heads.
        layout, kv_layout: who holds which token.
        longest: tokens of the longest document, without padding where positions tell it from what is padding.
        sides: the same over the ring, for queries and keys.

    Raises:
        ConfigError: an unknown layout.
        PlanError: no document, or one without tokens.
    """

    def __init__(
        self,
        lengths: tuple[int, ...],
        settings: Settings,
        sequence: Transport,
        kv_lengths: tuple[int, ...] | None = None,
        placed: layouts.Layout | None = None,
        longest: int | None = None,
    ) -> None:
        self.lengths, self.kv_lengths, self.settings, self.sequence = lengths, kv_lengths, settings, sequence
        heads = settings.head_degree
        self.ring: Messenger = sequence
        self.members: Messenger | None = None
        if heads > 1:
            first = sequence.rank // heads * heads
            self.ring = Subgroup(sequence, range(sequence.rank % heads, sequence.world, heads))
            self.members = Subgroup(sequence, range(first, first + heads))
        balance = Balance(settings.balance_tokens, settings.balance_area)
        self.q_side = self.k_side = placed or layouts.make(settings.layout, lengths, self.ring.world, balance)
        self.layout = self.kv_layout = layouts.split(self.q_side, heads)
        if kv_lengths is not None:
            self.k_side = layouts.make(settings.layout, kv_lengths, self.ring.world, balance, least=0)
            self.kv_layout = layouts.split(self.k_side, heads)
        self.sizes, self.placed = self.layout.sizes, placed is not None
        self.longest = longest or max(lengths)
        self._plans: dict[Mask, Plan] = {}

    @cached_property
    def order(self) -> TokenOrder:
        """Index tensors between the whole sequence and the ranks."""
        return TokenOrder(self.lengths, self.layout, self.sequence.rank)

    @cached_property
    def kv_order(self) -> TokenOrder:
        """The same for the keys of cross-attention."""
        if self.kv_lengths is None:
            return self.order
        return TokenOrder(self.kv_lengths, self.kv_layout, self.sequence.rank)

    def plan(self, mask: Mask) -> Plan:
        """The plan of these documents under a mask; the same object each time."""
        if mask not in self._plans:
            self._plans[mask] = Plan(self, mask)
        return self._plans[mask]


class Plan(OfThisProcess):
    """One rank's plan for one set of documents and one mask. Made by `SequenceParallel.plan`; hashable by identity.

    Attributes:
        documents: lengths, layout and settings, shared by the plans of all masks.
        mask: which keys a query sees.
        schedule: the forward traffic of the ring.
        reasons: the choices made, each with its reason.
        handle: the number under which attention's operator finds the plan.
        seen: what `ring_attention` has found out about its calls, by what they depend on.

    Raises:
        UnsupportedError: no kernel, or not the one that the settings name, can compute the mask.
    """

    def __init__(self, documents: Documents, mask: Mask) -> None:
        self.documents, self.mask = documents, mask
        settings = documents.settings
        regions = mask.regions(documents.lengths, documents.kv_lengths)
        self.sides = Sides(documents.q_side, documents.k_side, regions)
        self.windowed = regions.lower_edge
        refuse_impossible(self.windowed, settings.kernel)
        self.route = Route.of(settings, self.sides)
        self.fabric = self.route.fabric
        self.schedule, why = self.route.forward()
        self.reasons = self._reasons(why)
        self.handle = intern(self)
        self._positions: dict[tuple[tuple[Block, ...], str, str], tuple[Tensor, Tensor]] = {}
        self._travels: dict[Request, Reason] = {}  # every layer asks again
        self.seen: dict[Hashable, Any] = {}

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document."""
        return self.documents.lengths

    @property
    def layout(self) -> layouts.Layout:
        """Runs of tokens of every rank."""
        return self.documents.layout

    @property
    def sequence(self) -> Transport:
        """The transport of the sequence group."""
        return self.documents.sequence

    @property
    def tokens(self) -> int:
        """Tokens of all documents together."""
        return sum(self.lengths)

    @property
    def local_tokens(self) -> int:
        """Tokens that this rank holds; may be 0."""
        return self.documents.sizes[self.sequence.rank]

    @property
    def local_keys(self) -> int:
        """Keys that this rank holds: its tokens, but in cross-attention."""
        return self.documents.kv_layout.sizes[self.sequence.rank]

    @property
    def position_ids(self) -> Tensor:
        """Position of each of this rank's tokens within its document, int64 (1, S_local), on the CPU; a new tensor."""
        return self.documents.order.positions[None].clone()

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens of a whole tensor, in the plan's order. `x` is the same on every rank of the group.

        Differentiable: the gradient of the whole tensor is gathered, so it is the same, and whole, on every rank; with
        `SequenceParallel.loss` and an average over ranks it would be counted once for each rank.

        Raises:
            PlanError: `x` has not as many entries along `dim` as the plan has tokens.
        """
        self._expect(x, dim, self.tokens, "the whole sequence")
        return shard_tokens(x, dim, self.documents.order, self.sequence)

    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """The whole tensor, in the order of the sequence, from every rank's tokens. Collective over the sequence group.

        Differentiable: the gradient is that of the sum over the ranks of what they do with the whole tensor.

        Raises:
            PlanError: `x` has not as many entries along `dim` as this rank has tokens; raised on every rank.
            DisagreementError: dtypes or the other dimensions differ between ranks.
        """
        agree_to_gather(x, dim, self.sequence, self._misfit(x, dim, self.local_tokens, "this rank's tokens"))
        return gather_tokens(x, dim, self.documents.order, self.sequence)

    def shard_keys(self, x: Tensor, dim: int = 1) -> Tensor:
        """As `shard`, for tensors of keys in cross-attention."""
        self._expect(x, dim, sum(self.documents.kv_lengths or self.lengths), "all keys")
        return shard_tokens(x, dim, self.documents.kv_order, self.sequence)

    def gather_keys(self, x: Tensor, dim: int = 1) -> Tensor:
        """As `gather`, for keys."""
        agree_to_gather(x, dim, self.sequence, self._misfit(x, dim, self.local_keys, "this rank's keys"))
        return gather_tokens(x, dim, self.documents.kv_order, self.sequence)

    def masked(self, causal: bool = True, window: int | None = None, chunk: int | None = None) -> Plan:
        """The plan of the same documents in the same layout under another mask, for a layer that differs. Cached."""
        return self.documents.plan(Mask.make(causal, window, chunk))

    @cached_property
    def keys_per_query(self) -> float:
        """Keys that a query sees, on average."""
        return self.sides.regions.pairs() / self.tokens

    @cached_property
    def fewest_keys(self) -> int:
        """Keys that the last query of every document sees at least; 0 under windows and chunks."""
        if self.windowed or self.mask.chunk is not None:
            return 0
        return min(self.documents.kv_lengths or self.lengths)

    @cached_property
    def agreed(self) -> Mapping[str, object]:
        """What all ranks must have planned alike, as text: written once, since every layer compares it."""
        documents = self.documents
        record = {
            "lengths": documents.lengths,
            "kv_lengths": documents.kv_lengths,
            "mask": self.mask,
            "settings": documents.settings.model_dump(exclude={"timeout"}),
            "placement": documents.layout.digest if documents.placed else "",  # else settings and lengths say it
        }
        return {name: Shown(repr(value)) for name, value in record.items()}

    def explain(self) -> str:
        """The choices of the plan with their reasons, a line each."""
        documents = f"{len(self.lengths)} document" + "s" * (len(self.lengths) > 1)
        head = f"{documents}, {self.tokens} tokens over {self.sequence.world} ranks, {self.mask}"
        return "\n".join([head, *(f"  {r.choice}: {r.value} ({r.reason})" for r in self.reasons)])

    @cached_property
    def backward_schedule(self) -> Traffic:
        """The backward traffic in which keys and values travel, and their gradients return."""
        return self.route.returned(self.schedule)

    @cached_property
    def query_schedule(self) -> Traffic:
        """The backward traffic in which queries travel, and dq returns."""
        return self.route.backward("q")

    @cached_property
    def forward_pass(self) -> Pass:
        """What this rank does in forward."""
        return self._pass(self.schedule)

    @cached_property
    def backward_pass(self) -> Pass:
        """What this rank does in backward where keys travel."""
        whole = self.route.granularity.pieces == 1  # then a rank does the same as in forward, step by step
        return self._pass(self.backward_schedule, self.forward_pass.work if whole else None)

    @cached_property
    def query_pass(self) -> Pass:
        """The same where queries travel."""
        return self._pass(self.query_schedule)

    def positions_of(
        self, blocks: tuple[Block, ...], travels: str, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Positions within their documents of this rank's rows in the ring and of the view of some blocks, int64.

        They are kept on the device, so that a step sends nothing there.
        """
        home, cargo = self.sides[:2] if travels == "kv" else self.sides[1::-1]
        key = (blocks, travels, str(device))
        if key not in self._positions:
            columns = home.columns(self.documents.ring.rank), view_runs(cargo, blocks)
            own, view = (torch.from_numpy(row_positions(runs)).to(device) for runs in columns)
            self._positions[key] = own, view
        return self._positions[key]

    def backward_travels(self, request: Request) -> Reason:
        """Which side travels in backward for tensors of this kind: by the bytes that each would send. See `freight`."""
        found = self._travels.get(request)
        if found is None:
            found = self._travels[request] = self._cheaper_to_send(request)
        return found

    def kernel(self, request: Request) -> Choice:
        """The kernel for tensors of this kind, with the reason.

        Raises:
            UnsupportedError: no kernel, or not the one that the settings name, can do this exactly.
        """
        return select(request, self.documents.settings.kernel)

    def __repr__(self) -> str:
        shown = self.lengths if len(self.lengths) < 9 else (*self.lengths[:8], "...")
        return f"Plan(lengths={shown}, {self.mask}, rank {self.sequence.rank} of {self.sequence.world})"

    def _cheaper_to_send(self, request: Request) -> Reason:
        widths = request.heads, request.kv_heads, request.head_dim, request.value_dim
        settings, keys = self.documents.settings, sum(self.documents.kv_lengths or self.lengths)
        row = Row(*widths, request.dtype.itemsize).sent(settings.kv_dtype, settings.dkv_dtype)
        q, kv = row.both("q"), row.both("kv") * keys / self.tokens
        asked = settings.backward
        counted = f"queries {q} bytes a token, keys and values {kv:.0f}"
        if asked != "auto":
            return Reason("backward", TRAVELS[asked], f"asked for; {counted}")
        return Reason("backward", TRAVELS[row.cheaper(self.tokens, keys)], counted)

    def _pass(self, traffic: Traffic, known: dict[int, Work] | None = None) -> Pass:
        return pass_of(traffic, self.documents.ring, self.sides, self.fabric.node, known)

    def _reasons(self, why: str) -> tuple[Reason, ...]:
        settings, sizes = self.documents.settings, self.documents.sizes
        pieces, hops = self.route.granularity
        together = f"a rank's block in {pieces} pieces" if pieces > 1 else f"{hops} block(s)"
        reasons = [
            Reason("layout", settings.layout, f"{min(sizes)} to {max(sizes)} tokens a rank"),
            Reason("schedule", settings.schedule, why),
            Reason("block_tokens", str(settings.block_tokens), f"{together} at a time"),
            Reason("backward", settings.backward, "keys travel, or queries where their heads make fewer bytes"),
        ]
        if settings.head_degree > 1:
            ranks = f"{settings.head_degree} ranks share out the heads, {self.fabric.world} the sequence"
            reasons.insert(2, Reason("heads", str(settings.head_degree), ranks))
        return tuple(reasons)

    def _expect(self, x: Tensor, dim: int, tokens: int, what: str) -> None:
        if (problem := self._misfit(x, dim, tokens, what)) is not None:
            raise problem

    def _misfit(self, x: Tensor, dim: int, tokens: int, what: str) -> PlanError | None:
        if -x.dim() <= dim < x.dim() and x.shape[dim] == tokens:
            return None
        fix = f"Give a tensor with {tokens} entries along that dim, or make a plan for these lengths."
        values: dict[str, object] = {"shape": tuple(x.shape), "expected": tokens, "plan": self}
        return PlanError(f"a tensor does not hold {what} along dim {dim}", fix=fix, **values)


def plan_of(handle: int) -> Plan:
    """The plan interned under this number.

    Raises:
        PlanError: nobody holds the plan any more.
    """
    plan = find(handle)
    assert isinstance(plan, Plan)  # nothing else is interned
    return plan
