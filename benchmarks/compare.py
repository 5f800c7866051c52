"""Two runs of the benchmarks beside each other: does what was measured before come out again?

    python benchmarks/compare.py benchmarks/results/<before>.csv benchmarks/results/<after>.csv [--within 0.1]

Both are files that `make bench` wrote. For each benchmark and unit it prints how many figures both have, and the median
and the extremes of the new value over the old one. Ratios (x, share) are judged: within `--within`, 0.1 by default,
they count as the same, for repetitions of one run differ by 2 to 10 % on machines that others use too; so do blocks of
memory, which are counted. Operators must be equal. Seconds and rates belong to a machine and an hour: they are shown
and not judged.

Exit codes: 0 everything judged is the same; 1 some is not, and is listed; 2 the question makes no sense.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from report import Figure

from seqpar_ring.errors import ConfigError

COUNTS = ("operators",)
RATIOS = ("x", "share", "blocks")
MACHINE = ("hardware", "instructions", "commit", "torch")
"""What is printed of each run."""


class Pair(NamedTuple):
    """A figure in both runs."""

    benchmark: str
    setting: str
    ranks: str
    metric: str
    unit: str
    before: float
    after: float

    @property
    def over(self) -> float:
        """The new value over the old one."""
        return self.after / self.before if self.before else float(self.after == self.before) or float("inf")

    def same(self, within: float) -> bool:
        """Whether the two count as the same; always, of a unit that is not judged."""
        if self.unit in COUNTS:
            return self.after == self.before
        return self.unit not in RATIOS or max(self.over, 1 / self.over if self.over else float("inf")) <= 1 + within


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file that `make bench` wrote.

    Raises:
        ConfigError: there is none, or it is another one.
    """
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"cannot read figures: {error}", fix="name a CSV file that make bench wrote") from None
    lacking = [name for name in Figure._fields if not rows or name not in rows[0]]
    if lacking:
        raise ConfigError(
            "not a file of figures", fix="name a CSV file that make bench wrote", path=path, lacks=", ".join(lacking)
        )
    return rows


def paired(before: Sequence[Mapping[str, str]], after: Sequence[Mapping[str, str]]) -> list[Pair]:
    """The figures that both have. Those of one name (two batches with as many documents) pair in their order."""
    old, found = _named(before), []
    for name, values in _named(after).items():
        found += [Pair(*name, *both) for both in zip(old.get(name, ()), values, strict=False)]
    return found


def _named(rows: Iterable[Mapping[str, str]]) -> dict[tuple[str, str, str, str, str], list[float]]:
    found = defaultdict(list)
    for row in rows:
        if row["unit"]:  # the reason why something was not timed has none
            name = (row["benchmark"], row["setting"], row["ranks"], row["metric"], row["unit"])
            found[name].append(float(row["value"]))
    return found


def summary(pairs: Sequence[Pair], within: float) -> str:
    """A table in Markdown: a row for each benchmark and unit."""
    lines = ["| benchmark | unit | figures | median, new over old | least | most | judged |", "| --- " * 7 + "|"]
    for benchmark, unit in dict.fromkeys((pair.benchmark, pair.unit) for pair in pairs):
        mine = [pair for pair in pairs if (pair.benchmark, pair.unit) == (benchmark, unit)]
        overs = [pair.over for pair in mine]
        same = sum(pair.same(within) for pair in mine)
        judged = f"{same} of {len(mine)} the same" if unit in (*COUNTS, *RATIOS) else "no"
        middle = f"{statistics.median(overs):.3f} | {min(overs):.3f} | {max(overs):.3f}"
        lines.append(f"| {benchmark} | {unit} | {len(mine)} | {middle} | {judged} |")
    return "\n".join(lines)


def main() -> int:
    """Print how two runs compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="CSV file of the older run")
    parser.add_argument("after", type=Path, help="CSV file of the newer run")
    parser.add_argument("--within", type=float, default=0.1, help="relative difference of two ratios that are the same")
    chosen = parser.parse_args()
    if not chosen.within >= 0:
        parser.error(f"--within {chosen.within:g}: at least 0")
    try:
        runs = {name: read(getattr(chosen, name)) for name in ("before", "after")}
        pairs = paired(runs["before"], runs["after"])
    except (ConfigError, ValueError) as error:  # a value that is no number
        parser.error(str(error))
    for name, rows in runs.items():
        machines = sorted({" ".join(row.get(key) or "" for key in MACHINE) for row in rows})
        print(f"{name:6}: {'; '.join(machines)}: {len(rows)} figures, {len(rows) - len(pairs)} of them in it alone")
    if not pairs:
        parser.error("the two runs have no figure in common")
    print(f"\n{summary(pairs, chosen.within)}")
    differ = sorted((pair for pair in pairs if not pair.same(chosen.within)), key=lambda pair: -abs(pair.over - 1))
    if differ:
        print(f"\nNot the same within {chosen.within:.0%}:")
    for pair in differ:
        ranks = f", {pair.ranks} ranks" if pair.ranks else ""
        print(f"  {pair.benchmark}: {pair.setting}{ranks}: {pair.metric} {pair.before:.4g}, now {pair.after:.4g}")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
