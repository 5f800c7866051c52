"""Draws docs/pictures/schedules.png: ranks down, steps across, from the very traffic that a run executes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
from drawing import INK, save
from matplotlib.axes import Axes

from seqpar_ring import layout as layouts
from seqpar_ring.config import Settings
from seqpar_ring.geometry import Mask
from seqpar_ring.packing import Balance
from seqpar_ring.planner.schedule_picture import HEAD, LINE, draw_traffic
from seqpar_ring.schedule import Route, Sides, Traffic

DOCUMENTS = [52, 18, 18, 14, 14, 12, 12, 10, 10]
LOOSE = Balance(1.1, 1.35)  # so few tokens cannot be as even as a hundred thousand


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
        names = {"schedule": self.schedule, "node": self.node or None, "block_tokens": self.block_tokens or "auto"}
        route = Route.of(Settings.parse({"size": self.world, **names}), sides)
        return route.backward() if self.backward else route.forward()[0]


LEFT = [
    Panel("ring: each block goes on to the next rank", "ring", 4, [64]),
    Panel("ring, block_tokens = half a block: pieces go round two by two", "ring", 4, [64], block_tokens=8),
    Panel("double_ring, nodes of 4: long transfers are posted a round ahead", "double_ring", 8, [128], node=4),
]
RIGHT = [
    Panel("ring, backward: gradients (dotted) go round with their block, then home", "ring", 4, [64], backward=True),
    Panel("ring, block_tokens = two blocks: two arrive at once, in jumps of two", "ring", 6, [96], block_tokens=32),
    Panel("all_gather: everything is posted at once", "all_gather", 4, [64]),
    Panel("direct, packed documents: only what is needed, from its owner", "direct", 4, DOCUMENTS, "packed"),
]


def draw(path: Path) -> None:
    """All panels in two columns, every rank as high as every other."""
    total = max(sum(panel.world + HEAD for panel in column) for column in (LEFT, RIGHT))
    fig = plt.figure(figsize=(15, total * LINE))
    for left, column in ((0.0, LEFT), (0.51, RIGHT)):
        top = total
        for panel in column:
            high = panel.world + HEAD
            ax = fig.add_axes((left, (top - high) / total, 0.49, high / total))
            draw_traffic(ax, panel.traffic(), panel.title, panel.node or None)
            top -= high
    explain(fig.add_axes((0.0, 0.0, 0.49, (total - sum(panel.world + HEAD for panel in LEFT)) / total)))
    save(fig, path)


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
