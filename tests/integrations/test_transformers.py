"""A parallelized HuggingFace model takes the very step of one process: loss and every parameter's gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hf_cases import (
    BATCHES,
    FAMILIES,
    GRAD,
    LOSS,
    Batch,
    Step,
    assert_same_step,
    averaged,
    build,
    compiled_steps,
    ddp_step,
    one_process,
    packed,
    sharded_step,
    step,
    worst,
)
from seqpar_ring.integrations.transformers import NAME, parallelize, register
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from seqpar_ring import SequenceParallel
from seqpar_ring.testing import RankPool, run_lockstep

LAYOUTS = ("zigzag", "contiguous", "striped")
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


@pytest.mark.parametrize("world", [1, 2])
def test_a_copy_of_a_parallelized_model_takes_the_same_step_and_shares_its_ranks(world: int) -> None:
    """As for an average of weights, or a model to compare with; batches that the original's `sp` sharded fit it."""
    base, batch = build("Llama"), BATCHES["packed documents"]()
    expected = one_process(base, batch)

    def of_the_copy(sp: SequenceParallel) -> Step:
        original = parallelize(copy.deepcopy(base), sp)
        plan = sp.shard_batch(batch)["seqpar_plan"]
        assert copy.deepcopy(plan) is plan
        found = step(sp, copy.deepcopy(original), sp.shard_batch(batch))
        assert all(p.grad is None for p in original.parameters())
        return found

    for found in run_lockstep(of_the_copy, world):
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


@pytest.mark.slow
@pytest.mark.parametrize("what", ["model", "layers"])
def test_a_compiled_model_takes_the_same_steps_at_any_length(pool2: RankPool, what: str) -> None:
    batches = [packed(lengths) for lengths in ([43], [31], [13, 7, 20], [29], [37])]
    base = build("Llama", num_hidden_layers=2)
    for steps, operators in pool2.run(compiled_steps, what, batches):
        for found, batch in zip(steps, batches, strict=True):
            assert_same_step(found, one_process(base, batch), GRAD, LOSS)
        assert min(operators) == max(operators) > 50, "as much runs compiled at every length"


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
@pytest.mark.filterwarnings("ignore:What the model returns for this whole batch")
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


@pytest.mark.filterwarnings("ignore:What the model returns for this whole batch")
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
    labels = plan.shard(labels)
    return {**whole, "position_ids": plan.shard(batch["position_ids"]), "labels": labels, "shift_labels": labels}


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
