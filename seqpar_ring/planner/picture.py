"""Picture: the timeline of one layer's attention over a ring: ranks down, time across.

Each rank has a row: above, what it computes and where it waits, exposed; below, in thin lanes, what arrives for it
meanwhile. Colours are those of Okabe and Ito, which the colour-blind tell apart, and waits are hatched besides. It
draws `Panel`s, plain columns of bars, whether they were predicted (`predicted` makes one of a priced ring) or measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqpar_ring.geometry import Ints
from seqpar_ring.planner.canvas import INK, figure, save
from seqpar_ring.planner.cost import Pass, Ring
from seqpar_ring.planner.loads import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COMPUTE, WAIT, POST, OUT, HOME, AROUND = "compute", "wait", "post", "out", "home", "around"

COLOURS = {COMPUTE: "#0072b2", WAIT: "#d55e00", POST: "#f0e442", OUT: "#e69f00", HOME: "#cc79a7", AROUND: "#009e73"}
LIGHT = "#56b4e9"
"""Of every second step, so that steps can be told apart."""

WORDS = {
    COMPUTE: "computes (steps in turn)",
    WAIT: "waits: exposed",
    POST: "posts transfers",
    OUT: "keys and values arrive",
    HOME: "gradients arrive",
    AROUND: "heads are exchanged, before and after the ring",
}

UPPER = (0.06, 0.56)
SLOTS = {**dict.fromkeys((COMPUTE, WAIT, POST, AROUND), UPPER), OUT: (0.62, 0.76), HOME: (0.78, 0.92)}
"""Where in a rank's row each kind stands, from the row's top, in rows."""

WIDTH, LEFT, RIGHT = 13.0, 0.8, 0.25
"""Of the picture and its borders, in inches."""

LETTER = 0.067
"""Inches of a letter of the smaller words."""

TALLEST, ROW, NARROWEST = 9.0, 0.42, 0.1
"""Inches of all rows of a panel where it has many, and of one where it has few; no row is narrower than the last."""

MOST = 128
"""Ranks of a panel that are drawn."""

HATCHED, TOLD_APART = 0.2, 0.06
"""Inches of a row from which on hatching shows, and of a step from which on two shades do."""

ABOVE, BELOW, FOOT = 0.62, 0.5, 0.42
"""Inches above and below each panel's rows, and for the legend."""


class Style(NamedTuple):
    """How a panel's bars are drawn.

    Attributes:
        hatched: waits are hatched; in thin rows they are full.
        shades: seconds of a step from which on steps have two shades in turn.
    """

    hatched: bool
    shades: float


class Bars(NamedTuple):
    """Bars of one kind, as columns.

    Attributes:
        kind: COMPUTE, WAIT, POST, OUT (keys and values, or queries, arrive), HOME (gradients arrive) or AROUND.
        rank: whose row.
        begin, end: seconds.
        step: of the ring, where that is known.
    """

    kind: str
    rank: Ints
    begin: Floats
    end: Floats
    step: Ints

    def take(self, some: NDArray[np.bool_]) -> Bars:
        """Some of the bars."""
        return Bars(self.kind, self.rank[some], self.begin[some], self.end[some], self.step[some])


class Panel(NamedTuple):
    """One timeline.

    Attributes:
        title: what it shows.
        note: numbers: efficiency, exposed share.
        ranks: rows.
        seconds: its length.
        bars: what is drawn.
        marks: moments at which a line goes down, with a word at its top.
    """

    title: str
    note: str
    ranks: int
    seconds: float
    bars: tuple[Bars, ...]
    marks: tuple[tuple[float, str], ...] = ()


def predicted(ring: Ring, title: str) -> Panel:
    """The forward pass of a ring, and after it the backward pass, as simulated."""
    bars: list[Bars] = []
    start, marks = 0.0, []
    for name, one in (("forward", ring.forward), ("backward", ring.backward)):
        bars += _bars(one, start)
        marks.append((start, f"{name}, {written(one.seconds)}: {one.exposed / one.seconds:.1%} exposed"))
        start += one.seconds
    return timeline(title, ring.forward.flows.world, start, bars, marks)


def timeline(
    title: str, ranks: int, seconds: float, bars: Sequence[Bars], marks: Sequence[tuple[float, str]] = ()
) -> Panel:
    """A panel with its numbers: efficiency is the share of the time in which a rank computes, on average; exposed the
    share in which not even the busiest one does."""
    computing = np.zeros(ranks)
    for one in bars:
        if one.kind == COMPUTE:
            np.add.at(computing, one.rank, one.end - one.begin)
    busy = computing / seconds if seconds else computing
    note = f"efficiency {busy.mean():.1%}, exposed {1 - busy.max():.1%} of {written(seconds)}"
    return Panel(title, note, ranks, seconds, tuple(bars), tuple(marks))


def _bars(one: Pass, start: float) -> list[Bars]:
    """The bars of a pass that begins at `start`; heads are exchanged half before and half after the ring."""
    run, flows = one.run, one.flows
    begins = start + one.around / 2
    step, rank = (index.ravel() for index in np.indices(run.begin.shape))
    found = [
        Bars(COMPUTE, rank, begins + run.begin.ravel(), begins + run.end.ravel(), step),
        Bars(WAIT, rank, begins + run.ready.ravel(), begins + run.begin.ravel(), step),
    ]
    after = begins + run.seconds
    last = run.end[-1] if len(run.end) else np.zeros(flows.world)
    ranks, none = np.arange(flows.world), np.zeros(flows.world, dtype=np.int64)
    found.append(Bars(WAIT, ranks, begins + last, np.full(flows.world, after), none))
    if one.around:
        for a, b in ((start, begins), (after, after + one.around / 2)):
            found.append(Bars(AROUND, ranks, np.full(flows.world, a), np.full(flows.world, b), none))
    out = len(flows.kv.post)
    for kind, moves, times in ((OUT, flows.kv, run.moves[:, :out]), (HOME, flows.dkv, run.moves[:, out:])):
        found.append(Bars(kind, moves.dst, begins + times[0], begins + times[1], moves.post))
    return found


def draw(path: Path, panels: Sequence[Panel], one_scale: bool = True) -> None:
    """Write a picture of timelines, one under the other, on one scale of time or each on its own.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    panels = [_first(panel) for panel in panels]
    heights = [max(min(ROW * panel.ranks, TALLEST), NARROWEST * panel.ranks) for panel in panels]
    whole = sum(heights) + len(panels) * (ABOVE + BELOW) + FOOT
    fig = figure(WIDTH, whole)
    longest = max(panel.seconds for panel in panels)
    top = whole
    for panel, height in zip(panels, heights, strict=True):
        top -= ABOVE + height
        ax = fig.add_axes((LEFT / WIDTH, top / whole, 1 - (LEFT + RIGHT) / WIDTH, height / whole))
        _draw_panel(ax, panel, longest if one_scale else panel.seconds, height)
        top -= BELOW
    _draw_legend(
        fig.add_axes((LEFT / WIDTH, 0.0, 1 - (LEFT + RIGHT) / WIDTH, FOOT / whole)),
        panels,
        heights[0] / panels[0].ranks >= HATCHED,
    )
    save(fig, path)


def _first(panel: Panel) -> Panel:
    """The panel, or its first ranks where there are too many to be drawn."""
    if panel.ranks <= MOST:
        return panel
    bars = tuple(bars.take(bars.rank < MOST) for bars in panel.bars)
    title = f"{panel.title} (the first {MOST} of {panel.ranks:,} ranks)"
    return panel._replace(title=title, ranks=MOST, bars=bars)


def _draw_panel(ax: Axes, panel: Panel, longest: float, height: float) -> None:
    unit, factor = _unit(longest)
    style = Style(height / panel.ranks >= HATCHED, TOLD_APART * longest / (WIDTH - LEFT - RIGHT))
    for bars in panel.bars:
        _draw_bars(ax, bars, factor, style)
    inch, free = panel.ranks / height, 0.0
    for at, word in panel.marks:
        ax.axvline(at * factor, color=INK, linewidth=0.8)
        x = max(at * factor, free)  # words stand where their pass begins, or where there is room after the last ones
        ax.text(x, -0.04 * inch, f" {word}", fontsize=9, color=INK, va="bottom")
        free = x + (len(word) + 3) * LETTER / (WIDTH - LEFT - RIGHT) * longest * factor
    ax.text(0.0, -0.3 * inch, panel.title, fontsize=12, color=INK, weight="bold", va="bottom")
    ax.text(longest * factor, -0.3 * inch, panel.note, fontsize=10.5, color=INK, ha="right", va="bottom")
    ax.set_xlim(0, longest * factor)
    ax.set_ylim(panel.ranks, 0)
    every = max(1, int(np.ceil(0.16 * inch)))
    ranks = range(0, panel.ranks, every)
    ax.set_yticks([rank + 0.5 for rank in ranks], [f"rank {rank}" if every == 1 else str(rank) for rank in ranks])
    ax.tick_params(labelsize=8.5, length=0, axis="y")
    ax.tick_params(labelsize=8.5, axis="x")
    ax.set_xlabel(unit, fontsize=9, color=INK, labelpad=2)
    ax.spines[["top", "right", "left"]].set_visible(False)
    if style.hatched:
        for rank in range(1, panel.ranks):
            ax.axhline(rank, color="#dddddd", linewidth=0.5, zorder=0)


def _draw_bars(ax: Axes, bars: Bars, factor: float, style: Style) -> None:
    """Bars as one collection of rectangles: some thousands of patches would take seconds."""
    from matplotlib.collections import PolyCollection

    some = np.flatnonzero(bars.end > bars.begin)
    if not len(some):
        return
    high, low = (bars.rank[some] + edge for edge in SLOTS[bars.kind])
    x0, x1 = bars.begin[some] * factor, bars.end[some] * factor
    corners = [np.stack([x, y], -1) for x, y in ((x0, low), (x1, low), (x1, high), (x0, high))]
    alternate = bars.kind == COMPUTE and np.median(bars.end[some] - bars.begin[some]) >= style.shades
    odd = bars.step[some] % 2 * alternate
    colours = [LIGHT if light else COLOURS[bars.kind] for light in odd]
    drawn = PolyCollection(list(np.stack(corners, 1)), facecolors=colours, linewidths=0, zorder=2)
    if style.hatched and bars.kind == WAIT:
        drawn.set(hatch="////", facecolor="#fbe3d5", edgecolor=COLOURS[WAIT], linewidth=0.4)
    ax.add_collection(drawn, autolim=False)


def _draw_legend(ax: Axes, panels: Sequence[Panel], hatched: bool) -> None:
    from matplotlib.patches import Patch

    there = {bars.kind for panel in panels for bars in panel.bars if (bars.end > bars.begin).any()}
    patches = []
    for kind, words in WORDS.items():
        if kind == WAIT and hatched:
            patches.append(Patch(facecolor="#fbe3d5", edgecolor=COLOURS[WAIT], hatch="////", label=words))
        elif kind in there or kind == WAIT:
            patches.append(Patch(facecolor=COLOURS[kind], label=words))
    ax.legend(handles=patches, loc="center left", ncols=len(patches), frameon=False, fontsize=9, borderpad=0)
    ax.axis("off")


def written(seconds: float) -> str:
    """Seconds in a unit that suits them."""
    unit, factor = _unit(seconds)
    value = seconds * factor
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def _unit(seconds: float) -> tuple[str, float]:
    return ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
