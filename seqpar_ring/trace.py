"""Traces: when each rank waited, posted and computed, at every stage of every pass, on one clock.

A recorder hangs on a ring's transport for as long as somebody records, and the executor tells it what it does; nothing
is kept anywhere else, and without one nothing is measured. On a GPU the marks are events on the current stream, so
spans are the device's time and not the host's. A trace says what was and predicts nothing; pictures are made elsewhere.
"""

from __future__ import annotations

import json
import socket
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from seqpar_ring.errors import ConfigError
from seqpar_ring.transport import Transport

KINDS = ("wait", "post", "compute")
"""What a rank does at a stage: waits for what is due, posts what leaves, computes with what is there."""

LABELS = ("forward", "backward", "backward, queries travel")
"""The passes."""

PINGS = 9
"""Meetings by which the clocks of different hosts are compared."""


class Span(NamedTuple):
    """What one rank did from `begin` to `end`, in seconds.

    Attributes:
        rank: within the ring.
        kind: one of `KINDS`.
        begin, end: on the clock of the trace.
        stage: of the pass, as in its schedule.
        label: the pass: one of `LABELS`.
        run: which pass of the recording it was, from 0; the same on all ranks.
    """

    rank: int
    kind: str
    begin: float
    end: float
    stage: int
    label: str
    run: int


class Trace(NamedTuple):
    """A recording. Spans stand in order of rank, and within a rank of time; time 0 is the beginning of the earliest."""

    ranks: int
    spans: tuple[Span, ...]

    @property
    def seconds(self) -> float:
        """From the beginning to the end of all."""
        return max((span.end for span in self.spans), default=0.0)

    def of(self, run: int) -> Trace:
        """One pass alone, from its own beginning."""
        return _from_zero(self.ranks, [span for span in self.spans if span.run == run])


class Recorder:
    """Takes the time of what one rank does; see `recording`.

    Args:
        device: where the rank computes.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._events = device is not None and device.type == "cuda"
        self._marks: list[tuple[str, Any, Any, tuple[int, str, int]]] = []
        self._label, self._run = "", -1
        self._origin: Any = None
        if self._events:
            torch.cuda.synchronize(device)
            self._origin = self._mark()
        self._began = time.perf_counter()

    def start(self, label: str) -> None:
        """A pass begins."""
        self._label, self._run = label, self._run + 1

    @contextmanager
    def span(self, kind: str, stage: int) -> Iterator[None]:
        """Something that a stage of this pass does."""
        begin = self._mark()
        yield
        self._marks.append((kind, begin, self._mark(), (stage, self._label, self._run)))

    def spans(self, rank: int) -> list[Span]:
        """What was recorded, on this process's clock; waits for the device."""
        if self._events:
            torch.cuda.synchronize()
        seconds = self._seconds
        return [Span(rank, kind, seconds(a), seconds(b), *at) for kind, a, b, at in self._marks]

    def _mark(self) -> Any:
        if not self._events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, mark: Any) -> float:
        return float(self._began + self._origin.elapsed_time(mark) / 1e3) if self._events else float(mark)


@contextmanager
def recording(transport: Transport, device: torch.device | None = None) -> Iterator[Recorder]:
    """Record what this rank does on a ring meanwhile: `with recording(sp.groups.ring) as recorder: ...`.

    Args:
        transport: the ring's.
        device: where the rank computes; None: a CPU.

    Raises:
        ConfigError: somebody records already.
    """
    _expect_free(transport)
    recorder = transport.recorder = Recorder(device)
    try:
        yield recorder
    finally:
        transport.recorder = None


class Ranges:
    """Names what one rank does for profilers; see `ranges`."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._label, self._nvtx = "", device is not None and device.type == "cuda"

    def start(self, label: str) -> None:
        """A pass begins."""
        self._label = label

    @contextmanager
    def span(self, kind: str, stage: int) -> Iterator[None]:
        """Something that a stage of this pass does."""
        name = f"ring {self._label} {stage}: {kind}"
        with torch.profiler.record_function(name), torch.cuda.nvtx.range(name) if self._nvtx else nullcontext():
            yield


@contextmanager
def ranges(transport: Transport, device: torch.device | None = None) -> Iterator[None]:
    """Name each stage of each pass meanwhile, for torch's profiler and, on a GPU, as NVTX ranges for Nsight Systems.

    A range reads "ring forward 2: compute". It costs a microsecond and no synchronisation.

    Args:
        transport: the ring's: `sp.groups.ring`.
        device: where the rank computes; None: a CPU.

    Raises:
        ConfigError: somebody records already.
    """
    _expect_free(transport)
    transport.recorder = Ranges(device)
    try:
        yield
    finally:
        transport.recorder = None


def _expect_free(transport: Transport) -> None:
    if transport.recorder is not None:
        raise ConfigError("this ring is being recorded already", fix="End that recording first.")


def own(recorder: Recorder, transport: Transport) -> Trace:
    """This rank's part of a trace, on the clock of rank 0. Collective over the ring; `merge` puts parts together."""
    offset = _offset(transport)
    spans = [_moved(span, offset) for span in recorder.spans(transport.rank)]
    first = torch.full((transport.world,), 0.0, dtype=torch.float64)
    first[transport.rank] = min((span.begin for span in spans), default=time.perf_counter() + offset)
    origin = float(transport.all_reduce(first).min())
    return Trace(transport.world, tuple(_moved(span, -origin) for span in spans))


def gather(recorder: Recorder, transport: Transport) -> Trace:
    """The trace of all ranks, on every rank. Collective over the ring."""
    mine = own(recorder, transport).spans
    most = torch.zeros(transport.world, dtype=torch.int64)
    most[transport.rank] = len(mine)
    counts = transport.all_reduce(most).tolist()
    table = torch.zeros((transport.world, max(counts), 6), dtype=torch.float64)
    for i, span in enumerate(mine):
        row = KINDS.index(span.kind), span.begin, span.end, span.stage, LABELS.index(span.label), span.run
        table[transport.rank, i] = torch.tensor(row, dtype=torch.float64)
    spans = []
    for rank, rows in enumerate(transport.all_reduce(table).tolist()):
        for kind, begin, end, stage, label, run in rows[: counts[rank]]:
            spans.append(Span(rank, KINDS[int(kind)], begin, end, int(stage), LABELS[int(label)], int(run)))
    return Trace(transport.world, tuple(spans))


def merge(parts: Iterable[Trace]) -> Trace:
    """The trace of all ranks from the parts of each, as `own` made them.

    Raises:
        ConfigError: no part, parts of rings of different sizes, or a rank that is there twice.
    """
    found = list(parts)
    sizes = sorted({part.ranks for part in found})
    if len(sizes) != 1:
        raise ConfigError("these are no parts of one trace", fix="Give the files of one run.", ranks=sizes)
    ranks = [rank for part in found for rank in dict.fromkeys(span.rank for span in part.spans)]
    if len(set(ranks)) != len(ranks):
        raise ConfigError("a rank is there twice", fix="Give one file for each rank.", ranks=ranks)
    return _from_zero(sizes[0], sorted((span for part in found for span in part.spans), key=lambda s: s.rank))


def save(trace: Trace, path: Path) -> None:
    """Write a trace, or one rank's part, as JSON."""
    record = {"kind": "trace", "ranks": trace.ranks, "fields": Span._fields, "spans": trace.spans}
    path.write_text(json.dumps(record, separators=(",", ":")) + "\n", encoding="utf-8")


def load(*paths: Path) -> Trace:
    """A trace from its file, or from the files of all its ranks.

    Raises:
        ConfigError: a file that is not there or holds no trace; or as `merge`.
    """
    return merge(_read(path) for path in paths)


def _read(path: Path) -> Trace:
    fix = "Give a file that seqpar_ring.trace.save wrote."
    if not path.is_file():
        raise ConfigError("there is no such trace", fix=fix, path=str(path))
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["kind"] != "trace" or tuple(record["fields"]) != Span._fields:
            raise ConfigError(f"{path} holds no trace", fix=fix, kind=record["kind"], fields=record["fields"])
        return Trace(int(record["ranks"]), tuple(Span(*row) for row in record["spans"]))
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} holds no trace", fix=fix, says=str(error)) from None


def _offset(transport: Transport) -> float:
    """What to add to this process's clock to get that of rank 0; processes of one host share a clock.

    Elsewhere it is found by meetings: all ranks leave one at about the same moment.
    """
    host = zlib.crc32(socket.gethostname().encode())
    rows = torch.zeros((transport.world, 1 + PINGS), dtype=torch.float64)
    rows[transport.rank, 0] = host
    for i in range(PINGS):
        transport.all_reduce(torch.zeros(1))
        rows[transport.rank, 1 + i] = time.perf_counter()
    whole = transport.all_reduce(rows)
    mine, first = whole[transport.rank], whole[0]
    return 0.0 if mine[0] == first[0] else median((first - mine)[1:].tolist())


def _moved(span: Span, seconds: float) -> Span:
    return span._replace(begin=span.begin + seconds, end=span.end + seconds)


def _from_zero(ranks: int, spans: Sequence[Span]) -> Trace:
    first = min((span.begin for span in spans), default=0.0)
    return Trace(ranks, tuple(_moved(span, -first) for span in spans))
