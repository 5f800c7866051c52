"""Places: where a rank runs, on which host and with which GPU, and that no two run on the same.

Over NCCL each rank needs a GPU of its own, and a process that has not set its device uses the first one, as all others
do. Said here in our own words, before or after NCCL finds it out; which ranks form groups is no matter here.
"""

from __future__ import annotations

import platform
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist

from seqpar_ring.errors import GroupError


class Place(NamedTuple):
    """Where a rank runs.

    Attributes:
        host: its host.
        device: the name of its GPU; "" without one.
        gpu: tells GPUs of one name apart where a rank must have one of its own, as over NCCL; "" where it need not, or
            nobody knows.
    """

    host: str
    device: str
    gpu: str = ""


def place_of(device: torch.device) -> Place:
    """Where this process runs, with this device."""
    host = f"{platform.node()} {uuid.getnode()}"  # hosts of a cluster may share a name
    if device.type != "cuda":
        return Place(host, "")
    one_each = "nccl" in str(dist.get_backend_config())
    gpu = str(getattr(torch.cuda.get_device_properties(device), "uuid", "")) if one_each else ""
    return Place(host, torch.cuda.get_device_name(device), gpu)


def refuse_shared_gpus(places: Sequence[Place]) -> None:
    """All ranks see the same places, so all raise or none does.

    Raises:
        GroupError: several ranks of a host use the same GPU.
    """
    by_gpu: dict[tuple[str, str], list[int]] = {}
    for rank, place in enumerate(places):
        by_gpu.setdefault((place.host, place.gpu), []).append(rank)
    for (_, gpu), ranks in by_gpu.items():
        if gpu and len(ranks) > 1:
            raise _shared_gpu(ranks=ranks, gpu=places[ranks[0]].device)


@contextmanager
def in_our_words() -> Iterator[None]:
    """Around what ranks do together first: over NCCL alone it finds shared GPUs out itself, before places are known.

    Raises:
        GroupError: it did.
    """
    try:
        yield
    except RuntimeError as error:
        _, found, which = str(error).partition("Duplicate GPU detected : ")
        if not found:
            raise
        raise _shared_gpu(nccl_says=which.partition("\n")[0]) from error


def _shared_gpu(**values: object) -> GroupError:
    return GroupError(
        "several ranks of a host use the same GPU",
        fix='Call torch.cuda.set_device(int(os.environ["LOCAL_RANK"])) in each process before anything else.',
        **values,
    )
