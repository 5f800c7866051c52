"""Runs of positions, bands of visibility, masks as regions, tiles between runs. Integers only; imports no torch."""

from seqpar_ring.geometry.bands import INF, Band, Part, Tile, area, causal, full, join, split, tile, window
from seqpar_ring.geometry.columns import (
    RunColumns,
    TileColumns,
    areas,
    join_equal,
    ramp,
    restrict,
    tiles_between,
    windows,
)
from seqpar_ring.geometry.masks import Ints, Mask, Region, Regions, region_area
from seqpar_ring.geometry.runs import Rows, Run, by_document, clip, count, union, view, within

__all__ = [
    "INF",
    "Band",
    "Ints",
    "Mask",
    "Part",
    "Region",
    "Regions",
    "Rows",
    "Run",
    "RunColumns",
    "Tile",
    "TileColumns",
    "area",
    "areas",
    "by_document",
    "causal",
    "clip",
    "count",
    "full",
    "join",
    "join_equal",
    "ramp",
    "region_area",
    "restrict",
    "split",
    "tile",
    "tiles_between",
    "union",
    "view",
    "window",
    "windows",
    "within",
]
