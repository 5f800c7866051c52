"""What ring attention costs on a CPU beside the work itself, and beside others: planning, time, memory, traffic, peers.

    python benchmarks/attention.py planning|overhead|overhead16|packed|memory|peers|peers16|all [--quick] [--out FOLDER]
    python benchmarks/attention.py peers --times 9 --ways seqpar_ring "DeepSpeed Ulysses"

Every figure is the median over repetitions in one run, alternating with what it is compared to; CPU time of all ranks
stands beside wall time. Results are written as JSON with the machine and the versions. Nothing here needs a GPU.
`--quick` takes sizes at which only that it runs can be seen.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import described
from memory import memory
from mixes import documents, half_below, share_below
from peer_ways import WAYS
from peers import NAMES, peers

from seqpar_ring import layout as layouts
from seqpar_ring import ring_attention
from seqpar_ring.config import Settings
from seqpar_ring.geometry import Mask
from seqpar_ring.groups import Groups
from seqpar_ring.kernels import register, unregister
from seqpar_ring.kernels.cpu import CpuKernel
from seqpar_ring.parallel import SequenceParallel
from seqpar_ring.schedule import Fabric, Needs, Sides, choose, rows_sent, work
from seqpar_ring.testing import Case, RankPool
from seqpar_ring.testing.threads import run_lockstep_groups
from seqpar_ring.transport import Link

Row = dict[str, Any]


def planning(count: int = 1000, worlds: Sequence[int] = (8, 64)) -> list[Row]:
    """Host time of layout, traffic and one rank's calls: 1,000 documents, one core."""
    rows = []
    lengths = documents(count, 350, 131_072, seed=1)
    for world in worlds:
        for layout, schedule in (("packed", "direct"), ("packed", "ring"), ("zigzag", "ring"), ("contiguous", "ring")):
            times = [_planned(lengths, layout, schedule, world) for _ in range(9)]
            parts = [statistics.median(part) * 1e3 for part in zip(*times, strict=True)]
            names = ("layout_ms", "traffic_ms", "calls_ms")
            row = {"layout": layout, "schedule": schedule, "ranks": world, "documents": len(lengths)}
            row |= {"tokens": sum(lengths), "longest": max(lengths)}
            rows.append({**row, **dict(zip(names, parts, strict=True)), "total_ms": sum(parts)})
    return rows


def _planned(lengths: list[int], layout: str, schedule: str, world: int) -> tuple[float, float, float]:
    marks = [time.process_time()]
    placed = layouts.make(layout, lengths, world)
    marks.append(time.process_time())
    sides = Sides(placed, placed, Mask().regions(lengths))
    traffic, _ = choose(schedule, Needs(*sides), Fabric(world, world))
    marks.append(time.process_time())
    work(traffic, world // 2, sides)
    marks.append(time.process_time())
    return marks[1] - marks[0], marks[2] - marks[1], marks[3] - marks[2]


def overhead(
    tokens: int = 16384, repeats: int = 4, worlds: Sequence[int] = (2, 4), dtype: torch.dtype = torch.float32
) -> list[Row]:
    """CPU time of all ranks (processes over gloo) over that of torch's flash kernel on one process, and what of it is
    spent in the kernel.

    Cores that are busy at once are slower than one alone, whatever runs on them. So that what the ring costs can be
    told from that, its time also stands over the one process's while every other core does the same work.
    """
    rows, case = [], Case(8, 2, 64, dtype=dtype)
    for world in worlds:
        with RankPool(world, timeout=900) as pool:
            found = []
            for repeat in range(repeats + 1):
                alone, busy = _timed_alone(case, tokens), _mean(filter(None, pool.run(_timed_busy, case, tokens)))
                ring = pool.run(_timed_ring, case, tokens)
                if repeat:  # the first warms up
                    found.append((alone, busy, tuple(map(sum, zip(*ring, strict=True)))))
                print(f"W={world} {dtype} repetition {repeat} of {repeats}", flush=True)
            about = {"dtype": str(dtype).removeprefix("torch."), "tokens": tokens, "ranks": world}
            rows += [{**about, **_beside(found, backward)} for backward in (False, True)]
    return rows


def _mean(times: Iterable[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(map(statistics.fmean, zip(*times, strict=True)))


def _beside(found: Sequence[Sequence[tuple[float, ...]]], backward: bool) -> Row:
    """Medians of forward, or of both passes; of a ring (seconds, backward's, in the kernel, in the kernel there)."""
    passes = 1 + backward
    one, busy, ring = ([sum(times[:passes]) for times in some] for some in zip(*found, strict=True))
    kernel = [sum(times[2 : 2 + passes]) for *_, times in found]
    ratios = [a / b for a, b in zip(ring, one, strict=True)]
    return {
        "pass": "forward + backward" if backward else "forward",
        "ring_cpu_s": statistics.median(ring),
        "one_cpu_s": statistics.median(one),
        "busy_cpu_s": statistics.median(busy),
        "ratio": statistics.median(ratios),
        "ratio_to_busy": statistics.median(a / b for a, b in zip(ring, busy, strict=True)),
        "in_kernel": statistics.median(a / b for a, b in zip(kernel, ring, strict=True)),
        "ratios": ratios,
    }


class TimedKernel(CpuKernel):
    """torch's CPU kernel, and the CPU seconds that this thread has spent in it."""

    name = "timed"

    def __init__(self) -> None:
        super().__init__()
        self.capabilities = replace(self.capabilities, priority=-1)  # never what "auto" takes
        self.seconds = 0.0

    def forward(self, *args: Any) -> Any:
        """See `Kernel.forward`."""
        begun = time.thread_time()
        result = super().forward(*args)
        self.seconds += time.thread_time() - begun
        return result

    def backward(self, *args: Any) -> Any:
        """See `Kernel.backward`."""
        begun = time.thread_time()
        result = super().backward(*args)
        self.seconds += time.thread_time() - begun
        return result


def _timed_ring(sp: SequenceParallel, case: Case, tokens: int) -> tuple[float, float, float, float]:
    """CPU seconds of this rank in forward and in backward, and those of them in the kernel."""
    torch.set_num_threads(1)
    kernel = TimedKernel()
    register(kernel)
    try:
        plan = SequenceParallel.over(sp.groups, sp.settings.model_copy(update={"kernel": "timed"})).plan(tokens)
        q, k, v, dout = (plan.shard(x) for x in case.inputs(tokens))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        plan.sequence.agree("start", {})
        marks = [(time.process_time(), kernel.seconds)]
        out = ring_attention(q, k, v, plan)
        marks.append((time.process_time(), kernel.seconds))
        torch.autograd.grad(out, leaves, dout)
        marks.append((time.process_time(), kernel.seconds))
    finally:
        unregister("timed")
    (all0, own0), (all1, own1), (all2, own2) = marks
    return all1 - all0, all2 - all1, own1 - own0, own2 - own1


def _timed_busy(sp: SequenceParallel, case: Case, tokens: int) -> tuple[float, float] | None:
    """The whole work in as many processes at once as run at once; None on other ranks."""
    return _timed_alone(case, tokens) if sp.rank < (os.cpu_count() or 1) else None


def _timed_alone(case: Case, tokens: int) -> tuple[float, float]:
    torch.set_num_threads(1)
    q, k, v, dout = (x.transpose(1, 2) for x in case.inputs(tokens))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    marks = [time.process_time()]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    marks.append(time.process_time())
    torch.autograd.grad(out, leaves, dout)
    return marks[1] - marks[0], time.process_time() - marks[1]


PACKED = {
    "zigzag on a ring": {"layout": "zigzag", "schedule": "ring"},
    "packed, direct": {"layout": "packed", "schedule": "direct"},
}


def packed(world: int = 8, tokens: int = 131_072, batches: int = 5) -> list[Row]:
    """Heavy-tailed packed documents, W = 8: bytes sent, and wall time on a link and without one.

    The link is so fast that what the ring's busiest rank sends takes as long as the ring's computation took without
    one. Ranks are threads, two at a time, one for each core.
    """
    mixes = half_below(4096, tokens, 128, 20)
    rows = [_bytes(lengths, world) for lengths in mixes]
    for lengths in mixes[:batches]:
        row = _about(lengths, "wall")
        free = _walls(lengths, world, None)
        link = Link(free["zigzag on a ring"][1] / free["zigzag on a ring"][0])
        shaped = _walls(lengths, world, link)
        for kind, found in (("unshaped", free), ("shaped", shaped)):
            row |= {f"{kind}, {name}, s": seconds for name, (seconds, _) in found.items()}
            row[f"{kind}, ratio"] = found["packed, direct"][0] / found["zigzag on a ring"][0]
        rows.append({**row, "link_bytes_per_s": link.bandwidth})
    return rows


def _about(lengths: list[int], what: str) -> Row:
    row: Row = {"what": what, "tokens": sum(lengths), "documents": len(lengths), "longest": max(lengths)}
    return {**row, "share_below_4096": share_below(lengths, 4096)}


def _bytes(lengths: list[int], world: int) -> Row:
    """Rows of keys and values that travel in forward, as a share of every block visiting every rank."""
    row = _about(lengths, "rows sent")
    for name, how in PACKED.items():
        placed = layouts.make(how["layout"], lengths, world)
        sides = Sides(placed, placed, Mask().regions(lengths))
        sent = rows_sent(choose(how["schedule"], Needs(*sides), Fabric(world, world))[0])
        row[name] = sent / ((world - 1) * sum(lengths))
        row[f"{name}, tokens max/mean"] = max(placed.sizes) * world / sum(placed.sizes)
    return {**row, "ratio": row["packed, direct"] / row["zigzag on a ring"]}


def _walls(lengths: list[int], world: int, link: Link | None, repeats: int = 3) -> dict[str, tuple[float, float]]:
    """Median wall seconds, and bytes, of each way; the ways alternate."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in PACKED}
    for _ in range(repeats):
        for name, how in PACKED.items():
            found[name].append(_wall(lengths, world, how, link))
    return {name: (statistics.median(s for s, _ in runs), runs[0][1]) for name, runs in found.items()}


def _wall(lengths: list[int], world: int, how: dict[str, str], link: Link | None) -> tuple[float, float]:
    """(wall seconds of forward and backward, bytes that the busiest rank sent)."""
    case, settings = Case(1, 1, 32, dtype=torch.float32), Settings.parse({"size": world, "backward": "kv", **how})
    inputs = case.inputs(sum(lengths))

    def rank(groups: Groups) -> tuple[float, float]:
        sp = SequenceParallel.over(groups, settings)
        plan = sp.plan(lengths)
        q, k, v, dout = (plan.shard(x) for x in inputs)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        assert plan.backward_pass  # planning is not what is timed here
        plan.sequence.agree("start", {})
        sp.reset_report()
        started = time.perf_counter()
        torch.autograd.grad(ring_attention(q, k, v, plan), leaves, dout)
        plan.sequence.agree("end", {})
        sent = sp.report().bytes_sent
        return time.perf_counter() - started, float(sent.get("kv", 0) + sent.get("dkv", 0))

    found = run_lockstep_groups(rank, world, timeout=900, at_once=2, link=link)
    return max(seconds for seconds, _ in found), max(nbytes for _, nbytes in found)


PARTS: dict[str, Callable[[], list[Row]]] = {
    "planning": planning,
    "overhead": overhead,
    "overhead16": partial(overhead, dtype=torch.bfloat16),
    "packed": packed,
    "memory": memory,
    "peers": partial(peers, names={torch.float32: NAMES[torch.float32]}),
    "peers16": partial(peers, names={torch.bfloat16: NAMES[torch.bfloat16]}),
}

QUICK: dict[str, dict[str, Any]] = {
    "planning": {"count": 100, "worlds": (8,)},
    "overhead": {"tokens": 2048, "repeats": 1},
    "overhead16": {"tokens": 2048, "repeats": 1},
    "packed": {"world": 4, "tokens": 16_384, "batches": 1},
    "memory": {"worlds": (2,)},
    "peers": {"tokens": 1024, "worlds": (2,), "times": 1},
    "peers16": {"tokens": 1024, "worlds": (2,), "times": 1},
}
"""Arguments with which a part only shows that it runs."""


REPEATED = {"overhead": "repeats", "overhead16": "repeats", "peers": "times", "peers16": "times"}
"""Parts whose repetitions can be chosen, and what their functions call the number."""


def _chosen(part: str, times: int | None, ways: Sequence[str] | None) -> dict[str, Any]:
    """What the command line asks of a part, as its function takes it."""
    dtype = torch.bfloat16 if part.endswith("16") else torch.float32
    found: dict[str, Any] = {} if times is None else {REPEATED[part]: times}
    return found if ways is None else {**found, "names": {dtype: tuple(ways)}}


def main() -> None:
    """Run one part or all, print it, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON files")
    parser.add_argument("--quick", action="store_true", help="small sizes: to see that it runs, not for figures")
    parser.add_argument("--times", type=int, help=f"repetitions, of {', '.join(REPEATED)}")
    parser.add_argument("--ways", nargs="+", metavar="WAY", choices=WAYS, help=f"of peers: {'; '.join(WAYS)}")
    chosen = parser.parse_args()
    if chosen.times is not None and (chosen.part not in REPEATED or chosen.times < 1):
        parser.error(f"--times is for {', '.join(REPEATED)}, and at least 1: {chosen.part}, {chosen.times}")
    if chosen.ways is not None and not chosen.part.startswith("peers"):
        parser.error(f"--ways is for peers and peers16, not for {chosen.part}")
    torch.set_num_threads(1)
    for part in PARTS if chosen.part == "all" else [chosen.part]:
        arguments = {**(QUICK[part] if chosen.quick else {}), **_chosen(part, chosen.times, chosen.ways)}
        rows = PARTS[part](**arguments)
        for row in rows:
            shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
            print("  ".join(f"{key} {value}" for key, value in shown.items()))
        chosen.out.mkdir(parents=True, exist_ok=True)
        record = {"machine": described(), "rows": rows}
        (chosen.out / f"attention-{part}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
