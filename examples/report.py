"""What the example prints: names with texts, a line and a progress bar for the steps, every rank's part at the end.

Only rank 0 prints; figures of the other ranks are gathered. Where the output is no terminal there is no bar, only the
lines, which also suit a log file. Nothing here trains.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import TypeVar

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import seqpar_ring as sr

Value = TypeVar("Value")

LANES = {"kv": "keys and values", "dkv": "their gradients"}


class Printer:
    """Prints on rank 0, and is silent elsewhere."""

    def __init__(self) -> None:
        self.console = Console(quiet=dist.get_rank() > 0, highlight=False, markup=False)

    def line(self, text: str = "") -> None:
        """One line, never wrapped."""
        self.console.print(text, soft_wrap=True)

    def table(self, lines: Iterable[tuple[str, str]]) -> None:
        """A name and a text a line; further lines of a text stand below its first."""
        for name, text in lines:
            self.line(f"{name:<10}" + text.replace("\n", "\n" + " " * 10))

    def verdict(self, checks: Iterable[tuple[bool, str]]) -> bool:
        """What was to be shown, and whether all of it was."""
        done = list(checks)
        self.table(("OK" if good else "FAILED", what) for good, what in done)
        return all(good for good, _ in done)


class Steps:
    """The steps of a training as they happen; a context manager, entered by every rank."""

    def __init__(self, out: Printer, steps: int) -> None:
        self.out, self.steps, self.losses = out, steps, list[float]()
        columns = (MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._bar = Progress(
            TextColumn("training"), BarColumn(), *columns, console=out.console, speed_estimate_period=600
        )
        self._task = self._bar.add_task("training", total=steps)
        self._started = 0.0

    def __enter__(self) -> Steps:
        if self.out.console.is_terminal:
            self._bar.start()
        self._started = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.out.console.is_terminal:
            self._bar.stop()

    def done(self, loss: float, norm: float | None, tokens: int) -> None:
        """A step is done: its loss, the norm of its gradient before clipping, its tokens over all ranks. Collective."""
        now = time.perf_counter()
        seconds, self._started = now - self._started, now
        self.losses.append(loss)
        shown = "" if norm is None else f"gradient norm {norm:.2f}  "  # ZeRO-0 does not tell
        memory = " + ".join(map(readable, gathered(peak_memory())))
        self.out.line(
            f"step {len(self.losses):>3}/{self.steps}  loss {loss:.4f}  {shown}"
            f"{tokens / seconds:,.0f} tokens/s  {seconds:.1f} s  memory {memory}"
        )
        self._bar.update(self._task, completed=len(self.losses))


def parts(sp: sr.SequenceParallel, plan: sr.Plan, sent: sr.Report, seconds: float) -> list[tuple[str, str]]:
    """What each rank held of a row, sent and waited for in so many seconds, and needed. Collective."""
    lanes = [f"{readable(sent.bytes_sent[lane])} of {name}" for lane, name in LANES.items() if lane in sent.bytes_sent]
    mine = (
        f"held {plan.local_tokens:,} of a row's {plan.tokens:,} tokens; sent {' and '.join(lanes) or 'nothing'}; "
        f"waited {sent.seconds_waited:.1f} s for the others, {sent.seconds_waited / seconds:.0%} of the training; "
        f"peak memory {readable(peak_memory())}"
    )
    return [(f"rank {rank}", text) for rank, text in enumerate(gathered(mine))]


def gathered(value: Value) -> list[Value]:
    """Every rank's value, in rank order. Collective."""
    values: list[Value] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def peak_memory() -> int:
    """The most memory that this process ever held, in bytes (its resident set)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def readable(size: float) -> str:
    """A number of bytes in the unit that suits it, of powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
