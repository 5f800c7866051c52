"""A ring over all GPUs of a machine, or of several: each rank's TFLOP/s forward and backward, beside other packages.

    torchrun --standalone --nproc-per-node 8 benchmarks/multi_gpu.py [--tokens 8192] [--schedules ring direct]
                                             [--block-tokens 0 2048] [--kernels auto] [--ways NAME ...]

The table is that of `gpu.py`, with real links: so many tokens a rank, 64 query and 8 key heads of width 128, bf16,
causal over one document, then over packed ones. Ours in every schedule and block size asked for, then the other
packages that are installed (`peers.txt`; those that want flash-attn need the real one), each compared with dense
attention first, and left out by name where it fails. Time is that of the last rank, from a barrier on. Rank 0 writes
CSV and JSON. With `--device cpu` (gloo) it shows that it runs; such figures say nothing. **It has not run on GPUs
yet.**
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import sys
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from gpu import Shape, flop
from machine import described
from mixes import heavy_tailed
from peer_ways import OURS, WAYS, Attend, Rank, ours
from peers import Work, errors, find_peers, inexact, run, version_of

from seqpar_ring import groups as process_groups
from seqpar_ring.config import Settings
from seqpar_ring.errors import SeqparError
from seqpar_ring.parallel import SequenceParallel

Row = dict[str, Any]

TIMEOUT = 600.0
"""Seconds that a rank waits for another."""

FIELDS = (
    *("case", "way", "version", "kernel", "schedule", "block_tokens"),
    *("ranks", "tokens", "heads", "kv_heads", "head_dim", "device"),
    *("forward_s", "backward_s", "host_us_a_step", "forward_tflops", "backward_tflops", "not timed"),
)
"""Columns of the CSV file."""


class Try(NamedTuple):
    """Something to time: how it is called in the table, its documents, its settings, and how it attends."""

    row: Row
    lengths: list[int]
    settings: dict[str, Any]
    attend: Attend
    local: int
    steps: int


def tries(chosen: argparse.Namespace, shape: Shape, at: Rank) -> Iterator[Try | Row]:
    """All that is asked for; a row instead, with the reason, for what cannot be timed."""
    whole = [shape.ranks * shape.tokens]
    packed = heavy_tailed(whole[0], max(1, shape.tokens // 64), seed=1)
    for kernel in chosen.kernels:
        for block in chosen.block_tokens:
            for schedule in chosen.schedules:
                yield _ours(shape, at, whole, {"layout": "zigzag", "schedule": schedule}, block, kernel)
            yield _ours(shape, at, packed, {"layout": "packed", "schedule": "direct"}, block, kernel)
    for name in chosen.ways:
        yield _peer(name, shape, at, whole)


def _ours(
    shape: Shape, at: Rank, lengths: list[int], how: dict[str, Any], block: int, kernel: str
) -> Try | Row:
    settings = {**how, "size": shape.ranks, "block_tokens": block or "auto", "kernel": kernel}
    case = "causal" if len(lengths) == 1 else "packed"
    row = {"case": case, "way": OURS, "kernel": kernel, "schedule": how["schedule"], "block_tokens": block or "auto"}
    try:
        sp = SequenceParallel.over(at.sp.groups, Settings.parse(settings))
        plan = sp.plan(lengths)
        return Try(row, lengths, settings, ours(plan), plan.local_tokens, plan.schedule.steps)
    except SeqparError as error:  # raised on all ranks alike
        return {**row, "not timed": str(error)}


def _peer(name: str, shape: Shape, at: Rank, lengths: list[int]) -> Try | Row:
    way = WAYS[name]
    row: Row = {"case": "causal", "way": name, "version": f"{way.package} {version_of(way.package)}".strip()}
    if not version_of(way.package):
        return {**row, "not timed": f"{way.package} is not installed"}
    small = Work(128 * shape.ranks, torch.bfloat16)
    try:
        found = errors(way, at._replace(tokens=small.tokens, kv_heads=small.case.kv_heads), small)
        worst = torch.tensor(list(found.values()), dtype=torch.float64, device=shape.device)
        dist.all_reduce(worst, dist.ReduceOp.MAX, group=at.group)
        wrong = inexact(dict(zip(found, worst.tolist(), strict=True)), small.dtype)
        if wrong:
            return {**row, "not timed": wrong}
        return Try(row, lengths, {"size": shape.ranks, "layout": "zigzag"}, way.make(at), shape.tokens, shape.ranks)
    except Exception as error:  # whatever a peer raises is what is reported; one rank alone would end in a timeout
        return {**row, "not timed": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}


def timed(one: Try, shape: Shape, at: Rank, times: int) -> Row:
    """A row of the table: medians of the slowest rank's seconds, and the rates that they make."""
    on_device = {"generator": torch.Generator(shape.device).manual_seed(at.rank), "device": shape.device}
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    inputs = [torch.randn(1, one.local, h, shape.head_dim, dtype=torch.bfloat16, **on_device) for h in heads]
    found = []
    try:
        for _ in range(1 + times):
            sample = run(one.attend, inputs, at.group)[1]
            backward = sample.both_wall - sample.forward_wall
            slowest = torch.tensor([sample.forward_wall, backward, sample.forward_cpu], dtype=torch.float64)
            slowest = slowest.to(shape.device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX, group=at.group)
            found.append(slowest.tolist())
    except SeqparError as error:  # raised on all ranks alike
        return {**one.row, "not timed": str(error)}
    forward, backward, host = (statistics.median(column) for column in zip(*found[1:], strict=True))
    work = flop(one.lengths, shape, one.settings) / shape.ranks
    return {
        **one.row,
        **shape._asdict(),
        "forward_s": forward,
        "backward_s": backward,
        "host_us_a_step": 1e6 * host / max(1, one.steps),
        "forward_tflops": work / forward / 1e12,
        "backward_tflops": 2.5 * work / backward / 1e12,
    }


def write(rows: list[Row], out: Path, hardware: str, shape: Shape) -> Path:
    """CSV and JSON of what is measured so far, by the hardware's name, which is returned without an ending."""
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"multi-gpu-{shape.ranks}-{hardware.lower().replace(' ', '-')}-{shape.tokens}"
    record = {"machine": {**described(), "device": f"{shape.ranks} x {hardware}"}, "rows": rows}
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    return stem


def options() -> argparse.ArgumentParser:
    """What can be asked for."""
    peers = [name for name, way in WAYS.items() if way.package]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of each rank (8192)")
    parser.add_argument("--heads", type=int, nargs=3, default=[64, 8, 128], help="query heads, key heads, their width")
    parser.add_argument("--kernels", nargs="+", default=["auto"], help="of ours (auto)")
    parser.add_argument("--schedules", nargs="+", default=["ring", "direct", "all_gather"], help="of ours")
    parser.add_argument(
        "--block-tokens", type=int, nargs="+", default=[0, 2048], help="rows of a block's pieces; 0 for whole blocks"
    )
    parser.add_argument("--ways", nargs="*", default=peers, choices=peers, metavar="WAY", help=f"of {peers}; all")
    parser.add_argument("--times", type=int, default=10, help="repetitions (10)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu to see that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the files")
    return parser


def main() -> None:
    """Join the ranks, measure, print, write."""
    parser = options()
    chosen = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        parser.exit(2, "multi_gpu.py: start it with torchrun --standalone --nproc-per-node GPUS (see --help).\n")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "multi_gpu.py: there is no GPU here. Try --device cpu with few tokens to see that it runs.\n")
    if chosen.tokens < 2 or chosen.tokens % 2:
        parser.exit(2, f"multi_gpu.py: peers need two chunks a rank: give an even --tokens, not {chosen.tokens}.\n")
    device = "cpu" if chosen.device == "cpu" else f"cuda:{os.environ['LOCAL_RANK']}"
    if chosen.device == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    find_peers()
    warnings.filterwarnings("ignore", category=FutureWarning)  # old names that peers call
    dist.init_process_group("nccl" if chosen.device == "cuda" else "gloo", timeout=timedelta(seconds=TIMEOUT))
    world = dist.get_world_size()
    groups = process_groups.make(world, timeout=TIMEOUT)
    shape = Shape(*chosen.heads, world, chosen.tokens, device)
    sp = SequenceParallel.over(groups, Settings.parse({"size": world}))
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    at = Rank(sp, group, world * chosen.tokens, shape.kv_heads, device)
    hardware = "cpu" if chosen.device == "cpu" else torch.cuda.get_device_name(device)
    rows = []
    for one in tries(chosen, shape, at):
        row = timed(one, shape, at, chosen.times) if isinstance(one, Try) else one
        rows.append({**row, "device": chosen.device, "ranks": world})
        if groups.rank == 0:
            figure = f"{row['forward_tflops']:.3g}, {row['backward_tflops']:.3g} TFLOP/s" if "forward_s" in row else ""
            what = ", ".join(f"{row[key]}" for key in ("case", "way", "schedule", "block_tokens") if key in row)
            print(f"{what}: {figure or row['not timed']}", flush=True)
            stem = write(rows, chosen.out, hardware, shape)
    if groups.rank == 0:
        print(f"written: {stem}.json, .csv")
    dist.destroy_process_group()
    sys.stdout.flush()


if __name__ == "__main__":
    main()
