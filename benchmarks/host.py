"""What a layer costs the host: one rank of a ring whose kernels compute nothing and whose messages go nowhere.

    python benchmarks/host.py [--ranks 8] [--rounds 15] [--quick] [--out benchmarks/results]

On a GPU the host only launches, and where that takes longer than what was launched, the GPU waits. So this times the
thread that launches: over torch's "fake" process group, which takes every message and sends none, and with block
kernels that only make their results' memory, behind the same wrappers as on a GPU. Ours and the loops of other packages
(`peer_ways.py`) take turns; tensors are small, because an operator of torch takes the host as long for any size. What
is missing is what CUDA and NCCL add to each launch and message; so operators that would be launches are counted, too
(a block kernel makes one, its results' zeros). Merging is by plain operators of torch for all: five of ours, which are
one kernel on a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import peer_kernel
import peer_ways
import torch
import torch.distributed as dist
from machine import described
from peer_ways import OURS, WAYS, Attend, Rank, Way
from peers import find_peers, version_of
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from seqpar_ring.errors import ConfigError
from seqpar_ring.kernels import TorchFlashKernel, register
from seqpar_ring.kernels.library import Library
from seqpar_ring.parallel import SequenceParallel

Row = dict[str, Any]

TOKENS, HEADS, KV_HEADS, WIDTH = 16, 4, 2, 8
"""A rank's tokens, and the shape of a row: small, see above."""

FREE = ("as_strided", "view", "alias", "detach", "empty", "empty_strided", "empty_like", "_unsafe_view")
"""Operators that launch nothing."""

LAYERS = 20
"""Layers of a round, one after the other."""

AT_ONCE = "seqpar_ring, all blocks at once"
NAMES = (
    OURS,
    AT_ONCE,
    "ring-flash-attn, zigzag",
    "ring-flash-attn, ring",
    "ring-flash-attn, llama3",
    "torch context parallel, all-to-all",
    "torch context parallel, all-gather",
    "ringmaster, zigzag",
)
"""The ways that are timed. Not Ulysses, which has no steps: its four exchanges a layer cost next to nothing."""


# ----------------------------------------------------------------------------------------- kernels that compute nothing
def made(q_BSHD: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for (out, lse_BHS)."""
    *some, S, H, _ = q_BSHD.shape
    return torch.empty_like(q_BSHD), torch.zeros((*some, H, S), dtype=torch.float32)


class Nothing(Library):
    """torch's varlen flash attention, as ours calls it."""

    absent = ""

    def __init__(self) -> None:
        super().__init__("torch", "torch", ())

    def function(self, name: str) -> Callable[..., Any]:
        """See `Library.function`."""
        return self._backward if "backward" in name else self._forward

    @staticmethod
    def _forward(q: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return made(q)

    @staticmethod
    def _backward(_: Tensor, q: Tensor, k: Tensor, v: Tensor, *__: Any, **___: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class NoKernel(TorchFlashKernel):
    """Ours: the whole wrapper of a GPU's kernel around nothing."""

    name = "nothing"


def _flash_forward(name: str) -> Callable[..., Any]:
    @wraps(getattr(peer_kernel, name))  # peers look at signatures
    def forward(q: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, None, None]:
        return *made(q), None, None

    return forward


def _flash_backward(name: str) -> Callable[..., Any]:
    @wraps(getattr(peer_kernel, name))
    def backward(*_: Any, **__: Any) -> None:
        """dq, dk and dv are written in place: nothing to make."""

    return backward


def _torch_forward(q_BHSD: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q_BHSD), torch.zeros(q_BHSD.shape[:3], dtype=torch.float32)


def _torch_backward(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def replace_kernels() -> None:
    """Let everybody find kernels that compute nothing, wherever they look for theirs."""
    register(NoKernel(Nothing(), ("cpu",)))
    functions = [
        (_flash_backward if "backward" in one.__name__ else _flash_forward)(one.__name__) for one in peer_kernel.NAMES
    ]
    places: list[tuple[Any, str, Any]] = [
        (peer_kernel, "NAMES", tuple(functions)),
        (peer_ways, "_flash_attn_forward", functions[0]),
        (peer_ways, "FORWARD", _torch_forward),
        (peer_ways, "BACKWARD", _torch_backward),
    ]
    for module, name, value in places:
        setattr(module, name, value)


# --------------------------------------------------------------------------------------------------------------- timing
def leaves_of() -> tuple[list[Tensor], Tensor]:
    """q, k and v with gradients, and dout."""
    shapes = [(1, TOKENS, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    *qkv, dout = (torch.randn(shape).bfloat16() for shape in shapes)
    return [x.requires_grad_() for x in qkv], dout


def launches(attend: Attend) -> tuple[int, int]:
    """Operators that compute or copy something in a forward and in a backward pass; on a GPU each is a launch."""
    leaves, dout = leaves_of()
    out = attend(*leaves)  # else what is made once would count

    def forward() -> Tensor:
        return attend(*leaves)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, dout)

    found = []
    for act in (forward, backward):
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            act()
        leaf = [e.name for e in seen.events() or () if e.name.startswith("aten::") and not e.cpu_children]
        found.append(sum(name.removeprefix("aten::") not in FREE for name in leaf))
    return found[0], found[1]


def layer(attend: Attend) -> tuple[float, float]:
    """Seconds of this thread in a forward and in a backward pass."""
    leaves, dout = leaves_of()
    forward = backward = 0.0
    for _ in range(LAYERS):
        begun = time.thread_time()
        out = attend(*leaves)
        middle = time.thread_time()
        torch.autograd.grad(out, leaves, dout)
        forward += middle - begun
        backward += time.thread_time() - middle
    return forward / LAYERS, backward / LAYERS


def host(world: int = 8, rounds: int = 15, names: Sequence[str] = NAMES) -> list[Row]:
    """A row for each way: microseconds of a layer, medians over rounds in which all take turns."""
    find_peers()
    warnings.filterwarnings("ignore", category=FutureWarning)  # old names that peers call
    try:
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError as error:
        fix = "Use the version that constraints.txt pins."
        raise ConfigError("torch has no fake process group", fix=fix, torch=torch.__version__) from error
    dist.init_process_group("fake", store=FakeStore(), rank=world // 2, world_size=world)
    try:
        replace_kernels()
        sp = SequenceParallel(size=world, kernel="nothing", layout="zigzag")
        # On a GPU ranks compare only what is new, and that is what is asked about here.
        ring: Any = sp.groups.ring
        ring.agree = lambda *_: None
        agree_at_first = ring.agree_at_first
        ring.agree_at_first = lambda *about, always=False, **more: agree_at_first(*about, **more)
        group = dist.new_group()
        assert isinstance(group, dist.ProcessGroup)
        at = Rank(sp, group, world * TOKENS, KV_HEADS)
        ways = {**WAYS, AT_ONCE: Way(AT_ONCE, "", "zigzag", peer_ways._ours(world))}
        return _timed({name: ways[name] for name in names}, at, rounds)
    finally:
        dist.destroy_process_group()


def _timed(ways: dict[str, Way], at: Rank, rounds: int) -> list[Row]:
    attends: dict[str, Attend] = {}
    found: list[Row] = []
    for name, way in ways.items():
        about: Row = {"ranks": at.world, "way": name}
        if way.package:
            about["version"] = f"{way.package} {version_of(way.package)}".strip()
        try:
            attends[name] = way.make(at)
            about["forward_launches"], about["backward_launches"] = launches(attends[name])
        except Exception as error:  # whatever a peer raises is what is reported; ours must not fail
            if not way.package:
                raise
            attends.pop(name, None)
            about["not timed"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        found.append(about)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in attends}
    for i in range(rounds):
        for name, attend in attends.items():
            samples[name].append(layer(attend))
        print(f"round {i + 1} of {rounds}", flush=True)
    for row in found:
        if row["way"] in samples:
            both = [sum(pair) for pair in samples[row["way"]]]
            ours = [sum(pair) for pair in samples[OURS]] if OURS in samples else both
            forward, backward = (statistics.median(x) for x in zip(*samples[row["way"]], strict=True))
            row |= {"forward_us": 1e6 * forward, "backward_us": 1e6 * backward}
            row["over_ours"] = statistics.median(a / b for a, b in zip(both, ours, strict=True))
    return found


def main() -> None:
    """Time it, print it, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8, help="ranks of the ring that this process is one of (8)")
    how_long = parser.add_mutually_exclusive_group()
    how_long.add_argument("--rounds", type=int, default=15, help="turns of each way (15)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON file")
    how_long.add_argument("--quick", action="store_true", help="one round: to see that it runs, not for figures")
    chosen = parser.parse_args()
    if chosen.ranks < 2 or chosen.rounds < 1:
        parser.error(f"a ring has two ranks at least, and is timed once at least: {chosen.ranks}, {chosen.rounds}")
    torch.set_num_threads(1)
    rows = host(chosen.ranks, 1 if chosen.quick else chosen.rounds)
    for row in rows:
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
        print("  ".join(f"{key} {value}" for key, value in shown.items()))
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "host.json").write_text(json.dumps({"machine": described(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
