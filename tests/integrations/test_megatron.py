"""Megatron-core over a ring trains as one rank: loss and every gradient, through its own DDP; wrong things fail."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from mcore_workers import in_worker

from seqpar_ring.testing import RankPool

pytestmark = pytest.mark.timeout(400)
"""Each pool imports megatron-core once, which takes most of a minute on a busy machine."""

LOSS, GRADIENT = 1e-6, 1e-5
PACKED = {"lengths": (24, 8, 32)}
PADDED = {"lengths": (21, 0, 5, 1, 31), "padded": (24, 8, 8, 8, 32)}


@pytest.fixture(scope="module")
def alone() -> Iterator[Callable[..., Any]]:
    """What a function of the cases gives on one rank, in a process of its own; computed once for all that share it."""
    with RankPool(1, timeout=280) as pool:
        known: dict[str, Any] = {}

        def reference(module: str, name: str, *args: Any, **case: Any) -> Any:
            key = repr((module, name, args, sorted(case.items())))
            if key not in known:
                known[key] = pool.run_groups(in_worker(module, name, **{"cp": 1, **case}), *args)[0]
            return known[key]

        yield reference


@pytest.fixture
def step(alone: Callable[..., Any]) -> Callable[..., list[Any]]:
    """A step over a ring, compared with one rank; see `mcore_cases.Compared`."""

    def compared(pool: RankPool, **case: Any) -> list[Any]:
        own = ("cp", "tp", "recompute", "remat", "settings", "fault")
        shared = {key: value for key, value in case.items() if key not in own}
        reference = alone("mcore_cases", "alone", **shared)
        results: list[Any] = pool.run_groups(in_worker("mcore_cases", "compare", **case), reference)
        assert "mcore_shim" not in sys.modules, "it would change torch for all tests that follow"
        return results

    return compared


@pytest.fixture
def assert_trains_alike(step: Callable[..., list[Any]]) -> Callable[..., None]:
    """Every rank's loss and gradients are those of one rank, and the ring ran as often as it should."""

    def trains_alike(pool: RankPool, rings: int = 2, **case: Any) -> None:
        for loss, gradient, name, found, _ in step(pool, **case):
            assert loss <= LOSS
            assert gradient <= GRADIENT, name
            assert found == rings, "forward passes of the ring: layers times micro-batches"

    return trains_alike


Alike = Callable[..., None]


@pytest.mark.parametrize("rope", [True, False], ids=["rope", "no rope"])
@pytest.mark.parametrize("batch", [{}, PACKED, PADDED], ids=["sbhd", "thd", "padded thd"])
def test_two_ranks_train_as_one(assert_trains_alike: Alike, pool2: RankPool, batch: dict[str, Any], rope: bool) -> None:
    assert_trains_alike(pool2, cp=2, rope=rope, **batch)


@pytest.mark.parametrize("rope", [True, False], ids=["rope", "no rope"])
@pytest.mark.parametrize("batch", [{}, PACKED, PADDED], ids=["sbhd", "thd", "padded thd"])
def test_four_ranks_train_as_one(
    assert_trains_alike: Alike, pool4: RankPool, batch: dict[str, Any], rope: bool
) -> None:
    assert_trains_alike(pool4, cp=4, rope=rope, **batch)


@pytest.mark.parametrize("batch", [{}, PACKED, PADDED], ids=["sbhd", "thd", "padded thd"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_latent_attention_with_values_of_another_width_trains_as_one(
    assert_trains_alike: Alike, pool2: RankPool, pool4: RankPool, batch: dict[str, Any], ranks: int
) -> None:
    assert_trains_alike(pool2 if ranks == 2 else pool4, cp=ranks, mla=True, **batch)


OPTIONS = {
    "window": (("window_size", (7, 0)),),
    "window in some layers": (("window_size", (7, 0)), ("window_attn_skip_freq", 2)),
    "zero sinks": (("softmax_type", "off-by-one"),),
    "learnable sinks": (("softmax_type", "learnable"),),
    "soft cap": (("attn_logit_softcapping", 2.0),),
    "scale": (("softmax_scale", 0.5),),
    "one group of heads": (("num_query_groups", 1),),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_a_config_asks_of_attention_is_done(assert_trains_alike: Alike, pool2: RankPool, name: str) -> None:
    assert_trains_alike(pool2, cp=2, options=OPTIONS[name], **PADDED)


@pytest.mark.parametrize("batch", [{}, PADDED], ids=["sbhd", "padded thd"])
@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("mla", [False, True], ids=["gqa", "mla"])
def test_recompute_runs_no_second_ring(
    assert_trains_alike: Alike, pool2: RankPool, recompute: str, batch: dict[str, Any], mla: bool
) -> None:
    """Three micro-batches in flight, as in a pipeline: each layer gets its own results back."""
    assert_trains_alike(pool2, rings=6, cp=2, recompute=recompute, micro_batches=3, mla=mla, **batch)


def test_recompute_that_keeps_nothing_runs_the_ring_again(assert_trains_alike: Alike, pool2: RankPool) -> None:
    assert_trains_alike(pool2, rings=4, cp=2, recompute="full", remat="none")


@pytest.mark.parametrize("batch", [{}, PADDED], ids=["sbhd", "padded thd"])
def test_tensor_and_context_parallelism_together_train_as_one(
    assert_trains_alike: Alike, pool4: RankPool, batch: dict[str, Any]
) -> None:
    assert_trains_alike(pool4, cp=2, tp=2, **batch)


def test_tensor_and_context_parallelism_with_sinks_and_recompute(assert_trains_alike: Alike, pool4: RankPool) -> None:
    options = (("softmax_type", "off-by-one"),)
    assert_trains_alike(pool4, cp=2, tp=2, recompute="full", options=options, **PADDED)


@pytest.mark.parametrize("batch", [{}, PACKED], ids=["sbhd", "thd"])
@pytest.mark.parametrize("fault", ["contiguous", "rope", "leak", "lost"])
def test_a_wrong_layout_rotary_rank_mask_or_backward_would_be_seen(
    step: Callable[..., list[Any]], pool2: RankPool, fault: str, batch: dict[str, Any]
) -> None:
    for _, gradient, _, _, _ in step(pool2, cp=2, fault=fault, **batch):
        assert gradient > 1e-2


def test_the_default_average_of_means_is_another_number(step: Callable[..., list[Any]], pool2: RankPool) -> None:
    for *_, (mean_of_means, truth) in step(pool2, cp=2):
        assert abs(mean_of_means - truth) > 1e-3 * truth


@pytest.mark.parametrize("per_token", [True, False])
def test_the_default_average_of_means_is_warned_of(pool2: RankPool, per_token: bool) -> None:
    first, second = pool2.run_groups(in_worker("mcore_attention", "warned"), per_token)
    assert len(first) == (0 if per_token else 1)
    assert second == []


ENGINES = {
    "overlap": {"overlap": True},
    "distributed optimizer": {"distributed": True},
    "both": {"distributed": True, "overlap": True},
    "pipeline": {"pp": 2},
}


def furthest(found: list[tuple[list[float], int]], truth: list[float]) -> float:
    """The largest relative difference of a loss, over ranks and steps."""
    return max(abs(a - b) / abs(b) for losses, _ in found for a, b in zip(losses, truth, strict=True))


@pytest.mark.parametrize("batch", [{}, PADDED], ids=["sbhd", "padded thd"])
@pytest.mark.parametrize("engine", ENGINES)
def test_megatrons_own_loop_learns_as_one_rank_does(
    alone: Callable[..., Any], pool4: RankPool, engine: str, batch: dict[str, Any]
) -> None:
    """Four steps of four micro-batches: Megatron's schedules and Adam, with full recompute."""
    asked = ENGINES[engine]
    stages = asked.get("pp", 1)
    case = in_worker("mcore_training", "train", cp=4 // stages, recompute="full", **batch)
    found = pool4.run_groups(case, asked)
    assert furthest(found, alone("mcore_training", "train", {}, True, **batch)[0]) <= LOSS
    assert {rings for _, rings in found} == {4 * 4 * 2 // stages}, "once a layer and micro-batch"


def test_gradients_that_get_lost_would_be_seen_in_the_losses(alone: Callable[..., Any], pool4: RankPool) -> None:
    found = pool4.run_groups(in_worker("mcore_training", "train", cp=4, fault="lost", **PADDED), {})
    assert furthest(found, alone("mcore_training", "train", {}, True, **PADDED)[0]) > 1e-3


# ---------------------------------------------------------------------------------------------------- attention alone


def test_a_class_a_spec_and_a_partial_function_all_build_it(pool2: RankPool) -> None:
    for found in pool2.run_groups(in_worker("mcore_attention", "forms")):
        assert max(found) <= 2e-6


def test_every_layer_of_a_blocks_spec_gets_it_and_the_spec_stays_as_it_was(pool2: RankPool) -> None:
    for before, ringed, after in pool2.run_groups(in_worker("mcore_attention", "specs")):
        assert before == after == ["DotProductAttention"] * 2
        assert ringed == ["RingCoreAttention"] * 2


def test_learnable_sinks_are_saved_and_nothing_else(pool4: RankPool) -> None:
    saved = in_worker("mcore_attention", "saved")
    assert pool4.run_groups(saved, "learnable") == [{"at.softmax_offset": (4,)}] * 4
    assert pool4.run_groups(saved, "off-by-one") == pool4.run_groups(saved, "vanilla") == [{}] * 4


def test_comm_types_choose_the_schedule_and_hierarchical_groups_the_nodes(pool4: RankPool) -> None:
    for found in pool4.run_groups(in_worker("mcore_attention", "comm_types")):
        *flat, hierarchical, double, plain = found
        schedules = ["ring", "ring", "all_gather", "ring", "all_gather", "direct"]
        assert [(schedule, node) for schedule, node, _ in flat] == [(name, None) for name in schedules]
        assert hierarchical[:2] == double[:2] == ("double_ring", 2)
        assert plain[:2] == ("ring", 2)
        assert max(away for _, _, away in found) <= 2e-6


def test_comm_types_reach_every_layer_of_a_model_through_its_config(pool4: RankPool) -> None:
    """With nodes of two ranks in the settings, which mean a double ring unless a string says another schedule."""
    asked = {
        None: "double_ring",
        "seqpar_ring": "double_ring",
        "seqpar_ring:ring": "ring",
        "seqpar_ring:double": "double_ring",
        "seqpar_ring:all_gather": "all_gather",
        "seqpar_ring:direct": "direct",
    }
    for found in pool4.run_groups(in_worker("mcore_layers", "strings"), list(asked)):
        assert found == [[(name, schedule, 2)] * 2 for name, schedule in asked.items()]


def test_a_list_of_comm_types_has_one_for_each_layer(pool2: RankPool) -> None:
    names = ["seqpar_ring:direct", "seqpar_ring:all_gather"]
    for version, message, found in pool2.run_groups(in_worker("mcore_layers", "lists"), names):
        assert message.startswith("list index out of range") == (version < (0, 17))
        assert found == [(names[0], "direct", None), (names[1], "all_gather", None)]


SETTINGS_BY_LAYER = (
    (("schedule", "all_gather"),),
    (("schedule", "direct"), ("block_tokens", 5)),
)


@pytest.mark.parametrize("batch", [{}, PADDED], ids=["sbhd", "padded thd"])
def test_layers_of_a_block_may_have_settings_of_their_own(
    assert_trains_alike: Alike, pool2: RankPool, batch: dict[str, Any]
) -> None:
    case = {"cp": 2, "spec": "block", "settings": SETTINGS_BY_LAYER, **batch}
    assert_trains_alike(pool2, **case)
    for found in pool2.run_groups(in_worker("mcore_layers", "own", **case)):
        assert found == [(None, "all_gather", None), (None, "direct", None)]


def test_every_micro_batch_may_bring_a_group_of_its_own(pool4: RankPool) -> None:
    for found in pool4.run_groups(in_worker("mcore_attention", "groups_of_micro_batches")):
        assert max(found) <= 2e-6


def test_padding_is_zero_and_gets_no_gradient_whatever_comes_back(pool2: RankPool) -> None:
    for outputs, gradients, away in pool2.run_groups(in_worker("mcore_attention", "padding")):
        assert (outputs, gradients) == (0.0, 0.0)
        assert away <= 2e-6


def test_a_causal_attention_mask_says_nothing_new(pool2: RankPool) -> None:
    for found in pool2.run_groups(in_worker("mcore_attention", "plain_masks")):
        assert max(found) <= 2e-6


def test_without_a_causal_mask_padding_is_seen_by_nobody(pool2: RankPool) -> None:
    for away in pool2.run_groups(in_worker("mcore_attention", "full")):
        assert away <= 1e-6


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
