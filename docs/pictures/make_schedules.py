"""Draws docs/pictures/schedules.png: ranks down, steps across, from the very traffic that a run executes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
from drawing import COLOURS, INK, save
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

from seqpar_ring import layout as layouts
from seqpar_ring.geometry import Mask, Rows, count
from seqpar_ring.packing import Balance
from seqpar_ring.schedule import Fabric, Granularity, Needs, Sides, Traffic, choose, transpose

DOCUMENTS = [26, 9, 9, 7, 7, 6, 6, 5, 5]
LOOSE = Balance(1.1, 1.35)  # eighty tokens cannot be as even as eighty thousand
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


PANELS = [
    Panel("ring: each block goes on to the next rank", "ring", 4, [64]),
    Panel("ring, backward: gradients (dotted) follow their block home", "ring", 4, [64], backward=True),
    Panel("ring, block_tokens = half a block: first halves go round first", "ring", 4, [64], block_tokens=8),
    Panel("ring, block_tokens = two blocks: two arrive at once, in jumps of two", "ring", 6, [96], block_tokens=32),
    Panel("double_ring, nodes of 4: long transfers a round ahead", "double_ring", 8, [128], node=4),
    Panel("all_gather: everything is posted at once", "all_gather", 4, [64]),
    Panel("direct, packed documents: only what is needed, from its owner", "direct", 4, DOCUMENTS, "packed"),
]


def draw(path: Path) -> None:
    """All panels, one below the other in two columns."""
    heights = [panel.world for panel in PANELS]
    fig, axes = plt.subplots(4, 2, figsize=(15, 19), height_ratios=[max(heights[i : i + 2]) for i in range(0, 8, 2)])
    for ax, panel in zip(axes.flat, PANELS, strict=False):
        draw_panel(ax, panel)
    explain(axes.flat[-1])
    fig.subplots_adjust(hspace=0.16, wspace=0.06)
    save(fig, path)


def draw_panel(ax: Axes, panel: Panel) -> None:
    """One schedule."""
    traffic = panel.traffic()
    ax.set_title(panel.title, fontsize=11, color=INK, loc="left")
    for step in range(traffic.steps):
        ax.text(step * ACROSS + WIDE / 2, 0.62, f"step {step}", ha="center", fontsize=9, color=INK)
    for rank in range(traffic.world):
        ax.text(-0.2, -rank, f"rank {rank}", ha="right", va="center", fontsize=9.5, color=COLOURS[rank], weight="bold")
        for step in range(traffic.steps):
            draw_cell(ax, traffic, rank, step)
    for moves, open_ in ((traffic.kv, False), (traffic.dkv, True)):
        for move in moves:
            start = (move.post * ACROSS + WIDE + 0.04, -move.src - (0.15 if open_ else -0.05))
            end = (move.due * ACROSS - 0.05, -move.dst - (0.15 if open_ else -0.05))
            style = "->" if open_ else "-|>"
            arrow = FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=9, color=COLOURS[move.block.owner])
            arrow.set_linewidth(1.0)
            arrow.set_linestyle(":" if open_ else "-")
            ax.add_patch(arrow)
    if panel.node:
        ax.axhline(0.5 - panel.node, color="#999999", linewidth=1, linestyle="--")
    ax.set_xlim(-1.1, traffic.steps * ACROSS)
    ax.set_ylim(-traffic.world + 0.4, 0.95)
    ax.axis("off")


def draw_cell(ax: Axes, traffic: Traffic, rank: int, step: int) -> None:
    """What a rank computes with at a step: a bar for each block, as wide as its rows."""
    used = [use.block for use in traffic.uses if (use.rank, use.step) == (rank, step)]
    x, y = step * ACROSS, -rank - HIGH / 2
    ax.add_patch(Rectangle((x, y), WIDE, HIGH, facecolor="#f4f4f4", edgecolor="#cccccc", linewidth=0.6))
    for i, block in enumerate(used):
        high = HIGH / len(used)
        bottom = y + HIGH - (i + 1) * high
        ax.add_patch(Rectangle((x, bottom), WIDE, high, facecolor=COLOURS[block.owner], edgecolor="white"))
        says = f"{block.owner}: {shown(block.rows)}" if traffic.steps < 7 else str(block.owner)
        ax.text(x + WIDE / 2, bottom + high / 2, says, ha="center", va="center", fontsize=7.5, color="white")


def shown(rows: Rows) -> str:
    """Rows as a range, or how many there are in how many ranges."""
    return f"{rows[0][0]}-{rows[0][1]}" if len(rows) == 1 else f"{count(rows)} in {len(rows)}"


def explain(ax: Axes) -> None:
    """How to read the picture."""
    lines = [
        "Each box: what a rank computes with at a step,",
        "in the colour of the rank that owns those rows",
        "(owner: rows of its memory).",
        "",
        "Arrows leave where a block is posted and arrive",
        "where it is used; what nobody needs is not sent.",
        "Dotted arrows carry gradients.",
    ]
    ax.text(0.05, 0.9, "\n".join(lines), fontsize=11.5, color=INK, va="top", linespacing=1.6, transform=ax.transAxes)
    ax.axis("off")


if __name__ == "__main__":
    draw(Path(__file__).with_name("schedules.png"))
