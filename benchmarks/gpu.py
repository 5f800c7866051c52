"""Rings on one GPU: each rank's TFLOP/s forward and backward, kernels side by side, the merge, the host's time.

    python benchmarks/gpu.py [--ranks 8] [--tokens 8192] [--kernels flash3 torch_flash] [--out benchmarks/results]

The ranks are threads that take turns on the device, and what they send each other is copied on it: so a rank's rate is
that of all work over all time, with every kernel call, merge and addition of a real ring and none of its links. Shapes
are those that peers publish: 64 query and 8 key heads of width 128, bf16, causal, so many tokens a rank; then the same
tokens as packed documents. Each kernel that is there is timed, and the one that "auto" takes is marked. Writes CSV,
JSON and a picture, anew after each row, so that what was measured is there whatever ends the rest. With `--device cpu`
it shows that it runs; such figures say nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import described
from mixes import heavy_tailed
from torch import Tensor

from seqpar_ring import ring_attention
from seqpar_ring.config import Settings
from seqpar_ring.geometry import Mask
from seqpar_ring.kernels import Kernel, Request, architecture_of, lacks, names, registered, select
from seqpar_ring.kernels.merge import Part, at_once, merge_parts_
from seqpar_ring.kernels.trial import seconds
from seqpar_ring.layout import make
from seqpar_ring.parallel import SequenceParallel
from seqpar_ring.planner.loads import loads
from seqpar_ring.schedule import Route, Sides
from seqpar_ring.testing import run_lockstep

REPEATS = 5


class Shape(NamedTuple):
    """What is computed: heads, their width, ranks, tokens of a rank, and where."""

    heads: int
    kv_heads: int
    head_dim: int
    ranks: int
    tokens: int
    device: str

    @property
    def request(self) -> Request:
        """What it asks of a kernel."""
        sizes = self.head_dim, self.head_dim, self.heads, self.kv_heads
        sm = architecture_of(torch.device(self.device))
        return Request(self.device, torch.bfloat16, *sizes, architecture=sm)


def cases(shape: Shape) -> dict[str, tuple[list[int], dict[str, Any]]]:
    """Documents and settings, by name."""
    whole = shape.ranks * shape.tokens
    packed = heavy_tailed(whole, max(1, shape.tokens // 64), seed=1)
    return {
        "causal": ([whole], {"layout": "zigzag"}),
        "causal, all blocks at once": ([whole], {"layout": "zigzag", "block_tokens": whole}),
        "packed": (packed, {"layout": "packed", "schedule": "direct"}),
    }


def flop(lengths: list[int], shape: Shape, settings: dict[str, Any]) -> float:
    """FLOP of the unmasked pairs of one forward pass, all ranks together."""
    chosen = Settings.parse({"size": shape.ranks, **settings})
    side = make(chosen.layout, lengths, shape.ranks)
    sides = Sides(side, side, Mask().regions(lengths))
    route = Route.of(chosen, sides)
    return float(loads(route.flows(), sides, route.cut(backward=False)).pairs.sum()) * 4 * shape.heads * shape.head_dim


def timed(shape: Shape, lengths: list[int], kernel: str, settings: dict[str, Any]) -> dict[str, float]:
    """Seconds of forward and of backward, all ranks together, and what the host needs for a step of a rank."""

    def settle(sp: SequenceParallel) -> float:
        sp.groups.ring.agree("benchmark", {"all work": "given to the device"})
        if shape.device != "cpu":
            torch.cuda.synchronize(shape.device)
        now = time.perf_counter()
        sp.groups.ring.agree("benchmark", {"the clock": "read"})  # or another rank's next work would count to this
        return now

    def on_rank(sp: SequenceParallel) -> list[tuple[float, float, float]]:
        plan = sp.plan(lengths)
        widths = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
        generator = torch.Generator(shape.device).manual_seed(sp.groups.rank)
        on_device = {"generator": generator, "device": shape.device, "dtype": torch.bfloat16}
        q, k, v, dout = (torch.randn(1, plan.local_tokens, h, shape.head_dim, **on_device) for h in widths)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        found = []
        for _ in range(1 + REPEATS):
            begin, busy = settle(sp), time.thread_time()
            out = ring_attention(*leaves, plan)
            host = time.thread_time() - busy
            middle = settle(sp)
            assert isinstance(out, Tensor)
            torch.autograd.grad(out, leaves, dout)
            found.append((middle - begin, settle(sp) - middle, host / max(1, plan.schedule.steps)))
        return found[1:]

    every = run_lockstep(on_rank, shape.ranks, timeout=300.0, kernel=kernel, **settings)[0]
    forward, backward, host = (statistics.median(column) for column in zip(*every, strict=True))
    return {"forward_s": forward, "backward_s": backward, "host_us_a_step": 1e6 * host}


def merging(shape: Shape) -> dict[str, float | bool]:
    """Seconds in which one and four parts are merged into a rank's accumulator, its bytes, and whether by our own
    kernel, which needs Triton, or by torch's operators."""
    size = (1, shape.tokens, shape.heads, shape.head_dim)
    out, part = torch.zeros(size, device=shape.device), torch.ones(size, device=shape.device, dtype=torch.bfloat16)
    lse = torch.zeros(1, shape.heads, shape.tokens, device=shape.device)
    return {
        f"merge_{n}_s": seconds(lambda n=n: merge_parts_(out, lse, [Part(0, part, lse.clone())] * n), shape.device)
        for n in (1, 4)
    } | {"accumulator_bytes": float(out.nbytes), "fused": at_once(out) > 1}


def candidates(shape: Shape, asked: list[str]) -> list[Kernel]:
    """Those that can compute it here; what the others lack is printed."""
    found = []
    for kernel in registered():
        missing = lacks(kernel.capabilities, shape.request)
        if asked and kernel.name not in asked:
            continue
        if missing or (kernel.capabilities.priority < 0 and not asked):
            print(
                f"{kernel.name}: left out, " + (f"lacks {', '.join(missing)}" if missing else "a fallback"), flush=True
            )
            continue
        found.append(kernel)
    return found


def measured(shape: Shape, asked: list[str]) -> Iterator[dict[str, Any]]:
    """A row for each case and kernel; one that fails is printed, and the others go on."""
    _, reason = select(shape.request)
    print(f"auto takes {reason}", flush=True)
    there = candidates(shape, asked)
    for name, (lengths, settings) in cases(shape).items():
        work = flop(lengths, shape, settings)
        auto, _ = select(shape.request._replace(documents=len(lengths)))
        for kernel in there:
            try:
                times = timed(shape, lengths, kernel.name, settings)
            except Exception as error:  # a library's own, too
                print(f"{name}, {kernel.name}: {type(error).__name__}: {error}", flush=True)
                continue
            rates = work / times["forward_s"] / 1e12, 2.5 * work / times["backward_s"] / 1e12
            print(f"{name}, {kernel.name}: {rates[0]:.1f} forward, {rates[1]:.1f} backward TFLOP/s a rank", flush=True)
            row = {"case": name, "kernel": kernel.name, "auto": kernel.name == auto.name, **shape._asdict(), **times}
            yield {**row, "forward_tflops": rates[0], "backward_tflops": rates[1]}


def write(record: dict[str, Any], stem: Path, title: str) -> None:
    """What is measured so far, as JSON, CSV and picture."""
    rows = record["rows"]
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, stem.with_suffix(".png"), title)


def draw(rows: list[dict[str, Any]], path: Path, hardware: str) -> None:
    """Bars by case and kernel."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 1.2 + 0.4 * len(rows)), sharey=True, layout="constrained")
    labels = [f"{row['case']}: {row['kernel']}{' (auto)' if row['auto'] else ''}" for row in rows]
    for axis, way in zip(axes, ("forward", "backward"), strict=True):
        bars = axis.barh(labels, [row[f"{way}_tflops"] for row in rows], color="#4477aa")
        axis.bar_label(bars, fmt="%.0f", padding=3)
        axis.set_title(f"{way}, TFLOP/s a rank")
        axis.margins(x=0.15)
    axes[0].invert_yaxis()
    figure.suptitle(hardware)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8, help="of the ring (8)")
    parser.add_argument("--tokens", type=int, default=8192, help="of each rank (8192)")
    parser.add_argument("--heads", type=int, nargs=3, default=[64, 8, 128], help="query heads, key heads, their width")
    parser.add_argument("--kernels", nargs="*", default=[], choices=names(), help="only these; else all that can")
    parser.add_argument("--device", default="cuda:0", help="cuda:0, or cpu to see that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the files")
    chosen = parser.parse_args()
    if chosen.device != "cpu" and not torch.cuda.is_available():
        parser.exit(2, "gpu.py: there is no GPU here. Try --device cpu with few tokens to see that it runs.\n")
    shape = Shape(*chosen.heads, chosen.ranks, chosen.tokens, chosen.device)
    hardware = "cpu" if chosen.device == "cpu" else torch.cuda.get_device_name(chosen.device)
    record: dict[str, Any] = {"machine": {**described(), "device": hardware}, "merge": merging(shape), "rows": []}
    chosen.out.mkdir(parents=True, exist_ok=True)
    stem = chosen.out / f"gpu-{hardware.lower().replace(' ', '-')}-{shape.tokens}"
    for row in measured(shape, chosen.kernels):
        record["rows"].append(row)
        write(record, stem, f"{hardware}, {shape.ranks} ranks, {shape.tokens:,} tokens each")
    if not record["rows"]:
        parser.exit(1, "gpu.py: nothing was timed; why not is said above.\n")
    print(f"written: {stem}.json, .csv, .png")


if __name__ == "__main__":
    main()
