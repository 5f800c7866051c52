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
        "Gemma2", "windows in some layers, softcap of scores and logits", {"head_dim": 8, "sliding_window": 7}
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
    "DeepSeek-V3": Family(
        "DeepseekV3",
        "MLA: values narrower than keys; experts",
        {
            **{"q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6},
            **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
            **{"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "num_key_value_heads": 6, "head_dim": 4},
        },
    ),
    "Llama 4": Family(
        "Llama4",
        "chunks in some layers, the others without RoPE and with queries scaled by position; experts",
        {
            **{"config": "Llama4TextConfig", "head_dim": 8, "intermediate_size_mlp": 40, "attention_chunk_size": 8},
            **{"layer_types": [CHUNKED, FULL, CHUNKED], "no_rope_layers": [1, 0, 1], "floor_scale": 4},
            **{"attn_scale": 0.5, "num_local_experts": 4, "num_experts_per_tok": 1, "moe_layers": [1]},
        },
    ),
    "Ministral 3": Family("Ministral3", "queries scaled by position", {"head_dim": 8}),
    "StarCoder 2": Family(
        "Starcoder2", "window", {"sliding_window": 7, "residual_dropout": 0.0, "embedding_dropout": 0.0}
    ),
    "Nemotron": Family("Nemotron", "the plan goes with the positions"),
    "StableLM": Family("StableLm", "the plan goes with the positions"),
    "GPT-2": Family(
        "GPT2",
        "learned positions, no groups of heads",
        {
            **{"n_embd": 48, "n_head": 6, "n_layer": 2, "n_positions": 64},
            **{"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
        },
        suffix="LMHeadModel",
        fp64=True,
    ),
    "Seed-OSS": Family("SeedOss", "", {"head_dim": 8, "residual_dropout": 0.0}),
}

REFUSED = {
    "BERT and other encoders": "they attend in both directions",
    "T5 and other encoder-decoders": "they are no decoders for text",
    "Jamba and others with recurrent, linear or convolution layers": "such layers would see a rank's tokens only",
    "Falcon, Bloom, MPT and others without transformers' attention interface": "nothing there can be replaced",
    "Doge": "it adds a mask of its own to the causal one",
    "any model with dropout or router jitter above 0": "each rank would draw its own",
    "any model with output_router_logits": "the balance loss of experts is no sum over tokens",
    "any model with attention_chunk_size or attn_temperature_tuning but Llama 4": "not known what it does with them",
    "PEFT's prompt learning": "it adds tokens or keys that are in no batch",
}
"""What is refused by name, and why; tests of the refusals stand in test_transformers_models.py and test_trainer.py."""
