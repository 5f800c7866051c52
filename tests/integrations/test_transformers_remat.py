"""Checkpointed layers of a HuggingFace model: the same step, the ring once where attention is kept, what is said."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_cases import (
    BATCHES,
    FAMILIES,
    GRAD,
    LOSS,
    Step,
    assert_same_step,
    averaged,
    build,
    one_process,
    packed,
    sharded_step,
    step,
    turn_on,
)
from seqpar_ring.integrations.transformers import parallelize

from seqpar_ring import SequenceParallel, executor, remat
from seqpar_ring.testing import RankPool, run_lockstep


@pytest.mark.parametrize(
    ("checkpointing", "setting", "runs"),
    [
        ("", "attention", 1),
        ("plain", "attention", 1),
        ("reentrant", "attention", 1),
        ("context", "none", 1),
        ("context", "attention", 1),
        ("plain", "none", 2),
        ("reentrant", "none", 2),
        ("plain", "auto", 2),  # so short that keeping does not pay
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_keeps_the_step_and_runs_the_ring_once_where_attention_is_kept(
    family: str, checkpointing: str, setting: str, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, batch, ran = build(family), BATCHES["packed documents"](), []
    forward = executor.forward
    monkeypatch.setattr(executor, "forward", lambda *args: ran.append(1) or forward(*args))

    def run(sp: SequenceParallel) -> Step:
        model = parallelize(copy.deepcopy(base), sp)
        turn_on(model, checkpointing)
        return step(sp, model, batch)

    for found in run_lockstep(run, 2, remat=setting, offload=family == "Qwen3"):
        assert_same_step(found, one_process(base, batch), GRAD, LOSS)
    assert len(ran) == 2 * base.config.num_hidden_layers * runs


def test_every_other_layer_may_be_checkpointed(monkeypatch: pytest.MonkeyPatch) -> None:
    base, batch, ran = build("Llama"), BATCHES["one odd document"](), []
    forward = executor.forward
    monkeypatch.setattr(executor, "forward", lambda *args: ran.append(1) or forward(*args))

    def run(sp: SequenceParallel) -> Step:
        model = parallelize(copy.deepcopy(base), sp)
        model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=2)
        return step(sp, model, batch)

    assert_same_step(run_lockstep(run, 2, remat="attention")[0], one_process(base, batch), GRAD, LOSS)
    assert len(ran) == 2 * base.config.num_hidden_layers


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, of a checkpoint in evaluation
def test_evaluation_without_gradients_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training mode too, where a reentrant checkpoint's first run is also without gradients."""
    base, kept = build("Llama"), []
    put = remat.InPlace.put
    monkeypatch.setattr(remat.InPlace, "put", lambda *args: kept.append(1) or put(*args))

    def run(sp: SequenceParallel) -> None:
        model = parallelize(copy.deepcopy(base), sp)
        turn_on(model, "reentrant")
        with torch.no_grad():
            model(**BATCHES["one odd document"]())
        assert not kept
        model(**BATCHES["one odd document"]())
        assert len(kept) == base.config.num_hidden_layers

    run_lockstep(run, 1, remat="attention")


def test_the_first_forward_says_what_was_chosen_and_why(caplog: pytest.LogCaptureFixture) -> None:
    base = build("Llama")

    def run(sp: SequenceParallel) -> None:
        model = parallelize(copy.deepcopy(base), sp)
        for _ in range(2):
            model(**BATCHES["one odd document"]())

    with caplog.at_level("INFO", logger="seqpar_ring"):
        run_lockstep(run, 2)
    (said,) = [record.getMessage() for record in caplog.records if "remat" in record.getMessage()]
    remat_says = "remat: none (22 keys a query on average, and 512 are worth keeping; 0.00 MiB kept by this rank)"
    assert all(text in said for text in ("layout: zigzag", remat_says, "logits: whole ("))


def test_the_first_forward_says_what_keeping_attention_costs(caplog: pytest.LogCaptureFixture) -> None:
    base, batch = build("Llama"), packed([1024])
    with caplog.at_level("INFO", logger="seqpar_ring"):
        run_lockstep(lambda sp: parallelize(copy.deepcopy(base), sp)(**batch), 2)
    (said,) = [record.getMessage() for record in caplog.records if "remat" in record.getMessage()]
    config = base.config
    numbers = config.num_hidden_layers * 512 * (config.hidden_size + config.num_attention_heads)  # out, and lse
    assert f"{4 * numbers / 2**20:.2f} MiB kept" in said
    assert "remat: attention (512 keys a query on average, and 512 are worth keeping; " in said


def test_two_batches_in_flight_each_keep_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    base, batches = build("Llama"), [packed([19], seed=1), packed([5, 12], seed=2)]

    def run(sp: SequenceParallel) -> Step:
        model = parallelize(copy.deepcopy(base), sp)
        turn_on(model, "plain")
        items = sp.count_targets(batches)
        losses = [model(**batch, num_items_in_batch=items).loss for batch in batches]
        for loss in losses:  # the first batch's backward comes after the second's forward
            loss.backward()
        return sum(loss.item() for loss in losses), averaged(sp, model)

    for found in run_lockstep(run, 2, remat="attention"):
        assert_same_step(found, one_process(base, *batches), GRAD, LOSS)


def test_with_attention_kept_recomputing_sends_nothing_over_gloo(pool2: RankPool) -> None:
    batch = BATCHES["one odd document"]()
    sent = {}
    for checkpointing, setting in (("", "none"), ("plain", "attention"), ("reentrant", "attention"), ("plain", "none")):
        results = pool2.run(sharded_step, "Llama", batch, torch.float32, checkpointing, remat=setting)
        assert_same_step(results[0][:2], one_process(build("Llama"), batch), GRAD, LOSS)
        sent[checkpointing, setting] = [kv for _, _, kv in results]
    assert sent["plain", "attention"] == sent["reentrant", "attention"] == sent["", "none"]
    assert all(more == 1.5 * kv > 0 for more, kv in zip(sent["plain", "none"], sent["", "none"], strict=True))
