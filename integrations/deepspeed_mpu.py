"""What DeepSpeed gets as `mpu`: the sequence group is hidden from it, and a model in parts is left as it is.

To DeepSpeed every rank that holds the same part of the model is a data rank which averages gradients; only the batch
arithmetic counts sequence groups. An `mpu` of the user's own (tensor parallelism) says which ranks hold which part:
sequence groups are then laid inside its data-parallel groups, and its model-parallel groups go through untouched. It
splits no model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from seqpar_ring.errors import GroupError, UnsupportedError
from seqpar_ring.groups import MODEL, RING
from seqpar_ring.parallel import SequenceParallel

NEEDED = tuple(f"get_{kind}_parallel_{what}" for kind in ("model", "data") for what in ("group", "world_size", "rank"))
"""What a user's own mpu must answer; DeepSpeed asks the same of it."""

ELSEWHERE = {
    "get_sequence_parallel_world_size": "sequence parallelism of its own, with which gradients wrong in some stages",
    "get_pipe_parallel_world_size": "pipeline parallelism",
    "get_pipeline_model_parallel_world_size": "pipeline parallelism",
    "get_context_parallel_world_size": "context parallelism of its own, whose ranks it does not average",
    "get_expert_model_parallel_world_size": "experts in parts",
}
"""What an mpu may declare that cannot be combined with the ring, by the method that says so."""


class WholeModel:
    """The mpu of a model that every rank holds whole. Making one is collective over the world."""

    def __init__(self) -> None:
        alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        self._alone: dist.ProcessGroup = alone[dist.get_rank()]

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """All ranks."""
        return dist.group.WORLD

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """This rank alone."""
        return self._alone

    def get_model_parallel_world_size(self) -> int:
        """One."""
        return 1

    def get_model_parallel_rank(self) -> int:
        """Zero."""
        return 0


class HiddenSequenceGroup:
    """No sequence parallelism, but the data ranks' arithmetic.

    Gradients and ZeRO partitions go over all ranks with the same part of the model; the number and index of data ranks,
    by which batch sizes are checked and samples dealt out, are those of the sequence groups, so that the ranks of one
    get the same samples.
    """

    def __init__(self, sp: SequenceParallel, parts: Any) -> None:
        self._sp, self._parts = sp, parts

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """The ranks with this part of the model: gradients are averaged over them."""
        group: dist.ProcessGroup | None = self._parts.get_data_parallel_group()
        return group

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of `get_data_parallel_group`."""
        return list(dist.get_process_group_ranks(self.get_data_parallel_group()))

    def get_data_parallel_world_size(self) -> int:
        """Sequence groups, each of which holds a batch of its own."""
        return self._sp.data_size

    def get_data_parallel_rank(self) -> int:
        """Which sequence group this is."""
        return self._sp.data_rank

    def get_sequence_data_parallel_group(self) -> dist.ProcessGroup | None:
        """The same: ZeRO partitions over them."""
        return self.get_data_parallel_group()

    def get_sequence_data_parallel_world_size(self) -> int:
        """Their number."""
        return dist.get_world_size(self.get_data_parallel_group())

    def get_sequence_data_parallel_rank(self) -> int:
        """This rank among them."""
        return dist.get_rank(self.get_data_parallel_group())

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that hold the parts of one model."""
        group: dist.ProcessGroup = self._parts.get_model_parallel_group()
        return group

    def get_model_parallel_world_size(self) -> int:
        """Their number."""
        return int(self._parts.get_model_parallel_world_size())

    def get_model_parallel_rank(self) -> int:
        """Which part this rank holds."""
        return int(self._parts.get_model_parallel_rank())

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


def check(mpu: Any) -> None:
    """Refuse an mpu that sequence groups cannot be laid into.

    Raises:
        UnsupportedError: it lacks methods, or declares what cannot be combined.
    """
    missing = [name for name in NEEDED if not callable(getattr(mpu, name, None))]
    if missing:
        raise UnsupportedError(
            "an mpu does not say which ranks hold which part of the model",
            fix="Give one with these methods, or leave mpu out where every rank holds the whole model.",
            missing=missing,
            mpu=mpu,
        )
    for name, what in ELSEWHERE.items():
        if callable(getattr(mpu, name, None)) and getattr(mpu, name)() > 1:
            raise UnsupportedError(
                f"an mpu declares {what}",
                fix='Let it say model and data parallelism only; the "seqpar_ring" block shares out the sequence.',
                **{name: getattr(mpu, name)()},
            )


def mesh_of(mpu: Any, size: int, device: str) -> DeviceMesh:
    """The ranks as ("model", "data", "ring"): rings are consecutive ranks of a data-parallel group. Collective.

    Raises:
        GroupError: `size` does not divide the data-parallel groups; these do not cover the world; the ranks of a
            model-parallel group have different places in theirs, so that parts of a model would see different tokens;
            or they are not one of each, so that some ranks would be averaged with no others; raised on every rank.
    """
    mine = sorted(dist.get_process_group_ranks(mpu.get_data_parallel_group()))
    models = sorted(dist.get_process_group_ranks(mpu.get_model_parallel_group()))
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, (mine, mine.index(dist.get_rank()), models))
    parts = [list(line) for line in sorted({tuple(line) for line, *_ in said})]
    everyone = sorted(rank for part in parts for rank in part)
    even = len({len(part) for part in parts}) == 1 and everyone == list(range(len(said)))
    # Of each part one rank, all at one place of their part's data ranks: ranks of one part have different places.
    whole = all(len(model) == len(parts) and len({said[r][1] for r in model}) == 1 for *_, model in said)
    if not even or not whole:
        raise GroupError(
            "the groups of an mpu are no grid of parts of the model and data ranks",
            fix="Its data-parallel groups must cover the world, each rank once, and a model-parallel group must have "
            "one rank of each, all at the same place in theirs.",
            data_parallel_groups=parts,
            model_parallel_group=models,
        )
    if len(mine) % size:
        raise GroupError(
            "the size of a sequence group must divide the data-parallel groups of the mpu",
            fix=f"Give a size that divides {len(mine)}.",
            size=size,
            data_parallel_group=mine,
        )
    grid = torch.tensor(parts).reshape(len(parts), -1, size)
    return DeviceMesh(device, grid, mesh_dim_names=(MODEL, "data", RING))
