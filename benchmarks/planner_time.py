"""The planner's times against the clock: predicted and measured wall time of ring attention on shaped links.

    python benchmarks/planner_time.py [--world 2 4] [--seconds 5] [--nice -10] [--out benchmarks/results]
    python benchmarks/planner_time.py --again benchmarks/results/planner-time.json

For each number of ranks and each bandwidth the machine is probed in the very namespaces in which attention is then
timed (`shaped.py`; needs root), and each setting is priced on what the probe found: nothing is fitted to the times
that are predicted. Two figures come out: how far a prediction is off, and how much slower the setting that the
planner would pick is than the fastest that was measured. `--again` prices what was measured before with the planner
as it is now.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from machine import described
from shaped import Result, Setting, machines, measure

from seqpar_ring.geometry import Mask
from seqpar_ring.planner.cost import Ring
from seqpar_ring.planner.hardware import Machine
from seqpar_ring.planner.search import AS_FAST
from seqpar_ring.schedule import Row

RATES = {2: (8e6, 20e6, 60e6), 4: (8e6, 20e6, 60e6)}
"""Bytes per second, for which a whole block's transfer takes about three times, once and a third of its computation."""

WAYS = (("ring", 1), ("ring", 4), ("direct", 1), ("direct", 4), ("all_gather", 1))
"""Schedules, and in how many pieces a block travels; in the order of preference that the planner has for equals."""

Line = dict[str, Any]


def suite(worlds: Sequence[int]) -> list[Setting]:
    """What is measured: all ways at 8,192 tokens, a ring at 4,096 as well."""
    found = []
    for world in worlds:
        for rate in RATES[world]:
            for schedule, pieces in WAYS:
                block = 0 if pieces == 1 else 8192 // world // pieces
                found.append(Setting(world, 8192, schedule=schedule, block_tokens=block, rate_bytes_per_s=rate))
            found.append(Setting(world, 4096, rate_bytes_per_s=rate))
    return found


def predicted(setting: Setting, machine: Machine) -> tuple[float, float]:
    """Seconds of forward and of backward."""
    row = Row(setting.heads, setting.kv_heads, setting.head_dim, setting.head_dim, 4)
    ring = Ring((setting.tokens,), Mask(), setting.settings, row, (machine, "fp32"))
    return ring.forward.seconds, ring.backward.seconds


def compared(results: Sequence[Result], probed: dict[tuple[int, float], Machine]) -> list[Line]:
    """A row for each setting."""
    rows = []
    for result in results:
        s = result.setting
        forward, backward = predicted(s, probed[s.world, s.rate_bytes_per_s])
        off = (forward + backward) / result.both - 1
        times = {"forward": result.forward, "backward": result.backward, "both": result.both, "least": result.least}
        priced = {"predicted_forward": forward, "predicted_backward": backward, "off": off}
        rows.append({**s._asdict(), **times, **priced, "cpu": result.cpu, "load": result.load})
    return rows


def picks(rows: Sequence[Line]) -> Iterator[Line]:
    """For each number of ranks and each bandwidth: how much slower the planner's pick is than the fastest measured."""

    def key(row: Line) -> tuple[Any, ...]:
        return row["world"], row["rate_bytes_per_s"], row["tokens"]

    for (world, rate, tokens), group in groupby(sorted(rows, key=key), key):
        some = list(group)
        if len(some) < 2:
            continue
        prices = [row["predicted_forward"] + row["predicted_backward"] for row in some]
        # As the search does: of what is as fast as the fastest, the first in the order of preference.
        pick = next(row for row, price in zip(some, prices, strict=True) if price <= AS_FAST * min(prices))
        best = min(some, key=lambda row: row["both"])
        yield {
            "world": world,
            "rate_bytes_per_s": rate,
            "tokens": tokens,
            "pick": [pick["schedule"], pick["block_tokens"]],
            "best": [best["schedule"], best["block_tokens"]],
            "slower": pick["both"] / best["both"] - 1,
        }


def report(rows: Sequence[Line]) -> dict[str, Any]:
    """Print a table; returns the figures that count."""
    for r in rows:
        block = r["block_tokens"] or "whole"
        rate = f"{r['rate_bytes_per_s'] / 1e6:4.0f} MB/s"
        what = f"W={r['world']} {r['tokens']:5d} tokens {r['schedule']:10s} {block!s:>5} {rate}"
        told = r["predicted_forward"] + r["predicted_backward"]
        print(f"{what}  measured {1e3 * r['both']:7.1f} ms  predicted {1e3 * told:7.1f} ms  {r['off']:+.1%}")
    chosen = list(picks(rows))
    for one in chosen:
        print(
            f"W={one['world']} {one['rate_bytes_per_s'] / 1e6:4.0f} MB/s: picks {one['pick']}, "
            f"{one['slower']:.1%} slower than {one['best']}"
        )
    figures = {
        "settings": len(rows),
        "median_off": statistics.median(abs(row["off"]) for row in rows),
        "worst_off": max(abs(row["off"]) for row in rows),
        "worst_pick": max((one["slower"] for one in chosen), default=0.0),
    }
    print(", ".join(f"{name} {value:.3g}" for name, value in figures.items()))
    return {**figures, "picks": chosen}


def main() -> None:
    """Measure, predict, print, and write the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, nargs="*", default=[2, 4], choices=[2, 4], help="numbers of ranks")
    parser.add_argument("--seconds", type=float, default=5.0, help="that the repetitions of a setting may take")
    parser.add_argument("--nice", type=int, default=0, help="priority of the ranks; below 0 where others compute too")
    parser.add_argument("--again", type=Path, help="results to price again; nothing is measured")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON file")
    chosen = parser.parse_args()
    if chosen.again:
        again(chosen.again)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that namespaces are removed
    settings = suite(chosen.world)
    cases = list(dict.fromkeys((s.world, s.rate_bytes_per_s) for s in settings))
    found = machines(cases, chosen.nice, lambda line: print(line, flush=True))
    probed = dict(zip(cases, found, strict=True))
    results = measure(settings, chosen.seconds, chosen.nice, lambda line: print(line, flush=True))
    rows = compared(results, probed)
    figures = report(rows)
    record = {
        "machine": described(),
        **figures,
        "rows": rows,
        "probed": [{"world": w, "rate_bytes_per_s": r, "machine": m.model_dump()} for (w, r), m in probed.items()],
    }
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "planner-time.json").write_text(json.dumps(record, indent=1) + "\n")


def again(path: Path) -> None:
    """Price what was measured before."""
    record = json.loads(path.read_text())
    probed = {(p["world"], p["rate_bytes_per_s"]): Machine(**p["machine"]) for p in record["probed"]}
    fields = Setting._fields
    results = [
        Result(
            Setting(**{f: r[f] for f in fields}),
            r["forward"],
            r["backward"],
            r["both"],
            r["least"],
            r["cpu"],
            0,
            r["load"],
        )
        for r in record["rows"]
    ]
    report(compared(results, probed))


if __name__ == "__main__":
    main()
