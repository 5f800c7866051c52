"""Process groups: which ranks share a sequence (the ring), which see other data, and the transports of both.

The world is data x ring: rings are consecutive ranks, so that a ring stays inside a node where it can, unless a device
mesh says otherwise. A mesh with a dimension "model" (tensor parallelism, say) holds one such world for each part of the
model. Global ranks are arranged here and nowhere else; everything above counts within its ring. What the ranks ask for
is compared before any group is made, since creating groups differently on two ranks hangs. Nothing here initialises
torch.distributed, and none is needed for a world of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from seqpar_ring.config import Settings
from seqpar_ring.errors import GroupError, SeqparError, TransportError
from seqpar_ring.places import Place, in_our_words, place_of, refuse_shared_gpus
from seqpar_ring.transport import FAR_LANES, LANES, DistributedTransport, LockstepWorld, Transport
from seqpar_ring.transport.agreement import Claim, claim, settle

RING = "ring"
"""Name of the mesh dimension whose ranks share a sequence."""

MODEL = "model"
"""Name of the mesh dimension whose ranks hold parts of one model: they see the same tokens, and average nothing."""


@dataclass(eq=False)
class Groups:
    """One rank's place in the world.

    Attributes:
        size: ranks that share a sequence (W).
        world_size: all ranks; with a model in parts, those that hold the same part.
        rank: this rank within its ring; follows the order of global ranks.
        data_rank: which ring of these this is.
        global_rank: this rank among all processes.
        ring: transport of the sequence group.
        everyone: transport of the `world_size` ranks, for what they agree on or sum.
        mesh: the device mesh ("data", "ring") or the one that was given; None without torch.distributed, or closed.
        device: the name of the ring's devices, where all its ranks are on one host with the same GPU; else "".
        mesh_is_own: whether `make` made the mesh.
    """

    size: int
    world_size: int
    rank: int
    data_rank: int
    global_rank: int
    ring: Transport
    everyone: Transport
    mesh: DeviceMesh | None = None
    device: str = ""
    mesh_is_own: bool = False

    @property
    def data_size(self) -> int:
        """Number of rings, each with data of its own."""
        return self.world_size // self.size

    def agree(self, what: str, record: Mapping[str, object], problem: Exception | None = None) -> None:
        """Go on together or raise together. Collective over these ranks.

        Args:
            what: what is about to be done, for messages.
            record: what the ranks of a ring must have in common; rings may differ.
            problem: what this rank found wrong.

        Raises:
            Exception: `problem` where there is one; a DisagreementError in a group whose records differ; and on every
                other rank of the world one that names the rank and its error.
        """
        try:
            self.ring.agree(what, record, problem)
        except Exception as found:
            problem = found
        if self.data_size > 1:  # other groups would go on, and wait in vain for this one in the loss
            self.everyone.agree(what, {}, problem)
        elif problem is not None:
            raise problem

    def close(self) -> None:
        """Destroy the process groups that `make` made. Collective; once more does nothing.

        Raises:
            DisagreementError: another rank does something else meanwhile.
        """
        made = {id(one): one for one in (*self.ring.groups(), *self.everyone.groups())}
        if not made:
            return
        with suppress(TransportError):  # the last message of each must have arrived; but the dead send none
            self.everyone.agree("close", {})
        if self.mesh_is_own and self.mesh is not None:
            made |= {id(one): one for one in map(self.mesh.get_group, self.mesh.mesh_dim_names or ())}
        for one in made.values():
            if one is not dist.group.WORLD:
                dist.destroy_process_group(one)
        if self.mesh_is_own:
            self.mesh = None  # it would hold its groups, and their threads


def make(
    size: int, mesh: DeviceMesh | None = None, timeout: float = 600.0, lanes: Sequence[str] = LANES,
    problem: SeqparError | None = None,
) -> Groups:  # fmt: skip
    """Make the groups of this world. Collective: every rank of the world calls it, with the same arguments.

    Args:
        size: ranks that share a sequence.
        mesh: rings are the lines along its dimension "ring" (or its only dimension); None: consecutive ranks. Ranks
            along a dimension "model" hold parts of one model.
        timeout: seconds after which a rank that waits for another gives up.
        lanes: the streams of messages that the ring needs, each a process group.
        problem: what the caller found wrong already, for all ranks to raise.

    Raises:
        SeqparError: `problem`.
        GroupError: torch.distributed is needed and not initialised; size does not divide the world; the mesh has no
            dimension "ring", or one of another size, or does not cover the world; ranks use the same GPU over NCCL.
        DisagreementError: the ranks ask for different sizes or timeouts.
        TransportError: the ranks cannot reach each other.
    """
    if not dist.is_initialized():
        if problem is not None:
            raise problem
        return _alone(size)
    rank = dist.get_rank()
    rings, worlds, places = _agreed_lines(size, mesh, timeout, lanes, problem)
    if dist.get_world_size() == 1:
        return _alone(size, mesh)
    device = _device(mesh)
    mesh_is_own = mesh is None
    if mesh is None:
        shape = (len(rings), size)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", RING))
    mine = next(ring for ring in rings if rank in ring)
    world = next(line for line in worlds if rank in line)
    groups = {lane: _my_group(rings, rank, timeout, lane) for lane in (lanes if size > 1 else ())}
    ring: Transport = DistributedTransport(groups, device, timeout) if size > 1 else LockstepWorld(1).transport(0)
    # Where all share one sequence its group does for both: another takes memory of the GPU (NCCL) or a thread (gloo).
    control = groups["control"] if size > 1 and rings == worlds else _my_group(worlds, rank, timeout)
    everyone = DistributedTransport({"control": control}, device, timeout)
    data_rank = [line for line in rings if line[0] in world].index(mine)
    here = {(places[r].host, places[r].device) for r in mine}  # whichever GPU of that name it is
    shared = here.pop()[1] if len(here) == 1 else ""
    place = (size, len(world), mine.index(rank), data_rank, rank)
    return Groups(*place, ring, everyone, mesh, shared, mesh_is_own)


def _my_group(
    lines: Sequence[tuple[int, ...]], rank: int, timeout: float, lane: str = "control"
) -> dist.ProcessGroup:
    """A process group for each of some lines of ranks, made by all ranks in one order; the one with this rank."""
    limit, backend = timedelta(seconds=timeout), str(dist.get_backend_config())
    made = [dist.new_group(list(line), timeout=limit, pg_options=options_of(lane, backend, limit)) for line in lines]
    mine: dist.ProcessGroup = made[next(i for i, line in enumerate(lines) if rank in line)]
    return mine


def options_of(lane: str, backend: str, timeout: timedelta | None) -> Any:
    """How the group of a lane is made over NCCL: its stream has a high priority; None for other backends and "control".

    A transfer waits for the computation before it, and when that is done the next one stands in the queue already: of
    equal priority, its blocks would fill the device first, and the transfer would begin when they end.

    Args:
        lane: what the group is for.
        backend: of the new group, as torch writes it: "nccl", "cpu:gloo,cuda:nccl".
        timeout: of the new group; None: torch's own.
    """
    if lane == "control" or "nccl" not in backend or not dist.is_nccl_available():
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    if timeout is not None:
        options._timeout = timeout  # else torch warns that the two differ
    return options


def lanes_of(settings: Settings) -> tuple[str, ...]:
    """The streams of messages that these settings need: those between nodes only for what may be a double ring."""
    return LANES + FAR_LANES if settings.schedule in ("double_ring", "auto") else LANES


def lockstep(world: LockstepWorld, rank: int, size: int) -> Groups:
    """The same for one rank of a world of threads: rings of consecutive ranks.

    Raises:
        GroupError: size does not divide the world.
    """
    _check_size(size, world.world)
    data_rank, ring_rank = divmod(rank, size)
    ring = world.subset(range(data_rank * size, (data_rank + 1) * size))
    return Groups(size, world.world, ring_rank, data_rank, rank, ring.transport(ring_rank), world.transport(rank))


def _alone(size: int, mesh: DeviceMesh | None = None) -> Groups:
    if size > 1 and not dist.is_initialized():
        raise GroupError(
            "a sequence group of several ranks needs torch.distributed, which is not initialised",
            fix='Start with torchrun and call torch.distributed.init_process_group("gloo" or "nccl") first.',
            size=size,
        )
    _check_size(size, 1)
    world = LockstepWorld(1)
    return Groups(1, 1, 0, 0, 0, world.subset([0]).transport(0), world.transport(0), mesh)


def _check_size(size: int, world: int) -> None:
    if isinstance(size, int) and size >= 1 and world % size == 0:
        return
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    raise GroupError(
        "the size of a sequence group must divide the number of ranks",
        fix=f"Give a size of {' or '.join(map(str, divisors))}, or start a multiple of size ranks.",
        size=size,
        world=world,
    )


Lines = list[tuple[int, ...]]


def _agreed_lines(
    size: int, mesh: DeviceMesh | None, timeout: float, lanes: Sequence[str], problem: SeqparError | None = None
) -> tuple[Lines, Lines, list[Place]]:
    """All rings, and all worlds of them, in order of their first rank, after every rank has said what it wants; and
    where each rank runs.

    What is wrong on one rank is raised on all.
    """
    total, rank = dist.get_world_size(), dist.get_rank()
    ring: tuple[int, ...] = ()
    world = tuple(range(total))
    failed: SeqparError | None = None
    try:
        if problem is not None:
            raise problem
        _check_size(size, total)
        start = rank // size * size
        world = world if mesh is None else _world_of(mesh)
        ring = tuple(range(start, start + size)) if mesh is None else _ring_of(mesh, size)
    except SeqparError as error:
        failed = error
    record = {"size": size, "timeout": timeout, "a mesh is given": mesh is not None, "lanes": tuple(lanes)}
    said: list[tuple[Claim, tuple[int, ...], tuple[int, ...], Place] | None] = [None] * total
    with in_our_words():
        dist.all_gather_object(said, (claim("sequence groups", record, failed), ring, world, place_of(_device(mesh))))
    heard = [item for item in said if item is not None]
    settle([one for one, *_ in heard], rank, failed)
    rings, worlds = sorted({line for _, line, *_ in heard}), sorted({line for _, _, line, _ in heard})
    for lines in (rings, worlds):
        if sorted(r for line in lines for r in line) != list(range(total)):
            raise GroupError(
                "the rings of the mesh do not cover every rank of the world once",
                fix='Give a mesh over all ranks: init_device_mesh(device, (data, size), mesh_dim_names=("data", '
                '"ring")).',
                rings=lines,
                world=total,
            )
    places = [place for *_, place in heard]
    refuse_shared_gpus(places)
    return rings, worlds, places


def _world_of(mesh: DeviceMesh) -> tuple[int, ...]:
    """The ranks that hold the same part of the model as this one, as global ranks in ascending order."""
    if mesh.get_coordinate() is None:
        raise GroupError(
            "this rank is not in the mesh",
            fix="Give a mesh over all ranks of the world.",
            rank=dist.get_rank(),
            mesh=mesh.mesh.tolist(),
        )
    names = mesh.mesh_dim_names or ()
    if MODEL not in names:
        return tuple(range(dist.get_world_size()))
    here = mesh.mesh.select(names.index(MODEL), mesh.get_local_rank(MODEL))
    return tuple(sorted(int(r) for r in here.flatten()))


def _ring_of(mesh: DeviceMesh, size: int) -> tuple[int, ...]:
    """This rank's line along the mesh's ring dimension, as global ranks in ascending order."""
    names = mesh.mesh_dim_names or ()
    if RING not in names and mesh.ndim != 1:
        raise GroupError(
            'the mesh has no dimension named "ring"',
            fix='Name one: mesh_dim_names=("data", "ring"); or pass the one-dimensional mesh of the sequence group.',
            mesh_dim_names=names,
            shape=tuple(mesh.mesh.shape),
        )
    group = mesh.get_group(RING) if RING in names else mesh.get_group()
    ranks: Sequence[int] = dist.get_process_group_ranks(group)
    if len(ranks) != size:
        raise GroupError(
            "the mesh's ring is not of the size asked for",
            fix=f"Give size={len(ranks)}, or a mesh whose ring has {size} ranks.",
            size=size,
            ring=list(ranks),
            mesh_dim_names=names,
            shape=tuple(mesh.mesh.shape),
        )
    return tuple(sorted(ranks))


def _device(mesh: DeviceMesh | None) -> torch.device:
    """Where the groups' tensors live: the mesh's device, else this process's GPU if the default group speaks NCCL."""
    if mesh is not None:
        on_cuda = mesh.device_type == "cuda"
    else:
        on_cuda = torch.cuda.is_available() and "nccl" in str(dist.get_backend_config())
    return own_device(on_cuda)


def own_device(on_cuda: bool) -> torch.device:
    """This process's GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
