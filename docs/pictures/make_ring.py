"""Draws docs/pictures/ring.png: how one sequence travels, from the library's own layout and schedule.

The picture is made from the very data that a training run executes, so it cannot show something else. Run it with
`make picture`; the optional argument is the file to write.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from drawing import COLOURS, FAINT, INK, cells, draw_pairs, draw_tokens, save, target
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

from seqpar_ring import layout
from seqpar_ring.geometry import Mask, area, count, view
from seqpar_ring.schedule import Fabric, Needs, Sides, Traffic, choose, tiles

WORLD, TOKENS = 4, 32
SIDE = 1.0  # of the square of one rank's queries against one rank's keys
LEFT, ACROSS, DOWN = 2.75, 1.72, 1.52  # where the squares begin, and from one to the next


def corner(rank: int, step: int) -> tuple[float, float]:
    """Upper left corner of the square of a rank at a step."""
    return LEFT + step * ACROSS, -1.62 - rank * DOWN


def draw_square(ax: Axes, sides: Sides, traffic: Traffic, rank: int, step: int) -> int:
    """The work of one rank at one step: its queries downwards, the block's keys across. Returns the pairs computed."""
    x, y = corner(rank, step)
    (use,) = (u for u in traffic.uses if (u.rank, u.step) == (rank, step))
    owner, rows = use.block
    placed = sides.q
    n_q, n_k = (sum(run.n for run in placed[who]) for who in (rank, owner))
    cell = SIDE / max(n_q, n_k)
    ax.add_patch(Rectangle((x, y - SIDE), SIDE, SIDE, facecolor="white", edgecolor="#cccccc", linewidth=0.7))
    ax.add_patch(Rectangle((x, y - SIDE), count(rows) * cell, SIDE, facecolor=FAINT, edgecolor="none"))
    found = tiles(placed[rank], view(placed[owner], rows), sides.regions)
    draw_pairs(ax, (x, y), cell, (pair for tile in found for pair in cells(tile)), COLOURS[owner])
    ax.add_patch(Rectangle((x - 0.09, y - SIDE), 0.06, SIDE, facecolor=COLOURS[rank], edgecolor="none"))
    width = count(rows) * cell
    ax.add_patch(Rectangle((x, y + 0.03), width, 0.06, facecolor=COLOURS[owner], edgecolor="none"))
    return sum(map(area, found))


def draw_moves(ax: Axes, traffic: Traffic) -> None:
    """Arrows from where a block leaves to where it is used; round the end of the ring they go out and come in."""
    for move in traffic.kv:
        x0, y0 = corner(move.src, move.post)
        x1, y1 = corner(move.dst, move.due)
        out, into = (x0 + SIDE + 0.05, y0 - SIDE / 2), (x1 - 0.14, y1 - SIDE / 2)
        colour = COLOURS[move.block.owner]
        style: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 11, "linewidth": 1.6, "color": colour}
        if abs(move.src - move.dst) == 1:
            ax.add_patch(FancyArrowPatch(out, into, connectionstyle="arc3,rad=0", **style))
            continue
        gap, dash = DOWN * 0.55, {**style, "linestyle": (0, (2.5, 1.5))}
        ax.add_patch(FancyArrowPatch(out, (out[0] + 0.27, out[1] - gap), **{**dash, "arrowstyle": "-"}))
        ax.add_patch(FancyArrowPatch((into[0] - 0.27, into[1] + gap), into, **dash))


def draw(path: Path) -> None:
    """Draw everything and write the file."""
    placed = layout.make("zigzag", [TOKENS], WORLD)
    sides = Sides(placed, placed, Mask().regions([TOKENS]))
    traffic, _ = choose("ring", Needs(*sides), Fabric(WORLD, WORLD))
    held = [[(rank, token) for _, token in layout.positions(runs)] for rank, runs in enumerate(placed)]
    fig, ax = plt.subplots(figsize=(10, 8.4))
    right = LEFT + (WORLD - 1) * ACROSS + SIDE
    draw_tokens(ax, 0.0, -0.55, right, sorted((pair for of in held for pair in of), key=lambda pair: pair[1]))
    ax.text(0, -0.12, f"One sequence of {TOKENS} tokens, zigzag over {WORLD} ranks", fontsize=12.5, color=INK)
    ax.text(0, -1.3, "tokens held", fontsize=9.5, color=INK)
    for step in range(traffic.steps):
        ax.text(corner(0, step)[0] + SIDE / 2, -1.3, f"step {step}", ha="center", fontsize=9.5, color=INK)
    ax.text(right + 0.55, -1.3, "pairs", ha="center", fontsize=9.5, color=INK)
    for rank in range(WORLD):
        pairs = sum(draw_square(ax, sides, traffic, rank, step) for step in range(traffic.steps))
        middle = corner(rank, 0)[1] - SIDE / 2
        ax.text(0, middle + 0.26, f"rank {rank}", fontsize=10.5, color=COLOURS[rank], weight="bold")
        draw_tokens(ax, 0, middle - 0.15, 1.95, held[rank])
        ax.text(right + 0.55, middle, str(pairs), ha="center", va="center", fontsize=10.5, color=INK)
    draw_moves(ax, traffic)
    ax.set_xlim(-0.05, right + 0.95)
    ax.set_ylim(corner(WORLD - 1, 0)[1] - SIDE - 1.1, 0.15)
    note = (
        "Each square: a rank's own queries (down) against the keys it has now (across), in the colour of their owner.\n"
        "Coloured pairs are computed. Keys and values move on one rank a step; "
        "where half a block is enough, half is sent."
    )
    ax.text(0, corner(WORLD - 1, 0)[1] - SIDE - 1.05, note, fontsize=9, color=INK, va="bottom", linespacing=1.5)
    ax.set_aspect("equal")
    ax.axis("off")
    save(fig, path)


if __name__ == "__main__":
    draw(target("ring.png"))
