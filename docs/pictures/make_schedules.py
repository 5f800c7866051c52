"""Draws docs/pictures/schedules.png: ranks down, steps across, from the very traffic that a run executes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
from drawing import COLOURS, INK, save
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

from seqpar_ring import layout as layouts
from seqpar_ring.geometry import Mask, Rows, count
from seqpar_ring.packing import Balance
from seqpar_ring.schedule import Fabric, Granularity, Move, Needs, Sides, Traffic, choose, transpose

DOCUMENTS = [52, 18, 18, 14, 14, 12, 12, 10, 10]
LOOSE = Balance(1.1, 1.35)  # so few tokens cannot be as even as a hundred thousand
WIDE, HIGH = 1.0, 0.62  # of a cell, where steps and ranks are 1.75 and 1 apart
ACROSS = 1.75


class Panel(NamedTuple):
    """One schedule to be drawn."""

    title: str
    schedule: str
    world: int
    lengths: list[int]
    layout: str = "zigzag"
    node: int = 0
    block_tokens: int | None = None
    backward: bool = False

    def traffic(self) -> Traffic:
        """What the library plans for it."""
        placed = layouts.make(self.layout, self.lengths, self.world, LOOSE)
        sides = Sides(placed, placed, Mask().regions(self.lengths))
        size = Granularity.of(self.block_tokens, max(placed.sizes), self.world)
        fabric = Fabric(self.world, self.node or self.world, size.hops)
        traffic, _ = choose(self.schedule, Needs(*sides, size.pieces), fabric)
        return transpose(traffic, fabric.node) if self.backward else traffic


LEFT = [
    Panel("ring: each block goes on to the next rank", "ring", 4, [64]),
    Panel("ring, block_tokens = half a block: the first pieces go round first", "ring", 4, [64], block_tokens=8),
    Panel("double_ring, nodes of 4: long transfers are posted a round ahead", "double_ring", 8, [128], node=4),
]
RIGHT = [
    Panel("ring, backward: gradients (dotted) go round with their block, then home", "ring", 4, [64], backward=True),
    Panel("ring, block_tokens = two blocks: two arrive at once, in jumps of two", "ring", 6, [96], block_tokens=32),
    Panel("all_gather: everything is posted at once", "all_gather", 4, [64]),
    Panel("direct, packed documents: only what is needed, from its owner", "direct", 4, DOCUMENTS, "packed"),
]
HEAD, LINE = 1.6, 0.6  # what a panel needs besides its ranks, in ranks; inches of a rank


def draw(path: Path) -> None:
    """All panels in two columns, every rank as high as every other."""
    total = max(sum(panel.world + HEAD for panel in column) for column in (LEFT, RIGHT))
    fig = plt.figure(figsize=(15, total * LINE))
    for left, column in ((0.0, LEFT), (0.51, RIGHT)):
        top = total
        for panel in column:
            high = panel.world + HEAD
            draw_panel(fig.add_axes((left, (top - high) / total, 0.49, high / total)), panel)
            top -= high
    explain(fig.add_axes((0.0, 0.0, 0.49, (total - sum(panel.world + HEAD for panel in LEFT)) / total)))
    save(fig, path)


def draw_panel(ax: Axes, panel: Panel) -> None:
    """One schedule."""
    traffic = panel.traffic()
    ax.text(-1.0, 1.0, panel.title, fontsize=11.5, color=INK)
    for step in range(traffic.steps):
        ax.text(step * ACROSS + WIDE / 2, 0.5, f"step {step}", ha="center", fontsize=9.5, color=INK)
    if traffic.dkv:
        ax.text(traffic.steps * ACROSS, 0.5, "home", ha="center", fontsize=9.5, color=INK)
    for rank in range(traffic.world):
        ax.text(-0.2, -rank, f"rank {rank}", ha="right", va="center", fontsize=9.5, color=COLOURS[rank], weight="bold")
        for step in range(traffic.steps):
            draw_cell(ax, traffic, rank, step)
    for moves, gradient in ((traffic.kv, False), (traffic.dkv, True)):
        side_by_side: Counter[tuple[int, int, int]] = Counter()
        for move in moves:
            way = (move.post, move.src, move.dst)
            draw_move(ax, move, side_by_side[way], gradient)
            side_by_side[way] += 1
    if panel.node:
        ax.axhline(0.5 - panel.node, color="#999999", linewidth=1, linestyle="--")
    ax.set_xlim(-1.1, traffic.steps * ACROSS + (0.3 if traffic.dkv else -0.6))
    ax.set_ylim(-traffic.world + 0.2, HEAD + 0.2)
    ax.axis("off")


def draw_move(ax: Axes, move: Move, beside: int, gradient: bool) -> None:
    """An arrow from where a transfer is posted to where it is due; it passes behind the boxes between.

    `beside` counts the arrows that go the same way already.
    """
    down = (0.17 if gradient else -0.06) + 0.22 * beside
    start = (move.post * ACROSS + WIDE + 0.04, -move.src - down)
    end = (move.due * ACROSS - 0.05, -move.dst - down)
    style = "->" if gradient else "-|>"
    arrow = FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=10, color=COLOURS[move.block.owner], zorder=1)
    arrow.set_linewidth(1.2)
    arrow.set_linestyle(":" if gradient else "-")
    ax.add_patch(arrow)


def draw_cell(ax: Axes, traffic: Traffic, rank: int, step: int) -> None:
    """What a rank computes with at a step: a bar for each block."""
    used = [use.block for use in traffic.uses if (use.rank, use.step) == (rank, step)]
    x, y = step * ACROSS, -rank - HIGH / 2
    ax.add_patch(Rectangle((x, y), WIDE, HIGH, facecolor="#f4f4f4", edgecolor="#cccccc", linewidth=0.6, zorder=2))
    for i, block in enumerate(used):
        high = HIGH / len(used)
        bottom = y + HIGH - (i + 1) * high
        ax.add_patch(Rectangle((x, bottom), WIDE, high, facecolor=COLOURS[block.owner], edgecolor="white", zorder=3))
        says = f"{block.owner}: {shown(block.rows)}" if traffic.steps < 8 else str(block.owner)
        ax.text(x + WIDE / 2, bottom + high / 2, says, ha="center", va="center", fontsize=8, color="white", zorder=4)


def shown(rows: Rows) -> str:
    """Rows as a range, or how many there are in how many ranges."""
    return f"{rows[0][0]}-{rows[0][1]}" if len(rows) == 1 else f"{count(rows)} in {len(rows)}"


def explain(ax: Axes) -> None:
    """How to read the picture."""
    lines = [
        "Each box: what a rank computes with at a step, in the colour of the rank that owns",
        "those rows (owner: rows of its memory, or how many rows in how many ranges).",
        "Arrows leave where a block is posted and arrive where it is due; what nobody needs",
        "is not sent. Dotted arrows carry gradients.",
    ]
    ax.text(0.02, 0.85, "\n".join(lines), fontsize=11, color=INK, va="top", linespacing=1.5, transform=ax.transAxes)
    ax.axis("off")


if __name__ == "__main__":
    draw(Path(__file__).with_name("schedules.png"))
