"""The token-weighted loss equals one device's, in value and gradient, and a mean of means does not."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from seqpar_ring.errors import BatchError, DisagreementError, PlanError
from seqpar_ring.loss import mean_of_sums
from seqpar_ring.parallel import SequenceParallel
from seqpar_ring.testing import run_lockstep

LENGTHS, V = [13, 1, 8], 11


def data(seed: int) -> tuple[Tensor, Tensor]:
    """Logits and labels of a whole batch, most labels of the first document masked."""
    generator = torch.Generator().manual_seed(seed)
    S = sum(LENGTHS)
    logits = torch.randn(2, S, V, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, V, (2, S), generator=generator)
    labels[:, 2:12] = -100
    return logits, labels


def on_one_device(seeds: list[int]) -> tuple[float, list[Tensor]]:
    """Token mean over all batches, and the gradient of each batch's logits."""
    from seqpar_ring.batch import shift_labels

    logits = [data(seed)[0].requires_grad_() for seed in seeds]
    targets = [shift_labels(data(seed)[1], LENGTHS) for seed in seeds]
    total = sum(
        functional.cross_entropy(x.flatten(0, 1), y.flatten(), reduction="sum")
        for x, y in zip(logits, targets, strict=True)
    )
    loss = total / sum(int((y != -100).sum()) for y in targets)
    assert isinstance(loss, Tensor)
    return loss.item(), list(torch.autograd.grad(loss, logits))


@pytest.mark.parametrize(("world", "size"), [(1, 1), (2, 2), (3, 3), (4, 2), (4, 4), (8, 4)])
def test_value_and_averaged_gradient_are_those_of_one_device(world: int, size: int) -> None:
    truth, grads = on_one_device(list(range(world // size)))

    def train(sp: SequenceParallel) -> tuple[float, int, Tensor]:
        logits, labels = data(sp.data_rank)
        batch = sp.shard_batch({"input_ids": labels, "labels": labels}, LENGTHS)
        plan = batch["seqpar_plan"]
        mine = plan.shard(logits).requires_grad_()
        loss = sp.loss(mine, batch["labels"], plan)
        (grad,) = torch.autograd.grad(loss, mine)
        return loss.item(), sp.data_rank, plan.gather(grad) / sp.world_size

    for value, data_rank, grad in run_lockstep(train, world, size=size):
        assert value == pytest.approx(truth, rel=1e-12)
        torch.testing.assert_close(grad, grads[data_rank], rtol=1e-12, atol=1e-15)


def test_over_several_micro_batches_it_weighs_every_token_the_same() -> None:
    truth, grads = on_one_device([0, 1, 2, 3])

    def train(sp: SequenceParallel) -> tuple[float, list[tuple[int, Tensor]]]:
        seeds = [sp.data_rank, 2 + sp.data_rank]
        batches = [{"input_ids": data(seed)[1], "labels": data(seed)[1], "position_ids": positions()} for seed in seeds]
        items = sp.count_targets(batches)
        value, found = 0.0, []
        for seed, batch in zip(seeds, batches, strict=True):
            part = sp.shard_batch(batch)
            mine = part["seqpar_plan"].shard(data(seed)[0]).requires_grad_()
            loss = sp.loss(mine, part["labels"], num_items=items, accumulation=2) / 2  # as an engine divides
            value += loss.item()
            found.append((seed, part["seqpar_plan"].gather(torch.autograd.grad(loss, mine)[0]) / sp.world_size))
        return value, found

    for value, found in run_lockstep(train, 4, size=2):
        assert value == pytest.approx(truth, rel=1e-12)
        for seed, grad in found:
            torch.testing.assert_close(grad, grads[seed], rtol=1e-12, atol=1e-15)


def test_targets_are_counted_in_the_documents_that_a_batch_is_sharded_in() -> None:
    """The first token of a document is no target; counted as one, loss and gradients would be too small."""
    whole = [{"input_ids": ids, "labels": ids} for ids in (torch.arange(24)[None], torch.arange(9).expand(2, -1))]
    lengths = [[2] * 12, [4, 1, 4]]

    def count(sp: SequenceParallel) -> tuple[int, int, int]:
        parts = [sp.shard_batch(batch, of) for batch, of in zip(whole, lengths, strict=True)]
        there = torch.cat([part["seqpar_plan"].gather(part["labels"]).flatten() for part in parts])
        return int((there != -100).sum()), sp.count_targets(iter(whole), iter(lengths)), sp.count_targets(whole)

    assert run_lockstep(count, 2) == [(24, 24, 39)] * 2
    for other in (lengths[:1], [*lengths, [1]]):
        with pytest.raises(BatchError, match="not as many lengths as batches"):
            run_lockstep(lambda sp, other=other: sp.count_targets(whole, other), 2)


def positions() -> Tensor:
    return torch.cat([torch.arange(n) for n in LENGTHS])[None]


def test_a_mean_of_per_rank_means_would_be_seen() -> None:
    truth, _ = on_one_device([0])

    def mean_of_means(sp: SequenceParallel) -> Tensor:
        logits, labels = data(0)
        batch = sp.shard_batch({"input_ids": labels, "labels": labels}, LENGTHS)
        mine = batch["seqpar_plan"].shard(logits)
        return functional.cross_entropy(mine.flatten(0, 1), batch["labels"].flatten())

    means = run_lockstep(mean_of_means, 4)
    assert abs(sum(means).item() / 4 - truth) > 5e-3 * truth  # type: ignore[union-attr]


def test_a_rank_without_targets_is_no_nan_and_no_targets_at_all_is_an_error() -> None:
    def train(sp: SequenceParallel) -> tuple[float, bool]:
        logits = torch.randn(1, 6, V, requires_grad=True)
        labels = torch.full((1, 6), -100)
        if sp.rank == 1:
            labels[0, 2] = 3
        loss = sp.loss(logits, labels)
        loss.backward()
        assert logits.grad is not None
        with pytest.raises(BatchError, match="no token of the batch has a target"):
            sp.loss(logits, torch.full((1, 6), -100))
        return loss.item(), bool(logits.grad.isfinite().all())

    results = run_lockstep(train, 3)
    assert len({value for value, _ in results}) == 1
    assert all(finite for _, finite in results)


def test_a_rank_without_tokens_takes_part() -> None:
    def train(sp: SequenceParallel) -> float:
        plan = sp.plan([2])
        logits = plan.shard(torch.ones(1, 2, V)).requires_grad_()
        return sp.loss(logits, plan.shard(torch.tensor([[3, -100]])), plan).item()

    assert run_lockstep(train, 4, layout="striped") == pytest.approx([torch.tensor(V).log().item()] * 4)


def test_bf16_logits_are_reduced_in_fp32() -> None:
    def value(sp: SequenceParallel) -> Tensor:
        return sp.loss(torch.zeros(1, 300, V, dtype=torch.bfloat16), torch.zeros(1, 300, dtype=torch.long))

    (loss,) = run_lockstep(value, 1)
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(torch.tensor(V).log().item(), rel=1e-6)


def test_labels_of_another_shape_and_accumulation_alone_are_refused() -> None:
    def refuse(sp: SequenceParallel) -> None:
        with pytest.raises(PlanError, match=r"labels=\(1, 3\)"):
            sp.loss(torch.zeros(1, 4, V), torch.zeros(1, 3, dtype=torch.long))
        with pytest.raises(BatchError, match="expected_tokens=4"):
            sp.loss(torch.zeros(1, 3, V), torch.zeros(1, 3, dtype=torch.long), sp.plan(4))
        with pytest.raises(PlanError, match="accumulation=2"):
            sp.loss(torch.zeros(1, 4, V), torch.zeros(1, 4, dtype=torch.long), accumulation=2)

    run_lockstep(refuse, 1)


def test_fewer_items_than_targets_and_a_flag_for_a_number_are_refused() -> None:
    """Each rank's own targets in place of the world's would make the loss `world` times as large."""
    def run(sp: SequenceParallel, items: Any) -> None:
        sp.loss(torch.randn(1, 4, 7), torch.tensor([[1, 2, 3, -100]]), num_items=items)

    run_lockstep(lambda sp: run(sp, 6), 2)
    for items, words in ((3, r"more targets .*targets=6, num_items=3"), (True, "num_items is no number of targets")):
        with pytest.raises(BatchError, match=words):
            run_lockstep(lambda sp, items=items: run(sp, items), 2)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_items": 6.9}, r"num_items is no number of targets \[num_items=6.9\]"),
        ({"num_items": "6"}, "num_items is no number of targets"),
        ({"num_items": float("nan")}, "num_items is no number of targets"),
        ({"num_items": torch.tensor([3, 3])}, "num_items is no number of targets"),
        ({"num_items": 6, "accumulation": 0}, "accumulation is no number of micro-batches"),
        ({"num_items": 6, "accumulation": -1}, "accumulation is no number of micro-batches"),
        ({"num_items": 6, "accumulation": 1.5}, "accumulation is no number of micro-batches"),
        ({"num_items": 6, "accumulation": None}, "accumulation is no number of micro-batches"),
    ],
)
def test_weights_that_are_no_whole_numbers_are_refused_on_every_rank(given: dict[str, Any], words: str) -> None:
    def run(sp: SequenceParallel) -> None:
        weights = given if sp.rank == 1 else {"num_items": 6}
        with pytest.raises(BatchError, match=words if sp.rank == 1 else "rank 1"):
            sp.loss(torch.randn(1, 4, 7), torch.tensor([[1, 2, 3, -100]]), **weights)

    run_lockstep(run, 2)


def test_weights_may_be_numbers_of_torch_and_numpy() -> None:
    logits, labels = torch.randn(1, 4, 7), torch.tensor([[1, 2, 3, -100]])
    for items in (torch.tensor(6), torch.tensor(6.0), np.int64(6), 6.0):
        one, other = run_lockstep(lambda sp, items=items: sp.loss(logits, labels, num_items=items, accumulation=2), 2)
        assert torch.equal(one, other)


def test_ranks_that_count_only_their_own_targets_are_told_so_on_all_of_them() -> None:
    """HuggingFace's idiom, a sum over one's own micro-batches: some raised, and others waited for them or went on."""

    def run(sp: SequenceParallel, items: list[int | None]) -> str:
        try:
            sp.loss(torch.randn(1, 4, 7), torch.tensor([[1, 2, 3, -100]]), num_items=items[sp.rank])
        except DisagreementError as error:
            return str(error)
        return "went on"

    for items in ([50, 70], [3, 9], [None, 6]):
        for said in run_lockstep(lambda sp, items=items: run(sp, items), 2):
            assert "the ranks hold different values of 'num_items'" in said
            assert all(str(one) in said for one in items)


@pytest.mark.parametrize(
    ("labels", "tiles", "kind", "words"),
    [
        ([[1, 2, 3]], None, PlanError, "logits and labels differ in shape"),
        ([[1, 2, 7, -100]], None, BatchError, r"a label is beyond the vocabulary \[label=7, vocabulary=7\]"),
        ([[1, 2, 3]], 2, PlanError, "hidden states and labels differ in shape"),
        ([[1, 2, 3, -100]], 0, PlanError, "there is no tile"),
    ],
)
def test_what_is_wrong_on_one_rank_is_raised_on_all(
    labels: list[list[int]], tiles: int | None, kind: type[Exception], words: str
) -> None:
    """The others were left waiting until the timeout."""

    def run(sp: SequenceParallel) -> None:
        given = torch.tensor(labels if sp.rank == 0 else [[1, 2, 3, -100]])
        if tiles is None:
            sp.loss(torch.randn(1, 4, 7), given)
        else:
            sp.tiled_loss(torch.randn(1, 4, 7), lambda x: x, given, tiles=tiles if sp.rank == 0 else 2)

    def said(sp: SequenceParallel) -> str:
        with pytest.raises(kind) as caught:
            run(sp)
        return str(caught.value)

    first, second = run_lockstep(said, 2)
    assert re.search(words, first)
    assert "rank 0" in second


def test_numbers_of_tiles_that_differ_are_told() -> None:
    """Under ZeRO-3 each tile gathers the head's parameters from all ranks."""

    def run(sp: SequenceParallel) -> None:
        labels = torch.tensor([[1, 2, 3, -100]])
        with pytest.raises(DisagreementError, match="'tiles'"):
            sp.tiled_loss(torch.randn(1, 4, 7), lambda x: x, labels, tiles=2 + sp.rank)
        with pytest.raises(BatchError, match=r"num_items says no targets .*targets=6, num_items=0"):
            sp.loss(torch.randn(1, 4, 7), labels, num_items=0)

    run_lockstep(run, 2)


def test_a_label_below_zero_that_is_not_ignored_is_said_on_every_rank() -> None:
    """nanoGPT masks with -1: one rank had an IndexError, and the others a TransportError."""

    def act(sp: SequenceParallel) -> str:
        labels = torch.full((1, 4), 3)
        if sp.rank == 1:
            labels[0, 2] = -1
        with pytest.raises(BatchError) as raised:
            sp.loss(torch.zeros(1, 4, 7), labels, sp.plan([8]))
        return str(raised.value)

    for message in run_lockstep(act, 2, timeout=30.0):
        assert "a label is below 0" in message
        assert "label=-1" in message


def test_an_evaluation_does_not_use_up_the_comparison_of_the_steps_weights() -> None:
    """On a GPU the first weights are compared: those of a batch by itself say nothing of what ranks count of a step."""
    known: list[str] = []

    class Recording:
        world = 1

        def agree_at_first(self, what: str, record: Any, error: Any, *, always: bool, known_as: str) -> None:
            known.append(known_as)

        def all_reduce(self, x: Tensor) -> Tensor:
            return x

        def in_one_go(self, what: str) -> Any:
            return nullcontext()

    for items in (None, 5, 6):
        everyone: Any = Recording()
        mean_of_sums(lambda: torch.ones((), requires_grad=True), torch.tensor([[1, 2]]), everyone, num_items=items)
    assert known[0] != known[1] == known[2]
