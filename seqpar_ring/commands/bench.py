"""`seqpar-ring bench`: attention over a few local ranks against one process, and against what the planner says.

Small on purpose: it answers whether a ring works here and what it gains. Ranks are processes on the CPU over gloo, one
thread each, so it says nothing about GPUs or a cluster's links; a training run's trace does (`seqpar_ring.trace`).
"""

from __future__ import annotations

import json
import time
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from seqpar_ring import __version__
from seqpar_ring.commands import options as take
from seqpar_ring.config import Settings
from seqpar_ring.errors import ConfigError, did_you_mean
from seqpar_ring.geometry import Mask
from seqpar_ring.planner.asked import documents, pairs
from seqpar_ring.planner.cost import Ring
from seqpar_ring.planner.hardware import machine
from seqpar_ring.planner.picture import written
from seqpar_ring.planner.savefile import FORMAT, block
from seqpar_ring.planner.sections import Section
from seqpar_ring.schedule import Row

if TYPE_CHECKING:
    from seqpar_ring.parallel import SequenceParallel

HELP = "Time attention over local CPU ranks against one process."

EPILOG = """\
Examples:

\b
  seqpar-ring bench
  seqpar-ring bench --ranks 4 --seq-len 16K --setting block_tokens=1024
  seqpar-ring bench --hardware machine.yaml         what probe measured: predicted beside measured

Exit codes: 0 timed; 2 the question makes no sense.
"""

DEFAULT = "8K"
"""Tokens, where neither --seq-len nor --documents is given."""

DTYPES = {"fp32": ("float32", 4), "bf16": ("bfloat16", 2), "fp16": ("float16", 2)}
"""torch's names, and bytes of a number."""


class Case(NamedTuple):
    """What is timed: documents, heads, dtype, whether causal, and how often."""

    lengths: tuple[int, ...]
    row: Row
    dtype: str
    causal: bool
    repeats: int


class Took(NamedTuple):
    """Median seconds of each pass, on the rank that takes longest; predicted too if hardware was given."""

    ranks: int
    forward: float
    backward: float
    predicted: tuple[float, float] | None = None

    @property
    def seconds(self) -> float:
        """Both passes."""
        return self.forward + self.backward


def bench(  # noqa: PLR0913 - options of a command line
    ranks: Annotated[int, typer.Option(help="Processes that share the sequence.", min=1)] = 2,
    seq_len: take.SeqLen = "",
    packed: Annotated[str, typer.Option("--documents", help="Packed documents, as in plan.")] = "",
    heads: Annotated[int, typer.Option(help="Query heads.", min=1)] = 8,
    kv_heads: Annotated[int, typer.Option(help="Key and value heads.", min=1)] = 2,
    head_dim: Annotated[int, typer.Option(help="Width of a head.", min=1)] = 64,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    full: take.Full = False,
    setting: take.Setting = None,
    repeats: Annotated[int, typer.Option(help="Times that each pass is run; the median counts.", min=1)] = 5,
    hardware: Annotated[
        str, typer.Option(help="What the planner predicts for: a file of probe, or a preset with --fabric.")
    ] = "",
    fabric: take.Fabric = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead (docs/cli.md).")] = False,
) -> None:
    """Time one process and the ring; print seconds, tokens per second, ratio, prediction."""
    if dtype not in DTYPES:
        raise ConfigError("unknown dtype", fix=did_you_mean(dtype, DTYPES), dtype=dtype)
    if heads % kv_heads:
        raise ConfigError("key heads must divide heads", fix="Give e.g. 8 and 2.", heads=heads, kv_heads=kv_heads)
    lengths = documents(packed, seq_len or ("" if packed else DEFAULT))
    row = Row(heads, kv_heads, head_dim, head_dim, DTYPES[dtype][1])
    case = Case(lengths, row, dtype, not full, repeats)
    chosen = pairs(setting or [])
    if "size" in chosen:
        raise ConfigError("the size is the number of ranks here", fix="Give --ranks.", size=chosen["size"], ranks=ranks)
    if fabric and not hardware:
        raise ConfigError("a fabric alone predicts nothing", fix="Give --hardware too, or neither.", fabric=fabric)
    settings = Settings.parse({**chosen, "size": ranks}, "the settings")
    compared = [Settings(size=1), settings] if ranks > 1 else [settings]
    prices = [_predicted(case, one, (hardware, fabric)) if hardware else None for one in compared]
    took = [_timed(case, one)._replace(predicted=price) for one, price in zip(compared, prices, strict=True)]
    if as_json:
        print(json.dumps(as_data(case, settings, took), indent=1))
    else:
        from seqpar_ring.commands.terminal import console, show

        show(console(), sections(case, settings, took))


def _timed(case: Case, settings: Settings) -> Took:
    """Run it on processes of this machine."""
    from seqpar_ring.testing import RankPool

    plain = settings.model_dump(exclude={"size", "timeout"})
    with RankPool(settings.size, timeout=settings.timeout) as pool:
        by_rank = pool.run(_attention, case, size=settings.size, **plain)
    forward, backward = (median(max(each) for each in zip(*(rank[i] for rank in by_rank), strict=True)) for i in (0, 1))
    return Took(settings.size, forward, backward)


def _attention(sp: SequenceParallel, case: Case) -> tuple[list[float], list[float]]:
    """Seconds of each forward and backward pass on this rank, from when all ranks were there."""
    import torch

    from seqpar_ring import ring_attention

    plan = sp.plan(list(case.lengths), causal=case.causal)
    local, kind = plan.position_ids.shape[-1], getattr(torch, DTYPES[case.dtype][0])
    generator = torch.Generator().manual_seed(sp.rank)
    q, k, v = (
        torch.randn((1, local, n, case.row.head_dim), generator=generator).to(kind).requires_grad_()
        for n in (case.row.heads, case.row.kv_heads, case.row.kv_heads)
    )
    took: tuple[list[float], list[float]] = ([], [])
    for _ in range(case.repeats + 1):
        sp.groups.ring.all_reduce(torch.zeros(1))
        begin = time.perf_counter()
        out = ring_attention(q, k, v, plan)
        assert isinstance(out, torch.Tensor)
        middle = time.perf_counter()
        out.backward(torch.ones_like(out))
        took[0].append(middle - begin)
        took[1].append(time.perf_counter() - middle)
    return took[0][1:], took[1][1:]  # the first is warm-up


def _predicted(case: Case, settings: Settings, on: tuple[str, str]) -> tuple[float, float]:
    hardware, fabric = on
    priced = (machine(hardware, fabric or None), case.dtype)
    ring = Ring(case.lengths, Mask.make(case.causal, None, None), settings, case.row, priced)
    return ring.forward.seconds, ring.backward.seconds


def sections(case: Case, settings: Settings, took: list[Took]) -> list[Section]:
    """What was timed, as tables."""
    total, row = sum(case.lengths), case.row
    mask = "causal" if case.causal else "full attention"
    many = f"{len(case.lengths)} documents, " if len(case.lengths) > 1 else ""
    what = f"{many}{total:,} tokens, {mask}, {row.heads} heads on {row.kv_heads} of width {row.head_dim}, {case.dtype}"
    how = (
        f"{settings.schedule}, {settings.layout}; CPU processes of one thread each, over gloo; median of {case.repeats}"
    )
    alone = took[0]
    head = ["", "forward", "backward", "both", "tokens/s", "speed-up"]
    rows = []
    for one in took:
        times = [written(one.forward), written(one.backward), written(one.seconds)]
        name = "one process" if one.ranks == 1 else f"{one.ranks} ranks"
        cells = [name, *times, f"{total / one.seconds:,.0f}", f"{alone.seconds / one.seconds:.2f}"]
        if one.predicted is not None:
            both = sum(one.predicted)
            cells += [written(both), f"{one.seconds / both - 1:+.0%}"]
        rows.append(tuple(cells))
    if alone.predicted is not None:
        head += ["predicted", "measured is"]
    numbers = tuple(range(1, len(head)))
    return [
        Section("Timed", ((what,), (how,))),
        Section("Seconds of one layer's attention", tuple(rows), tuple(head), numbers),
    ]


def as_data(case: Case, settings: Settings, took: list[Took]) -> dict[str, Any]:
    """The same as JSON has it."""
    total = sum(case.lengths)
    return {
        "format": FORMAT,
        "seqpar_ring": __version__,
        "tokens": total,
        "documents": len(case.lengths),
        "heads": list(case.row[:4]),
        "dtype": case.dtype,
        "causal": case.causal,
        "settings": block(settings),
        "timed": [
            {
                "ranks": one.ranks,
                "forward": one.forward,
                "backward": one.backward,
                "tokens_a_second": total / one.seconds,
                "speed_up": took[0].seconds / one.seconds,
                "predicted": None
                if one.predicted is None
                else dict(zip(("forward", "backward"), one.predicted, strict=True)),
            }
            for one in took
        ],
    }
