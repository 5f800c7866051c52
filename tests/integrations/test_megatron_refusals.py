"""What a ring under Megatron cannot do exactly is refused by name: in a call, and where it can be known, before."""

from __future__ import annotations

import pytest
from mcore_workers import in_worker

from seqpar_ring.testing import RankPool

pytestmark = pytest.mark.timeout(400)

REFUSED = {
    "dropout": ("UnsupportedError", "attention dropout", "attention_dropout=0.1"),
    "dropout of the layer": ("UnsupportedError", "attention dropout", "attention_dropout=0.2"),
    "fp8 dot product": ("UnsupportedError", "FP8", "fp8_dot_product_attention=True"),
    "fp8 attention": ("UnsupportedError", "FP8", "fp8_multi_head_attention=True"),
    "qk clip": ("UnsupportedError", "qk_clip=True"),
    "graphs": ("UnsupportedError", "CUDA graph", "cuda_graph_impl='local'"),
    "sinks": ("UnsupportedError", "softmax_type='mystery'"),
    "mask type": ("UnsupportedError", "arbitrary attention masks", "attn_mask_type='arbitrary'"),
    "cross": ("UnsupportedError", "cross-attention", "attention_type='cross'"),
    "comm type": ("ConfigError", "cp_comm_type='seqpar_rong'", 'Did you mean "seqpar_ring"?'),
    "variant": ("ConfigError", "cp_comm_type='seqpar_ring:triple'"),
    "a2a": ("ConfigError", "cp_comm_type='a2a+p2p'", '"seqpar_ring:double"'),
    "double without nodes": ("ConfigError", "hierarchical_context_parallel_sizes", "context_parallel_size=2"),
    "setting": ("ConfigError", "blok_tokens", 'Did you mean "block_tokens"?'),
    "setting of Megatron's": ("ConfigError", "layout='striped'", "block_tokens"),
    "kernel": ("ConfigError", "unknown kernel", "kernel='flash9'"),
    "spec": ("ConfigError", "no core_attention", "spec="),
    "other attention": ("UnsupportedError", "not plain dot-product attention", "core_attention='Sparse'"),
    "bias": ("UnsupportedError", "attention bias", "attention_bias=(1, 4, 24, 48)"),
    "arbitrary mask": ("UnsupportedError", "arbitrary attention masks", "attn_mask_type='causal'"),
    "mask's shape": ("BatchError", "attention_mask=(1, 1, 48, 48)", "expected=(24, 48)"),
    "padding mask": ("UnsupportedError", "padding mask", "attn_mask_type='padding'"),
    "mask of packed": ("UnsupportedError", "attention_mask beside cu_seqlens"),
    "more arguments": ("UnsupportedError", "arguments=['qr']", "megatron_core="),
    "cache": ("UnsupportedError", "keys from a cache", "queries=24, keys=30"),
    "odd": ("PlanError", "2 x cp equal chunks", "length=46"),
    "unpadded": ("PlanError", "2 x cp equal chunks", "length=23", "multiple of 4"),
    "no room": ("PlanError", "no room", "cu_seqlens_q_padded=[0, 20, 48]"),
    "too few": ("PlanError", "do not fill", "tokens_of_all_ranks=48, cu_seqlens_end=40"),
    "descending": ("PlanError", "does not ascend", "cu_seqlens_q=[0, 30, 24]"),
    "other keys": ("UnsupportedError", "keys of other lengths", "cu_seqlens_kv=[0, 12, 48]"),
    "no group": ("GroupError", "local_cp_size=2"),
    "lengths without a format": ("UnsupportedError", "lengths of several documents", "qkv_format=None, documents=2"),
    "lengths of a batch": ("UnsupportedError", "lengths of several documents", "qkv_format='sbhd', documents=2"),
    "config without the group": ("GroupError", "context_parallel_size=1, ranks=2", "Set context_parallel_size=2"),
    "config with another group": ("GroupError", "context_parallel_size=4, ranks=2"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_exact_is_refused_by_name(pool2: RankPool, what: str) -> None:
    for message in pool2.run_groups(in_worker("mcore_attention", "refused"), what):
        assert all(text in message for text in REFUSED[what]), message


BIASED = {
    "T5's encoder": ("attention bias", "model='T5Model'", "module='encoder'", 'position_embedding_type="rope"'),
    "T5's decoder": ("attention bias", "model='T5Model'", "module='decoder'"),
    "late positions": ("attention bias", "model='Late'", "module='relative'"),
    "relative config": ("attention bias", "position_embedding_type='relative'"),
    "alibi config": ("attention bias", "position_embedding_type='alibi'"),
    "a spec's bias": ("attention bias", "attention_bias_type='alibi'", "core_attention='DotProductAttention'"),
    "a partial's bias": ("attention bias", "alibi_slopes=0.5"),
    "a spec's dropout": ("with parameters", "attention_dropout=0.1"),
}


@pytest.mark.parametrize("way", BIASED)
def test_an_attention_bias_is_refused_when_a_spec_layer_or_model_brings_it(pool2: RankPool, way: str) -> None:
    for message in pool2.run_groups(in_worker("mcore_bias", "outcome"), way):
        assert message.startswith("UnsupportedError: ")
        assert all(text in message for text in BIASED[way]), message


@pytest.mark.parametrize(
    "way", ["T5 with rotary positions", "T5 with learned positions", "rotary config", "an empty spec"]
)
def test_what_brings_no_bias_is_built(pool2: RankPool, way: str) -> None:
    assert pool2.run_groups(in_worker("mcore_bias", "outcome"), way) == ["built"] * 2
