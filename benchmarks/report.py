"""Figures of all benchmarks in one form: a line of CSV each, with what they were taken on, and tables for README.

Every script writes its own JSON, rows with names of its own; `SHOWN` says which of these are the setting of a figure
and which are figures. Nothing is measured here.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """One figure: of which benchmark, in which setting, over how many ranks, what, how much of which unit."""

    benchmark: str
    setting: str
    ranks: str
    metric: str
    value: str
    unit: str


class Shown(NamedTuple):
    """How to read a benchmark's rows.

    Attributes:
        setting: keys that say what was timed.
        metrics: keys of figures, and their units.
        headline: those of them that go into the tables.
        ranks: key of the number of ranks.
    """

    setting: tuple[str, ...]
    metrics: Mapping[str, str]
    headline: tuple[str, ...] = ()
    ranks: str = "ranks"


MACHINE = ("commit", "hardware", "instructions", "cores", "python", "torch", "numpy")
COLUMNS = (*Figure._fields, "date", *MACHINE)
"""Of the CSV file."""

RATES = {"forward_tflops": "TFLOP/s a rank", "backward_tflops": "TFLOP/s a rank", "host_us_a_step": "us"}

OVERHEAD = Shown(
    ("dtype", "pass", "tokens"),
    {"ratio": "x", "ratio_to_busy": "x", "in_kernel": "share", "ring_cpu_s": "s", "one_cpu_s": "s", "busy_cpu_s": "s"},
    ("ratio", "ratio_to_busy", "in_kernel"),
)

PEERS = Shown(
    ("dtype", "pass", "way", "version", "note", "tokens"),
    {"cpu_s": "s", "wall_s": "s", "cpu_over_one_process": "x", "wall_over_ours": "x"},
    ("cpu_over_one_process", "wall_over_ours"),
)

SHOWN: dict[str, Shown] = {
    "planning": Shown(("layout", "schedule", "documents"), {"total_ms": "ms"}, ("total_ms",)),
    "overhead": OVERHEAD,
    "overhead16": OVERHEAD,
    "packed": Shown(("what", "tokens", "documents"), dict.fromkeys(("ratio", "unshaped, ratio", "shaped, ratio"), "x")),
    "memory": Shown(("block_tokens",), {"blocks": "blocks"}, ("blocks",)),
    "peers": PEERS,
    "peers16": PEERS,
    "host": Shown(
        ("way", "version"),
        {
            "forward_us": "us",
            "backward_us": "us",
            "over_ours": "x",
            "forward_launches": "operators",
            "backward_launches": "operators",
        },
        ("forward_us", "backward_us", "over_ours"),
    ),
    "overlap": Shown(
        ("tokens", "schedule", "block_tokens", "cut", "kv_dtype", "dkv_dtype", "transfer_over_computation"),
        {"both": "s", "over_the_larger": "x"},
        ("over_the_larger",),
        "world",
    ),
    "shaped": Shown(
        ("tokens", "schedule", "layout", "block_tokens", "rate_bytes_per_s"),
        dict.fromkeys(("forward", "backward", "both"), "s"),
        ("both",),
        "world",
    ),
    "gpu": Shown(("case", "kernel", "tokens"), RATES, ("forward_tflops", "backward_tflops")),
    "multi_gpu": Shown(
        ("case", "way", "kernel", "schedule", "block_tokens", "tokens"), RATES, ("forward_tflops", "backward_tflops")
    ),
}


def figures(benchmark: str, rows: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """The figures of a benchmark's rows. Where something was not timed, the reason is the value."""
    shown, found = SHOWN[benchmark], []
    for row in rows:
        setting = ", ".join(f"{key} {row[key]}" for key in shown.setting if row.get(key) not in (None, ""))
        ranks = str(row.get(shown.ranks, ""))
        if "not timed" in row:
            found.append(Figure(benchmark, setting, ranks, "not timed", str(row["not timed"]), ""))
        for metric, unit in shown.metrics.items():
            if metric in row:
                found.append(Figure(benchmark, setting, ranks, metric, f"{row[metric]:.6g}", unit))
    return found


def write(path: Path, found: Sequence[tuple[Figure, Mapping[str, object]]], date: str) -> None:
    """A line for each figure, and the machine that it belongs to (as `machine.described` says)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for figure, machine in found:
            writer.writerow([*figure, date, *(machine.get(key, "") for key in MACHINE)])


def tables(found: Sequence[Figure]) -> str:
    """The figures that matter most, as tables in Markdown: one for each benchmark, a row for each setting."""
    parts = []
    for name, shown in SHOWN.items():
        mine = [f for f in found if f.benchmark == name and f.metric in (*shown.headline, "not timed")]
        if not mine:
            continue
        columns = [f"{metric.replace('_', ' ')}, {shown.metrics[metric]}" for metric in shown.headline]
        lines = [f"| {name} | ranks | {' | '.join(columns)} |", "| --- " * (2 + len(columns)) + "|"]
        for setting, ranks in dict.fromkeys((f.setting, f.ranks) for f in mine):
            values = {f.metric: f.value for f in mine if (f.setting, f.ranks) == (setting, ranks)}
            cells = [_cell(values.get(metric, "")) for metric in shown.headline]
            if "not timed" in values:
                cells[0] = f"not timed: {values['not timed']}"
            lines.append(f"| {setting} | {ranks} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cell(value: str) -> str:
    """A number in three digits; what is not one (that of several runs, with how far they lie apart) as it is."""
    try:
        return f"{float(value):.3g}"
    except ValueError:
        return value
