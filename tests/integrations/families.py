"""The model families that are compared with one process, each as a tiny model in which its peculiarities bite.

Windows and chunks are shorter than the documents, layers of both kinds are there, lengths pass the borders at which a
rotary embedding changes. `docs/models.md` is made from this table by `docs/make_models.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
MIXED = [SLIDING, FULL, SLIDING]
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.4, 1.8, 2.2, 2.6]}


def rope(kind: str, **others: Any) -> dict[str, Any]:
    """The rope_parameters of a config; both kinds change at 16 positions."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **others}, "max_position_embeddings": 16}


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: as in transformers' class names.
        special: what attention or positions of the family need, in words.
        changes: arguments of its config beside the tests' usual ones.
        row_sets_length: a packed row is one sequence for its rotary embedding, as transformers has it in one process.
        fp64: compared in fp64, where fp32 rounds too much to tell.
    """

    name: str
    special: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    suffix: str = "ForCausalLM"
    row_sets_length: bool = False
    fp64: bool = False


WINDOWS = {"sliding_window": 7, "layer_types": MIXED}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MLA = {
    **{"q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6},
    **{"num_key_value_heads": 6, "head_dim": 4},
}
GROUPED = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    **{"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
}
SOFT = {"head_dim": 8, **WINDOWS, "attn_logit_softcapping": 2.0}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
TABLE = {
    "Llama": Family("Llama"),
    "Llama, dynamic RoPE": Family(
        "Llama", "angles follow the length", rope("dynamic", factor=2.0), row_sets_length=True
    ),
    "Llama, longrope": Family(
        "Llama",
        "angles follow the length",
        {**rope("longrope", **FACTORS, original_max_position_embeddings=16, factor=2.0), "max_position_embeddings": 64},
        row_sets_length=True,
    ),
    "Qwen2": Family("Qwen2"),
    "Qwen3": Family("Qwen3", "norm of q and k", {"head_dim": 16}),
    "Qwen3-MoE": Family(
        "Qwen3Moe",
        "experts",
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "Mistral": Family("Mistral", "window in every layer", {"sliding_window": 7}),
    "Mixtral": Family("Mixtral", "experts", EXPERTS),
    "Gemma 2": Family(
        "Gemma2",
        "windows in some layers, softcap of scores and logits, scale of its own",
        {"head_dim": 8, "sliding_window": 7, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 3},
    ),
    "Gemma 3": Family(
        "Gemma3",
        "windows in some layers, a RoPE for each kind of layer",
        {"config": "Gemma3TextConfig", "head_dim": 8, "sliding_window": 7, "layer_types": MIXED},
    ),
    "gpt-oss": Family(
        "GptOss",
        "sinks, windows in some layers, experts",
        {"head_dim": 8, "sliding_window": 7, "layer_types": MIXED, **EXPERTS},
    ),
    "Phi-3": Family("Phi3", "window", {"sliding_window": 9, "pad_token_id": 0}),
    "Phi-3, longrope": Family(
        "Phi3",
        "angles follow the length",
        {
            **rope("longrope", **FACTORS, original_max_position_embeddings=16),
            **{"max_position_embeddings": 64, "original_max_position_embeddings": 16, "pad_token_id": 0},
        },
        row_sets_length=True,
    ),
    "SmolLM3": Family("SmolLM3", "layers without RoPE", {"no_rope_layers": [1, 0, 1], "pad_token_id": 0}),
    "OLMo 2": Family("Olmo2", "norm of q and k"),
    "OLMo 3": Family("Olmo3", "windows in some layers", WINDOWS),
    "Granite": Family(
        "Granite", "scale of its own, logits divided", {"logits_scaling": 4.0, "attention_multiplier": 0.3}
    ),
    "Cohere 2": Family(
        "Cohere2",
        "windows in some layers, layers without RoPE, logits multiplied",
        {"sliding_window": 7, "layer_types": MIXED},
    ),
    "Exaone 4": Family(
        "Exaone4",
        "windows in some layers, layers without RoPE",
        {"sliding_window": 7, "layer_types": MIXED},
    ),
    "GLM-4": Family("Glm4", "half of each head rotated", {"head_dim": 8, "pad_token_id": 0}),
    "DeepSeek-V3": Family("DeepseekV3", "MLA: values narrower than keys; experts", {**MLA, **GROUPED}),
    "Llama 4": Family(
        "Llama4",
        "chunks in some layers, the others without RoPE and with queries scaled by position; experts",
        {
            **{"config": "Llama4TextConfig", "head_dim": 8, "intermediate_size_mlp": 40, "attention_chunk_size": 8},
            **{"layer_types": [CHUNKED, FULL, CHUNKED], "no_rope_layers": [1, 0, 1], "floor_scale": 4},
            **{"attn_scale": 0.5, "num_local_experts": 4, "num_experts_per_tok": 1, "moe_layers": [1]},
        },
    ),
    "Ministral 3": Family(
        "Ministral3",
        "queries scaled by position",
        {
            "head_dim": 8,
            **rope("yarn", factor=4.0, original_max_position_embeddings=8, llama_4_scaling_beta=0.5),
            **{"max_position_embeddings": 64},
        },
    ),
    "StarCoder 2": Family(
        "Starcoder2", "window", {"sliding_window": 7, "residual_dropout": 0.0, "embedding_dropout": 0.0}
    ),
    "Nemotron": Family("Nemotron", "the plan goes with the positions"),
    "StableLM": Family("StableLm", "the plan goes with the positions"),
    "GPT-2": Family(
        "GPT2",
        "learned positions, no groups of heads",
        {"n_embd": 48, "n_head": 6, "n_layer": 2, "n_positions": 64, **NO_DROPOUT},
        suffix="LMHeadModel",
        fp64=True,
    ),
    "Seed-OSS": Family("SeedOss", "", {"head_dim": 8, "residual_dropout": 0.0}),
    "Arcee": Family("Arcee"),
    "BERT as a decoder": Family(
        "Bert",
        "learned positions",
        {"is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        suffix="LMHeadModel",
    ),
    "Cohere": Family("Cohere", "logits multiplied", {"pad_token_id": 0}),
    "DeepSeek-V2": Family("DeepseekV2", "MLA; RoPE as complex numbers; experts", {**MLA, **GROUPED}),
    "Ernie 4.5": Family("Ernie4_5", "", {"head_dim": 8, "pad_token_id": 0}),
    "Ernie 4.5 MoE": Family("Ernie4_5_Moe", "experts", {"moe_num_experts": 4, "moe_k": 2, "pad_token_id": 0}),
    "Gemma": Family("Gemma", "", {"head_dim": 8}),
    "Gemma 3n": Family(
        "Gemma3n",
        "windows in some layers, AltUp, embeddings for each layer",
        {
            **{"config": "Gemma3nTextConfig", "head_dim": 8, "sliding_window": 7, "layer_types": MIXED},
            **{"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 97, "num_kv_shared_layers": 0},
            **{"laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0, 0.0], "altup_num_inputs": 2},
        },
    ),
    "Gemma 4": Family(
        "Gemma4",
        "windows in some layers, wider heads in the others",
        {
            **{"config": "Gemma4TextConfig", "head_dim": 8, "global_head_dim": 16, "sliding_window": 7},
            **{"layer_types": [SLIDING, SLIDING, FULL], "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0},
        },
    ),
    "GLM-4.5": Family("Glm4Moe", "experts", {"head_dim": 8, "pad_token_id": 0, **GROUPED}),
    "GPT-NeoX": Family("GPTNeoX", "part of each head rotated, biases", {"num_key_value_heads": 6}),
    "GPT-BigCode": Family(
        "GPTBigCode",
        "one key head for all, learned positions",
        {"n_embd": 48, "n_head": 6, "n_layer": 2, "n_positions": 64, **NO_DROPOUT},
    ),
    "Granite MoE": Family("GraniteMoe", "scale of its own; experts", {**EXPERTS, "attention_multiplier": 0.3}),
    "Helium": Family("Helium", "", {"head_dim": 8, "pad_token_id": 0}),
    "Hunyuan": Family("HunYuanDenseV1", "norm of q and k", {"head_dim": 8, "pad_token_id": 0}),
    "LongCat-Flash": Family(
        "LongcatFlash",
        "MLA, two attentions in each layer, experts that do nothing",
        {
            **MLA,
            **{"num_hidden_layers": 4, "num_layers": 2, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16},
            **{"moe_topk": 2, "zero_expert_num": 2, "n_routed_experts": 4},
        },
    ),
    "MiMo-V2-Flash": Family(
        "MiMoV2Flash",
        "values narrower than keys, sinks and windows in some layers, experts",
        {"head_dim": 8, "v_head_dim": 6, **WINDOWS, **GROUPED, "pad_token_id": 0},
    ),
    "MiniCPM 3": Family("MiniCPM3", "MLA", MLA),
    "MiniMax-M2": Family("MiniMaxM2", "norm of q and k; experts", {"head_dim": 8, **EXPERTS}),
    "Ministral": Family("Ministral", "windows in some layers", {"head_dim": 8, **WINDOWS}),
    "OLMo": Family("Olmo", "", {"pad_token_id": 0}),
    "OLMoE": Family("Olmoe", "norm of q and k; experts", {"num_experts": 4, "num_experts_per_tok": 2}),
    "OPT": Family(
        "OPT",
        "learned positions that start at 2",
        {"ffn_dim": 72, "word_embed_proj_dim": 48, "dropout": 0.0, "pad_token_id": 0},
    ),
    "Persimmon": Family(
        "Persimmon", "norm of q and k; the plan goes with the positions", {"pad_token_id": 0}, fp64=True
    ),
    "Phi": Family("Phi", "half of each head rotated, biases", {"pad_token_id": 0}),
    "Phi-3.5-MoE": Family("Phimoe", "experts", {**EXPERTS, "router_jitter_noise": 0.0, "pad_token_id": 0}),
    "Qwen2-MoE": Family("Qwen2Moe", "experts, one of them shared", {**ROUTED, "shared_expert_intermediate_size": 24}),
    "VaultGemma": Family("VaultGemma", "windows in some layers, softcap", SOFT),
}


@dataclass(frozen=True)
class Refused:
    """What is refused by name: an example of it as a tiny model, and what the error says.

    Attributes:
        why: the reason, for the page.
        name, changes, suffix: of the example, as in `Family`.
        says: texts of the error.
    """

    why: str
    name: str
    changes: dict[str, Any]
    says: tuple[str, ...]
    suffix: str = "ForCausalLM"


LOCAL = "the layers would see a rank's tokens only"
DIRECTIONS = "they attend in both directions"
INTERFACE = "they do not attend through transformers' AttentionInterface, once in every layer"
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
REFUSED = {
    "BERT and other encoders": Refused(DIRECTIONS, "Bert", STILL, ("in both directions",), "ForMaskedLM"),
    "BART and other decoders with cross-attention": Refused(
        DIRECTIONS,
        "Bart",
        {"d_model": 48, "decoder_layers": 2, "decoder_attention_heads": 6, "decoder_ffn_dim": 72, "dropout": 0.0},
        ("in both directions", "BartAttention"),
    ),
    "T5 and other encoder-decoders": Refused(
        "they are no decoders for text",
        "T5",
        {"num_layers": 2, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2},
        ("encoder-decoder",),
        "ForConditionalGeneration",
    ),
    "Jamba, Qwen3-Next and others with recurrent, linear or convolution layers": Refused(
        LOCAL, "Qwen3Next", {"head_dim": 8, **ROUTED}, ("layers other than plain attention", "linear_attention")
    ),
    "DeepSeek-V3.2, GLM-5 and others with layers that pick their keys": Refused(
        LOCAL,
        "DeepseekV32",
        {**MLA, **GROUPED, "index_topk": 8, "index_n_heads": 2, "index_head_dim": 8},
        ("layers other than plain attention", "indexed_attention"),
    ),
    "Bloom, MPT, Mamba, RWKV and others without position_ids": Refused(
        "they would count each rank's tokens from 0",
        "Bloom",
        {"n_head": 6, "n_layer": 2, "hidden_dropout": 0.0},
        ("takes no position_ids",),
    ),
    "RoBERTa, CamemBERT, XLM-R, Data2Vec": Refused(
        "they count positions from the id of their padding token on",
        "Roberta",
        {"is_decoder": True, "pad_token_id": 1, **STILL},
        ("not from 0", "RobertaEmbeddings"),
    ),
    "Falcon, XGLM and others with attention of their own (until transformers 5.23 GPT-J and CodeGen too)": Refused(
        INTERFACE,
        "Falcon",
        {"num_kv_heads": 3, "new_decoder_architecture": True},
        ("attention interface", "attention_calls=0"),
    ),
    "DiffLlama": Refused(
        INTERFACE,
        "DiffLlama",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0},
        ("attention interface", "attention_calls=6"),
    ),
    "Doge": Refused("it adds a mask of its own to the causal one", "Doge", {}, ("mask of its own",)),
    "Phi-3.5-MoE, Moshi and others with a window in their mask only": Refused(
        "the window does not reach attention",
        "Phimoe",
        {**EXPERTS, "router_jitter_noise": 0.0, "sliding_window": 7},
        ("no layer hands one to attention", "sliding_window=7"),
    ),
    "any model with dropout or router jitter above 0": Refused(
        "each rank would draw its own",
        "Llama",
        {"attention_dropout": 0.1},
        ("dropout above 0", "attention_dropout=0.1"),
    ),
    "any model with output_router_logits": Refused(
        "the balance loss of experts is no sum over tokens",
        "Mixtral",
        {**EXPERTS, "output_router_logits": True},
        ("no sum over tokens",),
    ),
    "any model with attention_chunk_size or attn_temperature_tuning but Llama 4": Refused(
        "not known what it does with them",
        "Llama",
        {"attn_temperature_tuning": True},
        ("attn_temperature_tuning", "place in the shard"),
    ),
    "heads other than language modelling": Refused(
        "their labels are not shifted", "Llama", {}, ("only language models",), "ForTokenClassification"
    ),
}
"""What is refused by name, and why, with an example of each. test_transformers_models.py holds more refusals."""
