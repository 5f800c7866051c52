"""Rings: plans over a process group that somebody else made, kept for functions that have no object of their own.

ring-flash-attn's functions get a process group with every call and nothing else that lasts, while plans and the
transport are worth keeping. A `Ring` holds both; `ring_of` finds that of a group. It decides nothing about attention.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from seqpar_ring import layout as layouts
from seqpar_ring.attention import ring_attention
from seqpar_ring.compat.arguments import Options, Tensors, unpack
from seqpar_ring.config import Settings
from seqpar_ring.errors import GroupError, PlanError, SeqparError
from seqpar_ring.groups import own_device
from seqpar_ring.plan import Documents
from seqpar_ring.transport import LANES, DistributedTransport, LockstepWorld, Transport

Result = Tensor | tuple[Tensor, Tensor, None]
"""out, or (out, softmax_lse, None) where the caller asked for attention probabilities, which are never made."""

PLANS_KEPT = 64
"""Sets of document lengths that a ring remembers."""


NO_LANES: Mapping[str, dist.ProcessGroup] = {}
"""Where all messages use the one group."""


class Placement(Protocol):
    """Who holds which tokens where somebody else has placed them. Equal ones hash alike, so that plans are kept."""

    def __hash__(self) -> int: ...

    def __call__(self, lengths: Sequence[int], world: int) -> layouts.Layout:
        """The layout of documents of these lengths over so many ranks."""


class Ring:
    """The ranks that share a sequence, and the plans that were made for them.

    Every function of this package takes one in place of a process group.

    Args:
        transport: over those ranks.

    Attributes:
        documents: by a layout's name and lengths, the documents under default settings.
        placed: by settings, lengths and a placement, documents whose tokens are where others have put them.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.documents: Callable[[str, tuple[int, ...]], Documents] = lru_cache(maxsize=PLANS_KEPT)(
            lambda layout, lengths: _documents(layout, lengths, transport)
        )
        self.placed: Callable[[Settings, tuple[int, ...], Placement], Documents] = lru_cache(maxsize=PLANS_KEPT)(
            lambda settings, lengths, placement: Documents(
                lengths, settings, transport, placed=placement(lengths, transport.world)
            )
        )

    def equally(self, layout: str, local: Sequence[int]) -> Documents:
        """The documents of which every rank holds so many tokens.

        Args:
            layout: "parts" (each document in W contiguous parts), "zigzag" or "striped".
            local: tokens of each document on each rank.

        Raises:
            PlanError: no tokens, or an odd number of them under zigzag, where a rank has two equal chunks.
        """
        if min(local) < 1:
            raise PlanError("a rank holds no tokens", fix="Give every rank the same number, at least 1.", tokens=local)
        odd = [n for n in local if n % 2]
        if layout == "zigzag" and odd:
            raise PlanError(
                "zigzag gives a rank two equal chunks of each document, so an even number of tokens",
                fix=f"Pad documents to a multiple of {2 * self.transport.world}, or use SequenceParallel.",
                local_tokens=odd[0],
            )
        return self.documents(layout, tuple(self.transport.world * n for n in local))

    def attend(
        self, tensors: Tensors, options: Options, read: Callable[[int], Documents], varlen: bool = False
    ) -> Result:
        """Attention of this rank's queries over every rank's keys. Collective.

        Args:
            tensors: (q, k, v), (q, kv) or (qkv,), with a batch dimension or without.
            options: the rest.
            read: the documents, from the number of tokens that this rank holds. May not communicate.
            varlen: whether tokens come without a batch dimension.

        Raises:
            SeqparError: as `ring_attention`, and what `read` and the options raise; on every rank.
        """
        try:
            q, k, v = unpack(tensors, varlen)
            documents = read(q.shape[1])
            options.check(q.device.type, len(documents.lengths) if varlen else None)
            plan = documents.plan(options.mask(max(documents.lengths)))
        except Exception as problem:
            # The other ranks are told here what they meet in ring_attention, where all agree before anything travels;
            # on a GPU only of what is new to them, so what is no fault of the arguments would be told to nobody.
            if isinstance(problem, SeqparError) or not getattr(tensors[0], "is_cuda", False):
                self.transport.agree("ring_attention", {}, problem)
            raise
        scale, slopes = options.softmax_scale, options.alibi_slopes
        out, lse = ring_attention(q, k, v, plan, scale=scale, alibi_slopes=slopes, return_lse=True)
        if varlen:
            out, lse = out.squeeze(0), lse.squeeze(0)
        return (out, lse, None) if options.return_attn_probs else out


def _documents(layout: str, lengths: tuple[int, ...], transport: Transport) -> Documents:
    """The documents of these global lengths. `parts`: each in W equal contiguous parts; else a layout's name."""
    settings = Settings.parse({"size": transport.world, "layout": "contiguous" if layout == "parts" else layout})
    placed = parts(lengths, transport.world) if layout == "parts" else None
    return Documents(lengths, settings, transport, placed=placed)


def parts(lengths: Sequence[int], world: int) -> layouts.Layout:
    """Every document in `world` equal contiguous parts, rank r holding part r of each; lengths are multiples of it."""
    count = np.tile(np.array(lengths, dtype=np.int64) // world, world)
    rank, doc = (x.ravel() for x in np.indices((world, len(lengths)), dtype=np.int64))
    return layouts.place(world, rank, doc, rank * count, count)


Group = dist.ProcessGroup | Ring | None
"""What the functions take as `group`; None: the default group."""

_RINGS: weakref.WeakKeyDictionary[dist.ProcessGroup, Ring] = weakref.WeakKeyDictionary()
"""The one state of this module: a function that gets nothing but a group has nowhere else to keep what belongs to it.
An entry goes with its group, because a ring does not hold that (see `_UsersGroup`), and holds few plans."""


def ring_of(group: Group) -> Ring:
    """The ring over a process group; None: the default group, or one rank without torch.distributed.

    Collective over the group when it is first used.

    Raises:
        GroupError: no process group, or one that this rank does not belong to.
        TransportError: the ranks could not reach each other.
    """
    if isinstance(group, Ring):
        return group
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return Ring(LockstepWorld(1).transport(0))
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise GroupError(
            "group is not a process group that this rank belongs to",
            fix="Give the torch.distributed group of the ranks that share the sequence, on those ranks only.",
            group=group,
        )
    if group not in _RINGS:
        alone = dist.get_world_size(group) == 1
        _RINGS[group] = Ring(LockstepWorld(1).transport(0) if alone else _UsersGroup(group))
    return _RINGS[group]


def with_lanes(group: dist.ProcessGroup, lanes: Mapping[str, dist.ProcessGroup]) -> None:
    """From now on the ring over a process group has these lanes beside the group; see `lanes`. Collective over it."""
    _RINGS[group] = Ring(_UsersGroup(group, lanes))


class _UsersGroup(DistributedTransport):
    """A transport over one group for all lanes, that of the caller, which it does not keep alive.

    Messages of a pair match in posting order, and both sides post in the same order, so one group will do; lanes of
    their own (`lanes.own_lanes`) let a fast transfer pass a slow one.
    """

    anew = "Make a new process group (torch.distributed.new_group) on all ranks before the step is tried again."

    def __init__(self, group: dist.ProcessGroup, own: Mapping[str, dist.ProcessGroup] = NO_LANES) -> None:
        on_cuda = torch.cuda.is_available() and "nccl" in str(dist.get_backend_config(group))
        device = own_device(on_cuda)
        lanes = {**dict.fromkeys(LANES, group), **own}
        super().__init__(lanes, device, timeout_of(group, device).total_seconds())


def timeout_of(group: dist.ProcessGroup, device: torch.device) -> timedelta:
    """After how long the group gives up, for messages; torch shows it in no public place."""
    options: Any = group._get_backend(device).options
    limit: timedelta = getattr(options, "_timeout", timedelta.max)
    return limit
