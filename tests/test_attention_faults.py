"""Ring attention: what must fail, and what is refused.

Beside what must hold (`test_attention.py`) stand seeded faults in the executor and its runs, each of which has to break
the comparison with dense attention, and bad arguments, which have to end in a named error on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from seqpar_ring import attention, executor, operator, ring_attention, run
from seqpar_ring import layout as layouts
from seqpar_ring import plan as plans
from seqpar_ring.errors import DisagreementError, PlanError, SeqparError, UnsupportedError
from seqpar_ring.geometry import Mask
from seqpar_ring.kernels import ReferenceKernel, merge, names, register, unregister
from seqpar_ring.packing import Balance
from seqpar_ring.parallel import SequenceParallel
from seqpar_ring.passes import Message
from seqpar_ring.plan import Documents, Plan, Reason
from seqpar_ring.schedule import Move, Work
from seqpar_ring.testing import (
    Case,
    RankPool,
    assert_matches_dense,
    dense_results,
    relative_error,
    ring_results,
    run_lockstep,
)
from seqpar_ring.transport.base import Agreed

# -- what must fail ---------------------------------------------------------------------------------------------------


def drop_a_hop(patch: pytest.MonkeyPatch) -> None:
    """In forward, the block of one other rank is not computed with."""
    go = run.Run.go

    def without(self: Any, compute: Any) -> None:
        def some(work: Work, view: Any) -> None:
            if self._label != "forward" or work.blocks[0].owner != (self._ring.rank + 1) % 4:
                compute(work, view)

        go(self, some)

    patch.setattr(run.Run, "go", without)


def average_instead_of_merge(patch: pytest.MonkeyPatch) -> None:
    merged = merge.merge_

    def average(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
        seen = (part_lse > -torch.inf).transpose(1, 2)[..., None]
        out.copy_(torch.where(seen, (out + part_out) / 2, out))
        merged(torch.zeros_like(out), lse, torch.zeros_like(out), part_lse)

    patch.setattr(executor, "merge_", average)


def wait_for_others(patch: pytest.MonkeyPatch) -> None:
    """Parts of a step are merged several at a time, as on a GPU."""
    patch.setattr(executor, "at_once", lambda out: 3)


def forget_what_waits(patch: pytest.MonkeyPatch) -> None:
    wait_for_others(patch)
    patch.setattr(executor._Partial, "merge", lambda self: None)


def lose_a_gradient(patch: pytest.MonkeyPatch) -> None:
    """One dKV that comes home is not added."""
    take = run.Run._take_gradient

    def lossy(self: Any, message: Message, landed: Any) -> None:
        if message.move.block.owner != 0:
            take(self, message, landed)

    patch.setattr(run.Run, "_take_gradient", lossy)


def keep_stale_keys(patch: pytest.MonkeyPatch) -> None:
    """Backward computes with the rank's own keys instead of those that arrived."""
    fetch = run.Run._seen

    def stale(self: Any, work: Work) -> tuple[Tensor, ...]:
        k, v = fetch(self, work)
        return (torch.zeros_like(k), v) if self._label != "forward" and work.blocks[0].owner == 1 else (k, v)

    patch.setattr(run.Run, "_seen", stale)


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

    def local(plan: Any, dout: Tensor, kept: Any, *rest: Any, **more: Any) -> Any:
        return backward(plan, dout, kept._replace(lse=kept.lse - 0.01), *rest, **more)

    patch.setattr(executor, "backward", local)


def mix_up_blocks_that_arrive_together(patch: pytest.MonkeyPatch) -> None:
    """The view of several blocks is put together in the wrong order."""
    view = run.Run._seen

    def shuffled(self: Any, work: Work) -> Any:
        return view(self, work._replace(slices=work.slices[::-1]))

    patch.setattr(run.Run, "_seen", shuffled)


def forget_the_delta(patch: pytest.MonkeyPatch) -> None:
    """Where queries travel, what softmax takes away from every row's gradient is left at home."""
    fetch = run.Run._seen

    def without(self: Any, work: Work) -> Any:
        fields = fetch(self, work)
        return (*fields[:3], torch.zeros_like(fields[3])) if len(fields) == 4 else fields

    patch.setattr(run.Run, "_seen", without)


def sink_in_every_block(patch: pytest.MonkeyPatch) -> None:
    """The sink is merged twice instead of once."""
    drain = operator._drain
    patch.setattr(operator, "_drain", lambda out, lse, sinks: drain(*drain(out, lse, sinks), sinks))


def take_row_numbers_for_positions(patch: pytest.MonkeyPatch) -> None:
    """ALiBi's distances are counted in a rank's memory, where the sequence has gaps."""
    positions_of = Plan.positions_of

    def numbered(self: Any, *args: Any) -> Any:
        return tuple(torch.arange(len(x)) for x in positions_of(self, *args))

    patch.setattr(Plan, "positions_of", numbered)


FAULTS: dict[Callable[[pytest.MonkeyPatch], None], set[str]] = {
    drop_a_hop: {"out", "dq", "dk", "dv"},
    average_instead_of_merge: {"out"},
    forget_what_waits: {"out"},
    lose_a_gradient: {"dk", "dv"},
    keep_stale_keys: {"dq", "dv"},
    widen_the_mask: {"out"},
    use_the_local_lse: {"dq", "dk", "dv"},
    mix_up_blocks_that_arrive_together: {"out", "dq", "dk", "dv"},
    forget_the_delta: {"dq", "dk"},
    sink_in_every_block: {"out", "dq"},
    take_row_numbers_for_positions: {"out"},
}
SPECIAL: dict[Any, tuple[Case, dict[str, Any]]] = {
    mix_up_blocks_that_arrive_together: (Case(), {"block_tokens": 40}),
    forget_the_delta: (Case(), {"backward": "q"}),
    forget_what_waits: (Case(), {"block_tokens": 8}),
    sink_in_every_block: (Case(sinks=True), {}),
    take_row_numbers_for_positions: (Case(alibi=True), {}),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_seeded_fault_breaks_the_comparison(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [41, 3, 22]
    case, how = SPECIAL.get(fault, (Case(), {}))
    assert_matches_dense(lengths, 4, case, 1e-12, **how)
    truth = dense_results(lengths, case)
    fault(monkeypatch)
    broken = run_lockstep(lambda sp: ring_results(sp, lengths, case), 4, **how)[0]
    for name in FAULTS[fault]:
        assert relative_error(broken[name], truth[name]) > 1e-3, name


@pytest.mark.parametrize("how", [{}, {"block_tokens": 8}, {"block_tokens": 40}, {"layout": "striped"}], ids=str)
def test_parts_that_wait_for_others_of_their_step_are_merged_as_well(
    how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for_others(monkeypatch)
    for case in (Case(), Case(window=5)):
        assert_matches_dense([41, 3, 22], 4, case, 1e-12, **how)


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
        ({"sinks": torch.zeros(3)}, PlanError, "one number for each query head"),
        ({"alibi_slopes": torch.zeros(2, 4)}, PlanError, "(batch, heads)"),
        ({"alibi_slopes": torch.zeros(4, requires_grad=True)}, PlanError, "no gradient"),
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


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"tokens": 5}, PlanError, "expected_tokens=6"),
        ({"q_dtype": torch.float64}, PlanError, "differ in dtype"),
        ({"kv_heads": 3}, PlanError, "must divide query heads"),
        ({"softcap": 0.0}, PlanError, "softcap=0.0"),
        ({"scale": -1.0}, PlanError, "scale=-1.0"),
        ({"sinks": torch.zeros(3)}, PlanError, "one number for each query head"),
    ],
)
def test_a_call_that_was_right_lets_no_wrong_one_through(
    change: dict[str, Any], error: type[SeqparError], words: str
) -> None:
    """What a kind of call comes to is remembered, layer for layer and step for step."""

    def second(sp: SequenceParallel) -> None:
        for _ in range(2):
            attend(sp)
        with pytest.raises(error) as caught:
            attend(sp, **change)
        assert words in str(caught.value)
        attend(sp)

    run_lockstep(second, 2)


def test_a_kernel_that_has_gone_is_missed_before_anything_is_sent_and_found_when_it_is_back() -> None:
    class Mine(ReferenceKernel):
        name = "mine"

    def again(sp: SequenceParallel) -> list[str]:
        said = []
        for present in (True, True, False, False, True):
            sp.groups.ring.agree("all are here", {})
            if sp.rank == 0:
                (register(Mine()) if present else unregister("mine")) if present != ("mine" in names()) else None
            sp.groups.ring.agree("it is done", {})
            try:
                attend(sp)
                said.append("")
            except SeqparError as error:
                said.append(str(error))
        return said

    register(Mine())
    try:
        for said in run_lockstep(again, 2, kernel="mine"):
            assert [bool(words) for words in said] == [False, False, True, True, False]
            assert all("unknown kernel" in words for words in said[2:4])
    finally:
        unregister("mine")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_on_all_ranks() -> None:
    def one(sp: SequenceParallel) -> None:
        plan = sp.plan(12)
        x = torch.zeros(1, plan.local_tokens, 2, 8)
        some = torch.nested.nested_tensor([torch.zeros(6, 2, 8)]) if sp.rank else x
        with pytest.raises(PlanError, match="nested tensors"):
            ring_attention(some, x, x, plan)

    run_lockstep(one, 2)


def test_other_numbers_are_other_calls_and_few_kinds_are_remembered() -> None:
    def several(sp: SequenceParallel) -> None:
        plan, seen = sp.plan(12), []
        q, k, v = (torch.randn(1, plan.local_tokens, 2, 8, dtype=torch.float64) for _ in range(3))
        for number in range(1, 100):
            scale = 1.0 / number
            out = ring_attention(q, k, v, plan, scale=scale)
            assert torch.equal(out, ring_attention(q, k, v, plan, scale=torch.tensor(scale, dtype=torch.float64)))
            seen.append(len(plan.seen))
        assert max(seen) == attention.MOST_SEEN
        assert seen[-1] < attention.MOST_SEEN

    run_lockstep(several, 2)


def test_what_is_no_plan_and_no_tensor_is_named() -> None:
    x = torch.randn(1, 8, 2, 4)

    def run(sp: SequenceParallel, plan: Any, rank: int) -> None:
        queries: Any = x.numpy() if sp.rank == rank else x
        ring_attention(queries, x, x, sp if plan == "sp" else plan and sp.plan(16))

    for plan in (None, "sp"):
        with pytest.raises(PlanError, match="was given no plan"):
            run_lockstep(lambda sp, plan=plan: run(sp, plan, 0), 2)
    with pytest.raises(PlanError, match=r"not torch tensors \[given=\['ndarray', 'Tensor', 'Tensor'\]\]"):
        run_lockstep(lambda sp: run(sp, True, 1), 2)


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


def placed_otherwise(sp: SequenceParallel) -> str:
    """Each rank has its own idea of where the same tokens lie, as many on each: nothing but the places tells."""
    layout = layouts.make("striped" if sp.rank else "zigzag", (4, 12), sp.size, Balance())
    plan = Documents((4, 12), sp.settings, sp.groups.ring, placed=layout).plan(Mask.make(True))
    q = torch.randn(1, plan.local_tokens, 2, 4)
    with pytest.raises(DisagreementError) as caught:
        ring_attention(q, q, q, plan)
    return str(caught.value)


def test_ranks_that_place_the_same_tokens_differently_are_told_so() -> None:
    for message in run_lockstep(placed_otherwise, 2):
        assert "placement" in message


def on_another_device(sp: SequenceParallel) -> tuple[str, bool]:
    plan = sp.plan(9)
    q = torch.randn(1, plan.local_tokens, 2, 4)
    away = q.to("meta")
    with pytest.raises(PlanError) as caught:
        ring_attention(away, away, away, plan)
    assert not sp.groups.ring.carries(torch.device("cuda"))  # gloo takes them in collectives only
    out = ring_attention(q, q, q, plan)
    assert isinstance(out, Tensor)
    return str(caught.value), bool(out.isfinite().all())


def test_tensors_that_the_process_groups_do_not_carry_are_refused_and_the_groups_go_on(pool2: RankPool) -> None:
    for message, goes_on in pool2.run(on_another_device):
        assert "carry no messages from a meta device" in message
        assert goes_on


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


@pytest.mark.parametrize(
    ("heads", "size", "words"),
    [((9, 3), 2, "to 1 or 3 or 9"), ((6, 3), 4, "to 1 or 3 or 6"), ((4, 2), 8, "to 1 or 2 or 4")],
)
def test_heads_that_cannot_be_shared_out_are_refused_with_those_that_can(
    heads: tuple[int, int], size: int, words: str
) -> None:
    def refuse(sp: SequenceParallel) -> str:
        plan = sp.plan(16)
        q, k = torch.zeros(1, plan.local_tokens, heads[0], 4), torch.zeros(1, plan.local_tokens, heads[1], 4)
        with pytest.raises(SeqparError) as caught:
            ring_attention(q, k, k, plan)
        return str(caught.value)

    for message in run_lockstep(refuse, 8, heads=size):
        assert f'Set "heads" {words};' in message


@pytest.mark.parametrize(("heads", "kv_heads", "wanted"), [(8, 4, (4, 2)), (8, 1, (4, 1))])
def test_a_kernel_is_chosen_for_the_heads_that_a_rank_computes_and_before_anything_is_sent(
    heads: int, kv_heads: int, wanted: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU a choice is a trial: one of other heads came first, and the one that counts between the messages."""
    asked: list[tuple[int, int]] = []

    def select(request: Any, name: str) -> Any:
        asked.append((request.heads, request.kv_heads))
        return chosen(request, name)

    chosen = plans.select
    monkeypatch.setattr(plans, "select", select)
    run_lockstep(lambda sp: ring_results(sp, [13], Case(heads, kv_heads)), 2, heads=2)
    assert set(asked) == {wanted}


def test_a_plan_that_no_kernel_can_run_is_refused_when_it_is_made() -> None:
    class Plain(ReferenceKernel):
        name = "plain"
        capabilities = replace(ReferenceKernel.capabilities, window=False)

    register(Plain())
    try:
        with pytest.raises(UnsupportedError, match='"plain" lacks sliding window'):
            run_lockstep(lambda sp: sp.plan([12, 3], window=4), 2, kernel="plain")
        assert run_lockstep(lambda sp: sp.plan([12, 3], window=12).windowed, 2, kernel="plain") == [False, False]
    finally:
        unregister("plain")


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ({"window": 0}, "at least one key"),
        ({"causal": False, "window": 3}, "a pair"),
        ({"causal": False, "window": (3, -1)}, "a pair"),
        ({"causal": False, "chunk": 3}, "causal"),
        ({"chunk": 0}, "at least one position"),
        ({"prefix": 3, "window": 4}, "no one meaning"),
        ({"prefix": 20}, "longer than its document"),
        ({"prefix": (1, 2)}, "one prefix for each document"),
        ({"window": (1, 2, 3, 4)}, "one window for each document"),
        ({"kv_lengths": (3, 4, 5)}, "no causal mask"),
        ({"causal": False, "kv_lengths": (3, 4)}, "different numbers of documents"),
    ],
)
def test_masks_that_do_not_exist_are_refused_with_the_fix(mask: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        run_lockstep(lambda sp: sp.plan([12, 7, 9], **mask), 1)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "expected"), [(8, 8, "queries travel"), (8, 2, "keys and values travel")]
)
def test_what_travels_in_backward_follows_the_bytes_and_says_so(heads: int, kv_heads: int, expected: str) -> None:
    def ask(sp: SequenceParallel) -> Reason:
        plan = sp.plan(64)
        q = torch.zeros(1, plan.local_tokens, heads, 16, dtype=torch.bfloat16)
        k = torch.zeros(1, plan.local_tokens, kv_heads, 16, dtype=torch.bfloat16)
        return plan.backward_travels(operator.request_for(q, k, k, plan, None, False))

    reason = run_lockstep(ask, 4)[0]
    assert reason.value == expected
    # In bf16: q, dout, dq in fp32, lse and delta; against k, v and their gradients in fp32.
    assert reason.reason == f"queries {8 * heads * 16 + 8 * heads} bytes a token, keys and values {12 * kv_heads * 16}"


def test_what_has_no_gradient_here_is_refused_and_not_dropped() -> None:
    def with_(**options: Any) -> Callable[[SequenceParallel], Any]:
        def run(sp: SequenceParallel) -> Any:
            plan = sp.plan(6)
            x = torch.randn(1, plan.local_tokens, 2, 4)
            return ring_attention(x, x, x, plan, **options)

        return run

    for name in ("scale", "softcap"):
        with pytest.raises(UnsupportedError, match=f"{name} has no gradient here"):
            run_lockstep(with_(**{name: torch.tensor(0.5, requires_grad=True)}), 2)
        for value in (0.0, -1.0, float("nan"), float("inf"), "1", True, [1.0], torch.ones(2)):
            with pytest.raises(PlanError, match=f"{name} must be a positive number"):
                run_lockstep(with_(**{name: value}), 2)


def test_tensors_that_are_none_no_width_and_the_same_softcap_twice() -> None:
    """Lists for sinks and slopes, heads without width; 30 and 30.0 are one softcap."""

    def run(sp: SequenceParallel, width: int = 4, **options: Any) -> Any:
        plan = sp.plan(6)
        x = torch.ones(1, plan.local_tokens, 2, width)
        return ring_attention(x, x, x, plan, **options)

    for name in ("sinks", "alibi_slopes"):
        with pytest.raises(PlanError, match="sinks and alibi_slopes are tensors"):
            run_lockstep(lambda sp, name=name: run(sp, **{name: [1.0, 2.0]}), 2)
    with pytest.raises(PlanError, match="q and k have no width"):
        run_lockstep(lambda sp: run(sp, 0), 2)
    run_lockstep(lambda sp: run(sp, softcap=(30, 30.0)[sp.rank]), 2)


@pytest.mark.parametrize("before", [False, True], ids=["", "after a call without"])
@pytest.mark.parametrize("way", ["jvp", "dual", "sinks", "alibi_slopes"])
def test_forward_mode_derivatives_are_refused_and_not_zero(way: str, before: bool) -> None:
    def run(sp: SequenceParallel) -> None:
        plan = sp.plan(6)
        x, by_head = torch.randn(1, plan.local_tokens, 2, 4), torch.ones(2)
        if before:
            ring_attention(x, x, x, plan)
        if way == "jvp":
            torch.func.jvp(lambda q: ring_attention(q, x, x, plan), (x,), (torch.ones_like(x),))
        elif way != "dual":
            torch.func.jvp(lambda y: ring_attention(x, x, x, plan, **{way: y}), (by_head,), (by_head,))
        else:
            with forward_ad.dual_level():
                ring_attention(x, forward_ad.make_dual(x, torch.ones_like(x)), x, plan)

    with pytest.raises(UnsupportedError, match="forward-mode"):
        run_lockstep(run, 1)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("way", ["shard", "gather"])
def test_second_derivatives_go_through_sharding(way: str, world: int) -> None:
    """autograd.grad dropped them without a word where another path led to its input; of x ** 3 they are 6 x."""

    def run(sp: SequenceParallel) -> tuple[Tensor, Tensor]:
        plan, factor = sp.plan(7), 1.0 + sp.rank
        whole = torch.linspace(0.5, 2.0, 7, dtype=torch.float64)[None]
        x = (whole if way == "shard" else plan.shard(whole)).requires_grad_()
        other = plan.shard(x) if way == "shard" else plan.gather(x)
        (grad,) = torch.autograd.grad((other**3).sum(), x, create_graph=True)
        (found,) = torch.autograd.grad(factor * (grad**2).sum() + x.sum(), x)
        factors = sum(range(1, world + 1))
        expected = 1 + 36 * x.detach() ** 3 * (factors if way == "shard" else factor * world**2)
        return found, expected

    for found, expected in run_lockstep(run, world):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_ranks_of_which_only_some_differentiate_are_told_so() -> None:
    def run(sp: SequenceParallel) -> None:
        plan = sp.plan(6)
        x = torch.randn(1, plan.local_tokens, 2, 4, requires_grad=sp.rank == 0)
        ring_attention(x, x, x, plan)

    with pytest.raises(DisagreementError, match="gradients"):
        run_lockstep(run, 2)


def first_time(agreed: Agreed, what: str) -> bool:
    known = agreed.knows(what)
    agreed.add(what)
    return not known


def test_what_was_agreed_on_is_forgotten_on_all_ranks_alike() -> None:
    """Whoever plans more than others must not be the only one to compare notes: over NCCL it would wait in vain."""
    def asked(sp: SequenceParallel) -> list[bool]:
        for length in range(20, 20 + 70 * (1 + sp.rank)):  # more plans than are kept, and not the same on all
            sp.plan(length)
        return [first_time(sp.plan(20).sequence.agreed, what) for what in ("a", "b", "a")]

    assert run_lockstep(asked, 2) == [[True, True, False]] * 2
    short = Agreed(kept=2)
    assert [first_time(short, what) for what in "abacb"] == [True, True, False, True, True]


@pytest.mark.parametrize("where", ["q", "k"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_nan_stays_where_it_belongs_and_visible(world: int, where: str) -> None:
    """In blocks of any size: torch's op makes 0 of a row of nan where there are few keys."""
    lengths, case = [13, 5, 20], Case(2, 1, 8, dtype=torch.float32)

    def run(sp: SequenceParallel) -> dict[str, Tensor]:
        plan = sp.plan(lengths)
        q, k, v, _ = case.inputs(plan.tokens)
        {"q": q, "k": k}[where][:, 15] = float("nan")  # the third token of the second document
        out = ring_attention(plan.shard(q), plan.shard(k), plan.shard(v), plan)
        return {"out": plan.gather(out)}

    seen = run_lockstep(run, world)[0]["out"].isnan().any(-1).any(-1)[0]
    assert seen.nonzero().flatten().tolist() == ([15] if where == "q" else [15, 16, 17])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_overflow_are_not_taken_for_rows_that_see_a_zero(dtype: torch.dtype) -> None:
    """Of finite queries and keys: a block of nothing but -inf counted in the merge with the weight of a logit of 0."""
    q = torch.full((1, 4, 1, 8), 1e19, dtype=dtype)
    k = torch.cat([torch.full((1, 2, 1, 8), -1e19), torch.zeros(1, 2, 1, 8)], 1).to(dtype)
    v = torch.cat([torch.ones(1, 2, 1, 8), torch.full((1, 2, 1, 8), 5.0)], 1).to(dtype)

    def run(sp: SequenceParallel) -> tuple[Tensor, Tensor, Tensor]:
        plan = sp.plan(4, causal=False)
        mine = [plan.shard(x).requires_grad_() for x in (q, k, v)]
        out, lse = ring_attention(*mine, plan, return_lse=True)
        out.sum().backward()
        return plan.gather(out.detach()), plan.gather(lse, 2), plan.gather(mine[2].grad)  # type: ignore[arg-type]

    for world in (1, 2):
        out, lse, dv = run_lockstep(run, world, layout="contiguous")[0]
        assert bool((out == 5).all())
        torch.testing.assert_close(lse, torch.full_like(lse, math.log(2)))
        torch.testing.assert_close(dv[0, :, 0, 0].float(), torch.tensor([0.0, 0.0, 2.0, 2.0]))


@pytest.mark.parametrize(("name", "value"), [("scale", 1e-46), ("softcap", 1e39), ("softcap", 1e-46)])
def test_a_number_that_is_none_in_the_dtype_of_the_logits_is_refused(name: str, value: float) -> None:
    """They were 0 or infinite in fp32, and the answers nan."""

    def run(sp: SequenceParallel) -> None:
        plan = sp.plan(6)
        for dtype in (torch.float64, torch.bfloat16):
            x = torch.randn(1, plan.local_tokens, 2, 4, dtype=dtype)
            ring_attention(x, x, x, plan, **{name: value})  # type: ignore[arg-type]

    with pytest.raises(PlanError, match=f"{name} must be a positive number"):
        run_lockstep(run, 2)


def on_one_rank(kind: str, x: Tensor) -> Tensor:
    return {"sparse": x.to_sparse(), "meta": x.to("meta")}[kind]


@pytest.mark.parametrize(("kind", "error"), [("sparse", PlanError), ("meta", DisagreementError)])
def test_another_kind_of_tensor_on_one_rank_is_said_on_all(kind: str, error: type[Exception]) -> None:
    """It failed in the middle of a pass, where the others went on or waited."""

    def run(sp: SequenceParallel) -> str:
        plan = sp.plan(6)
        x = torch.randn(1, plan.local_tokens, 2, 4)
        with pytest.raises(error) as found:
            ring_attention(*[on_one_rank(kind, x) if sp.rank else x] * 3, plan)
        return str(found.value)

    for said in run_lockstep(run, 2):
        assert ("not dense" if kind == "sparse" else "rank 0='cpu', rank 1='meta'") in said


def test_ranks_that_differ_in_wanting_gradients_of_what_they_gather_are_told_so() -> None:
    def run(sp: SequenceParallel) -> None:
        plan = sp.plan(6)
        plan.gather(torch.ones(1, plan.local_tokens, requires_grad=sp.rank == 0)).sum()

    with pytest.raises(DisagreementError, match=r"gather: .*'gradients'"):
        run_lockstep(run, 2)
