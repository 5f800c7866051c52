"""A HuggingFace model that cannot be sharded exactly is refused by name, with the values and a fix, on every rank."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hf_cases import assert_refused, build, errors, packed
from seqpar_ring.integrations.transformers import parallelize
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask

from seqpar_ring import SequenceParallel
from seqpar_ring.errors import (
    ConfigError,
    DisagreementError,
    UnsupportedError,
)
from seqpar_ring.testing import run_lockstep

MODELS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "attention dropout": (
        lambda: build("Llama", attention_dropout=0.1),
        ("dropout above 0", "attention_dropout=0.1", "attention_dropout=0.0"),
    ),
    "dropout elsewhere": (
        lambda: build("GPT2", suffix="LMHeadModel", n_embd=48, n_head=6, n_layer=2, attn_pdrop=0.0, embd_pdrop=0.0),
        ("dropout above 0", "resid_pdrop=0.1"),
    ),
    "a dropout module": (lambda: with_dropout_module(build("Llama")), ("dropout above 0", "extra=0.25")),
    "dropout of another kind": (
        lambda: with_dropout_module(build("Llama"), nn.AlphaDropout),
        ("dropout above 0", "extra=0.25"),
    ),
    "jitter in a config inside the config": (
        lambda: build(
            "Dbrx",
            **{"d_model": 48, "n_heads": 6, "n_layers": 2, "attn_config": {"kv_n_heads": 3, "rope_theta": 1e4}},
            ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0.3},
        ),
        ("dropout above 0", "moe_jitter_eps=0.3"),
    ),
    "layers spread over ranks": (lambda: spread(build("Llama")), ("same tokens", "tp_size=2", "without tp_plan")),
    "an attention function of its own": (
        lambda: with_attention(build("Llama")),
        ("attention function of its own", "attn_implementation='hot'"),
    ),
    "a loss function of its own": (
        lambda: with_loss(build("Llama")),
        ("loss function of its own", "loss_function='smooth'", "as it was"),
    ),
    "encoder": (
        lambda: build("Bert", suffix="ForMaskedLM", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        ("in both directions", "BertSelfAttention", "Use a decoder"),
    ),
    "encoder-decoder": (
        lambda: build("T5", suffix="ForConditionalGeneration", num_layers=2, d_model=16, d_kv=8, d_ff=24, num_heads=2),
        ("encoder-decoder", "T5ForConditionalGeneration"),
    ),
    "no language-model head": (
        lambda: build("Llama", suffix="ForTokenClassification"),
        ("only language models", "ForTokenClassification"),
    ),
    "recurrent layers": (lambda: build("Jamba"), ("layers other than plain attention", "linear_attention")),
    "no position_ids": (lambda: build("Bloom", hidden_dropout=0.0, n_head=6, n_layer=2), ("takes no position_ids",)),
    "positions within the shard": (
        lambda: build("Llama", attn_temperature_tuning=True),
        ("attn_temperature_tuning", "place in the shard"),
    ),
    "router losses": (
        lambda: build("Mixtral", num_local_experts=2, output_router_logits=True),
        ("output_router_logits", "no sum over tokens", "SFTConfig(router_aux_loss_coef=0.0)"),
    ),
    "positions that start at the padding token's id": (
        lambda: build(
            "Roberta", is_decoder=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=1
        ),
        ("not from 0", "RobertaEmbeddings", "counts from 0"),
    ),
    "attention weights": (lambda: build("Llama", attn_implementation="eager", output_attentions=True), ("weights",)),
    "no transformers model": (lambda: nn.Linear(2, 2), ("not a transformers model", "Linear")),
    "a wrapped model": (lambda: nn.Sequential(build("Llama")), ("wrapped already", "LlamaForCausalLM before")),
}


def with_dropout_module(model: Any, kind: Callable[[float], nn.Module] = nn.Dropout) -> Any:
    model.extra = kind(0.25)
    return model


def spread(model: Any) -> Any:
    """As from_pretrained(.., distributed_config=DistributedConfig(tp_size=2)) leaves it."""
    model._tp_size = 2
    return model


def with_attention(model: Any) -> Any:
    def hot(module: nn.Module, q: Any, k: Any, v: Any, mask: Any, scaling: float = 1.0, **others: Any) -> Any:
        return sdpa_attention_forward(module, q, k, v, mask, scaling=3 * scaling, **others)

    AttentionInterface.register("hot", hot)
    model.set_attn_implementation("hot")
    return model


def with_loss(model: Any) -> Any:
    def smooth(logits: torch.Tensor, labels: torch.Tensor, **_: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.2)

    model.loss_function = smooth
    return model


@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention"])
def test_attention_of_transformers_is_replaced(name: str) -> None:
    base = build("Llama", attn_implementation=name)
    found = run_lockstep(lambda sp: parallelize(copy.deepcopy(base), sp).config._attn_implementation, 2)
    assert found == ["seqpar_ring"] * 2


@pytest.mark.parametrize("what", MODELS)
def test_a_model_that_would_be_inexact_is_refused(what: str) -> None:
    make, texts = MODELS[what]
    base = make()
    assert_refused(errors(lambda sp: parallelize(copy.deepcopy(base), sp)), UnsupportedError, *texts)


def test_a_model_whose_layers_differ_in_heads_is_judged_like_any_other() -> None:
    """transformers raises where such a config is asked for the heads of all layers."""
    sizes = {"q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
    base = build("Dots3Note", config="Dots3NoteTextConfig", num_key_value_heads=6, pad_token_id=0, **sizes)
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        assert base.config.num_attention_heads
    found = errors(lambda sp: parallelize(copy.deepcopy(base), sp))
    assert_refused(found, UnsupportedError, "layers other than plain attention", "indexed_attention")


def test_a_refused_model_is_left_as_it_was() -> None:
    model = build("Llama", attention_dropout=0.1).eval()
    errors(lambda sp: parallelize(model, sp), world=1)
    batch = packed([9])
    assert model(**batch).loss.item() == build("Llama", attention_dropout=0.1).eval()(**batch).loss.item()


def test_parallelizing_twice_is_refused() -> None:
    base = build("Llama")
    found = errors(lambda sp: parallelize(parallelize(copy.deepcopy(base), sp), sp))
    assert_refused(found, ConfigError, "parallelized already", "once")


def test_ranks_with_different_models_disagree() -> None:
    models = [build("Llama"), build("Llama", num_hidden_layers=2)]
    found = errors(lambda sp: parallelize(models[sp.rank], sp))
    assert_refused(found, DisagreementError, "num_hidden_layers", "rank 0=3", "rank 1=2")


def test_a_family_that_never_calls_the_attention_interface_is_refused_by_its_first_forward() -> None:
    base = build("Falcon", num_kv_heads=3, new_decoder_architecture=True)
    found = errors(lambda sp: parallelize(copy.deepcopy(base), sp)(**packed([21])))
    assert_refused(found, UnsupportedError, "attention interface", "FalconForCausalLM", "attention_calls=0", "layers=3")


def test_a_layer_that_makes_a_mask_of_its_own_is_refused() -> None:
    base = build("Doge")
    found = errors(lambda sp: parallelize(copy.deepcopy(base), sp)(**packed([21])))
    assert_refused(found, UnsupportedError, "mask of its own", "DogeAttention", "attention_mask=(1, 6, ")


def test_a_mask_added_to_the_causal_one_is_refused() -> None:
    base = build("Llama")

    def act(sp: SequenceParallel) -> object:
        config = parallelize(copy.deepcopy(base), sp).config
        # attention_mask, and the cache, whose name is another since transformers 5.24
        return create_causal_mask(
            config, torch.zeros(1, 9, 48), None, None, or_mask_function=lambda batch, head, q, k: q < 3
        )

    assert_refused(errors(act), UnsupportedError, "adds a mask of its own to the causal one")


def test_a_layer_type_that_is_not_what_the_layer_does_is_refused() -> None:
    base = build("Llama", layer_types=["sliding_attention", "full_attention", "full_attention"], sliding_window=5)
    found = errors(lambda sp: parallelize(copy.deepcopy(base), sp)(**packed([21])))
    assert_refused(found, UnsupportedError, "sliding window", "calls_with_window=0")


def test_a_window_that_stands_in_a_mask_only_is_refused() -> None:
    base = build("Phimoe", num_local_experts=4, router_jitter_noise=0.0, sliding_window=7)
    found = errors(lambda sp: parallelize(copy.deepcopy(base), sp)(**packed([21])))
    assert_refused(found, UnsupportedError, "no layer hands one", "PhimoeForCausalLM", "sliding_window=7", "to None")


def test_a_model_that_computes_a_loss_of_its_own_is_refused() -> None:
    base = build("Llama")

    def act(sp: SequenceParallel) -> object:
        model = parallelize(copy.deepcopy(base), sp)
        model.loss_function = lambda logits, labels, **_: logits.sum()
        return model(**packed([21]))

    assert_refused(errors(act), UnsupportedError, "loss of its own", "loss_calls=0", "sp.loss")


def test_a_loss_that_gets_no_plan_is_refused() -> None:
    base = build("Llama")

    def act(sp: SequenceParallel) -> object:
        return parallelize(copy.deepcopy(base), sp).loss_function(torch.zeros(1, 3, 97), torch.zeros(1, 3))

    assert_refused(errors(act), UnsupportedError, "keyword arguments to its loss", "sp.loss")
