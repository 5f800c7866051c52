"""Draw memory.png: what a training step adds on a rank, by length and ranks, from benchmarks/results."""

from __future__ import annotations

import json
from pathlib import Path

import drawing
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results" / "training-memory.json"


def main() -> None:
    """Two panels: bytes against length, and what several ranks need of what one needs."""
    rows = json.loads(RESULTS.read_text())["steps"]
    by = {(row["ranks"], row["tokens"]): row["added"] / 2**20 for row in rows}
    sizes, lengths = (sorted({key[i] for key in by}) for i in (0, 1))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    for i, size in enumerate(sizes):
        colour, name = drawing.COLOURS[i], f"{size} rank" + "s" * (size > 1)
        left.plot(lengths, [by[size, n] for n in lengths], "o-", color=colour, label=name)
        right.plot(lengths, [by[size, n] / by[1, n] for n in lengths], "o-", color=colour, label=name)
        right.axhline(1 / size, color=colour, linewidth=0.8, linestyle=":")
    left.set_ylabel("MiB that a step adds on a rank")
    right.set_ylabel("share of one rank's (dotted: 1 / ranks)")
    right.set_ylim(0, 1.1)
    for ax in (left, right):
        ax.set_xlabel("tokens of the sequence")
        ax.set_xscale("log", base=2)
        ax.set_xticks(lengths, [f"{n:,}" for n in lengths])
        ax.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.tight_layout()
    drawing.save(figure, drawing.target("memory.png"))


if __name__ == "__main__":
    main()
