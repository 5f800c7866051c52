"""A parallelized HuggingFace model takes the very step of one process: loss and every parameter's gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hf_cases import (
    FAMILIES,
    Batch,
    Step,
    assert_same_step,
    averaged,
    build,
    ddp_step,
    one_process,
    packed,
    padded,
    sharded_step,
    step,
    turn_on,
    worst,
)
from seqpar_ring.integrations.transformers import NAME, parallelize, register
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from seqpar_ring import SequenceParallel, executor, remat
from seqpar_ring.testing import RankPool, run_lockstep

GRAD, LOSS = 1e-5, 1e-6
"""Largest relative L2 error of a parameter's gradient, and relative error of the loss, in fp32."""

LAYOUTS = ("zigzag", "contiguous", "striped")
BATCHES: dict[str, Callable[[], Batch]] = {
    "one odd document": lambda: packed([43]),
    "packed documents": lambda: packed([13, 1, 20, 7]),
    "rows padded at the right": lambda: padded([31, 18], 31),
    "packed rows": lambda: packed([11, 16], rows=2),
}
SHORT = {"zigzag": "packed documents", "contiguous": "rows padded at the right", "striped": "one odd document"}


def ring_step(base: Any, batch: Batch, world: int, **settings: Any) -> list[Step]:
    """The step of a copy of this model, by each of `world` lockstep ranks."""
    return run_lockstep(lambda sp: step(sp, parallelize(copy.deepcopy(base), sp), batch), world, **settings)


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_are_those_of_one_process(family: str, layout: str, world: int, kind: str) -> None:
    base, batch = build(family), BATCHES[kind]()
    expected = one_process(base, batch)
    for found in ring_step(base, batch, world, layout=layout):
        assert_same_step(found, expected, GRAD, LOSS)


@pytest.mark.parametrize("kind", BATCHES)
def test_scale_softcap_and_windows_of_single_layers_reach_the_ring(kind: str) -> None:
    base = build("Gemma2", head_dim=8, sliding_window=7, query_pre_attn_scalar=3, attn_logit_softcapping=2.0)
    assert base.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    batch = BATCHES[kind]()
    for found in ring_step(base, batch, 2):
        assert_same_step(found, one_process(base, batch), GRAD, LOSS)


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("schedule", ["ring", "direct"])
def test_attention_sinks_reach_the_ring_and_get_their_gradient(schedule: str, kind: str) -> None:
    """gpt-oss: sinks in every layer, a window in every other, experts."""
    base = build("GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=7)
    batch = BATCHES[kind]()
    expected = one_process(base, batch)
    assert any("sinks" in name and gradient.norm() > 0 for name, gradient in expected[1].items())
    for found in ring_step(base, batch, 2, schedule=schedule):
        assert_same_step(found, expected, GRAD, LOSS)


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_that_computes_in_fp64_throughout_agrees_to_fp64_rounding(layout: str, kind: str) -> None:
    still = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    base = build("GPT2", torch.float64, suffix="LMHeadModel", n_embd=48, n_head=6, n_layer=3, **still)
    batch = BATCHES[kind]()
    expected = one_process(base, batch)
    for found in ring_step(base, batch, 3, layout=layout):
        assert_same_step(found, expected, 1e-12, 1e-13)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_fp64_only_the_norms_fp32_is_left(family: str) -> None:
    # These families' norms compute in fp32 whatever the model's dtype, and gradients pass through them.
    base, batch = build(family, torch.float64), BATCHES["packed documents"]()
    for found in ring_step(base, batch, 3):
        assert_same_step(found, one_process(base, batch), 5e-7, 1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_processes_over_gloo_take_the_same_step(pool2: RankPool, family: str, layout: str) -> None:
    batch = BATCHES[SHORT[layout]]()
    expected = one_process(build(family), batch)
    for loss, grads, _ in pool2.run(sharded_step, family, batch, layout=layout):
        assert_same_step((loss, grads), expected, GRAD, LOSS)


def test_ddp_around_the_model_averages_to_the_same_gradients(pool2: RankPool) -> None:
    batch = BATCHES["packed documents"]()
    for found in pool2.run(ddp_step, "Qwen3", batch):
        assert_same_step(found, one_process(build("Qwen3"), batch), GRAD, LOSS)


@pytest.mark.parametrize("family", FAMILIES)
def test_data_ranks_see_other_batches_and_the_mean_is_over_all_their_targets(family: str) -> None:
    base, batches = build(family), [packed([9, 14], seed=1), packed([23], seed=2)]
    batches[1]["labels"][:, 3:] = -100  # so that a mean of the two means would be wrong
    expected = one_process(base, *batches)

    def run(sp: SequenceParallel) -> Step:
        return step(sp, parallelize(copy.deepcopy(base), sp), batches[sp.data_rank])

    for found in run_lockstep(run, 4, size=2):
        assert_same_step(found, expected, GRAD, LOSS)


def test_micro_batches_with_a_count_of_targets_make_one_step() -> None:
    base, batches = build("Llama"), [packed([19], seed=1), packed([5, 12], seed=2)]
    batches[0]["labels"][:, 4:] = -100

    def run(sp: SequenceParallel) -> Step:
        model = parallelize(copy.deepcopy(base), sp)
        items = torch.tensor(sp.count_targets(batches))
        losses = [model(**batch, num_items_in_batch=items).loss for batch in batches]
        torch.stack(losses).sum().backward()
        return sum(loss.item() for loss in losses), averaged(sp, model)

    for found in run_lockstep(run, 2):
        assert_same_step(found, one_process(base, *batches), GRAD, LOSS)


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


def test_a_batch_that_shard_batch_made_gives_the_same_numbers_as_the_whole_batch() -> None:
    base, batch = build("Qwen3"), BATCHES["packed documents"]()

    def run(sp: SequenceParallel) -> tuple[Step, Step]:
        model = parallelize(copy.deepcopy(base), sp)
        whole = step(sp, model, batch)
        model.zero_grad()
        return whole, step(sp, model, sp.shard_batch(batch))

    for whole, sharded in run_lockstep(run, 2):
        assert whole[0] == sharded[0]
        assert all(torch.equal(grad, sharded[1][name]) for name, grad in whole[1].items())


def test_shifted_labels_win_over_labels_as_in_transformers() -> None:
    base, batch = build("Llama"), BATCHES["one odd document"]()

    def run(sp: SequenceParallel) -> Step:
        sharded = sp.shard_batch(batch)
        return step(sp, parallelize(copy.deepcopy(base), sp), {**sharded, "labels": sharded["input_ids"]})

    assert_same_step(run_lockstep(run, 2)[0], one_process(base, batch), GRAD, LOSS)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_this_ranks_tokens_and_the_batch_may_come_by_position(family: str) -> None:
    base = build(family).eval()
    ids, mask = packed([29])["input_ids"], torch.ones(1, 29, dtype=torch.int64)
    expected = base(ids).logits

    def run(sp: SequenceParallel) -> torch.Tensor:
        with torch.no_grad():
            outputs = parallelize(copy.deepcopy(base), sp)(ids, mask)
        logits = outputs.logits
        assert outputs.past_key_values is None
        assert logits.shape[1] == sp.plan(29).local_tokens
        return sp.plan(29).gather(logits)

    for logits in run_lockstep(run, 3):
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_base_model_without_a_head_returns_this_ranks_hidden_states() -> None:
    base, ids = build("Llama", suffix="Model").eval(), packed([17])["input_ids"]

    def run(sp: SequenceParallel) -> torch.Tensor:
        hidden = parallelize(copy.deepcopy(base), sp)(input_ids=ids).last_hidden_state
        return sp.plan(17).gather(hidden)

    for hidden in run_lockstep(run, 2):
        torch.testing.assert_close(hidden, base(input_ids=ids).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_two_models_in_one_process_keep_their_plans_apart() -> None:
    bases = {"Llama": build("Llama"), "Mistral": build("Mistral")}
    batches = {"Llama": packed([25], seed=1), "Mistral": packed([6, 15], seed=2)}

    def run(sp: SequenceParallel) -> dict[str, Step]:
        models = {name: parallelize(copy.deepcopy(base), sp) for name, base in bases.items()}
        losses = {name: model(**batches[name]).loss for name, model in models.items()}  # both before any backward
        torch.stack(list(losses.values())).sum().backward()
        return {name: (losses[name].item(), averaged(sp, model)) for name, model in models.items()}

    for found in run_lockstep(run, 2):
        for name, base in bases.items():
            assert_same_step(found[name], one_process(base, batches[name]), GRAD, LOSS)


def test_parallelize_returns_the_same_model_and_leaves_its_checkpoint_alone() -> None:
    base = build("Llama")

    def run(sp: SequenceParallel) -> Any:
        model = copy.deepcopy(base)
        keys = list(model.state_dict())
        assert parallelize(model, sp) is model
        assert list(model.state_dict()) == keys
        return model.config.to_dict()

    for saved in run_lockstep(run, 2):
        assert saved == base.config.to_dict()
        assert NAME not in str(saved)


def test_registering_twice_is_registering_once() -> None:
    register()
    functions = AttentionInterface()[NAME], AttentionMaskInterface()[NAME]
    register()
    assert functions == (AttentionInterface()[NAME], AttentionMaskInterface()[NAME])


# ---------------------------------------------------------------------------------- faults that the comparison must see


def with_local_positions(sp: SequenceParallel, batch: Batch) -> dict[str, Any]:
    sharded = sp.shard_batch(batch)
    return {**sharded, "position_ids": torch.arange(sharded["input_ids"].shape[1])[None]}


def with_labels_shifted_in_the_shard(sp: SequenceParallel, batch: Batch) -> dict[str, Any]:
    sharded = sp.shard_batch(batch)
    labels = functional.pad(sharded["seqpar_plan"].shard(batch["labels"]), (0, 1), value=-100)[:, 1:]
    return {**sharded, "labels": labels, "shift_labels": labels}


def with_documents_that_see_each_other(sp: SequenceParallel, batch: Batch) -> dict[str, Any]:
    sharded = sp.shard_batch(batch)
    whole = sp.shard_batch({"input_ids": batch["input_ids"]})
    plan = whole["seqpar_plan"]
    labels = sp.plan(sharded["seqpar_plan"].lengths).gather(sharded["labels"])
    return {**whole, "position_ids": plan.shard(batch["position_ids"]), "labels": plan.shard(labels)}


@pytest.mark.parametrize(
    "fault", [with_local_positions, with_labels_shifted_in_the_shard, with_documents_that_see_each_other]
)
def test_a_batch_sharded_wrongly_breaks_the_comparison(fault: Callable[..., dict[str, Any]]) -> None:
    base, batch = build("Llama"), BATCHES["packed documents"]()

    def run(sp: SequenceParallel) -> Step:
        return step(sp, parallelize(copy.deepcopy(base), sp), fault(sp, batch))

    _, grad_error, name = worst(run_lockstep(run, 2)[0], one_process(base, batch))
    assert grad_error > 1e-2, name


def test_a_mean_of_the_ranks_means_breaks_the_comparison() -> None:
    base, batch = build("Llama"), BATCHES["rows padded at the right"]()

    def run(sp: SequenceParallel) -> Step:
        model, sharded = parallelize(copy.deepcopy(base), sp), sp.shard_batch(batch)
        labels = sharded.pop("labels")
        logits = model(**{**sharded, "shift_labels": None}).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        return loss.item(), averaged(sp, model)

    _, grad_error, name = worst(run_lockstep(run, 2, layout="contiguous")[0], one_process(base, batch))
    assert grad_error > 1e-2, name


def test_a_forgotten_window_breaks_the_comparison() -> None:
    base, batch = build("Mistral"), BATCHES["one odd document"]()
    open_ended = copy.deepcopy(base)
    open_ended.config.sliding_window = None
    _, grad_error, name = worst(ring_step(open_ended, batch, 2)[0], one_process(base, batch))
    assert grad_error > 1e-2, name


def test_a_window_off_by_one_breaks_the_comparison() -> None:
    base, batch = build("Mistral"), BATCHES["one odd document"]()
    wider = copy.deepcopy(base)
    wider.config.sliding_window += 1
    _, grad_error, name = worst(ring_step(wider, batch, 2)[0], one_process(base, batch))
    assert grad_error > 1e-2, name
