"""Megatron's Transformer Engine specs take a ring: nothing else in them changes, and they train as one rank does.

Transformer Engine is a stand-in on plain torch here (`mcore_te`): its kernels need a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
from mcore_workers import in_worker

from seqpar_ring.testing import RankPool

pytestmark = pytest.mark.timeout(400)

LOSS, GRADIENT = 1e-6, 1e-5
CASES = "mcore_te_cases"
PADDED = {"lengths": (21, 0, 5, 1, 31), "padded": (24, 8, 8, 8, 32)}
HOW_MANY = {
    "gpt": 1,
    "qk norm": 1,
    "latent": 1,
    "experts": 1,
    "block": 2,
    "next tokens": 1,
    "bert": 1,
    "t5 encoder": 1,
    "vision": 1,
}


@pytest.mark.parametrize("spec", HOW_MANY)
def test_a_ring_replaces_transformer_engines_attention_and_nothing_else(pool2: RankPool, spec: str) -> None:
    count = HOW_MANY[spec]
    for before, after, left in pool2.run_groups(in_worker(CASES, "replaced"), spec):
        assert before == ["TEDotProductAttention"] * count
        assert after == ["RingCoreAttention"] * count
        assert left == 0


def test_layers_build_it_with_transformer_engines_keywords(pool2: RankPool) -> None:
    shared = {"attention_type": "self", "cp_comm_type": "seqpar_ring:all_gather", "group": True}
    for plain in pool2.run_groups(in_worker(CASES, "keywords"), False):
        own = {"softmax_scale": 0.5, "kinds": ("causal", "TransformerConfig")}
        assert plain == [{**shared, **own, "layer_number": i} for i in (1, 2)]
    for latent in pool2.run_groups(in_worker(CASES, "keywords"), True):
        own = {"k_channels": 16, "v_channels": 12, "kinds": ("causal", "MLATransformerConfig")}
        kept = [found for found in latent if "k_channels" in found]  # Megatron builds one as for plain heads before
        for i, found in enumerate(kept, 1):
            assert found.pop("softmax_scale") == pytest.approx(16**-0.5)
            assert found == {**shared, **own, "layer_number": i}
        assert len(kept) == 2


MODELS: dict[str, dict[str, Any]] = {
    "sbhd": {},
    "padded thd": PADDED,
    "qk norm": {"options": (("qk_layernorm", True),)},
    "layer norm": {"options": (("normalization", "LayerNorm"), ("add_bias_linear", True))},
    "latent, padded thd": {"mla": True, **PADDED},
    "full recompute": {"recompute": "full", "micro_batches": 3},
    "experts in one layer": {"spec": "transformer engine block"},
}


@pytest.mark.parametrize("model", MODELS)
def test_transformer_engines_layers_train_over_a_ring_as_on_one_rank(pool2: RankPool, model: str) -> None:
    case = {"spec": "transformer engine", "cp": 2, **MODELS[model]}
    for loss, gradient, name, rings, _ in pool2.run_groups(in_worker(CASES, "trains", **case)):
        assert loss <= LOSS
        assert gradient <= GRADIENT, name
        assert rings == 2 * case.get("micro_batches", 1)


@pytest.mark.parametrize("fault", ["leak", "lost", "rope"])
def test_what_goes_wrong_beneath_transformer_engines_layers_would_be_seen(pool2: RankPool, fault: str) -> None:
    for _, gradient, _, _, _ in pool2.run_groups(
        in_worker(CASES, "trains", spec="transformer engine", cp=2, fault=fault)
    ):
        assert gradient > 1e-2


FP8 = {"fp8": "hybrid", "fp8_recipe": "delayed"}


@pytest.mark.parametrize("name", ["fp8_dot_product_attention", "fp8_multi_head_attention"])
def test_attention_in_fp8_is_refused_when_the_layer_is_built(pool2: RankPool, name: str) -> None:
    for message in pool2.run_groups(in_worker(CASES, "refused"), {**FP8, name: True}):
        assert message.startswith("UnsupportedError: attention in FP8 is not supported")
        assert f"{name}=True" in message


def test_linear_layers_in_fp8_are_left_to_transformer_engine(pool2: RankPool) -> None:
    assert pool2.run_groups(in_worker(CASES, "refused"), FP8) == ["built"] * 2
