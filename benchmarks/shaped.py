"""Ring attention on shaped links: wall time of forward and backward against bandwidth, schedule and block size.

    python benchmarks/shaped.py [--suite NAME] [--world 2 4] [--nice -10] [--out benchmarks/results]
    python benchmarks/shaped.py --list

Ranks are processes in network namespaces of their own (`netns.py`; needs root), each on its core (W = 2) or two to a
core (W = 4), with links limited by token buckets. Figures are medians over repetitions; a repetition runs from the
moment at which the first rank begins to that at which the last is done, on the clock that all processes share.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import described
from netns import PACKET, Rates, ShapedRanks, missing

from seqpar_ring import ring_attention
from seqpar_ring.config import Settings
from seqpar_ring.errors import UnsupportedError
from seqpar_ring.groups import Groups
from seqpar_ring.parallel import SequenceParallel
from seqpar_ring.planner.hardware import Machine
from seqpar_ring.probe import Options, probe

INNER = 4.0
"""How many times faster links within a node are, where a setting has nodes."""


class Setting(NamedTuple):
    """What is measured: one attention, forward and backward, and the link of each rank.

    `block_tokens` 0 stands for "auto", a whole block. The rate is in bytes per second in each direction, 0 for
    unlimited. A double ring has nodes of two ranks, and `INNER` times that rate within them.
    """

    world: int
    tokens: int
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    dtype: str = "float32"
    schedule: str = "ring"
    layout: str = "zigzag"
    block_tokens: int = 0
    heads_degree: int = 1
    rate_bytes_per_s: float = 0.0
    kv_dtype: str = "same"
    dkv_dtype: str = "fp32"
    cut: str = "even"

    @property
    def node(self) -> int | None:
        """Ranks of a node; None where there are none."""
        return 2 if self.schedule == "double_ring" else None

    @property
    def settings(self) -> Settings:
        """The same as settings of the library."""
        return Settings.parse(
            {
                "size": self.world,
                "schedule": self.schedule,
                "layout": self.layout,
                "block_tokens": self.block_tokens or "auto",
                "heads": self.heads_degree,
                "node": self.node,
                "kv_dtype": self.kv_dtype,
                "dkv_dtype": self.dkv_dtype,
                "cut": self.cut,
            }
        )

    @property
    def rates(self) -> Rates:
        """The links."""
        rate = self.rate_bytes_per_s or None
        return Rates(rate) if self.node is None or rate is None else Rates(rate, INNER * rate, self.node)


class Result(NamedTuple):
    """Wall seconds, medians: of a forward pass, of a backward pass, and of one after the other without a stop between.

    Attributes:
        setting: what was measured.
        forward, backward, both: medians.
        least: the least of each of the three.
        cpu: seconds of processor time of both passes together, of each rank; copies of messages among them.
        repeats: number of repetitions.
        load: processes that wanted to run, on average over the last minute, ranks included.
    """

    setting: Setting
    forward: float
    backward: float
    both: float
    least: tuple[float, float, float]
    cpu: tuple[float, ...]
    repeats: int
    load: float


def measure(
    settings: Sequence[Setting],
    seconds: float = 8.0,
    nice: int = 0,
    progress: Callable[[str], None] | None = None,
    turns: int = 0,
    packet: int = PACKET,
) -> list[Result]:
    """Measure settings, those of one world size together over the same processes. Needs root.

    Args:
        settings: what to measure; results come in their order.
        seconds: that one setting's repetitions may take together, but at least three are made.
        nice: priority of the ranks.
        progress: gets a line for each.
        turns: where they are to be compared with one another on a machine whose pace changes: so many rounds, in each
            of which every setting runs once, in place of `seconds`. Forward and backward are then those of the pass in
            which neither is waited for. 0: one setting after the other.
        packet: bytes of those that links carry, see `netns.PACKET`.

    Raises:
        UnsupportedError: no network namespaces here.
        TransportError: a rank failed.
    """
    if why := missing():
        raise UnsupportedError("no links can be shaped here", fix="Run as root on Linux with iproute2.", why=why)
    found: dict[int, Result] = {}
    for world in sorted({s.world for s in settings}):
        with ShapedRanks(world, nice=nice, packet=packet) as ranks:
            here = [i for i, setting in enumerate(settings) if setting.world == world]
            rounds: dict[int, list[list[_Times]]] = {i: [] for i in here}
            for _ in range(max(1, turns)):
                for i in here:
                    ranks.shape(settings[i].rates)
                    one = ranks.run(_once, settings[i]) if turns else ranks.run(_repeated, settings[i], seconds)
                    rounds[i].append(one)
                    found[i] = _result(settings[i], [_joined(of) for of in zip(*rounds[i], strict=True)])
                    if progress is not None:
                        progress(shown(found[i]))
    return [found[i] for i in range(len(settings))]


def machines(
    cases: Sequence[tuple[int, float]], nice: int = 0, progress: Callable[[str], None] | None = None
) -> list[Machine]:
    """Machines as the probe finds them on these links, each rank a node of its own. Needs root.

    Args:
        cases: numbers of ranks, and bytes per second; 0 for unlimited.
        nice: priority of the ranks.
        progress: gets a line for each.
    """
    found: dict[tuple[int, float], Machine] = {}
    for world in sorted({world for world, _ in cases}):
        with ShapedRanks(world, nice=nice) as ranks:
            options = Options(dtypes=("fp32",), node=1, quick=True)
            for rate in dict.fromkeys(rate for of, rate in cases if of == world):
                ranks.shape(Rates(rate or None))
                machine = ranks.run(_probed, options)[0]
                # What is computed does not depend on the links.
                options = options._replace(device=machine.device)
                found[world, rate] = machine
                if progress is not None:
                    progress(f"W={world} {rate / 1e6:6.1f} MB/s: {machine.outer}")
    return [found[case] for case in cases]


def _probed(groups: Groups, options: Options) -> Machine:
    return probe(groups, options)


class _Times(NamedTuple):
    """A rank's repetitions: (begin, end) on the common clock, and processor seconds of both passes."""

    forward: list[tuple[float, float]]
    backward: list[tuple[float, float]]
    both: list[tuple[float, float]]
    cpu: list[float]


def _joined(rounds: Sequence[_Times]) -> _Times:
    """A rank's repetitions of all rounds."""
    return _Times(*(list(itertools.chain(*of)) for of in zip(*rounds, strict=True)))


_READY: dict[Setting, Callable[[bool], list[float]]] = {}
"""This rank's settings that have been warmed up; one that differs in the link alone is the same."""


def _once(groups: Groups, setting: Setting) -> _Times:
    """Both passes, without a stop between."""
    key = setting._replace(rate_bytes_per_s=0.0)
    if key not in _READY:
        _READY[key] = _passes(groups, setting)
        _READY[key](False)
    begin = time.process_time()
    a, b, c, d = _READY[key](False)
    return _Times([(a, b)], [(c, d)], [(a, d)], [time.process_time() - begin])


def _passes(groups: Groups, setting: Setting) -> Callable[[bool], list[float]]:
    """A function that runs forward and backward, and returns when each began and ended; `stop`: all wait in between."""
    sp = SequenceParallel.over(groups, setting.settings)
    plan = sp.plan(setting.tokens)
    dtype = getattr(torch, setting.dtype)
    generator = torch.Generator().manual_seed(plan.sequence.rank)
    heads = (setting.heads, setting.kv_heads, setting.kv_heads, setting.heads)
    shapes = [(1, plan.local_tokens, h, setting.head_dim) for h in heads]
    q, k, v, dout = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run(stop: bool) -> list[float]:
        marks = [_start(sp)]
        out = ring_attention(q, k, v, plan)
        marks.append(time.monotonic())
        marks.append(_start(sp) if stop else marks[-1])
        torch.autograd.grad(out, leaves, dout)
        return [*marks, time.monotonic()]

    return run


def _repeated(groups: Groups, setting: Setting, seconds: float) -> _Times:
    run = _passes(groups, setting)
    run(False)  # warms up, and makes the plan of backward
    begin = time.monotonic()
    run(True)
    once = torch.tensor([time.monotonic() - begin], dtype=torch.float64)
    mean = float(groups.ring.all_reduce(once)) / groups.size  # the same on all ranks
    repeats = max(3, min(15, round(seconds / (2 * mean))))
    times = _Times([], [], [], [])
    for _ in range(repeats):
        a, b, c, d = run(True)
        times.forward.append((a, b))
        times.backward.append((c, d))
        begin = time.process_time()
        a, _, _, d = run(False)
        times.cpu.append(time.process_time() - begin)
        times.both.append((a, d))
        time.sleep(min(mean, 1.0))  # so that others who compute here have their turn
    return times


def _start(sp: SequenceParallel) -> float:
    """When this rank goes on, after all have come here. The links are idle for a moment, so their buckets are full."""
    sp.groups.ring.agree("start", {})
    time.sleep(0.005)
    sp.groups.ring.agree("start", {})
    return time.monotonic()


def _result(setting: Setting, ranks: list[_Times]) -> Result:
    def walls(name: str) -> list[float]:
        runs = zip(*(getattr(rank, name) for rank in ranks), strict=True)
        return [max(end for _, end in run) - min(begin for begin, _ in run) for run in runs]

    found = [walls(name) for name in ("forward", "backward", "both")]
    least = min(found[0]), min(found[1]), min(found[2])
    cpu = tuple(statistics.median(rank.cpu) for rank in ranks)
    forward, backward, both = (statistics.median(one) for one in found)
    return Result(setting, forward, backward, both, least, cpu, len(found[0]), os.getloadavg()[0])


def shown(result: Result) -> str:
    """One line for the terminal."""
    s = result.setting
    rate = f"{s.rate_bytes_per_s / 1e6:6.1f} MB/s" if s.rate_bytes_per_s else "  no limit "
    block = s.block_tokens or "auto"
    what = f"W={s.world} {s.tokens:6d} tokens {s.schedule:11s} {s.layout:10s} block {block:>5} {rate}"
    forward, backward, both, least = (1e3 * x for x in (result.forward, result.backward, result.both, result.least[2]))
    times = f"forward {forward:7.1f}  backward {backward:7.1f}  both {both:7.1f} ms"
    return f"{what}  {times}  (least {least:.1f}, {result.repeats} runs, load {result.load:.1f})"


def _grid() -> list[Setting]:
    """Tokens, schedules, block sizes and rates, so that links are a third to three times as slow as computation."""
    found = []
    for world in (2, 4):
        for rate in (10e6, 30e6, 100e6):
            found += [Setting(world, 4096, rate_bytes_per_s=rate), Setting(world, 8192, rate_bytes_per_s=rate)]
            found += [Setting(world, 8192, block_tokens=8192 // world // 4, rate_bytes_per_s=rate)]
        found += [Setting(world, 8192, schedule="direct", rate_bytes_per_s=rate) for rate in (10e6, 30e6)]
        found += [Setting(world, 8192, schedule="all_gather", rate_bytes_per_s=30e6)]
        found += [Setting(world, 8192, layout="contiguous", rate_bytes_per_s=30e6)]
        found += [Setting(world, 8192)]
    found += [Setting(4, 8192, schedule="double_ring", rate_bytes_per_s=rate) for rate in (10e6, 30e6)]
    found += [Setting(4, 8192, block_tokens=4096, rate_bytes_per_s=rate) for rate in (10e6, 30e6)]
    return found


SUITES: dict[str, Callable[[], list[Setting]]] = {
    "quick": lambda: [Setting(2, 2048, rate_bytes_per_s=rate) for rate in (10e6, 50e6)],
    "grid": _grid,
}


def main() -> None:
    """Measure a suite, print it, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=list(SUITES), default="grid")
    parser.add_argument("--world", type=int, nargs="*", help="only these numbers of ranks")
    parser.add_argument("--seconds", type=float, default=8.0, help="that the repetitions of a setting may take")
    parser.add_argument("--nice", type=int, default=0, help="priority of the ranks; below 0 where others compute too")
    parser.add_argument("--probe", action="store_true", help="also probe the machine that each rate makes")
    parser.add_argument("--list", action="store_true", help="print the settings, and measure nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON file")
    chosen = parser.parse_args()
    settings = [s for s in SUITES[chosen.suite]() if not chosen.world or s.world in chosen.world]
    if chosen.list:
        print("\n".join(map(str, settings)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that namespaces are removed
    results = measure(settings, chosen.seconds, chosen.nice, lambda line: print(line, flush=True))
    rows: list[dict[str, Any]] = [{**r.setting._asdict(), **r._asdict()} for r in results]
    for row in rows:
        del row["setting"]
    cases = list(dict.fromkeys((s.world, s.rate_bytes_per_s) for s in settings)) if chosen.probe else []
    made = zip(cases, machines(cases, chosen.nice, lambda line: print(line, flush=True)), strict=True)
    probed = [{"world": w, "rate_bytes_per_s": rate, "machine": m.model_dump()} for (w, rate), m in made]
    chosen.out.mkdir(parents=True, exist_ok=True)
    record = {"machine": described(), "nice": chosen.nice, "rows": rows, "probed": probed}
    (chosen.out / f"shaped-{chosen.suite}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    from shaped import main as run  # by its name, under which the ranks find what they are to run

    run()
