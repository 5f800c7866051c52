"""What the pictures of this folder share: colours by rank, strips of tokens, and the squares of pairs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from seqpar_ring.geometry import Tile

COLOURS = ("#2f6fab", "#e08a1e", "#3d9970", "#b0487f", "#7a5cb8", "#8c8c2b", "#c0504d", "#3aa6b9")
INK, FAINT = "#222222", "#eeeeee"


def cells(tile: Tile) -> Iterator[tuple[int, int]]:
    """The allowed (query row, key row) pairs of a tile."""
    for q in range(tile.q0, tile.q1):
        for k in range(tile.k0, tile.k1):
            if tile.lo <= (k - tile.k0) - (q - tile.q0) <= tile.hi:
                yield q, k


def draw_tokens(ax: Axes, x: float, y: float, width: float, owners: list[tuple[int, int]]) -> None:
    """A strip of tokens, each (rank, token number), coloured by the rank that holds it."""
    w = width / len(owners)
    for i, (rank, token) in enumerate(owners):
        ax.add_patch(Rectangle((x + i * w, y), w, 0.3, facecolor=COLOURS[rank], edgecolor="white", linewidth=0.8))
        ax.text(x + (i + 0.5) * w, y + 0.14, str(token), ha="center", va="center", fontsize=6.5, color="white")


def draw_pairs(
    ax: Axes, corner: tuple[float, float], cell: float, pairs: Iterable[tuple[int, int]], colour: str
) -> None:
    """Small squares at (row, column), downwards and to the right of a corner."""
    x, y = corner
    for row, column in pairs:
        box = (x + column * cell, y - (row + 1) * cell)
        ax.add_patch(Rectangle(box, cell, cell, facecolor=colour, edgecolor="white", linewidth=0.4))


def save(fig: Figure, path: Path) -> None:
    """Write a figure as PNG and forget it. With a palette: less than half the bytes, and no difference to see."""
    drawn = BytesIO()
    fig.savefig(drawn, format="png", dpi=100, bbox_inches="tight", facecolor="white")
    plt.close(fig)
    Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def target(name: str) -> Path:
    """The file to write: the argument, or this name beside the script."""
    return Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name(name)
