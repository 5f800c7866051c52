"""What a step asks of the host: nothing that would make a GPU wait, and nothing that a CUDA graph cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqpar_ring import SequenceParallel, executor, ring_attention
from seqpar_ring.cargo import Store
from seqpar_ring.kernels import Kept, Scores
from seqpar_ring.kernels.base import Capabilities
from seqpar_ring.kernels.library import Library
from seqpar_ring.kernels.varlen import Packed, Results, Rows, VarlenKernel
from seqpar_ring.testing import run_lockstep

WAITS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "equal", "is_nonzero")
"""Operators that read numbers of the device, so that the host waits for all that was queued."""

UPLOADS = ("lift_fresh", "lift_fresh_copy", "from_numpy")
"""Operators by which numbers of the host become a tensor."""


class Quiet(VarlenKernel):
    """A varlen kernel that launches nothing: what remains is what surrounds one."""

    name = "quiet"
    capabilities = Capabilities(dtypes=(torch.bfloat16,), max_head_dim=256, devices=("cpu",))

    def __init__(self) -> None:
        super().__init__(Library("torch", "torch", ()))

    def attend(self, rows: Rows, packed: Packed, scores: Scores) -> tuple[Tensor, Tensor]:
        T, H, _ = rows.q.shape
        return rows.q.new_zeros((T, H, rows.v.shape[2])), rows.q.new_zeros((H, T), dtype=torch.float32)

    def differentiate(self, rows: Rows, results: Results, packed: Packed, scores: Scores) -> Iterable[Tensor]:
        return (torch.zeros_like(x) for x in rows)


class Seen(TorchDispatchMode):
    """Counts the operators that are called, and those whose result is memory that was not there before."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.allocated: list[str] = []
        self.elsewhere = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.numel() and x.untyped_storage().data_ptr() not in known:
                self.allocated += [] if self.elsewhere else [self.names[-1]]
        return result

    def of(self, some: tuple[str, ...]) -> list[str]:
        return [name for name in self.names if name in some]


def steps(sp: SequenceParallel, lengths: list[int], sync: bool = False) -> list[Seen]:
    """The operators of two steps, each forward and backward."""
    plan, kernel, scores = sp.plan(lengths), Quiet(), Scores(0.1)
    shapes = [(1, plan.local_tokens, heads, 16) for heads in (4, 2, 2, 4)]
    q, k, v, dout = (torch.randn(shape).to(torch.bfloat16) for shape in shapes)
    found = []
    for _ in range(2):
        with Seen() as seen:
            out, lse = executor.forward(plan, (q, k, v), kernel, scores)
            if sync:
                float(lse.sum())
            executor.backward(plan, dout, Kept(q, k, v, out, lse, None), kernel, scores)
        found.append(seen)
    return found


SETTINGS: list[dict[str, Any]] = [
    {},
    {"schedule": "direct", "layout": "packed"},
    {"schedule": "all_gather"},
    {"block_tokens": 64},
    {"block_tokens": 999},
    {"schedule": "double_ring", "node": 2},
    {"kv_dtype": "int8", "dkv_dtype": "bf16"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_step_neither_waits_for_the_device_nor_sends_it_numbers_of_the_host(settings: dict[str, Any]) -> None:
    for first, again in run_lockstep(lambda sp: steps(sp, [700, 3, 321]), 4, **settings):
        assert len(again.names) > 20
        assert again.of(WAITS) == first.of(WAITS) == []
        assert again.of(UPLOADS) == []
        assert first.of(UPLOADS), "cumulative lengths go to the device once; the test would not see them"


def test_positions_go_to_a_device_once() -> None:
    def kept(sp: SequenceParallel) -> bool:
        plan = sp.plan([700, 3, 321])
        blocks = plan.forward_pass.work[0].blocks
        first, again = (plan.positions_of(blocks, "kv", torch.device("meta")) for _ in range(2))
        return first is again and first[0].is_meta and not plan.positions_of(blocks, "kv")[0].is_meta

    assert run_lockstep(kept, 2) == [True, True]


class Stages:
    """A recorder that says which stage allocated what; a pass is a list of stages."""

    def __init__(self, seen: Seen) -> None:
        self._seen, self.passes = seen, list[dict[int, list[str]]]()

    def start(self, label: str) -> None:
        self.passes.append({})

    @contextmanager
    def span(self, kind: str, stage: int) -> Iterator[None]:
        before = len(self._seen.allocated)
        yield
        self.passes[-1].setdefault(stage, []).extend(self._seen.allocated[before:])


def elsewhere(seen: Seen, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose own memory does not count."""

    def called(*args: Any, **kwargs: Any) -> Any:
        seen.elsewhere, before = True, seen.elsewhere
        try:
            return function(*args, **kwargs)
        finally:
            seen.elsewhere = before

    return called


def allocations(sp: SequenceParallel, batch: int, **how: Any) -> list[dict[int, list[str]]]:
    """What the stages of a forward and a backward pass allocate, but for what kernels and the network make."""
    plan, kernel, scores, seen = sp.plan([700, 3, 321]), Quiet(), Scores(0.1), Seen()
    ring, stages = plan.documents.ring, Stages(seen)
    ring.exchange = elsewhere(seen, ring.exchange)  # type: ignore[method-assign]
    kernel.forward = elsewhere(seen, kernel.forward)  # type: ignore[method-assign]
    kernel.backward = elsewhere(seen, kernel.backward)  # type: ignore[method-assign]
    plan.sequence.recorder = stages  # type: ignore[assignment]
    q, k, v, dout = (torch.randn(batch, plan.local_tokens, h, 16).to(torch.bfloat16) for h in (4, 2, 2, 4))
    with seen:
        out, lse = executor.forward(plan, (q, k, v), kernel, scores)
        executor.backward(plan, dout, Kept(q, k, v, out, lse, None), kernel, scores, **how)
    assert seen.allocated, "memory that is taken when a pass begins; the test would not see it"
    return stages.passes


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("queries_travel", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_step_takes_no_memory_once_the_sums_are_there(
    settings: dict[str, Any], queries_travel: bool, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of the rows that stay begin as the first result that fits, so the first two computations may make them."""
    monkeypatch.setattr(executor, "merge_", lambda *_: None)  # one kernel on a GPU, which takes no memory
    coded = settings.get("kv_dtype") == "int8"
    for passes in run_lockstep(lambda sp: allocations(sp, batch, queries_travel=queries_travel), 4, **settings):
        assert len(passes) == 2
        for stages in passes:
            made = [names for _, names in sorted(stages.items())]
            assert sum(map(len, made[:2])) <= 4 + 20 * coded
            if not coded:  # to code and decode rows takes steps of its own
                assert all(names == [] for names in made[2:])


def test_a_step_that_takes_memory_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Store.at
    monkeypatch.setattr(Store, "at", lambda *args: tuple(x.clone() for x in plain(*args)))
    for passes in run_lockstep(lambda sp: allocations(sp, 1), 4):
        assert all(any(names for step, names in stages.items() if step > 1) for stages in passes)


@pytest.mark.parametrize("queries_travel", [False, True])
def test_delta_is_made_only_where_queries_travel(queries_travel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels make it themselves of out, which travels with no query."""
    given: set[tuple[bool, bool]] = set()
    plain = Quiet.backward

    def noted(self: Quiet, dout: Tensor, kept: Kept, *how: Any) -> tuple[Tensor, Tensor, Tensor]:
        given.add((kept.out is not None, kept.delta is not None))
        return plain(self, dout, kept, *how)

    monkeypatch.setattr(Quiet, "backward", noted)
    run_lockstep(lambda sp: allocations(sp, 1, queries_travel=queries_travel), 4)
    assert given == {(not queries_travel, queries_travel)}


def test_a_step_that_waits_is_seen() -> None:
    for found in run_lockstep(lambda sp: steps(sp, [700], sync=True), 2):
        assert all(seen.of(WAITS) for seen in found)


def test_a_computation_costs_the_host_few_operators_of_torch() -> None:
    """Each takes it some microseconds whatever its size: at 2,000 tokens a rank that adds up to the kernels' time."""

    def counted(sp: SequenceParallel) -> tuple[int, int, int]:
        plan, kernel, scores = sp.plan([8 * 64]), Quiet(), Scores(0.1)
        q, k, v, dout = (torch.randn(1, plan.local_tokens, heads, 16).to(torch.bfloat16) for heads in (4, 2, 2, 4))
        for _ in range(2):
            with Seen() as there:
                out, lse = executor.forward(plan, (q, k, v), kernel, scores)
            with Seen() as back:
                executor.backward(plan, dout, Kept(q, k, v, out, lse, None), kernel, scores)
        return len(there.names), len(back.names), len(plan.forward_pass.work)

    for there, back, computations in run_lockstep(counted, 8):
        assert computations == 8
        assert there <= 8 * 24
        assert back <= 8 * 34


def exchanges(sp: SequenceParallel) -> int:
    """How often a forward pass posts to the ring."""
    plan, count, ring = sp.plan([700]), 0, sp.groups.ring
    post = ring.exchange

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return post(*args, **kwargs)

    ring.exchange = counted  # type: ignore[method-assign]
    q, k, v = (torch.randn(1, plan.local_tokens, heads, 16).to(torch.bfloat16) for heads in (4, 2, 2))
    executor.forward(plan, (q, k, v), Quiet(), Scores(0.1))
    return count


@pytest.mark.parametrize("schedule", ["ring", "all_gather"])
def test_a_handle_stands_for_what_is_due_together_and_not_for_all_that_a_step_posts(schedule: str) -> None:
    """An all-gather posts everything at once; whoever needs the first block does not wait for the last."""
    assert run_lockstep(exchanges, 4, schedule=schedule) == [3, 3, 3, 3]


@pytest.mark.gpu
def test_a_step_is_captured_as_a_cuda_graph_and_replayed_with_other_numbers() -> None:
    sp = SequenceParallel(size=1)
    plan = sp.plan([700, 3, 321])
    shapes = [(1, plan.local_tokens, heads, 64) for heads in (8, 2, 2)]
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes)

    def step() -> tuple[Tensor, ...]:
        out = ring_attention(q, k, v, plan)
        return out, *torch.autograd.grad(out.sum(), (q, k, v))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in (q, k, v):
            x.copy_(torch.randn_like(x))
    graph.replay()
    for mine, again in zip(captured, step(), strict=True):
        assert torch.equal(mine, again)
