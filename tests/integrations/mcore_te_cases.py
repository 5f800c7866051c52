"""Megatron's Transformer Engine specs over a ring: what is replaced, how it is built, and a step like one rank's."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any
from unittest import mock

import mcore_te  # noqa: F401 - before mcore_shim, which imports megatron.core
from mcore_cases import trains  # noqa: F401 - for the tests
from mcore_models import Case, config_of, model_of, mpu, parallel
from megatron.core.extensions.transformer_engine import HAVE_TE, TEDotProductAttention
from megatron.core.models.bert.bert_layer_specs import get_bert_layer_with_transformer_engine_spec
from megatron.core.models.gpt import gpt_layer_specs as gpt
from megatron.core.models.T5.t5_spec import encoder_model_with_transformer_engine_default_spec
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_transformer_engine_spec
from seqpar_ring.integrations.megatron import RingCoreAttention, with_ring

from seqpar_ring.errors import SeqparError
from seqpar_ring.groups import Groups


def config(spec: str, **options: Any) -> Any:
    return config_of(Case(spec=spec, options=tuple(options.items())), 2)


def with_next_tokens() -> Any:
    asked = config("transformer engine", mtp_num_layers=1)
    return gpt.get_gpt_mtp_block_spec(asked, gpt.get_gpt_layer_with_transformer_engine_spec(), True)


SPECS: dict[str, Any] = {
    "gpt": gpt.get_gpt_layer_with_transformer_engine_spec,
    "qk norm": lambda: gpt.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True),
    "latent": lambda: gpt.get_gpt_layer_with_transformer_engine_spec(multi_latent_attention=True, qk_layernorm=True),
    "experts": lambda: gpt.get_gpt_layer_with_transformer_engine_spec(num_experts=4, moe_grouped_gemm=True),
    "block": lambda: gpt.get_gpt_decoder_block_spec(config("transformer engine block"), use_transformer_engine=True),
    "next tokens": with_next_tokens,
    "bert": get_bert_layer_with_transformer_engine_spec,
    "t5 encoder": encoder_model_with_transformer_engine_default_spec,
    "vision": get_vit_layer_with_transformer_engine_spec,
}


def leaves(node: Any, path: str = "") -> dict[str, str]:
    """Everything that a spec says, by where it says it."""
    if isinstance(node, functools.partial):
        return leaves({"func": node.func, "args": node.args, **node.keywords}, path)
    if isinstance(node, dict):
        inside = {str(key): value for key, value in node.items()}
    elif isinstance(node, list | tuple):
        inside = {str(i): one for i, one in enumerate(node)}
    elif dataclasses.is_dataclass(node) and not isinstance(node, type):
        inside = {one.name: getattr(node, one.name) for one in dataclasses.fields(node)}
    else:
        return {path: f"{getattr(node, '__qualname__', node)}"}
    found: dict[str, str] = {}
    for key, one in inside.items():
        found.update(leaves(one, f"{path}.{key}"))
    return found


def replaced(_: Groups, name: str) -> tuple[list[str], list[str], int]:
    """Of a spec: what was in the places that `with_ring` changed, what is there now, and how many it left alone."""
    assert HAVE_TE
    parallel(1, 2)
    spec = SPECS[name]()
    before = leaves(spec)
    after = leaves(with_ring(spec))
    assert before == leaves(spec), "the spec that was given is as it was"
    assert before.keys() == after.keys()
    changed = [key for key in before if before[key] != after[key]]
    assert all(key.endswith(".core_attention") for key in changed)
    left = [key for key in after if after[key] == TEDotProductAttention.__qualname__]
    return [before[key] for key in changed], [after[key] for key in changed], len(left)


def keywords(_: Groups, mla: bool) -> list[dict[str, Any]]:
    """With which keywords Megatron builds the attention of each layer."""
    case = Case(
        spec="transformer engine", mla=mla, options=(("cp_comm_type", "seqpar_ring:all_gather"), ("softmax_scale", 0.5))
    )
    if mla:
        case = dataclasses.replace(case, options=case.options[:1])
    parallel(1, 2)
    build, seen = RingCoreAttention.__init__, []

    def noted(self: Any, **given: Any) -> None:
        build(self, **given)
        group = given.pop("pg_collection").cp
        kinds = given.pop("attn_mask_type").name, type(given.pop("config")).__name__
        assert given.pop("settings") == {"remat": "attention"}
        seen.append({**given, "kinds": kinds, "group": group is mpu.get_context_parallel_group()})

    with mock.patch.object(RingCoreAttention, "__init__", noted):
        model = model_of(case, config_of(case, 2))
    cores = [layer.self_attention.core_attention for layer in model.decoder.layers]
    assert [(type(one), one.settings.schedule) for one in cores] == [(RingCoreAttention, "all_gather")] * 2
    return seen


def refused(_: Groups, options: dict[str, Any]) -> str:
    """The message when a model of Transformer Engine's layers is built whose config says this."""
    parallel(1, 2)
    case = Case(spec="transformer engine", options=tuple(options.items()))
    try:
        model_of(case, config_of(case, 2))
    except SeqparError as error:
        return f"{type(error).__name__}: {error}"
    return "built"
