"""Lanes of their own for rings over process groups that somebody else made: Megatron's, or a caller's of `compat`.

Such a ring has one group, in which gradients of keys queue behind keys: over NCCL a group is a stream. More groups over
the same ranks cannot be made when the ring is first used, without the rest of the world: what torch makes among members
only (`use_local_synchronization`) is named by the number of groups that each of them has, and where these numbers
differ the members wait for each other in vain. So it is a call of its own, which the whole world makes once, and
without which everything runs as before. Nothing here decides what travels in which lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from seqpar_ring.compat.rings import timeout_of, with_lanes
from seqpar_ring.errors import GroupError, SeqparError, did_you_mean
from seqpar_ring.groups import options_of
from seqpar_ring.transport import FAR_LANES, LANES
from seqpar_ring.transport.agreement import Claim, claim, settle

OWN = tuple(lane for lane in (*LANES, *FAR_LANES) if lane != "control")
"""Lanes that may be had; collectives stay in the caller's group, whose order of ranks counts."""

Ranks = tuple[int, ...]


class Kind(NamedTuple):
    """How a process group was made."""

    backend: str | None
    timeout: timedelta | None


def own_lanes(*groups: dist.ProcessGroup, lanes: Sequence[str] = ("kv", "dkv")) -> None:
    """Give the rings over these process groups a group for each lane, so that none waits for another.

    Collective over the world: every rank calls it, once the groups are made and before they are used, with those that
    it belongs to (with none, if it belongs to none). The new groups end with `dist.destroy_process_group()`.

    Args:
        *groups: of the ranks that share a sequence: Megatron's context-parallel group, those of micro-batches. Several
            of the same ranks in one order on all of them.
        lanes: "kv" and "dkv"; for a double ring also "kv_far" and "dkv_far".

    Raises:
        GroupError: torch.distributed is not initialised, what is no process group, an unknown lane, a group that not
            all of its ranks have given.
        DisagreementError: the ranks ask for different lanes.
        TransportError: the ranks could not reach each other.
    """
    if not dist.is_initialized():
        fix = "Call it after init_process_group, on every rank."
        raise GroupError("lanes need torch.distributed, which is not initialised", fix=fix, groups=len(groups))
    failed, mine = None, dict[Ranks, list[dist.ProcessGroup]]()
    try:
        mine = _by_ranks(groups, lanes)
    except SeqparError as error:
        failed = error
    heard = _heard(mine, lanes, failed)
    for ranks in sorted({ranks for kinds in heard for ranks in kinds}):
        backend, limit = heard[ranks[0]][ranks]
        speaks = backend or str(dist.get_backend_config())
        made = {
            lane: dist.new_group(
                list(ranks), timeout=limit, backend=backend, pg_options=options_of(lane, speaks, limit)
            )
            for lane in lanes
        }
        for group in mine.get(ranks, ()):
            with_lanes(group, made)


def _by_ranks(groups: Sequence[dist.ProcessGroup], lanes: Sequence[str]) -> dict[Ranks, list[dist.ProcessGroup]]:
    """The groups of several ranks by their global ranks, in the group's order."""
    for lane in lanes:
        if lane not in OWN:
            raise GroupError("unknown lane", fix=did_you_mean(lane, OWN), lane=lane)
    found: dict[Ranks, list[dist.ProcessGroup]] = {}
    for group in groups:
        if not isinstance(group, dist.ProcessGroup):
            raise GroupError(
                "a ring's group is not a process group that this rank belongs to",
                fix="Give the torch.distributed groups of this rank.",
                group=group,
            )
        ranks = tuple(dist.get_process_group_ranks(group))
        if len(ranks) > 1:
            found.setdefault(ranks, []).append(group)
    return found


def _heard(
    mine: dict[Ranks, list[dist.ProcessGroup]], lanes: Sequence[str], failed: SeqparError | None
) -> list[dict[Ranks, Kind]]:
    """What each rank has given, after all have agreed; what is wrong on one rank is raised on all."""
    rank, total = dist.get_rank(), dist.get_world_size()
    said: list[tuple[Claim, dict[Ranks, Kind]] | None] = [None] * total
    kinds = {ranks: _kind(given[0]) for ranks, given in mine.items()}
    dist.all_gather_object(said, (claim("lanes of rings", {"lanes": tuple(lanes)}, failed), kinds))
    every = [one for one in said if one is not None]
    settle([one for one, _ in every], rank, failed)
    heard = [found for _, found in every]
    for ranks in sorted({ranks for found in heard for ranks in found}):
        lacking = [r for r in ranks if ranks not in heard[r]]
        if lacking:
            raise GroupError(
                "not all ranks of a group have asked for its lanes",
                fix="Call own_lanes on every rank of the world, with the groups that it belongs to.",
                group=ranks,
                missing=lacking,
            )
    return heard


def _kind(group: dist.ProcessGroup) -> Kind:
    backend = dist.get_backend(group)
    on_cuda = torch.cuda.is_available() and "nccl" in str(dist.get_backend_config(group))
    limit = timeout_of(group, torch.device("cuda" if on_cuda else "cpu"))
    # A group of several backends has no name of its own; the new one is then made as the world's.
    return Kind(None if backend == "undefined" else backend, None if limit == timedelta.max else limit)
