"""Ranks as processes over gloo, kept for many runs: the real transport at the price of one start.

A process that imports torch takes seconds to start, so a test session keeps one pool per world size, and workers are
forks of a server that can import once for all (multiprocessing's forkserver). Workers end with their parent, each run
has a time limit, and after an error that may have left messages on the way the workers start anew, so one failed run
cannot spoil the next. What runs must be importable by the workers. It does not serve training: use torchrun for that.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from seqpar_ring.config import Settings
from seqpar_ring.errors import ConfigError, SeqparError, TransportError
from seqpar_ring.testing.threads import note
from seqpar_ring.testing.worker import Job, Reply, WorkerTraceback, work

if TYPE_CHECKING:
    from seqpar_ring.parallel import SequenceParallel

T = TypeVar("T")

START = 120.0
"""Seconds for all workers to start and find each other."""

GRACE = 3.0
"""Seconds the other ranks get to end by themselves once one has failed."""


if sys.platform == "win32":
    CONTEXT = multiprocessing.get_context("spawn")
else:
    CONTEXT = multiprocessing.get_context("forkserver")
"""The server is a fresh process: a fork of it has nothing of this one but the environment that it is given."""


class _Worker(NamedTuple):
    process: BaseProcess
    connection: Connection


def run_processes(
    fn: Callable[[SequenceParallel], T], world: int, size: int | None = None, timeout: float = 120.0, **settings: Any
) -> list[T]:
    """Call `fn(sp)` on every rank, each a process of its own over gloo, and return the results in rank order.

    Args, results and errors as `RankPool.run`; `timeout` limits the whole run, in seconds.
    """
    with RankPool(world, timeout) as pool:
        return pool.run(fn, size=size, **settings)


class RankPool:
    """Processes that wait for functions to run as ranks of one world. Started at the first run.

    Workers start in tenths of a second where `multiprocessing.set_forkserver_preload(["seqpar_ring.testing.worker"])`,
    with all else that is slow to import and asks for no GPU, was called before the first pool of this process.

    Args:
        world: number of ranks.
        timeout: seconds that one run may take; also how long a rank waits for another, unless a run says otherwise.
    """

    def __init__(self, world: int, timeout: float = 120.0) -> None:
        self.world, self.timeout = world, float(timeout)
        self._workers: list[_Worker] = []
        self._store: object = None

    def run(self, fn: Callable[..., T], *args: Any, size: int | None = None, **settings: Any) -> list[T]:
        """Call `fn(sp, *args)` on every rank and return the results in rank order.

        Args:
            fn: a function of an importable module; gets this rank's `SequenceParallel`.
            *args: picklable, the same for all ranks; tensors are copied.
            size: ranks that share a sequence; None: all.
            **settings: as in `Settings`; `timeout` is how long a rank waits for another.

        Raises:
            ConfigError: wrong settings, or `fn` or its arguments do not pickle.
            Exception: what a rank raised, with that rank's traceback as its cause.
            TransportError: a worker died or did not answer in time.
        """
        whole = {"size": self.world if size is None else size, "timeout": self.timeout, **settings}
        chosen = Settings.parse(whole)
        return self._run(Job(fn, args, chosen.size, chosen.timeout, chosen))

    def run_groups(
        self, fn: Callable[..., T], *args: Any, size: int | None = None, timeout: float | None = None
    ) -> list[T]:
        """The same with the bare groups: call `fn(groups, *args)`. For tests of what lies below `SequenceParallel`."""
        return self._run(Job(fn, args, self.world if size is None else size, timeout or self.timeout, None))

    def pids(self) -> list[int]:
        """Process ids of the workers, in rank order; empty before the first run and after `close`."""
        return [worker.process.pid for worker in self._workers if worker.process.pid is not None]

    def close(self) -> None:
        """End the workers; the next run would start them again."""
        self._end(at_once=False)

    def _end(self, at_once: bool) -> None:
        """End the workers by their process objects, the idle ones by themselves, and the store they met at."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.connection.close()  # an idle worker ends by itself
        deadline = time.monotonic() + (0.0 if at_once else GRACE)
        for end in (BaseProcess.terminate, BaseProcess.kill):
            for worker in workers:
                worker.process.join(max(0.0, deadline - time.monotonic()))
                if worker.process.is_alive():
                    end(worker.process)
                    deadline = time.monotonic() + GRACE
        for worker in workers:
            worker.process.join()
            worker.process.close()
        self._store = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, job: Job) -> list[Any]:
        try:
            message = pickle.dumps((list(sys.path), pickle.dumps(job)))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ConfigError(
                "a function or argument for other processes does not pickle",
                fix="Define the function at the top level of a module, and give it what it needs as arguments.",
                function=getattr(job.fn, "__qualname__", job.fn),
            ) from error
        if not all(worker.process.is_alive() for worker in self._workers):
            self._end(at_once=True)
        if not self._workers:
            self._start()
        for worker in self._workers:
            worker.connection.send_bytes(message)
        try:
            replies = self._collect(self.timeout)
        except BaseException:  # an interrupt: the workers are in the middle of something
            self._end(at_once=True)
            raise
        if not all(reply.ok for reply in replies):
            if not _raised_together(replies):
                self._end(at_once=True)
            _raise_first(replies, self.world)
        return [pickle.loads(reply.value) for reply in replies]

    def _start(self) -> None:
        # The parent keeps the store, at a port the system picks: none is chosen first and taken by another later.
        self._store = store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        deterministic = torch.are_deterministic_algorithms_enabled()
        for rank in range(self.world):
            here, there = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=work,
                args=(rank, self.world, store.port, there, deterministic, dict(os.environ)),
                name=f"rank {rank} of {self.world}",
                daemon=True,
            )
            process.start()
            there.close()
            self._workers.append(_Worker(process, here))
        replies = self._collect(START)
        if not all(reply.ok for reply in replies):
            self._end(at_once=True)
            _raise_first(replies, self.world)

    def _collect(self, limit: float) -> list[Reply]:
        """One reply of every worker; those that died or did not answer in time get one made up for them."""
        replies: dict[int, Reply] = {}
        started = time.monotonic()
        deadline = started + limit
        while len(replies) < self.world:
            pending = {r: worker for r, worker in enumerate(self._workers) if r not in replies}
            sources = {worker.connection: r for r, worker in pending.items()}
            ends = {worker.process.sentinel: r for r, worker in pending.items()}
            ready = wait([*sources, *ends], timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = Reply.made_up("did not answer", time.monotonic() - started, list(pending), "late")
                return [replies.get(r, late) for r in range(self.world)]
            for rank in {sources[item] if isinstance(item, Connection) else ends[item] for item in ready}:  # type: ignore[index]
                replies[rank] = _receive(self._workers[rank], rank, time.monotonic() - started)
            if not all(reply.ok for reply in replies.values()):
                deadline = min(deadline, time.monotonic() + GRACE)
        return [replies[r] for r in range(self.world)]


def _receive(worker: _Worker, rank: int, seconds: float) -> Reply:
    try:
        reply: Reply = pickle.loads(worker.connection.recv_bytes())
        return reply
    except (EOFError, ConnectionResetError):
        worker.process.join()
        return Reply.made_up(f"ended with exit code {worker.process.exitcode}", seconds, [rank], "died")


def _raised_together(replies: list[Reply]) -> bool:
    """Whether all ranks raised together an error they had agreed on: then no message is left on the way."""
    kinds = {type(reply.error) for reply in replies}
    return len(kinds) == 1 and issubclass(next(iter(kinds)), SeqparError) and TransportError not in kinds


def _raise_first(replies: list[Reply], world: int) -> None:
    """Raise the error nearest to the root: a worker that died, a rank's own error, or else a failed transfer."""

    def distance(item: tuple[int, Reply]) -> tuple[int, float]:
        reply = item[1]
        far = {"died": 0, "late": 3}.get(reply.how, 2 if isinstance(reply.error, TransportError) else 1)
        return far, reply.seconds

    rank, first = min(((r, reply) for r, reply in enumerate(replies) if not reply.ok), key=distance)
    error = first.error
    assert error is not None
    note(error, f"(raised on rank {rank} of {world} processes)")
    raise error from (WorkerTraceback(first.traceback) if first.traceback else None)
