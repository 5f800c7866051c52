"""Schedule picture: a traffic drawn with ranks down and steps across, from the very data that a run executes.

A box is what a rank computes with at a step, in the colour of the rank that owns those rows; an arrow is a transfer,
from where it is posted to where it is due. It has no time: `picture` draws that.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from seqpar_ring.errors import ConfigError
from seqpar_ring.geometry import Rows, count
from seqpar_ring.planner.canvas import INK, figure, rank_colour, save
from seqpar_ring.schedule import Move, Traffic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE, HIGH = 1.0, 0.62
"""Of a box, where steps and ranks are ACROSS and 1 apart."""

ACROSS = 1.75
HEAD, LINE, FOOT = 1.6, 0.6, 0.6
"""What a picture needs above its ranks, in ranks; inches of a rank; inches below them."""

MOST = 600
"""Boxes of a picture: with more nothing can be read."""

LEGEND = (
    "A box: what a rank computes with at a step, in the colour of the rank that owns those rows (owner: rows of its\n"
    "memory, or how many rows in how many ranges). Arrows leave where a block is posted and arrive where it is due;\n"
    "dotted arrows carry gradients."
)


def draw_schedule(path: Path, traffic: Traffic, title: str, node: int | None = None) -> None:
    """Write a picture of a traffic.

    Raises:
        ConfigError: it has too many ranks and steps to be read, or the file cannot be written.
    """
    if traffic.world * traffic.steps > MOST:
        fix = "Draw fewer ranks, or use seqpar-ring timeline."
        sizes = {"ranks": traffic.world, "steps": traffic.steps}
        raise ConfigError("a schedule of this size cannot be drawn legibly", fix=fix, **sizes)
    fig = figure(max(9.0, 1.3 + 1.65 * traffic.steps), (traffic.world + HEAD) * LINE + FOOT)
    share = FOOT / ((traffic.world + HEAD) * LINE + FOOT)
    draw_traffic(fig.add_axes((0.0, share, 1.0, 1.0 - share)), traffic, title, node)
    fig.text(0.01, 0.01, LEGEND, fontsize=9, color=INK, va="bottom")
    save(fig, path)


def draw_traffic(ax: Axes, traffic: Traffic, title: str, node: int | None = None) -> None:
    """Draw a traffic into axes, with a line between nodes of so many ranks."""
    ax.text(-1.0, 1.0, title, fontsize=11.5, color=INK)
    for step in range(traffic.steps):
        ax.text(step * ACROSS + WIDE / 2, 0.5, f"step {step}", ha="center", fontsize=9.5, color=INK)
    if traffic.dkv:
        ax.text(traffic.steps * ACROSS, 0.5, "home", ha="center", fontsize=9.5, color=INK)
    for rank in range(traffic.world):
        colour = rank_colour(rank)
        ax.text(-0.2, -rank, f"rank {rank}", ha="right", va="center", fontsize=9.5, color=colour, weight="bold")
        for step in range(traffic.steps):
            _draw_box(ax, traffic, rank, step)
    for moves, gradient in ((traffic.kv, False), (traffic.dkv, True)):
        side_by_side: Counter[tuple[int, int, int]] = Counter()
        for move in moves:
            way = (move.post, move.src, move.dst)
            _draw_move(ax, move, side_by_side[way], gradient)
            side_by_side[way] += 1
    for border in range(node, traffic.world, node) if node else ():
        ax.axhline(0.5 - border, color="#999999", linewidth=1, linestyle="--")
    ax.set_xlim(-1.1, traffic.steps * ACROSS + (0.3 if traffic.dkv else -0.6))
    ax.set_ylim(-traffic.world + 0.2, HEAD + 0.2)
    ax.axis("off")


def _draw_move(ax: Axes, move: Move, beside: int, gradient: bool) -> None:
    """An arrow from where a transfer is posted to where it is due; it passes behind the boxes between.

    `beside` counts the arrows that go the same way already.
    """
    from matplotlib.patches import FancyArrowPatch

    down = (0.17 if gradient else -0.06) + 0.22 * beside
    start = (move.post * ACROSS + WIDE + 0.04, -move.src - down)
    end = (move.due * ACROSS - 0.05, -move.dst - down)
    style, colour = "->" if gradient else "-|>", rank_colour(move.block.owner)
    arrow = FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=10, color=colour, zorder=1)
    arrow.set_linewidth(1.2)
    arrow.set_linestyle(":" if gradient else "-")
    ax.add_patch(arrow)


def _draw_box(ax: Axes, traffic: Traffic, rank: int, step: int) -> None:
    """What a rank computes with at a step: a bar for each block."""
    from matplotlib.patches import Rectangle

    used = [use.block for use in traffic.uses if (use.rank, use.step) == (rank, step)]
    x, y = step * ACROSS, -rank - HIGH / 2
    ax.add_patch(Rectangle((x, y), WIDE, HIGH, facecolor="#f4f4f4", edgecolor="#cccccc", linewidth=0.6, zorder=2))
    for i, block in enumerate(used):
        high = HIGH / len(used)
        bottom, colour = y + HIGH - (i + 1) * high, rank_colour(block.owner)
        ax.add_patch(Rectangle((x, bottom), WIDE, high, facecolor=colour, edgecolor="white", zorder=3))
        says = f"{block.owner}: {_shown(block.rows)}" if traffic.steps < 8 else str(block.owner)
        ax.text(x + WIDE / 2, bottom + high / 2, says, ha="center", va="center", fontsize=8, color="white", zorder=4)


def _shown(rows: Rows) -> str:
    """Rows as a range, or how many there are in how many ranges."""
    return f"{rows[0][0]}-{rows[0][1]}" if len(rows) == 1 else f"{count(rows)} in {len(rows)}"
