"""Canvas: what pictures share: colours, and figures written as PNG. matplotlib is imported when something is drawn.

Figures are made without pyplot, so that drawing leaves no state behind and needs no display.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from seqpar_ring.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#2f6fab", "#e08a1e", "#3d9970", "#b0487f", "#7a5cb8", "#8c8c2b", "#c0504d", "#3aa6b9")
"""Of ranks, in turn."""

INK, FAINT = "#222222", "#eeeeee"

DOTS = 110
"""Dots of an inch."""


def rank_colour(rank: int) -> str:
    """A rank's colour."""
    return COLOURS[rank % len(COLOURS)]


def figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("pictures need matplotlib", fix='Install it: pip install "seqpar-ring[plot]".') from None
    fig = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(fig)
    return fig


def save(fig: Figure, path: Path) -> None:
    """Write a figure as PNG. With a palette: less than half the bytes, and no difference to see.

    Raises:
        ConfigError: the file cannot be written.
    """
    from PIL import Image

    drawn = BytesIO()
    fig.savefig(drawn, format="png", dpi=DOTS, bbox_inches="tight")
    try:
        palette = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
        palette.save(path, format="PNG", optimize=True)
    except OSError as error:
        fix = "Give a path in a folder that exists and can be written."
        raise ConfigError("the picture cannot be written", fix=fix, path=str(path), says=str(error)) from None
