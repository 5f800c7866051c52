"""Draws docs/pictures/timeline.png: one ring with transfers that hide, and with transfers that do not, as planned."""

from __future__ import annotations

from pathlib import Path

import drawing

from seqpar_ring.config import Settings
from seqpar_ring.geometry import Mask
from seqpar_ring.planner.cost import Ring
from seqpar_ring.planner.hardware import machine
from seqpar_ring.planner.model import load_model
from seqpar_ring.planner.picture import Panel, draw, predicted

RANKS, NODE = 8, 4
HIDDEN, EXPOSED = 2**19, 2**14


def panel(tokens: int, words: str) -> Panel:
    """A layer of Llama-3.1-8B over two nodes of four H100."""
    row = load_model("llama-3.1-8b").row(2)
    on = machine("h100", "nvlink+ndr", NODE)
    ring = Ring((tokens,), Mask(), Settings(size=RANKS), row, (on, "bf16"))
    return predicted(ring, f"{words}: {tokens:,} tokens, {tokens // RANKS:,} a rank")


def main(path: Path) -> None:
    """Both, each on its own scale of time."""
    draw(path, [panel(HIDDEN, "Transfers hide"), panel(EXPOSED, "Transfers show")], one_scale=False)


if __name__ == "__main__":
    main(drawing.target("timeline.png"))
