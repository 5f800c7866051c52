"""Models: parameters as transformers builds them, windows layer by layer, and configurations that lack something."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from seqpar_ring.errors import ConfigError, UnsupportedError
from seqpar_ring.planner.data import named, names
from seqpar_ring.planner.families import FAMILIES
from seqpar_ring.planner.model import Experts, Latent, Model, Span, load_model, of_config
from seqpar_ring.schedule import Row

SIZES = {
    **{"hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"intermediate_size": 96, "vocab_size": 128, "max_position_embeddings": 256},
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
MIXED = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    **{**HEADS, "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16},
    **{**MIXED, "v_head_dim": 12, "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 2},
    **{"n_group": 2, "topk_group": 1},
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("cohere", SIZES),
    ("cohere", {**SIZES, "use_qk_norm": True}),
    ("cohere2", {**SIZES, "sliding_window": 32}),
    ("deepseek_v2", {**LATENT, "q_lora_rank": None}),
    ("deepseek_v3", {**LATENT, "q_lora_rank": 24}),
    ("deepseek_v3", {**LATENT, "q_lora_rank": 24, "attention_bias": True}),
    ("deepseek_v3", {**LATENT, "q_lora_rank": None}),
    ("ernie4_5", SIZES),
    ("ernie4_5", {**SIZES, "use_bias": True}),
    ("exaone4", {**SIZES, "sliding_window": 32}),
    ("gemma", {**SIZES, "head_dim": 16}),
    ("gemma2", {**SIZES, "head_dim": 32, "sliding_window": 32}),
    ("gemma3_text", {**SIZES, "head_dim": 32, "sliding_window": 32, "num_hidden_layers": 13}),
    ("gemma3_text", {**SIZES, "attention_bias": True}),
    ("glm", SIZES),
    ("glm4", SIZES),
    ("glm4", {**SIZES, "attention_bias": False}),
    ("glm4_moe", {**SIZES, **MIXED, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "head_dim": 16}),
    ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128}),
    ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 96, "n_inner": 80}),
    ("gpt_neox", HEADS),
    ("gpt_oss", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32}),
    ("granite", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    ("llama", SIZES),
    ("llama", {**SIZES, "attention_bias": True, "head_dim": 24}),
    ("llama", {**SIZES, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama4_text", {**SIZES, "num_local_experts": 4, "intermediate_size_mlp": 112, "interleave_moe_layer_step": 2}),
    ("mistral", SIZES),
    ("mistral", {**SIZES, "sliding_window": None}),
    ("mixtral", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    ("nemotron", SIZES),
    ("nemotron", {**SIZES, "attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    ("olmo", SIZES),
    ("olmo2", SIZES),
    ("olmo3", {**SIZES, "sliding_window": 32}),
    ("phi", SIZES),
    ("phi3", {**SIZES, "sliding_window": 32}),
    ("qwen2", SIZES),
    ("qwen2", {**SIZES, "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 3}),
    ("qwen2_moe", {**SIZES, **MIXED, "num_experts": 8, "shared_expert_intermediate_size": 48}),
    (
        "qwen2_moe",
        {**SIZES, **MIXED, "num_experts": 8, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 2}
        | {"mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 32, "qkv_bias": False},
    ),
    ("qwen3", SIZES),
    ("qwen3", {**SIZES, "attention_bias": True, "use_sliding_window": True, "max_window_layers": 2}),
    ("qwen3_moe", {**SIZES, **MIXED, "num_experts": 8, "head_dim": 32}),
    ("qwen3_moe", {**SIZES, **MIXED, "num_experts": 8, "use_sliding_window": True, "mlp_only_layers": [0, 3]}),
    ("seed_oss", SIZES),
    ("seed_oss", {**SIZES, "attention_out_bias": True, "mlp_bias": True, "attention_bias": False}),
    ("smollm3", SIZES),
    ("smollm3", {**SIZES, "use_sliding_window": True, "sliding_window": 32}),
    ("stablelm", SIZES),
    ("stablelm", {**SIZES, "use_qkv_bias": True, "qk_layernorm": True}),
    ("starcoder2", SIZES),
    ("starcoder2", {**SIZES, "use_bias": False, "sliding_window": 32}),
]
PUBLISHED = {
    **{"llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496, "llama-3.1-405b": 405_853_388_800},
    **{"qwen3-8b": 8_190_735_360, "qwen3-32b": 32_762_123_264, "smollm2-135m": 134_515_008},
    **{"mistral-7b-v0.1": 7_241_732_096, "mistral-7b-v0.3": 7_248_023_552},
    **{"gpt-oss-20b": 20_914_757_184, "gpt-oss-120b": 116_829_156_672, "deepseek-v3": 671_026_404_352},
    **{"gemma3-12b": 11_766_034_176, "gemma3-27b": 27_009_346_304},
}


def config_of(family: str, fields: dict[str, Any]) -> PretrainedConfig:
    return CONFIG_MAPPING[family](**fields, **TOKENS)


def built(config: PretrainedConfig) -> int:
    """Parameters of the model that transformers makes of it."""
    with torch.device("meta"):
        return int(AutoModelForCausalLM.from_config(config).num_parameters())


def spans_of(config: PretrainedConfig) -> Counter[tuple[int | None, int | None]]:
    """How many layers see (a window, a chunk), as transformers' masks are made."""
    window = getattr(config, "sliding_window", None) or None
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # one mask for all layers, with the window if there is one
        windowed = config.model_type in ("mistral", "mixtral", "phi3", "qwen3_moe", "starcoder2")
        return Counter({(window if windowed else None, None): config.num_hidden_layers})
    seen = {
        "full_attention": (None, None),
        "sliding_attention": (window, None),
        "chunked_attention": (None, getattr(config, "attention_chunk_size", None)),
    }
    return Counter(seen[kind] for kind in kinds)


def names_of(cases: list[tuple[str, dict[str, Any]]]) -> list[str]:
    extra = [",".join(k for k in fields if k not in SIZES) for _, fields in cases]
    return [f"{family}-{more}"[:60] for (family, _), more in zip(cases, extra, strict=True)]


def test_every_family_that_is_counted_exactly_is_compared() -> None:
    assert {family for family, _ in CASES} == {name for name, family in FAMILIES.items() if family.exact}


@pytest.mark.parametrize(("family", "fields"), CASES, ids=names_of(CASES))
def test_parameters_and_windows_are_those_of_the_model_that_transformers_builds(
    family: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    config = config_of(family, fields)
    config.save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert model.exact
    assert model.parameters == built(config)
    assert Counter({(s.window, s.chunk): s.layers for s in model.spans}) == spans_of(config)


@pytest.mark.parametrize(("family", "fields"), CASES, ids=names_of(CASES))
def test_a_field_left_out_means_the_familys_default(family: str, fields: dict[str, Any]) -> None:
    whole = of_config(config_of(family, fields).to_dict(), "x")
    left_out = of_config({"model_type": family, **fields}, "x")
    if "max_position_embeddings" not in fields and family != "gpt2":
        whole = whole._replace(positions=None)
    assert left_out == whole


@pytest.mark.parametrize(
    "change", [{"num_key_value_heads": 4}, {"vocab_size": 129}, {"tie_word_embeddings": True}, {"attention_bias": True}]
)
def test_the_count_tells_a_wrong_configuration(change: dict[str, Any]) -> None:
    assert of_config({"model_type": "llama", **SIZES, **change}, "x").parameters != built(config_of("llama", SIZES))


def test_the_presets_are_these() -> None:
    assert names("models") == sorted(PUBLISHED)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_preset_is_the_published_model(name: str) -> None:
    model, fields = load_model(name), named("models", name)
    assert model.name == name
    assert model.exact
    assert model.parameters == PUBLISHED[name]
    config = CONFIG_MAPPING[fields["model_type"]](**{k: v for k, v in fields.items() if k != "model_type"}, **TOKENS)
    assert built(config) == PUBLISHED[name]
    assert Counter({(s.window, s.chunk): s.layers for s in model.spans}) == spans_of(config)


@pytest.mark.parametrize(
    ("name", "billions"), [("gpt-oss-20b", 3.61), ("gpt-oss-120b", 5.13), ("deepseek-v3", 37.0), ("qwen3-8b", 7.57)]
)
def test_a_token_meets_the_published_number_of_parameters(name: str, billions: float) -> None:
    # Model cards of gpt-oss (which leave the embedding out, as here) and DeepSeek-V3 ("37B").
    assert load_model(name).active_parameters / 1e9 == pytest.approx(billions, rel=0.015)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_layers_embeddings_and_the_last_norm_are_all_there_is(name: str) -> None:
    model = load_model(name)
    total = model.layers * model.layer_parameters + model.embeddings + model.norm_parameters
    assert total == pytest.approx(model.parameters, rel=1e-12)


def test_what_attention_sees() -> None:
    assert load_model("llama-3.1-8b").row(2) == Row(32, 8, 128, 128, 2)
    deepseek = load_model("deepseek-v3")
    assert deepseek.row(2) == Row(128, 128, 192, 128, 2)
    assert deepseek.latent == Latent(1536, 512, 64)
    assert deepseek.experts == Experts(layers=58, number=256, active=8, width=2048, shared=2048)
    assert deepseek.dense_layers == 3
    assert load_model("gemma3-27b").spans == (Span(52, 1024), Span(10))
    assert load_model("Mistral-7B-v0.1").spans == (Span(32, 4096),)


def test_the_text_part_of_a_configuration_of_several_is_read(tmp_path: Path) -> None:
    # As google/gemma-3-4b-pt has it: what equals the default is left out.
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    text |= {"sliding_window": 1024}
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps({**whole, "text_config": text}, indent="\t"))
    model = load_model(str(tmp_path / "config.json"))
    assert model.parameters == built(CONFIG_MAPPING["gemma3_text"](**{k: text[k] for k in text if k != "model_type"}))
    assert model.spans == (Span(29, 1024), Span(5))
    assert (model.heads, model.kv_heads, model.head_dim, model.tied) == (8, 4, 256, True)
    assert model.name == tmp_path.name


def test_an_unknown_family_is_taken_to_be_like_llama() -> None:
    known, unknown = (of_config({"model_type": name, **SIZES}, "x") for name in ("llama", "new_model"))
    assert unknown.parameters == known.parameters
    assert (known.exact, unknown.exact) == (True, False)
    assert not of_config({"model_type": "falcon", **SIZES}, "x").exact


@pytest.mark.parametrize(("name", "near"), [("llama-3.1-8", "llama-3.1-8b"), ("qwen3_32b", "qwen3-32b")])
def test_an_unknown_model_is_refused_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match="there is no model of this name") as caught:
        load_model(name)
    assert caught.value.fix == f'Did you mean "{near}"? Or give the path of a config.json.'


def test_a_missing_file_and_one_that_is_no_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such model file"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{'hidden_size': 64}")
    with pytest.raises(ConfigError, match=r"config\.json is no JSON"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="is no mapping"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("missing", [["hidden_size"], ["num_hidden_layers", "vocab_size"], ["num_attention_heads"]])
def test_all_missing_fields_are_named(missing: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"the configuration of x lacks {', '.join(missing)} ") as caught:
        of_config({"model_type": "llama", **{k: v for k, v in SIZES.items() if k not in missing}}, "x")
    assert caught.value.fix.startswith(f"Give {', '.join(missing)}: the planner needs")


@pytest.mark.parametrize(
    ("family", "fields", "missing"),
    [
        ("llama", {k: v for k, v in SIZES.items() if k != "intermediate_size"}, "intermediate_size"),
        ("deepseek_v3", {k: v for k, v in LATENT.items() if k != "v_head_dim"}, "v_head_dim"),
        ("mixtral", {**SIZES, "num_local_experts": 4}, "num_experts_per_tok"),
    ],
)
def test_what_only_some_families_need_is_named_too(family: str, fields: dict[str, Any], missing: str) -> None:
    with pytest.raises(ConfigError, match=f"the configuration of x lacks {missing} "):
        of_config({"model_type": family, **fields}, "x")


@pytest.mark.parametrize("value", [0, -4, 2.5, "64", True])
@pytest.mark.parametrize("field", ["hidden_size", "num_key_value_heads", "vocab_size"])
def test_what_is_no_positive_whole_number_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"the configuration of x has a wrong {field} ") as caught:
        of_config({"model_type": "llama", **SIZES, field: value}, "x")
    assert caught.value.fix == "Give a positive whole number."


def test_a_wrong_window_and_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="has a wrong sliding_window"):
        of_config({"model_type": "mistral", **SIZES, "sliding_window": -1}, "x")
    with pytest.raises(ConfigError, match="the heads of x cannot be shared out"):
        of_config({"model_type": "llama", **SIZES, "num_key_value_heads": 3}, "x")
    with pytest.raises(ConfigError, match="layer_types of x are not one a layer"):
        of_config({"model_type": "qwen2", **SIZES, "layer_types": ["full_attention"]}, "x")


def test_layers_that_are_no_attention_are_refused_and_not_priced_as_attention() -> None:
    kinds = ["linear_attention"] * 4 + ["full_attention"]
    with pytest.raises(UnsupportedError, match="not all layers of x are attention of a known kind") as caught:
        of_config({"model_type": "qwen3_next", **SIZES, "layer_types": kinds}, "x")
    assert caught.value.values["kinds"] == ["linear_attention"]


def test_a_model_may_be_made_by_hand() -> None:
    model = Model("mine", "llama", 2, 64, 96, 4, 2, 16, 16, 128, spans=(Span(2),))
    assert model == of_config({"model_type": "llama", **SIZES, "num_hidden_layers": 2}, "mine")._replace(positions=None)


@pytest.mark.parametrize(
    ("config", "kv_heads"),
    [
        ({"model_type": "gpt_bigcode"}, 1),
        ({"model_type": "gpt_bigcode", "multi_query": False}, 4),
        ({"model_type": "falcon", "multi_query": True}, 1),
        ({"model_type": "falcon", "multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 2}, 2),
        ({"model_type": "llama"}, 4),
    ],
)
def test_a_switch_may_say_that_all_queries_share_one_key_head(config: dict[str, Any], kv_heads: int) -> None:
    """StarCoder was planned with 48 key heads in place of one."""
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    assert of_config({**sizes, "num_attention_heads": 4, **config}, "x").kv_heads == kv_heads
