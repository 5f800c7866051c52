"""`seqpar-ring timeline`: one layer's attention as a picture, predicted, measured, or both under each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from seqpar_ring.commands import options as take
from seqpar_ring.config import Settings
from seqpar_ring.errors import ConfigError
from seqpar_ring.planner import picture
from seqpar_ring.planner.asked import Asked, Given, asked, decided
from seqpar_ring.planner.cost import Ring
from seqpar_ring.planner.model import Span
from seqpar_ring.planner.step import mask_of

if TYPE_CHECKING:
    from seqpar_ring.trace import Span as Recorded

HELP = "Draw one layer's attention: ranks down, time across, waits marked."

EPILOG = """\
Examples:

\b
  seqpar-ring timeline --model llama-3.1-8b --seq-len 256K --gpus 8 --hardware h100 --fabric nvlink --out ring.png
  seqpar-ring timeline --config plan.yaml --out plan.png             what plan --save wrote
  seqpar-ring timeline --trace trace.json --out run.png              what a run recorded (seqpar_ring.trace)
  seqpar-ring timeline ... --trace trace.json --out both.png         both, on one scale of time

What is predicted needs the options of plan; the ring is all devices, or size as --setting or a config says.

Exit codes: 0 drawn; 2 the question makes no sense.
"""

KINDS = {"compute": picture.COMPUTE, "wait": picture.WAIT, "post": picture.POST}
"""What a trace calls it, and what a picture does."""


def timeline(  # noqa: PLR0913 - options of a command line
    out: Annotated[Path, typer.Option(help="The PNG to write.", metavar="FILE")] = Path("timeline.png"),
    model: take.Model = "",
    seq_len: take.SeqLen = "",
    documents: take.Documents = "",
    gpus: take.Gpus = None,
    hardware: take.Hardware = "",
    fabric: take.Fabric = "",
    node: take.Node = None,
    config: take.Config = None,
    batch: take.Batch = None,
    dtype: take.Dtype = "",
    full: take.Full = False,
    setting: take.Setting = None,
    trace: Annotated[
        list[Path] | None, typer.Option(help="A run's trace, or one file for each rank (repeatable).", metavar="FILE")
    ] = None,
) -> None:
    """Predict, read, or both; draw; say what the picture shows."""
    causal = False if full else None
    written = Given(model, hardware, fabric, seq_len, documents, gpus, node, batch, dtype, causal)
    panels = []
    if config is not None or setting or written != Given():
        panels.append(predicted(asked(take.question(written, config, setting))))
    if trace:
        panels.append(measured(trace))
    if not panels:
        fix = "Give --model, --seq-len, --gpus, --hardware and --fabric; or --config plan.yaml; or --trace FILE."
        raise ConfigError("there is nothing to draw", fix=fix)
    picture.draw(out, panels)
    for panel in panels:
        print(f"{panel.title}: {panel.note}")
        for _, words in panel.marks:
            print(f"  {words}")
    print(f"drawn: {out}")


def predicted(what: Asked) -> picture.Panel:
    """The timeline of the settings that are decided, the rest as it is by default."""
    workload, machine = what.workload, what.machine
    given = decided(what.fixed.settings)
    size = given.get("size", what.gpus)
    if given.get("schedule") == "double_ring" and machine.node < size:
        given = {"node": machine.node, **given}
    settings = Settings.parse({**given, "size": size}, "the settings")
    span = _widest(workload.model.spans)
    mask = mask_of(span, workload)
    ring = Ring(workload.lengths, mask, settings, workload.model.row(workload.itemsize), (machine, workload.dtype))
    sees = f", layers with a window of {span.window:,}" if mask.window is not None else ""
    where = "+".join(Path(name).stem for name in (what.given.hardware, what.given.fabric) if name)
    how = f"{settings.schedule}, {settings.layout}" if settings.head_degree < size else "no ring"
    heads = f", heads over {settings.heads}" if settings.head_degree > 1 else ""
    title = f"{workload.model.name}{sees}, {workload.tokens:,} tokens, {size} ranks ({where}): {how}{heads}"
    return picture.predicted(ring, title)


def measured(paths: list[Path]) -> picture.Panel:
    """The timeline of a trace: of each kind of pass the one that took the median time."""
    from seqpar_ring.trace import load

    trace = load(*paths)
    start, marks = 0.0, []
    bars: list[picture.Bars] = []
    for label in dict.fromkeys(span.label for span in trace.spans):
        lasts = {run: trace.of(run).seconds for run in {span.run for span in trace.spans if span.label == label}}
        middle = median_low(lasts.values())
        run = next(run for run, seconds in lasts.items() if seconds == middle)
        bars += _bars(trace.of(run).spans, start)
        many = f", the median of {len(lasts)}" if len(lasts) > 1 else ""
        marks.append((start, f"{label}, {picture.written(middle)}{many}"))
        start += middle
    if not bars:
        raise ConfigError("the trace holds no pass", fix="Record at least one forward pass.", paths=[*map(str, paths)])
    return picture.timeline(f"measured: {', '.join(path.name for path in paths[:3])}", trace.ranks, start, bars, marks)


def _bars(spans: tuple[Recorded, ...], start: float) -> Iterator[picture.Bars]:
    for kind, drawn in KINDS.items():
        some = [span for span in spans if span.kind == kind]
        rank, step = (np.array([getattr(s, name) for s in some], dtype=np.int64) for name in ("rank", "stage"))
        begin, end = (start + np.array([getattr(s, name) for s in some], dtype=float) for name in ("begin", "end"))
        yield picture.Bars(drawn, rank, begin, end, step)


def _widest(spans: tuple[Span, ...]) -> Span:
    """The layers that see farthest: there a ring has most to do."""
    return max(spans, key=lambda span: (span.window is None and span.chunk is None, span.window or span.chunk or 0))
