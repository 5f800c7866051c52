"""Ranks as threads of this process: one thread each, over a lockstep transport, with the root cause raised at the end.

It exists so that a test of W ranks is one function call that takes milliseconds. It sets no seeds, no thread counts and
no dtypes: those are the caller's, and random numbers are shared between the threads, so seed a generator per rank.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from seqpar_ring import groups as process_groups
from seqpar_ring.config import Settings
from seqpar_ring.errors import TransportError
from seqpar_ring.groups import Groups
from seqpar_ring.transport import Link, LockstepWorld

if TYPE_CHECKING:
    from seqpar_ring.parallel import SequenceParallel

T = TypeVar("T")

GRACE = 5.0
"""Seconds that ranks get beyond the timeout of a wait, so that the one that waits can say for whom."""


def run_lockstep(
    fn: Callable[[SequenceParallel], T], world: int, size: int | None = None, timeout: float = 60.0, **settings: Any
) -> list[T]:
    """Call `fn(sp)` on every rank, each a thread, and return the results in rank order.

    Args:
        fn: gets this rank's `SequenceParallel`.
        world: number of ranks.
        size: ranks that share a sequence; None: all of them.
        timeout: seconds, for one wait of a rank and (with a little more) for the whole run.
        **settings: as in `Settings`.

    Raises:
        ConfigError, GroupError: wrong settings.
        Exception: the first error of a rank that is not merely the consequence of another's, with the rank as a note.
        TransportError: a rank waited in vain, or did not end in time.
    """
    from seqpar_ring.parallel import SequenceParallel

    chosen = Settings.parse({"size": world if size is None else size, "timeout": float(timeout), **settings})
    return run_lockstep_groups(lambda groups: fn(SequenceParallel.over(groups, chosen)), world, chosen.size, timeout)


def run_lockstep_groups(
    fn: Callable[[Groups], T],
    world: int,
    size: int | None = None,
    timeout: float = 60.0,
    at_once: int = 1,
    link: Link | None = None,
) -> list[T]:
    """Call `fn(groups)` on every rank: the same for tests of what lies below `SequenceParallel`.

    `at_once` ranks run at the same time; the others wait for one of them to wait for a message. `link` slows messages.
    """
    meeting = LockstepWorld(world, timeout, at_once, link)
    groups = [process_groups.lockstep(meeting, rank, world if size is None else size) for rank in range(world)]
    results: dict[int, T] = {}
    errors: list[tuple[int, BaseException]] = []  # in order of time

    def run(rank: int) -> None:
        try:
            # Else backward passes on one device would queue for its one thread, and wait there for each other.
            with torch.autograd.set_multithreading_enabled(False), meeting.turn():
                results[rank] = fn(groups[rank])
            meeting.finish(rank)
        except BaseException as error:  # including those a test framework fails with
            errors.append((rank, error))
            meeting.fail(rank, error)

    threads = [threading.Thread(target=run, args=(r,), name=f"rank {r}", daemon=True) for r in range(world)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout + GRACE
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    late = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
    if errors:
        rank, error = next((e for e in errors if not isinstance(e[1], TransportError)), errors[0])
        note(error, f"(raised on rank {rank} of {world} lockstep ranks)")
        raise error
    if late:
        error = TransportError(
            "ranks did not end in time", fix="Look for an endless loop, or raise timeout.", ranks=late, timeout=timeout
        )
        meeting.fail(late[0], error)
        raise error
    return [results[rank] for rank in range(world)]


def note(error: BaseException, text: str) -> None:
    """Add a line to an error's traceback; from Python 3.11 on it is shown, before that only kept."""
    error.__notes__ = [*getattr(error, "__notes__", []), text]
