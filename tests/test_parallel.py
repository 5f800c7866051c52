"""SequenceParallel: what it refuses, batches sharded and put together again, plans cached, ranks held together."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from seqpar_ring import Settings, ring_attention
from seqpar_ring.errors import (
    BatchError,
    ConfigError,
    DisagreementError,
    GroupError,
    PlanError,
    SeqparError,
)
from seqpar_ring.layout import LAYOUTS
from seqpar_ring.parallel import SequenceParallel
from seqpar_ring.testing import RankPool, run_lockstep


def batch(S: int = 22) -> dict[str, Any]:
    ids = torch.arange(2 * S).reshape(2, S)
    return {"input_ids": ids, "labels": ids + 1000, "attention_mask": torch.ones(2, S), "note": "as it was"}


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_a_sharded_batch_gathers_to_the_whole_with_shifted_labels(world: int, layout: str) -> None:
    lengths = [13, 1, 8]

    def whole_again(sp: SequenceParallel) -> tuple[Tensor, ...]:
        part = sp.shard_batch(batch(), lengths)
        plan = part["seqpar_plan"]
        assert part["note"] == "as it was"
        assert "attention_mask" not in part
        assert part["labels"] is part["shift_labels"]
        assert part["input_ids"].shape == (2, plan.local_tokens)
        torch.testing.assert_close(part["position_ids"][:1], plan.position_ids)
        return tuple(plan.gather(part[key]) for key in ("input_ids", "labels", "position_ids"))

    for ids, labels, positions in run_lockstep(whole_again, world, layout=layout):
        assert torch.equal(ids, batch()["input_ids"])
        assert torch.equal(positions[1], torch.cat([torch.arange(n) for n in lengths]))
        expected = batch()["labels"].roll(-1, 1)
        expected[:, [12, 13, 21]] = -100
        assert torch.equal(labels, expected)


def test_shard_and_gather_are_each_others_adjoint() -> None:
    """<gather(x), y> summed over ranks = sum of <x, its gradient>; the same for shard."""

    def adjoint(sp: SequenceParallel) -> tuple[Tensor, ...]:
        plan = sp.plan([7, 4])
        generator = torch.Generator().manual_seed(sp.rank)
        x = torch.randn(2, plan.local_tokens, dtype=torch.float64, generator=generator).requires_grad_()
        y = torch.randn(2, 11, dtype=torch.float64, generator=generator)
        whole = plan.gather(x)
        (grad,) = torch.autograd.grad((whole * y).sum(), x)
        w = torch.randn(2, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(99)).requires_grad_()
        z = torch.randn(2, plan.local_tokens, dtype=torch.float64, generator=generator)
        part = plan.shard(w)
        (grad_w,) = torch.autograd.grad((part * z).sum(), w)
        products = ((whole * y), (x * grad), (part * z), (w * grad_w))
        return tuple(product.sum().detach() for product in products)

    results = run_lockstep(adjoint, 3)
    torch.testing.assert_close(sum(r[0] for r in results), sum(r[1] for r in results))
    for r in results:  # every rank gets the gradient of the sum over the ranks
        torch.testing.assert_close(r[3], torch.as_tensor(sum(x[2] for x in results)))


def test_plans_are_cached_and_masks_share_the_layout() -> None:
    def same(sp: SequenceParallel) -> None:
        plan = sp.plan([5, 9])
        assert sp.plan((5, 9)) is plan
        assert sp.plan(14) is not plan
        windowed = plan.masked(window=3)
        assert windowed is sp.plan([5, 9], window=3)
        assert windowed.layout is plan.layout
        assert windowed.masked() is plan
        assert "14 tokens over 2 ranks" in plan.explain()
        assert "zigzag" in plan.explain()

    run_lockstep(same, 2)


def test_a_gone_plan_is_named_and_a_held_one_survives_until_backward() -> None:
    import gc

    from seqpar_ring.plan import plan_of

    def forget(sp: SequenceParallel) -> None:
        x = torch.ones(1, 4, 1, 8, requires_grad=True)
        out = ring_attention(x, x, x, SequenceParallel.over(sp.groups, sp.settings).plan(4))
        gc.collect()
        assert isinstance(out, Tensor)
        out.sum().backward()  # the graph holds the plan
        assert x.grad is not None
        with pytest.raises(PlanError, match="a plan is gone"):
            plan_of(10**9)

    run_lockstep(forget, 1)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"layout": "zigzg"}, ConfigError, 'Did you mean "zigzag"?'),
        ({"schedule": "rings"}, ConfigError, 'Did you mean "ring"?'),
        ({"kernel": "flash9"}, ConfigError, "unknown kernel"),
        ({"heads": 2}, ConfigError, "heads=2"),
        ({"layuot": "zigzag"}, ConfigError, 'Did you mean "layout"?'),
    ],
)
def test_wrong_settings_are_refused_at_once(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        SequenceParallel(1, **settings)
    assert words in str(caught.value)


def test_a_world_of_one_needs_no_torch_distributed() -> None:
    sp = SequenceParallel(1)
    assert (sp.size, sp.rank, sp.world_size) == (1, 0, 1)
    assert torch.equal(sp.shard_batch({"input_ids": torch.ones(1, 3)})["position_ids"], torch.tensor([[0, 1, 2]]))


def test_more_ranks_than_processes_is_refused() -> None:
    with pytest.raises(GroupError):
        SequenceParallel(2)


def test_a_training_batch_with_fewer_tokens_than_ranks_is_refused_on_every_rank() -> None:
    def refuse(sp: SequenceParallel) -> str:
        with pytest.raises(BatchError) as caught:
            sp.shard_batch(batch(3))
        return str(caught.value)

    assert all("tokens=3, size=4" in message for message in run_lockstep(refuse, 4))


def test_one_ranks_bad_batch_is_every_ranks_error() -> None:
    def refuse(sp: SequenceParallel) -> str:
        given = batch()
        if sp.rank == 2:
            given["attention_mask"] = torch.tensor([[0] + [1] * 21] * 2)
        with pytest.raises(BatchError) as caught:
            sp.shard_batch(given)
        return str(caught.value)

    assert all("left padding" in message for message in run_lockstep(refuse, 3))


@pytest.mark.parametrize("bad", ["mask", "other sample"])
def test_what_is_wrong_in_one_sequence_group_is_raised_in_every_other_too(bad: str) -> None:
    def refuse(sp: SequenceParallel) -> str:
        given = batch()
        if sp.groups.global_rank == 3:
            left = torch.tensor([[0] + [1] * 21] * 2)
            given.update({"attention_mask": left} if bad == "mask" else {"input_ids": given["labels"]})
        with pytest.raises(SeqparError) as caught:
            sp.shard_batch(given)
        return str(caught.value)

    messages = run_lockstep(refuse, 4, size=2, timeout=100)
    assert all({"mask": "left padding", "other sample": "input_ids (checksum)"}[bad] in message for message in messages)


@pytest.mark.parametrize("key", ["input_ids", "labels"])
def test_ranks_given_different_samples_are_told_so(key: str) -> None:
    def differ(sp: SequenceParallel) -> str:
        given = batch()
        given[key] = given[key] + (given[key] == 7 + 1000 * (key == "labels")) * sp.rank
        with pytest.raises(DisagreementError) as caught:
            sp.shard_batch(given)
        return str(caught.value)

    assert all(f"{key} (checksum)" in message for message in run_lockstep(differ, 2))


def test_data_parallel_groups_may_hold_different_samples(pool4: RankPool) -> None:
    totals = pool4.run(sum_of_own_sample, size=2)
    assert totals == [sum(range(11)), sum(range(11)), sum(range(100, 111)), sum(range(100, 111))]


def sum_of_own_sample(sp: SequenceParallel) -> int:
    part = sp.shard_batch({"input_ids": torch.arange(11)[None] + 100 * sp.data_rank})
    return int(part["seqpar_plan"].gather(part["input_ids"]).sum())


def test_the_report_counts_and_resets() -> None:
    def report(sp: SequenceParallel) -> None:
        plan = sp.plan(16)
        x = torch.ones(1, plan.local_tokens, 1, 8)
        sp.reset_report()
        ring_attention(x, x, x, plan)
        found = sp.report()
        rows = {0: 4, 1: 8}[sp.rank]  # rank 1's queries see only the first chunk of rank 0
        assert found.bytes_sent["kv"] == rows * 2 * 8 * 4
        assert found.messages >= 1
        assert found.seconds_waited >= 0
        assert "kv 0.0 MiB" in str(found)
        sp.reset_report()
        assert sum(sp.report().bytes_sent.values()) == 0

    run_lockstep(report, 2)


def test_settings_are_readable_back() -> None:
    def check(sp: SequenceParallel) -> Settings:
        return sp.settings

    assert run_lockstep(check, 2, layout="striped")[0].layout == "striped"


def test_what_is_trained_is_refused_whole_since_its_gradient_would_count_for_each_rank() -> None:
    def run(sp: SequenceParallel) -> None:
        embeds = torch.randn(1, 6, 8, requires_grad=True)
        assert sp.shard_batch({"inputs_embeds": embeds.detach()})["inputs_embeds"].shape[2] == 8
        sp.shard_batch({"inputs_embeds": embeds})

    with pytest.raises(BatchError, match="inputs_embeds has a gradient"):
        run_lockstep(run, 2)


def test_ranks_given_different_token_types_are_told_so() -> None:
    def run(sp: SequenceParallel) -> None:
        ids = torch.arange(6)[None]
        sp.shard_batch({"input_ids": ids, "token_type_ids": (ids > 2 + sp.rank).long()})

    with pytest.raises(DisagreementError, match="token_type_ids"):
        run_lockstep(run, 2)


def test_positions_that_inference_saw_first_can_be_trained_with() -> None:
    def run(sp: SequenceParallel) -> None:
        plan = sp.plan(6)
        with torch.inference_mode():
            plan.position_ids, plan.shard(torch.randn(1, 6))
        weights = torch.randn(6, 3, requires_grad=True)
        torch.nn.functional.embedding(plan.position_ids, weights).sum().backward()  # raised for a tensor of inference
        assert weights.grad is not None
        assert weights.grad.sum(1).nonzero().flatten().tolist() == sorted(plan.position_ids[0].tolist())

    run_lockstep(run, 2)


@pytest.mark.parametrize("window", [4.9, True, "4", [3, 2.5]], ids=str)
def test_a_window_that_is_no_whole_number_is_refused_and_not_rounded(window: Any) -> None:
    with pytest.raises(PlanError, match="window is no whole number"):
        run_lockstep(lambda sp: sp.plan([20, 5], window=window), 1)


def test_whole_numbers_of_numpy_and_torch_are_whole_numbers() -> None:
    def same(sp: SequenceParallel) -> None:
        plain = sp.plan([20, 5], window=[3, 2])
        for window in (np.array([3, 2]), torch.tensor([3, 2]), [np.int64(3), torch.tensor(2)]):
            assert sp.plan([20, 5], window=window) is plain
        assert sp.plan(np.int64(20), window=np.int64(4)) is sp.plan(20, window=4)

    run_lockstep(same, 1)


def test_a_mask_under_which_padding_would_be_seen_is_refused() -> None:
    whole = {"input_ids": torch.arange(12)[None]}
    padded = {**whole, "attention_mask": (torch.arange(12) < 9).long()[None]}

    def run(sp: SequenceParallel) -> None:
        plan = sp.shard_batch(padded)["seqpar_plan"]
        assert plan.masked(window=4).lengths == sp.plan(12).lengths
        with pytest.raises(PlanError, match="would see the padding"):
            plan.masked(causal=False)
        unpadded = sp.shard_batch({**padded, "attention_mask": torch.ones(1, 12)})["seqpar_plan"]
        assert unpadded is sp.plan(12)
        unpadded.masked(causal=False)

    run_lockstep(run, 2)


def test_lengths_may_be_one_number_or_an_array_and_nothing_else() -> None:
    """One plan for all of them: it is found by its lengths."""

    def same(sp: SequenceParallel) -> bool:
        plans = [sp.plan(x) for x in ([5, 3], (5, 3), np.array([5, 3]), torch.tensor([5, 3]), iter([5, 3]))]
        ones = [sp.plan(x) for x in (8, np.int64(8), torch.tensor(8), [8])]
        return len(set(plans)) == len(set(ones)) == 1

    assert run_lockstep(same, 2) == [True] * 2
    for lengths in (5.0, True, [5, 3.0], "53", None, [[5, 3]]):
        with pytest.raises(PlanError, match="lengths are no whole numbers"):
            run_lockstep(lambda sp, lengths=lengths: sp.plan(lengths), 1)
    with pytest.raises(PlanError, match="kv_lengths are no whole numbers"):
        run_lockstep(lambda sp: sp.plan(5, causal=False, kv_lengths=2.5), 1)


def test_positions_that_a_plan_gives_are_the_callers_own() -> None:
    def spoilt(sp: SequenceParallel) -> list[Tensor]:
        sp.plan([5, 3]).position_ids.add_(100)
        return [sp.plan([5, 3]).position_ids, sp.plan([5, 3], window=2).position_ids]

    assert all(int(x.max()) < 5 for x in run_lockstep(spoilt, 1)[0])


def test_copies_of_plans_and_of_what_makes_them_are_themselves_and_cannot_leave_the_process() -> None:
    def leave(sp: SequenceParallel) -> None:
        for thing in (sp, sp.plan(8)):
            assert copy.copy(thing) is copy.deepcopy(thing) is thing
            with pytest.raises(PlanError, match=f"a {type(thing).__name__} cannot be pickled"):
                pickle.dumps(thing)

    run_lockstep(leave, 1)


def test_windows_wider_than_numbers_of_64_bits_hide_nothing() -> None:
    def run(sp: SequenceParallel) -> None:
        x = torch.randn(1, 6, 2, 4, generator=torch.Generator().manual_seed(1))
        for causal, window in ((True, 2**70), (True, [2**70]), (False, (2**70, 2**70))):
            wide, none = (sp.plan([6], causal=causal, window=w) for w in (window, None))
            assert torch.equal(*(ring_attention(x, x, x, plan) for plan in (wide, none)))

    run_lockstep(run, 1)


def gather_what_differs(sp: SequenceParallel) -> list[str]:
    """What each rank is told of dtypes, widths and lengths that differ on rank 0, and of a gradient's."""
    plan, said = sp.plan(20), []
    tokens = plan.local_tokens
    other = sp.rank == 0
    cases = {
        "dtype": torch.ones(1, tokens, dtype=torch.float64 if other else torch.float32),
        "width": torch.ones(1, tokens, 3 if other else 2),
        "tokens": torch.ones(1, tokens + other),
    }
    for x in cases.values():
        with pytest.raises(SeqparError) as caught:
            plan.gather(x)
        said.append(f"{type(caught.value).__name__}: {caught.value}")
    x = torch.ones(1, 20, dtype=torch.float64 if other else torch.float32, requires_grad=True)
    with pytest.raises(DisagreementError, match="'dtype'"):
        plan.shard(x).sum().backward()
    assert torch.equal(plan.gather(plan.shard(torch.arange(20.0)[None])), torch.arange(20.0)[None])
    return said


def test_what_ranks_gather_must_be_alike(pool2: RankPool) -> None:
    """Over gloo a rank got garbage, and the other was aborted."""
    for results in (pool2.run(gather_what_differs), run_lockstep(gather_what_differs, 2)):
        for rank, (dtype, width, tokens) in enumerate(results):
            assert dtype.startswith("DisagreementError: gather")
            assert "torch.float64" in dtype
            assert "other dimensions" in width
            assert tokens.startswith("PlanError")
            assert tokens.startswith("PlanError: rank 0 failed") == (rank == 1)


def test_errors_that_are_not_ours_reach_all_ranks_too() -> None:
    """A loader that ran out on one rank, say: the others waited until the timeout."""
    good = {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}

    def broken() -> Any:
        yield good
        raise OSError("the disk is gone")

    def run(sp: SequenceParallel, what: str) -> None:
        bad, plan = sp.rank == 0, sp.plan(8)
        x = torch.ones(1, plan.local_tokens, 2, 4)
        if what == "shard_batch":
            sp.shard_batch(None if bad else good)  # type: ignore[arg-type]
        elif what == "positions":
            sp.shard_batch({**good, "position_ids": torch.full((1, 8), torch.nan)} if bad else good)
        elif what == "count_targets":
            sp.count_targets(broken() if bad else [good, good])
        elif what == "ring_attention":
            ring_attention(x, x, x, plan, scale=10**400 if bad else 1)
        else:
            sp.loss(torch.ones(1, 8, 9), None if bad else torch.zeros(1, 8, dtype=torch.int64))  # type: ignore[arg-type]

    def said(sp: SequenceParallel, what: str) -> str:
        try:
            run(sp, what)
        except Exception as error:
            return str(error)
        return "went on"

    for what in ("shard_batch", "positions", "count_targets", "ring_attention", "loss"):
        _, other = run_lockstep(lambda sp, what=what: said(sp, what), 2)
        assert "rank 0 failed" in other, (what, other)  # and not that it ended without a message
