"""A small GPTModel of Megatron, over a ring and alone, and a plain attention to compare with.

`Dense` is the reference: the same keywords, softmax over a written-out mask in float64, no ring, no code of ours.
Worker processes import these functions by name, and only they import megatron-core.
"""

from __future__ import annotations

import importlib
import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import mcore_shim  # noqa: F401 - before megatron.core
import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state as mpu
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from seqpar_ring.integrations.megatron import with_ring
from seqpar_ring.integrations.megatron_specs import exchanged

VOCAB, HEADS, HIDDEN, LAYERS = 96, 4, 32, 2
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 8, "v_head_dim": 12}
"""Multi-latent attention in which values are narrower than keys."""


@dataclass(frozen=True)
class Case:
    """A model, a batch, and how both are spread.

    Attributes:
        lengths: tokens of each packed sequence; empty: two rows of `tokens` tokens.
        padded: with padding; empty: none.
        recompute: "", "selective" (attention), or "full".
        remat: what becomes of attention's results then.
        options: of the TransformerConfig.
        settings: of the ring; of each layer's, where the spec is "block".
        spec: which of `mcore_specs`, or Megatron's local one.
        fault: what is done wrongly on purpose.
    """

    cp: int = 2
    tp: int = 1
    tokens: int = 48
    lengths: tuple[int, ...] = ()
    padded: tuple[int, ...] = ()
    rope: bool = True
    mla: bool = False
    recompute: str = ""
    remat: str = "attention"
    micro_batches: int = 1
    options: tuple[tuple[str, Any], ...] = ()
    settings: tuple[Any, ...] = ()
    spec: str = "local"
    fault: str = ""


class Dense(nn.Module):
    """Attention of one rank over whole sequences, by a written-out mask."""

    def __init__(self, config: Any, layer_number: int, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        skip = config.window_attn_skip_freq
        self.window = config.window_size if not skip or layer_number % skip else None
        self.scale, self.softcap = softmax_scale, getattr(config, "attn_logit_softcapping", None)
        self.softmax_offset = None
        if config.softmax_type == "off-by-one":
            self.softmax_offset = torch.zeros(HEADS)
        elif config.softmax_type == "learnable":
            self.softmax_offset = nn.Parameter(torch.zeros(HEADS))
            config.init_method(self.softmax_offset)

    def forward(self, *qkv: Any, packed_seq_params: Any = None, **_: Any) -> Tensor:
        params = packed_seq_params
        q, k, v = (x if params is None else x.unsqueeze(1) for x in qkv[:3])
        S = q.shape[0]
        hidden = torch.ones(S, S, dtype=torch.bool).triu(1)
        if self.window:
            hidden |= torch.ones(S, S, dtype=torch.bool).tril(-self.window[0] - 1)
        if params is not None:
            place = torch.full((S,), -1)
            row, room = params.cu_seqlens_q.tolist(), params.cu_seqlens_q_padded.tolist()
            for i, start in enumerate(room[:-1]):
                place[start : start + row[i + 1] - row[i]] = i
            hidden |= (place[:, None] != place[None, :]) | (place < 0)
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        scores = torch.einsum("qbhd,kbhd->bhqk", q.double(), k.double()) * (self.scale or 1 / math.sqrt(q.shape[-1]))
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores.masked_fill(hidden, -torch.inf)
        if self.softmax_offset is not None:
            sink = self.softmax_offset.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.masked_fill(hidden.all(-1, keepdim=True), 0.0).softmax(-1)
        weights = weights.masked_fill(hidden, 0.0)
        out = torch.einsum("bhqk,kbhe->qbhe", weights, v.double()).to(q.dtype).flatten(2)
        return out if params is None else out.squeeze(1)  # as Transformer Engine returns packed sequences


MADE: dict[tuple[int, int, int, int | None], dict[str, Any]] = {}
"""What Megatron's `parallel_state` holds, by the sizes that it was made for."""


def parallel(tp: int, cp: int, pp: int = 1, virtual: int | None = None) -> None:
    """Megatron's groups, made once for the same sizes: they are dozens, each with threads of its own, and stay."""
    made, state = MADE.get((tp, cp, pp, virtual)), vars(mpu)
    if made is None:
        state.update(MADE.setdefault((0, 0, 0, None), kept(state)))  # as nothing was made yet
        mpu.initialize_model_parallel(tp, pp, virtual, context_parallel_size=cp, create_gloo_process_groups=False)
        made = MADE[tp, cp, pp, virtual] = kept(state)
    state.update(made)
    model_parallel_cuda_manual_seed(1)


def kept(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name.startswith("_") and name.isupper()}


def config_of(case: Case, cp: int, tp: int = 1) -> Any:
    options: dict[str, Any] = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": 2 * HIDDEN,
        "num_attention_heads": HEADS,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "context_parallel_size": cp,
        "tensor_model_parallel_size": tp,
        "use_cpu_initialization": True,
        "init_method_std": 0.3,  # attention far from uniform
        "calculate_per_token_loss": True,
        "gradient_accumulation_fusion": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
    }
    if case.spec != "local":
        options.update(importlib.import_module("mcore_specs").OPTIONS.get(case.spec, {}))
        options["sequence_parallel"] = options.get("sequence_parallel", False) and tp > 1
    if case.recompute and cp > 1:
        options["recompute_granularity"] = case.recompute
        if case.recompute == "full":
            options.update(recompute_method="uniform", recompute_num_layers=1)
    if case.mla:
        mla = {**LATENT, "rope_type": "rope"}
        return MLATransformerConfig(**{**options, **mla, **dict(case.options)})
    softcap = dict(case.options).get("attn_logit_softcapping")
    known = {key: value for key, value in case.options if key != "attn_logit_softcapping"}
    config = TransformerConfig(**{**options, "num_query_groups": 2, **known})
    if softcap:
        config.attn_logit_softcapping = softcap  # as Megatron-Bridge's configs have it
    return config


def spec_of(case: Case, config: Any = None) -> Any:
    if case.spec != "local":
        return importlib.import_module("mcore_specs").SPECS[case.spec](case, config)
    return get_gpt_layer_local_spec(qk_layernorm=False, multi_latent_attention=case.mla, normalization="RMSNorm")


def ringed(case: Case, spec: Any) -> Any:
    if case.spec != "block":
        return with_ring(spec, remat=case.remat, **dict(case.settings))
    own = zip(spec.layer_specs, case.settings, strict=True)
    return replace(spec, layer_specs=[with_ring(layer, remat=case.remat, **dict(given)) for layer, given in own])


def model_of(case: Case, config: Any, attention: Any = None, **stage: Any) -> Any:
    """The same weights each time; over a ring unless another attention is given. `stage`: of a pipeline."""
    torch.manual_seed(7)
    spec = spec_of(case, config)
    if attention is None:
        spec = ringed(case, spec)
    else:
        spec = exchanged(spec, attention, attention)
    if config.mtp_num_layers:
        stage["mtp_block_spec"] = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
    return GPTModel(
        config,
        spec,
        vocab_size=VOCAB,
        max_sequence_length=128,
        position_embedding_type="rope" if case.rope else "none",
        parallel_output=True,
        share_embeddings_and_output_weights=False,
        **stage,
    )


def batch_of(case: Case, seed: int = 0) -> tuple[dict[str, Tensor], Any]:
    """A whole batch, with a loss mask that is uneven between ranks, and its PackedSeqParams."""
    made = torch.Generator().manual_seed(seed)
    padded = case.padded or case.lengths
    shape = (1, sum(padded)) if padded else (2, case.tokens)
    tokens, labels = (torch.randint(0, VOCAB, shape, generator=made) for _ in range(2))
    mask = (torch.rand(shape, generator=made) > 0.3).float()
    mask[:, :10] = 0
    if case.spec == "next tokens":
        hide_firsts(mask, padded or (case.tokens,))
    positions = torch.arange(shape[1]).expand(shape).contiguous()
    params = None
    if padded:
        positions = torch.cat([torch.arange(n) for n in padded])[None]
        starts = [sum(padded[:i]) for i in range(len(padded))]
        for start, n, m in zip(starts, case.lengths, padded, strict=True):
            mask[:, start + n : start + m] = 0
        cu, room = (
            torch.tensor([0, *torch.tensor(x).cumsum(0).tolist()], dtype=torch.int32) for x in (case.lengths, padded)
        )
        params = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, cu_seqlens_q_padded=room, cu_seqlens_kv_padded=room,
            max_seqlen_q=max(padded), max_seqlen_kv=max(padded),
        )  # fmt: skip
    return {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions}, params


def hide_firsts(mask: Tensor, lengths: tuple[int, ...]) -> None:
    """No loss at the first token of any chunk of two ranks: then a mask that moves by one has as many tokens in each.

    From 0.19 on each rank scales its loss of later tokens by the ratio of these two numbers, its own ones.
    """
    start = 0
    for n in lengths:
        mask[:, start : start + n : n // 4] = 0
        start += n
