"""What runs in a worker process of `RankPool`: join the world, then run one job after the other.

Kept apart from the pool because a worker imports this module by name. Groups are cached between jobs, as
making them costs more than most tests; after an error they are forgotten, since a message may still be on its way.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from seqpar_ring import groups as process_groups
from seqpar_ring.config import Settings
from seqpar_ring.errors import TransportError
from seqpar_ring.groups import Groups
from seqpar_ring.transport import LANES

MEET = 60.0
"""Seconds that workers wait for each other when they start."""


@dataclass(frozen=True)
class Job:
    """A function to run on every rank; with settings it gets a `SequenceParallel`, without them the bare groups."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    size: int
    timeout: float
    settings: Settings | None


@dataclass(frozen=True)
class Reply:
    """What became of a job on one rank.

    Attributes:
        ok: whether it returned.
        value: the pickled result.
        error: what it raised.
        traceback: of that error, as text.
        seconds: from its start to its end.
        how: "answered"; or, made up by the pool, "died" or "late".
    """

    ok: bool
    value: bytes = b""
    error: BaseException | None = None
    traceback: str = ""
    seconds: float = 0.0
    how: str = "answered"

    @staticmethod
    def made_up(what: str, seconds: float, ranks: Sequence[int], how: str) -> Reply:
        """For workers that cannot reply themselves."""
        error = TransportError(
            f"rank {', '.join(map(str, ranks))} {what}, after {seconds:.1f} s",
            fix="See what that process printed; raise the pool's timeout if it is only slow.",
        )
        return Reply(False, error=error, seconds=seconds, how=how)


class WorkerTraceback(Exception):  # noqa: N818 - not an error but the place of one
    """The traceback of another process, shown as the cause of its error."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def work(
    rank: int, world: int, port: int, connection: Connection, deterministic: bool, environment: dict[str, str]
) -> None:
    """The life of a worker: ends when the parent closes the connection, or is gone."""
    os.environ.clear()  # a fork's is that of the server when it started
    os.environ.update(environment)
    torch.set_num_threads(1)  # many ranks share few cores
    torch.use_deterministic_algorithms(deterministic)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=MEET))  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=MEET))
    made: dict[tuple[int, float, tuple[str, ...]], Groups] = {}
    connection.send_bytes(pickle.dumps(Reply(True)))
    with contextlib.suppress(EOFError, ConnectionResetError, BrokenPipeError):
        while True:
            reply = _reply_to(connection.recv_bytes(), made)
            if not reply.ok:
                made.clear()
            connection.send_bytes(pickle.dumps(reply))
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # taking down an interpreter with torch in it takes seconds and nothing here needs it


def _reply_to(message: bytes, made: dict[tuple[int, float, tuple[str, ...]], Groups]) -> Reply:
    started = time.monotonic()
    try:
        path, job = pickle.loads(message)
        sys.path.extend(folder for folder in path if folder not in sys.path)  # where the parent has found modules since
        return Reply(True, pickle.dumps(_result(pickle.loads(job), made)))
    except BaseException as error:  # including those a test framework fails with
        return Reply(
            False, error=_picklable(error), traceback=traceback.format_exc(), seconds=time.monotonic() - started
        )


def _result(job: Job, made: dict[tuple[int, float, tuple[str, ...]], Groups]) -> Any:
    lanes = LANES if job.settings is None else process_groups.lanes_of(job.settings)
    key = job.size, job.timeout, lanes
    if key not in made:
        made[key] = process_groups.make(job.size, timeout=job.timeout, lanes=lanes)
    if job.settings is None:
        return job.fn(made[key], *job.args)
    from seqpar_ring.parallel import SequenceParallel

    return job.fn(SequenceParallel.over(made[key], job.settings), *job.args)


def _picklable(error: BaseException) -> BaseException:
    """The error, or a plain one with its text where it cannot travel."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # any class may refuse in its own way
        return RuntimeError(f"{type(error).__name__}: {error}")
