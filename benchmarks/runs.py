"""Several runs of the benchmarks together: the median of each figure over them, and how far they lie apart.

    python benchmarks/runs.py benchmarks/results/<one>.csv benchmarks/results/<another>.csv ... [--only peers overlap]

All are files that `make bench` wrote on the same hardware; commits may differ, and are printed. It prints the tables of
`make bench`, with "median (least to most)" in each cell, and the number of runs where not all have a figure. What a
table of one run cannot say stands in these brackets: by how much a figure differs when nothing but the hour does.

Exit codes: 0 the tables; 2 the question makes no sense.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from compare import MACHINE, read
from report import SHOWN, Figure, tables

from seqpar_ring.errors import ConfigError

Run = Sequence[Mapping[str, str]]
"""The rows of one file."""

HARDWARE = ("hardware", "instructions", "cores")
"""What must be the same in all runs."""


def together(runs: Sequence[Run]) -> list[Figure]:
    """A figure for each that some run has; its value says where those of the runs lie.

    Several of one name in a run (two batches with as many documents) count as several values.
    """
    values: dict[Figure, list[list[float]]] = defaultdict(lambda: [[] for _ in runs])
    for i, rows in enumerate(runs):
        for row in rows:
            if row["unit"]:  # the reason why something was not timed has none
                name = Figure(**{**{key: row[key] for key in Figure._fields}, "value": ""})
                values[name][i].append(float(row["value"]))
    return [name._replace(value=spread(found)) for name, found in values.items()]


def spread(values: Sequence[Sequence[float]]) -> str:
    """The median of all runs' values, the extremes, and how many runs have one, if not all."""
    some = [value for of_run in values for value in of_run]
    having = sum(bool(of_run) for of_run in values)
    about = [f"{min(some):.3g} to {max(some):.3g}"] if len(some) > 1 else []
    about += [f"{having} of {len(values)} runs"] if having < len(values) else []
    return f"{statistics.median(some):.3g}" + (f" ({'; '.join(about)})" if about else "")


def main() -> None:
    """Print what several runs say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="FILE", help="CSV files of runs on the same hardware")
    parser.add_argument("--only", nargs="+", choices=SHOWN, metavar="PART", help=f"of {', '.join(SHOWN)}")
    chosen = parser.parse_args()
    try:
        runs = {path: read(path) for path in chosen.runs}
        found = together(list(runs.values()))
    except (ConfigError, ValueError) as error:  # a value that is no number
        parser.error(str(error))
    machines = {" ".join(row.get(key) or "" for key in HARDWARE) for rows in runs.values() for row in rows}
    if len(machines) > 1:
        parser.error(f"runs of different machines have no median: {'; '.join(sorted(machines))}")
    for path, rows in runs.items():
        of = sorted({" ".join(row.get(key) or "" for key in MACHINE) for row in rows})
        print(f"{path.name}: {'; '.join(of)}: {len(rows)} figures")
    print(f"\n{tables([figure for figure in found if figure.benchmark in (chosen.only or SHOWN)])}")


if __name__ == "__main__":
    main()
