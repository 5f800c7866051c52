"""Specs of Megatron beside its local one, for `mcore_models.Case.spec`, and what they ask of a config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mcore_models import Case
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

EXPERTS: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_aux_loss_coeff": 0.0,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "experts": EXPERTS,
    "transformer engine block": {
        **EXPERTS,
        "moe_layer_freq": [0, 1],
        "moe_grouped_gemm": True,
        "moe_token_dispatcher_type": "alltoall",
    },
    "next tokens": {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.5},
    "sequence parallel": {"sequence_parallel": True},
}
"""What a TransformerConfig says for such a spec."""


class SharedNorm(torch.nn.RMSNorm):
    """Megatron's norm on plain torch, which refuses sequence parallelism, with the one mark that this needs: each
    tensor-parallel rank has a part of the sequence, so its gradient is summed over them.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def experts(_: Case, config: Any) -> Any:
    return get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=False, normalization="RMSNorm")


def block(_: Case, config: Any) -> Any:
    return get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")


def next_tokens(_: Case, config: Any) -> Any:
    return get_gpt_layer_local_spec(normalization="RMSNorm")


def sequence_parallel(_: Case, config: Any) -> Any:
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = SharedNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * config.num_layers, layer_norm=SharedNorm)


def transformer_engine(case: Case, config: Any) -> Any:
    return get_gpt_layer_with_transformer_engine_spec(multi_latent_attention=case.mla, qk_layernorm=config.qk_layernorm)


def transformer_engine_block(_: Case, config: Any) -> Any:
    return get_gpt_decoder_block_spec(config, use_transformer_engine=True)


SPECS: dict[str, Callable[[Case, Any], Any]] = {
    "block": block,
    "experts": experts,
    "next tokens": next_tokens,
    "sequence parallel": sequence_parallel,
    "transformer engine": transformer_engine,
    "transformer engine block": transformer_engine_block,
}
"""By name: what they build for a case and a config."""
