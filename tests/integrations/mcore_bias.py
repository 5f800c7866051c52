"""Attention bias under Megatron: every way in which a config, a spec or a model can bring one to a ring."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from mcore_models import Case, Dense, config_of, model_of, parallel, spec_of
from megatron.core.models.common.embeddings.relative_pos_embedding import RelativePositionEmbedding
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.models.T5.t5_spec import decoder_model_with_local_spec, encoder_model_with_local_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from seqpar_ring.integrations.megatron import RingCoreAttention, with_ring

from seqpar_ring.errors import SeqparError
from seqpar_ring.groups import Groups


def t5(positions: str, side: str) -> Any:
    """A T5Model in which one side attends over a ring; cross-attention, and the other side, are plain."""
    parallel(1, 2)
    encoder, decoder = encoder_model_with_local_spec(), decoder_model_with_local_spec()
    encoder.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.no_mask
    decoder.submodules.cross_attention.submodules.core_attention = Dense
    ringed = {"encoder": encoder, "decoder": decoder}[side]
    ringed.submodules.self_attention.submodules.core_attention = RingCoreAttention
    case = Case(options=(("num_query_groups", 4),))  # Megatron shares none between heads of cross-attention
    blocks = [
        TransformerBlockSubmodules([spec] * 2, layer_norm=spec.submodules.input_layernorm)
        for spec in (encoder, decoder)
    ]
    return T5Model(
        config=config_of(case, 2),
        encoder_config=config_of(case, 2),
        transformer_encoder_layer_spec=with_ring(blocks[0]) if side == "encoder" else blocks[0],
        transformer_decoder_layer_spec=blocks[1],
        vocab_size=96,
        max_sequence_length=128,
        position_embedding_type=positions,
        add_encoder=side == "encoder",
        add_decoder=side == "decoder",
    )


class Late(torch.nn.Module):
    """A model that makes its relative positions when its layers are there."""

    def __init__(self) -> None:
        super().__init__()
        self.model = model_of(Case(), config_of(Case(), 2))
        self.relative = RelativePositionEmbedding(True, torch.nn.init.zeros_, 4)


def described(positions: str) -> object:
    """A model whose config tells of its positions, as those of frameworks around Megatron do."""
    parallel(1, 2)
    config = config_of(Case(), 2)
    config.position_embedding_type = positions
    return model_of(Case(), config)


def with_parameters(how: Callable[..., Any], **parameters: Any) -> object:
    spec = spec_of(Case())
    inner = spec.submodules.self_attention.submodules
    inner.core_attention = how(inner.core_attention, **parameters)
    return with_ring(spec)


def spec_with(module: Any, **parameters: Any) -> Any:
    return ModuleSpec(module=module, params=parameters)


def late() -> object:
    parallel(1, 2)
    return Late()


WAYS: dict[str, Callable[[], object]] = {
    "T5's encoder": lambda: t5("relative", "encoder"),
    "T5's decoder": lambda: t5("relative", "decoder"),
    "late positions": late,
    "relative config": lambda: described("relative"),
    "alibi config": lambda: described("alibi"),
    "a spec's bias": lambda: with_parameters(spec_with, attention_bias_type="alibi"),
    "a partial's bias": lambda: with_parameters(functools.partial, alibi_slopes=0.5),
    "a spec's dropout": lambda: with_parameters(spec_with, attention_dropout=0.1),
    # These bring none.
    "T5 with rotary positions": lambda: t5("rope", "encoder"),
    "T5 with learned positions": lambda: t5("learned_absolute", "decoder"),
    "rotary config": lambda: described("rope"),
    "an empty spec": lambda: with_parameters(spec_with),
}


def outcome(_: Groups, way: str) -> str:
    """The message of the error, with its class, or "built"."""
    try:
        WAYS[way]()
    except SeqparError as error:
        return f"{type(error).__name__}: {error}"
    return "built"
