"""Runs of positions, bands of visibility, and the tiles between them. Integers only; imports no torch."""

from seqpar_ring.geometry.bands import INF, Band, Part, Tile, area, causal, full, join, split, tile, window
from seqpar_ring.geometry.runs import Rows, Run, by_document, clip, count, union, view

__all__ = [
    "INF",
    "Band",
    "Part",
    "Rows",
    "Run",
    "Tile",
    "area",
    "by_document",
    "causal",
    "clip",
    "count",
    "full",
    "join",
    "split",
    "tile",
    "union",
    "view",
    "window",
]
