"""Ring attention against what else there is, on one CPU and one block kernel: CPU time of all ranks, and wall time.

Ranks are processes over gloo, one thread each. Every way (`peer_ways.py`) first answers a small question, which is
compared with dense attention in fp64, and then a whole one, which is compared with one process; one that errs or fails
is reported with its reason and not timed. Then all ways take turns in every repetition. Wall time is that of the last
rank, from a barrier on. Peers are looked for in `benchmarks/.peers`, where `make bench` installs them. bf16 is there
for those who cannot do fp32.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from peer_ways import OURS, WAYS, Attend, Rank, Way, flash, repeats, rows
from torch import Tensor

from seqpar_ring.errors import ConfigError, did_you_mean
from seqpar_ring.parallel import SequenceParallel
from seqpar_ring.testing import Case, RankPool, dense_results, relative_error

Row = dict[str, Any]

FOLDER = Path(__file__).parent / ".peers"
"""Where peers are installed, apart from everything else."""

ONE = "one process"
"""torch's flash attention over the whole sequence on one rank, while the others wait."""

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest relative L2 error of out, dq, dk and dv: some times what rounding makes."""

SOME = (
    OURS,
    "seqpar_ring, direct",
    "seqpar_ring, heads",
    "ring-flash-attn, zigzag",
    "ring-flash-attn, ring",
    "ring-flash-attn, stripe",
    "ring-flash-attn, llama3",
    "torch context parallel, all-to-all",
    "ringmaster, zigzag",
    "DeepSpeed Ulysses",
)
"""Ways that are timed in bf16: ring-flash-attn, and the quickest of each of the others."""

NAMES = {torch.float32: tuple(WAYS), torch.bfloat16: SOME}

LIMIT = 1800.0
"""Seconds for one job of the ranks."""


class Sample(NamedTuple):
    """Seconds of one repetition on one rank: CPU and wall time, of forward and of both passes."""

    forward_cpu: float
    both_cpu: float
    forward_wall: float
    both_wall: float


class Timed(NamedTuple):
    """A way's repetitions on one rank, and the largest error of its whole answer there."""

    error: float
    samples: list[Sample]


class Work(NamedTuple):
    """What is asked of every way: causal attention over one document, 8 query and 2 key heads of width 64."""

    tokens: int
    dtype: torch.dtype = torch.float32
    times: int = 3

    @property
    def case(self) -> Case:
        """The same as a case."""
        return Case(8, 2, 64, dtype=self.dtype)


def peers(
    tokens: int = 16384,
    worlds: Sequence[int] = (2, 4),
    times: int = 3,
    names: Mapping[torch.dtype, Sequence[str]] = NAMES,
) -> list[Row]:
    """A row for each number of ranks, dtype, way and pass; or one with the reason why a way was not timed.

    Raises:
        ConfigError: a name that is none; tokens that do not make two even chunks a rank.
    """
    for name in (name for some in names.values() for name in some):
        if name not in WAYS:
            raise ConfigError("no such way to attend", fix=did_you_mean(name, WAYS), name=name)
    if any(tokens % (2 * world) for world in worlds):
        raise ConfigError("peers need two even chunks a rank", fix="Give a multiple of 2 x ranks.", tokens=tokens)
    find_peers()  # the ranks get their path from here
    found = []
    for world in worlds:
        with RankPool(world, timeout=LIMIT) as pool:
            for dtype, some in names.items():
                found += _compared(pool, some, Work(tokens, dtype, times))
    return found


def find_peers() -> None:
    """Let Python find what `make bench` installs for comparison."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))


def version_of(package: str) -> str:
    """Of an installed distribution; empty if it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _compared(pool: RankPool, names: Sequence[str], work: Work) -> list[Row]:
    reasons = {name: reason for name in names if (reason := _hindered(pool, WAYS[name], work))}
    able = [name for name in names if name not in reasons]
    found = _rows(pool.run(_timed, able, work), able, work)
    return found + [{**_about(name, pool.world, work), "not timed": reason} for name, reason in reasons.items()]


def _hindered(pool: RankPool, way: Way, work: Work) -> str:
    """Why a way cannot be timed; empty if it can."""
    if way.package and not version_of(way.package):
        return f"{way.package} is not installed (make bench does it)"
    print(f"W={pool.world} {way.name}: compared with dense attention", flush=True)
    try:
        found = pool.run(_errors, way.name, work._replace(tokens=128 * pool.world))
    except Exception as error:  # whatever a peer raises is what is reported; ours must not fail
        if not way.package:
            raise
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return inexact({name: max(rank[name] for rank in found) for name in found[0]}, work.dtype)


def inexact(worst: Mapping[str, float], dtype: torch.dtype) -> str:
    """What is wrong with an answer of these errors; empty if nothing is."""
    wrong = [f"{name} is off by {error:.1e}" for name, error in worst.items() if not error <= TOLERANCE[dtype]]
    return f"its answer is not exact: {', '.join(wrong)}" if wrong else ""


def _at(sp: SequenceParallel, work: Work) -> Rank:
    warnings.filterwarnings("ignore", category=FutureWarning)  # old names that peers call
    return Rank(sp, _group(), work.tokens, work.case.kv_heads)


@cache
def _group() -> dist.ProcessGroup:
    """What peers talk over, made once: each group of gloo has a thread that wakes 100 times a second, used or not."""
    group = dist.new_group(timeout=timedelta(seconds=LIMIT))
    assert isinstance(group, dist.ProcessGroup)
    return group


def _errors(sp: SequenceParallel, name: str, work: Work) -> dict[str, float]:
    return errors(WAYS[name], _at(sp, work), work)


def errors(way: Way, at: Rank, work: Work) -> dict[str, float]:
    """Errors of this rank's rows of out, dq, dk and dv against dense attention in fp64."""
    mine = rows(way.layout, at.rank, at.world, work.tokens)
    answer, _ = run(way.make(at), tuple(x[:, mine].to(at.device) for x in work.case.inputs(work.tokens)), at.group)
    truth = dense_results(work.tokens, work.case)
    return {key: relative_error(x.cpu(), truth[key][:, mine]) for key, x in answer.items()}


def _timed(sp: SequenceParallel, names: Sequence[str], work: Work) -> dict[str, Timed]:
    """All ways in turn, `times` over; what comes first warms up and is compared with one process in fp32."""
    at, inputs = _at(sp, work), work.case.inputs(work.tokens)

    def alone(some: Sequence[Tensor]) -> tuple[dict[str, Tensor], Sample]:
        return run(flash, some, at.group) if at.rank == 0 else _waits(at.group)

    wide = [x.float() for x in inputs]
    truth = _shared(alone(wide)[0], wide, at)
    alone(inputs)
    ways, shares, found = {}, {}, {ONE: Timed(0.0, [])}
    for name in names:
        mine = rows(WAYS[name].layout, at.rank, at.world, work.tokens)
        ways[name], shares[name] = WAYS[name].make(at), tuple(x[:, mine] for x in inputs)
        answer, _ = run(ways[name], shares[name], at.group)
        found[name] = Timed(max(relative_error(x, truth[key][:, mine]) for key, x in answer.items()), [])
    for i in range(work.times):
        found[ONE].samples.append(alone(inputs)[1])
        first = i * len(names) // work.times  # each repetition begins with another one
        for name in (*names[first:], *names[:first]):
            found[name].samples.append(run(ways[name], shares[name], at.group)[1])
        if at.rank == 0:
            print(f"W={at.world} {work.dtype} repetition {i + 1} of {work.times}", flush=True)
    return found


def _shared(answer: dict[str, Tensor], inputs: Sequence[Tensor], at: Rank) -> dict[str, Tensor]:
    """The answer of rank 0, on every rank."""
    q, k, v, dout = inputs
    found = {}
    for name, like in (("out", dout), ("dq", q), ("dk", k), ("dv", v)):
        found[name] = answer[name].contiguous() if at.rank == 0 else torch.empty_like(like)
        dist.broadcast(found[name], 0, group=at.group)
    return found


def run(attend: Attend, inputs: Sequence[Tensor], group: dist.ProcessGroup) -> tuple[dict[str, Tensor], Sample]:
    """One forward and backward of this rank, once all ranks are there; `inputs` are q, k, v and dout of its rows.

    On a GPU, CPU time is what it takes to launch, and wall time waits for the device.
    """
    q, k, v, dout = inputs
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    clock = time.thread_time if q.is_cuda else time.process_time  # NCCL's own threads launch nothing
    dist.barrier(group)
    cpu, wall = [clock()], [_settled(q)]
    out = attend(*leaves)
    cpu.append(clock())
    wall.append(_settled(q))
    grads = torch.autograd.grad(out, leaves, dout)
    cpu.append(clock())
    wall.append(_settled(q))
    answer = dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))
    return answer, Sample(cpu[1] - cpu[0], cpu[2] - cpu[0], wall[1] - wall[0], wall[2] - wall[0])


def _settled(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def _waits(group: dist.ProcessGroup) -> tuple[dict[str, Tensor], Sample]:
    """What a rank does that takes no part."""
    dist.barrier(group)
    return {}, Sample(0.0, 0.0, 0.0, 0.0)


def _about(name: str, world: int, work: Work) -> Row:
    package = WAYS[name].package if name in WAYS else "torch"
    row: Row = {"ranks": world, "dtype": str(work.dtype).removeprefix("torch."), "way": name, "tokens": work.tokens}
    if package:
        row["version"] = f"{package} {version_of(package)}".strip()
    times = repeats(work.case.kv_heads, world)
    return {**row, "note": f"keys and values repeated {times} times"} if package == "deepspeed" and times > 1 else row


def _rows(ranks: Sequence[dict[str, Timed]], names: Sequence[str], work: Work) -> list[Row]:
    """Medians of each way and pass, and of its ratios within each repetition to one process and to ours."""
    found = []
    for which in ("forward", "both"):
        cpu: dict[str, list[float]] = {}
        wall: dict[str, list[float]] = {}
        for name in (ONE, *names):
            runs = list(zip(*(rank[name].samples for rank in ranks), strict=True))
            cpu[name] = [sum(getattr(s, f"{which}_cpu") for s in run) for run in runs]
            wall[name] = [max(getattr(s, f"{which}_wall") for s in run) for run in runs]
        for name in (ONE, *names):
            row = _about(name, len(ranks), work)
            row["pass"] = "forward" if which == "forward" else "forward + backward"
            error = max(rank[name].error for rank in ranks)
            if not error <= TOLERANCE[work.dtype]:
                found.append({**row, "not timed": f"its answer is off by {error:.1e} from one process's in fp32"})
                continue
            row |= {"cpu_s": statistics.median(cpu[name]), "wall_s": statistics.median(wall[name])}
            row["cpu_over_one_process"] = _ratio(cpu[name], cpu[ONE])
            if OURS in names:
                row["wall_over_ours"] = _ratio(wall[name], wall[OURS])
            row |= {"error": error, "cpu": cpu[name], "wall": wall[name]}
            found.append(row)
    return found


def _ratio(some: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(some, others, strict=True))
