"""Draws docs/pictures/layouts.png and masks.png: who holds which token, and who computes which pair.

Both are made by the library's own layouts and masks. Run it with `make picture`.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from drawing import COLOURS, INK, cells, draw_pairs, save
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from seqpar_ring import layout as layouts
from seqpar_ring.geometry import Mask, Regions, Run, area
from seqpar_ring.packing import Balance
from seqpar_ring.schedule import tiles

WORLD = 4
LENGTHS = [52, 18, 18, 14, 14, 12, 12, 10, 10]
LOOSE = Balance(1.1, 1.35)  # so few tokens cannot be as even as a hundred thousand
ORDER = ("contiguous", "zigzag", "striped", "packed")
SAYS = {
    "contiguous": "a plain cut: simple, and uneven under a causal mask",
    "zigzag": "2W chunks of each document, r and 2W - 1 - r for rank r: nearly equal work",
    "striped": "every W-th token: nearly equal work, and tokens even to one",
    "packed": "short documents whole (never sent), long ones zigzag over 2, 4, .. ranks",
}


def everywhere(length: int) -> tuple[Run, ...]:
    """All of one document, as one run."""
    return (Run(0, 0, length, 1, 0),)


def draw_layouts(path: Path) -> None:
    """A strip of all tokens for each layout, documents apart, and each rank's tokens and work beside it."""
    fig, ax = plt.subplots(figsize=(12, 5.2))
    cell, gap = 0.058, 0.14
    regions = Mask().regions(LENGTHS)
    for line, name in enumerate(ORDER):
        placed = layouts.make(name, LENGTHS, WORLD, LOOSE)
        owner = {token: rank for rank, runs in enumerate(placed) for token in layouts.positions(runs)}
        y, x = -1.15 * line, 0.0
        ax.text(0, y + 0.42, name, fontsize=11.5, weight="bold", color=INK)
        ax.text(1.9, y + 0.42, SAYS[name], fontsize=10, color=INK)
        for doc, length in enumerate(LENGTHS):
            for position in range(length):
                colour = COLOURS[owner[doc, position]]
                ax.add_patch(Rectangle((x, y), cell, 0.3, facecolor=colour, edgecolor="white", linewidth=0.35))
                x += cell
            x += gap
        keys = [run for runs in placed for run in runs]
        work = [sum(area(t) for run in runs for t in tiles([run], keys, regions)) for runs in placed]
        for rank in range(WORLD):
            share = work[rank] * WORLD / sum(work)
            says = f"{placed.sizes[rank]} tokens\nwork {share:.2f}"
            ax.text(x + 0.2 + 1.3 * rank, y + 0.02, says, fontsize=9, color=COLOURS[rank], linespacing=1.3)
    lengths = ", ".join(map(str, LENGTHS))
    head = f"Documents of {lengths} tokens over {WORLD} ranks, each a colour. Work: allowed pairs, 1 is the mean."
    ax.text(0, 0.95, head, fontsize=10.5, color=INK)
    ax.set_xlim(-0.05, x + 5.2)
    ax.set_ylim(-1.15 * (len(ORDER) - 1) - 0.15, 1.2)
    ax.axis("off")
    save(fig, path)


def masks(n: int) -> list[tuple[str, list[int], Regions, int]]:
    """Name, lengths of the documents, regions, number of keys; all for `n` queries."""
    two = [n // 3, n - n // 3]
    return [
        ("full", [n], Mask(causal=False).regions([n]), n),
        ("causal", [n], Mask().regions([n]), n),
        ("window=5", [n], Mask(window=5).regions([n]), n),
        ("chunk=6", [n], Mask(chunk=6).regions([n]), n),
        ("prefix=7", [n], Mask(prefix=7).regions([n]), n),
        ("two documents", two, Mask().regions(two), n),
        ("causal=False, window=(4, 2)", [n], Mask(causal=False, window=(4, 2)).regions([n]), n),
        (f"cross-attention, {n - 8} keys", [n], Mask(causal=False).regions([n], [n - 8]), n - 8),
    ]


def draw_masks(path: Path) -> None:
    """Every kind of mask as a square of pairs, coloured by the rank whose query it is, zigzag over 4 ranks."""
    n = 24
    fig, axes = plt.subplots(2, 4, figsize=(12, 6.6))
    for ax, (name, lengths, regions, keys) in zip(axes.flat, masks(n), strict=True):
        draw_mask(ax, lengths, regions, n, keys)
        ax.set_title(name, fontsize=11, color=INK)
    says = "Queries downwards, keys across. The colour is the rank that holds the query and computes the pair (zigzag)."
    fig.suptitle(says, fontsize=11, color=INK, y=0.99)
    save(fig, path)


def draw_mask(ax: Axes, lengths: list[int], regions: Regions, queries: int, keys: int) -> None:
    """One square."""
    placed = layouts.make("zigzag", lengths, WORLD)
    first = layouts.offsets(lengths)
    whole = [Run(doc, 0, n, 1, at) for doc, (n, at) in enumerate(zip(lengths, first, strict=True))]
    if keys != queries:
        whole = [Run(0, 0, keys, 1, 0)]
    ax.add_patch(Rectangle((0, -queries), keys, queries, facecolor="#f4f4f4", edgecolor="#cccccc"))
    for rank, runs in enumerate(placed):
        for run in runs:
            here = [run._replace(at=first[run.doc] + run.start)]
            found = tiles(here, whole, regions)
            draw_pairs(ax, (0, 0), 1, (pair for tile in found for pair in cells(tile)), COLOURS[rank])
    ax.set_xlim(-0.5, queries + 0.5)
    ax.set_ylim(-queries - 0.5, 0.5)
    ax.set_aspect("equal")
    ax.axis("off")


if __name__ == "__main__":
    here = Path(__file__).parent
    draw_layouts(here / "layouts.png")
    draw_masks(here / "masks.png")
