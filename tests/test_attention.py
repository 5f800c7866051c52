"""Ring attention against dense attention in fp64: out, lse, dq, dk, dv, over layouts, ranks, documents, heads, dtypes.

Beside what must hold stands what must fail: seeded faults in the executor, each of which has to break the comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seqpar_ring import executor, ring_attention
from seqpar_ring.errors import DisagreementError, PlanError, SeqparError, UnsupportedError
from seqpar_ring.kernels import merge
from seqpar_ring.layout import LAYOUTS
from seqpar_ring.parallel import SequenceParallel
from seqpar_ring.schedule import Block, Move
from seqpar_ring.testing import (
    Case,
    RankPool,
    assert_matches_dense,
    dense_results,
    relative_error,
    ring_results,
    run_lockstep,
)

WORLDS = [1, 2, 3, 4, 8]
LENGTHS = [[67], [1], [33, 1], [13, 1, 30, 7, 1, 3, 22], [5, 2, 1, 1], [1, 61, 19]]
HEADS = {"grouped": (4, 2), "one kv head": (3, 1), "as many": (2, 2)}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("world", WORLDS)
def test_the_ring_equals_dense_attention_in_fp64(world: int, layout: str, heads: str) -> None:
    for lengths in LENGTHS:
        for kernel in ("cpu", "reference"):
            case = Case(*HEADS[heads], batch=2)
            assert_matches_dense(lengths, world, case, 1e-12, layout=layout, kernel=kernel)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("world", WORLDS)
def test_full_attention_windows_and_pieces_equal_dense_in_fp64(world: int, layout: str) -> None:
    for case in (Case(causal=False), Case(window=5), Case(window=1), Case(scale=0.3)):
        assert_matches_dense([13, 1, 30, 7, 22], world, case, 1e-12, layout=layout, block_tokens=4)


@pytest.mark.parametrize("world", [1, 3])
def test_softcap_and_unequal_value_width_go_to_the_reference_kernel(world: int) -> None:
    assert_matches_dense([21, 8], world, Case(softcap=1.5), 1e-12)
    assert_matches_dense([21, 8], world, Case(value_dim=5), 1e-12)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=5),
    world=st.integers(1, 8),
    layout=st.sampled_from(sorted(LAYOUTS)),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 30),
    block_tokens=st.just("auto") | st.integers(1, 9),
    kv_heads=st.sampled_from([1, 2, 4]),
)
def test_random_cases_equal_dense_in_fp64(
    lengths: list[int], world: int, causal: bool, window: int | None, **how: Any
) -> None:
    case = Case(4, how.pop("kv_heads"), causal=causal or window is not None, window=window)
    assert_matches_dense(lengths, world, case, 1e-12, **how)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("world", [2, 4])
def test_processes_over_gloo_equal_dense_in_fp32(
    world: int, layout: str, request: pytest.FixtureRequest
) -> None:
    pool: RankPool = request.getfixturevalue(f"pool{world}")
    for lengths in ([197], [13, 1, 90, 7, 1, 3, 22], [2]):
        errors = assert_matches_dense(
            lengths, world, Case(6, 2, 16, dtype=torch.float32), 2e-6, pool=pool, layout=layout
        )
        assert max(errors.values()) > 0 or lengths == [2]


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_bf16_is_as_precise_as_one_kernel_on_the_whole_sequence(layout: str) -> None:
    """Error of out, dq, dk, dv against fp64 at W = 8: at most 1.05 times that of torch's own kernel, per tensor."""
    case = Case(8, 2, 64, dtype=torch.bfloat16)
    lengths = [1031]
    truth = dense_results(lengths, case)
    ring = run_lockstep(lambda sp: ring_results(sp, lengths, case), 8, layout=layout)[0]
    alone = flash_on_the_whole_sequence(case, sum(lengths))
    for name in ("out", "dq", "dk", "dv"):
        ours, theirs = relative_error(ring[name], truth[name]), relative_error(alone[name], truth[name])
        assert ours <= 1.05 * theirs, (name, ours, theirs)


def flash_on_the_whole_sequence(case: Case, tokens: int) -> dict[str, Tensor]:
    q, k, v, dout = (x.transpose(1, 2) for x in case.inputs(tokens))
    for x in (q, k, v):
        x.requires_grad_()
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    return {n: x.transpose(1, 2) for n, x in zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True)}


# -- what must fail ---------------------------------------------------------------------------------------------------


def drop_a_hop(patch: pytest.MonkeyPatch) -> None:
    """In forward, the block of one other rank is not computed with."""
    run = executor._Pass.run

    def without(self: Any, stages: Any, compute: Any) -> None:
        def some(block: Block, k: Tensor, v: Tensor) -> None:
            if self._gradient_dtype is not None or block.owner != (self._ring.rank + 1) % 4:
                compute(block, k, v)

        run(self, stages, some)

    patch.setattr(executor._Pass, "run", without)


def average_instead_of_merge(patch: pytest.MonkeyPatch) -> None:
    def average(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
        seen = (part_lse > -torch.inf).transpose(1, 2)[..., None]
        out.copy_(torch.where(seen, (out + part_out) / 2, out))
        merge.merge_(torch.zeros_like(out), lse, torch.zeros_like(out), part_lse)

    patch.setattr(executor, "merge_", average)


def lose_a_gradient(patch: pytest.MonkeyPatch) -> None:
    """One dKV that comes home is not added."""
    take = executor._Pass._take_gradient

    def lossy(self: Any, block: Block, landed: Tensor) -> None:
        if block.owner != 0:
            take(self, block, landed)

    patch.setattr(executor._Pass, "_take_gradient", lossy)


def keep_stale_keys(patch: pytest.MonkeyPatch) -> None:
    """Backward computes with the rank's own keys instead of those that arrived."""
    fetch = executor._Pass._keys_and_values

    def stale(self: Any, block: Block) -> tuple[Tensor, Tensor]:
        k, v = fetch(self, block)
        return (torch.zeros_like(k), v) if self._gradient_dtype is not None and block.owner == 1 else (k, v)

    patch.setattr(executor._Pass, "_keys_and_values", stale)


def widen_the_mask(patch: pytest.MonkeyPatch) -> None:
    """Diagonal calls are computed without causality."""
    from seqpar_ring.kernels.cpu import CpuKernel

    forward = CpuKernel.forward

    def uncausal(self: Any, q: Tensor, k: Tensor, v: Tensor, call: Any, scores: Any) -> tuple[Tensor, Tensor]:
        return forward(self, q, k, v, call._replace(right=1 << 60), scores)

    patch.setattr(CpuKernel, "forward", uncausal)


def use_the_local_lse(patch: pytest.MonkeyPatch) -> None:
    """Backward is given an lse that is not the global one."""
    backward = executor.backward

    def local(plan: Any, dout: Tensor, kept: Any, kernel: Any, scores: Any) -> Any:
        return backward(plan, dout, kept._replace(lse=kept.lse - 0.01), kernel, scores)

    patch.setattr(executor, "backward", local)


FAULTS: dict[Callable[[pytest.MonkeyPatch], None], set[str]] = {
    drop_a_hop: {"out", "dq", "dk", "dv"},
    average_instead_of_merge: {"out"},
    lose_a_gradient: {"dk", "dv"},
    keep_stale_keys: {"dq", "dv"},
    widen_the_mask: {"out"},
    use_the_local_lse: {"dq", "dk", "dv"},
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_seeded_fault_breaks_the_comparison(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, case = [41, 3, 22], Case()
    truth = dense_results(lengths, case)
    fault(monkeypatch)
    broken = run_lockstep(lambda sp: ring_results(sp, lengths, case), 4)[0]
    for name in FAULTS[fault]:
        assert relative_error(broken[name], truth[name]) > 1e-3, name


# -- what is refused --------------------------------------------------------------------------------------------------


def attend(sp: SequenceParallel, q_heads: int = 4, **change: Any) -> Any:
    """One call on 12 tokens, with one thing changed."""
    plan = sp.plan(12)
    S = change.pop("tokens", plan.local_tokens)
    q = torch.zeros(1, S, q_heads, 8, dtype=change.pop("q_dtype", torch.float32))
    k = torch.zeros(1, S, change.pop("kv_heads", 2), change.pop("width", 8))
    return ring_attention(q, k, k.clone(), plan, **change)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"tokens": 5}, PlanError, "expected_tokens=6"),
        ({"q_heads": 3}, PlanError, "must divide query heads"),
        ({"width": 4}, PlanError, "do not fit each other"),
        ({"q_dtype": torch.float64}, PlanError, "differ in dtype"),
        ({"sinks": torch.zeros(4)}, UnsupportedError, "sinks"),
        ({"softcap": 0.0}, PlanError, "softcap=0.0"),
    ],
)
def test_bad_arguments_are_refused_on_every_rank(change: dict[str, Any], error: type[SeqparError], words: str) -> None:
    def on_rank_1_only(sp: SequenceParallel) -> str:
        with pytest.raises(error) as caught:
            attend(sp, **(change if sp.rank == 1 else {}))
        return str(caught.value)

    for message in run_lockstep(on_rank_1_only, 2):
        assert words in message


def test_ranks_with_other_lengths_all_raise_and_name_the_field() -> None:
    def other_lengths(sp: SequenceParallel) -> str:
        plan = sp.plan([12, 4] if sp.rank == 1 else [12, 5])
        q = torch.zeros(1, plan.local_tokens, 2, 8)
        with pytest.raises(DisagreementError) as caught:
            ring_attention(q, q, q, plan)
        return str(caught.value)

    for message in run_lockstep(other_lengths, 3):
        assert "lengths" in message
        assert "(12, 4)" in message
        assert "(12, 5)" in message


def test_ranks_with_another_head_count_all_raise(pool2: RankPool) -> None:
    messages = pool2.run(caught_disagreement)
    assert all("dtype" not in message and "heads" in message for message in messages)
    assert len(messages) == 2


def caught_disagreement(sp: SequenceParallel) -> str:
    try:
        attend(sp, q_heads=2 if sp.rank else 4)
    except DisagreementError as error:
        return str(error)
    return "no error"


def test_a_window_the_named_kernel_lacks_is_refused() -> None:
    def refuse(sp: SequenceParallel) -> str:
        plan = sp.plan(12)
        q = torch.zeros(1, plan.local_tokens, 2, 8)
        with pytest.raises(UnsupportedError) as caught:
            ring_attention(q, q, q, plan, softcap=2.0)
        return str(caught.value)

    (message,) = run_lockstep(refuse, 1, kernel="cpu")
    assert "softcap" in message


def test_the_operator_can_be_traced_without_a_plan() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k = torch.empty(2, 5, 4, 8, dtype=torch.bfloat16), torch.empty(2, 5, 2, 8, dtype=torch.bfloat16)
        out, lse = torch.ops.seqpar_ring.attention(q, k, k, None, None, 1, 0.5, None)
    assert (out.shape, out.dtype) == ((2, 5, 4, 8), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 4, 5), torch.float32)


def test_a_move_is_the_only_thing_that_is_sent() -> None:
    """Bytes counted by the transport are those of the schedule's rows: KV in the inputs' dtype, dKV in fp32."""

    def count(sp: SequenceParallel) -> tuple[dict[str, int], dict[str, int]]:
        plan = sp.plan([31, 8])
        q, k = torch.randn(1, plan.local_tokens, 4, 8), torch.randn(1, plan.local_tokens, 2, 8)
        q, k, v = (x.to(torch.bfloat16).requires_grad_() for x in (q, k, k))
        out = ring_attention(q, k, v, plan)
        assert isinstance(out, Tensor)
        out.sum().backward()

        def rows(moves: tuple[Move, ...]) -> int:
            return sum(b - a for m in moves if m.src == sp.rank for a, b in m.block.rows)

        row = 2 * 2 * 8  # keys and values, two heads, eight wide
        expected = {
            "kv": row * 2 * (rows(plan.schedule.kv) + rows(plan.backward_schedule.kv)),
            "dkv": row * 4 * rows(plan.backward_schedule.dkv),
        }
        return sp.report().bytes_sent, expected

    for sent, expected in run_lockstep(count, 4):
        assert {lane: sent[lane] for lane in expected} == expected
