"""What a call asks of a sharded HuggingFace model and that cannot do exactly is refused, by name, on every rank."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hf_cases import Batch, assert_refused, build, errors, packed, padded
from seqpar_ring.integrations import transformers_edges as edges
from seqpar_ring.integrations.transformers import parallelize, register

from seqpar_ring import SequenceParallel
from seqpar_ring.config import Settings
from seqpar_ring.errors import (
    BatchError,
    ConfigError,
    DisagreementError,
    PlanError,
    SeqparError,
    UnsupportedError,
)
from seqpar_ring.groups import Groups
from seqpar_ring.testing import RankPool, run_lockstep, run_lockstep_groups

WHOLE = packed([21])
CALLS: dict[str, tuple[Batch | dict[str, Any], type[SeqparError], tuple[str, ...]]] = {
    "use_cache": ({**WHOLE, "use_cache": True}, UnsupportedError, ("KV cache", "use_cache=True", "use_cache=False")),
    "past_key_values": ({**WHOLE, "past_key_values": ()}, UnsupportedError, ("KV cache", "past_key_values='tuple'")),
    "cache": ({**WHOLE, "cache": ()}, UnsupportedError, ("KV cache", "cache='tuple'")),
    "logits_to_keep": ({**WHOLE, "logits_to_keep": 1}, UnsupportedError, ("logits_to_keep=1", "save_pretrained")),
    "attention weights": ({**WHOLE, "output_attentions": True}, UnsupportedError, ("attention weights",)),
    "router logits": ({**WHOLE, "output_router_logits": True}, UnsupportedError, ("no sum over tokens",)),
    "embeddings": ({"inputs_embeds": torch.zeros(1, 21, 48)}, UnsupportedError, ("inputs_embeds", "(1, 21, 48)")),
    "shifted labels": ({**WHOLE, "shift_labels": WHOLE["labels"]}, UnsupportedError, ("shift_labels", "not shifted")),
    "a mask of four dimensions": (
        {**WHOLE, "attention_mask": torch.ones(1, 1, 21, 21)},
        UnsupportedError,
        ("not a padding mask", "(1, 1, 21, 21)"),
    ),
    "left padding": (
        {**WHOLE, "labels": torch.full((1, 21), -100), "attention_mask": (torch.arange(21) > 2).long()[None]},
        BatchError,
        ("left padding",),
    ),
    "a hole in the mask": (
        {**WHOLE, "labels": torch.full((1, 21), -100), "attention_mask": (torch.arange(21) != 5).long()[None]},
        BatchError,
        ("hole",),
    ),
    "labels of another shape": ({**WHOLE, "labels": WHOLE["labels"][:, 1:]}, BatchError, ("(1, 20)", "(1, 21)")),
    "no target at all": ({**WHOLE, "labels": torch.full((1, 21), -100)}, BatchError, ("no token", "-100")),
    "fewer tokens than ranks": (packed([1]), BatchError, ("fewer tokens", "tokens=1", "size=2")),
    "an unknown argument": ({**WHOLE, "token_bias": 2.0}, UnsupportedError, ("token_bias", "Leave them out")),
    "attention in both directions": ({**WHOLE, "is_causal": False}, UnsupportedError, ("in both directions",)),
    "a token without an embedding": (
        {**WHOLE, "input_ids": WHOLE["input_ids"] + 96},
        BatchError,
        ("not among the model's embeddings", "embeddings=97", "tokenizer"),
    ),
    "another ignore_index": ({**WHOLE, "ignore_index": 0}, UnsupportedError, ("ignore_index",)),
    "no labels": ({"input_ids": WHOLE["input_ids"]}, BatchError, ("no labels", "keys=['input_ids']", "shard_batch")),
    "an empty batch": (
        {key: value[:0] for key, value in WHOLE.items()},
        BatchError,
        ("at least one of each", "leave out empty batches", "shape=(0, 21)"),
    ),
    "no tokens": ({"labels": WHOLE["labels"]}, BatchError, ("no input_ids",)),
}


@pytest.mark.parametrize("what", CALLS)
def test_a_call_that_a_sharded_model_cannot_follow_is_refused(what: str) -> None:
    base, (call, kind, texts) = build("Llama"), CALLS[what]
    assert_refused(errors(lambda sp: parallelize(copy.deepcopy(base), sp)(**call)), kind, *texts)


def test_tokens_of_a_block_that_see_each_other_are_refused() -> None:
    """transformers joins their mask to the causal one without saying so in any argument of the mask function."""
    base = build("HrmText", head_dim=8, num_hidden_layers=2, H_cycles=2, L_cycles=2)
    kinds = (torch.arange(21) < 9).long()[None]
    act = lambda sp: parallelize(copy.deepcopy(base), sp)(**WHOLE, token_type_ids=kinds)  # noqa: E731
    assert_refused(errors(act), UnsupportedError, "a mask of its own", "blocks of its tokens")


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("kind", ["causal", "sliding_window_causal", "chunked_causal"])
def test_masks_are_told_from_the_functions_they_are_made_of(kind: str, blocks: bool) -> None:
    from transformers import LlamaConfig, masking_utils

    register()
    config = LlamaConfig(sliding_window=5, attention_chunk_size=8, attn_implementation="seqpar_ring")
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    others = {"block_sequence_ids": positions} if blocks else {}
    call = lambda: getattr(masking_utils, f"create_{kind}_mask")(  # noqa: E731
        config, torch.zeros(1, 12, 8), None, None, position_ids=positions, **others
    )
    if blocks:
        with pytest.raises(UnsupportedError, match="mask_function='or_masks'"):
            call()
    else:
        assert call() is None


def test_another_attention_that_is_set_after_the_first_forward_is_refused() -> None:
    base = build("Llama")

    def act(sp: SequenceParallel) -> object:
        model = parallelize(copy.deepcopy(base), sp)
        model(**WHOLE)
        model.set_attn_implementation("sdpa")
        return model(**WHOLE)

    found = errors(act)
    assert_refused(found, UnsupportedError, "not every layer", "attention_calls=0", "as parallelize set it")


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_is_refused_with_the_way_to_do_it(use_cache: bool) -> None:
    base = build("Llama").eval()
    ids = WHOLE["input_ids"]

    def act(sp: SequenceParallel) -> object:
        model = parallelize(copy.deepcopy(base), sp)
        return model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=use_cache, pad_token_id=0)

    assert_refused(errors(act), UnsupportedError, "save_pretrained(path)", "AutoModelForCausalLM.from_pretrained(path)")


def test_the_way_to_generate_works(tmp_path: Any) -> None:
    base, ids = build("Llama").eval(), WHOLE["input_ids"]
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    expected = base.generate(ids, **options)

    def act(sp: SequenceParallel) -> None:
        parallelize(copy.deepcopy(base), sp).save_pretrained(tmp_path)

    run_lockstep(act, 1)
    assert torch.equal(type(base).from_pretrained(tmp_path).generate(ids, **options), expected)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        ({**WHOLE, "use_cache": True}, UnsupportedError),
        ({**WHOLE, "labels": WHOLE["labels"][:, 1:]}, BatchError),
        ({"input_ids": WHOLE["input_ids"]}, BatchError),
        ({key: value[:0] for key, value in WHOLE.items()}, BatchError),
        ({**WHOLE, "note": 1}, DisagreementError),
        (packed([21], seed=6), DisagreementError),
        (packed([20]), DisagreementError),
    ],
)
def test_what_is_wrong_on_one_rank_is_raised_on_every_rank(rank: int, bad: dict[str, Any], kind: Any) -> None:
    base = build("Llama")

    def act(sp: SequenceParallel) -> object:
        return parallelize(copy.deepcopy(base), sp)(**(bad if sp.rank == rank else WHOLE))

    found = errors(act, world=3)
    assert {type(error) for error in found} <= {kind}, found
    assert all(f"rank {rank}" in str(error) for i, error in enumerate(found) if i != rank)


@pytest.mark.filterwarnings("ignore:What the model returns for this whole batch")
def test_a_rank_without_tokens_is_refused() -> None:
    base = build("Llama").eval()
    batch = {"input_ids": packed([1, 2])["input_ids"], "position_ids": torch.tensor([[0, 0, 1]])}
    found = errors(lambda sp: parallelize(copy.deepcopy(base), sp)(**batch), world=3, layout="zigzag")
    assert_refused(found, BatchError, "no token", "tokens_by_rank=", "lengths=(1, 2)", "contiguous")


@pytest.mark.filterwarnings("ignore:What the model returns for this whole batch")
def test_a_rank_without_tokens_is_refused_on_all_data_ranks() -> None:
    """The others, whose batches are fine, waited for it in the loss."""
    base = build("Llama").eval()
    rows = [packed([1, 2])["input_ids"], packed([20])["input_ids"]]
    restarting = torch.tensor([[0, 0, 1]]), torch.arange(20)[None]

    def act(sp: SequenceParallel) -> object:
        batch = {"input_ids": rows[sp.data_rank], "position_ids": restarting[sp.data_rank]}
        return parallelize(copy.deepcopy(base), sp)(**batch)

    found = errors(act, world=6, size=3, layout="zigzag")
    assert all(type(error) is BatchError and "no token" in str(error) for error in found)


# -------------------------------------------------------------------------------------------------- sharded batches

SHARDED: dict[str, tuple[Callable[[SequenceParallel, dict[str, Any]], dict[str, Any]], type[SeqparError], str]] = {
    "whole ids": (lambda sp, b: {**b, "input_ids": WHOLE["input_ids"]}, BatchError, "input_ids does not hold"),
    "whole labels": (lambda sp, b: {**b, "labels": WHOLE["labels"]}, BatchError, "labels does not hold"),
    "no positions": (lambda sp, b: {**b, "position_ids": None}, BatchError, "no position_ids"),
    "a mask": (lambda sp, b: {**b, "attention_mask": torch.ones(1, 5)}, BatchError, "has an attention_mask"),
    "no plan at all": (lambda sp, b: {**b, "seqpar_plan": "zigzag"}, PlanError, "plan='zigzag'"),
    "a plan of another group": (lambda sp, b: {**b, "seqpar_plan": other(sp).plan(21)}, PlanError, "not a causal plan"),
    "a plan that sees both ways": (
        lambda sp, b: {**b, "seqpar_plan": sp.plan(21, causal=False)},
        PlanError,
        "not a causal plan",
    ),
}


def other(sp: SequenceParallel) -> SequenceParallel:
    """A group of this rank alone."""
    return run_lockstep(lambda alone: alone, 1)[0]


@pytest.mark.parametrize("what", SHARDED)
def test_a_sharded_batch_that_was_tampered_with_is_refused(what: str) -> None:
    base, (change, kind, text) = build("Llama"), SHARDED[what]

    def act(sp: SequenceParallel) -> object:
        return parallelize(copy.deepcopy(base), sp)(**change(sp, sp.shard_batch(WHOLE)))

    assert_refused(errors(act), kind, text)


# ----------------------------------------------------------------------------------------- around the model's own call


def test_the_inner_model_cannot_be_called_on_its_own() -> None:
    base = build("Llama")
    found = errors(lambda sp: parallelize(copy.deepcopy(base), sp).model(input_ids=WHOLE["input_ids"]))
    assert_refused(found, UnsupportedError, "without a plan", "LlamaAttention", "parallelize(model, sp) returned")


def test_a_padding_mask_cannot_reach_the_inner_model() -> None:
    base, batch = build("Llama"), padded([14], 21)
    del batch["labels"]
    found = errors(lambda sp: parallelize(copy.deepcopy(base), sp).model(**batch))
    assert_refused(found, BatchError, "a padding mask reached", "(1, 21)")


def test_dropout_that_is_turned_on_later_is_refused_by_attention() -> None:
    base = build("Llama")

    def act(sp: SequenceParallel) -> object:
        model = parallelize(copy.deepcopy(base), sp)
        model.model.layers[1].self_attn.attention_dropout = 0.3
        return model(**WHOLE)

    assert_refused(errors(act), UnsupportedError, "dropout above 0", "dropout=0.3")


def test_a_model_that_only_has_the_rings_attention_is_refused() -> None:
    """Its loss was the mean over each rank's own tokens, without a word."""
    base = build("Llama")
    register()

    def act(sp: SequenceParallel) -> object:
        model = copy.deepcopy(base)
        model.set_attn_implementation("seqpar_ring")
        return model(**sp.shard_batch(WHOLE), use_cache=False)

    assert_refused(errors(act), UnsupportedError, "without a plan", "parallelize(model, sp) returned")


@pytest.mark.parametrize("family", ["StableLm", "Nemotron"])
def test_another_ignore_index_is_refused_where_attention_does_not_see_it(family: str) -> None:
    base = build(family)
    found = errors(lambda sp: parallelize(copy.deepcopy(base), sp)(**WHOLE, ignore_index=0))
    assert_refused(found, UnsupportedError, "labels of -100 only", "ignore_index=0")


def test_positional_arguments_are_bound_as_the_model_binds_them() -> None:
    base = build("Llama")

    def run(sp: SequenceParallel) -> str:
        with pytest.raises(TypeError) as caught:
            parallelize(copy.deepcopy(base), sp)(WHOLE["input_ids"], input_ids=WHOLE["input_ids"])
        return str(caught.value)

    assert all("multiple values" in text for text in run_lockstep(run, 2))


def test_a_model_that_the_planner_does_not_know_is_refused_only_where_it_was_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On GPUs that are known the block size is its choice without anybody's asking."""

    def unknown(*_: object) -> None:
        raise ConfigError("the model has a wrong intermediate_size", fix="None.")

    def run(groups: Groups, asked: dict[str, Any]) -> str:
        settings = Settings.parse({"size": 2, **asked})
        sp = SequenceParallel.over(replace(groups, device="NVIDIA H100 80GB HBM3"), settings)
        try:
            parallelize(copy.deepcopy(base), sp)
        except ConfigError as error:
            return error.what
        return str(sp.plan(21).documents.settings.block_tokens)

    base = build("Llama")
    monkeypatch.setattr(edges, "of_config", unknown)
    assert run_lockstep_groups(partial(run, asked={}), 2) == ["auto"] * 2
    refused = run_lockstep_groups(partial(run, asked={"heads": "auto"}), 2)
    assert all("intermediate_size" in text for text in refused)


def refused_in_a_process(sp: SequenceParallel, dropout: float, call: dict[str, Any]) -> tuple[str, str]:
    """The class and text of the error that this rank raises."""
    with pytest.raises(SeqparError) as caught:
        parallelize(build("Llama", attention_dropout=dropout), sp)(**call)
    return type(caught.value).__name__, str(caught.value)


@pytest.mark.parametrize(
    ("dropout", "call", "kind", "text"),
    [
        (0.1, WHOLE, "UnsupportedError", "attention_dropout=0.1"),
        (0.0, {**WHOLE, "use_cache": True}, "UnsupportedError", "KV cache"),
        (0.0, {**WHOLE, "labels": WHOLE["labels"][:, 2:]}, "BatchError", "(1, 19)"),
    ],
)
def test_processes_are_refused_alike(
    pool2: RankPool, dropout: float, call: dict[str, Any], kind: str, text: str
) -> None:
    for name, message in pool2.run(refused_in_a_process, dropout, call):
        assert name == kind
        assert text in message
