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
        own = ("cp", "tp", "recompute", "remat", "settings", "layouts", "rows", "fault")
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


Alike = Callable[..., Any]


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
@pytest.mark.parametrize("pool", ["pool2", "pool4"])
def test_recompute_runs_no_second_ring(
    assert_trains_alike: Alike,
    request: pytest.FixtureRequest,
    pool: str,
    recompute: str,
    batch: dict[str, Any],
    mla: bool,
) -> None:
    """Three micro-batches in flight, as in a pipeline: each layer gets its own results back."""
    ranks: RankPool = request.getfixturevalue(pool)
    assert_trains_alike(ranks, rings=6, cp=ranks.world, recompute=recompute, micro_batches=3, mla=mla, **batch)


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
    """The largest relative difference of a loss or a gradient's norm, over ranks and steps."""
    return max(abs(a - b) / abs(b) for figures, _ in found for a, b in zip(figures, truth, strict=True))


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


def test_tensors_of_inference_mode_are_read_like_others(pool2: RankPool) -> None:
    for found in pool2.run_groups(in_worker("mcore_attention", "without_counting_writes")):
        assert max(found) <= 2e-6


def test_without_a_causal_mask_padding_is_seen_by_nobody(pool2: RankPool) -> None:
    for away in pool2.run_groups(in_worker("mcore_attention", "full")):
        assert away <= 1e-6


# ---------------------------------------------------------------------------------------------------- our layouts

ODD = {"lengths": (21, 3, 1, 40)}
IN_OURS: dict[str, dict[str, Any]] = {
    **{layout: {"layouts": (layout,), **ODD} for layout in ("packed", "striped", "zigzag")},
    "contiguous, more rows": {"layouts": ("contiguous",), "rows": 40, **ODD},
    "learned positions": {"layouts": ("packed",), "learned": True, **ODD},
    "no positions": {"layouts": ("striped",), "rope": False, **ODD},
    "latent": {"layouts": ("packed",), "mla": True, **ODD},
    "yarn": {"layouts": ("zigzag",), "yarn": True, **ODD},
    "latent, yarn": {"layouts": ("striped",), "mla": True, "yarn": True, **ODD},
    "two rows of one document": {"layouts": ("zigzag",), "tokens": 47},
    "two rows, latent": {"layouts": ("packed",), "tokens": 47, "mla": True},
}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", IN_OURS)
def test_our_layouts_train_as_one_rank(
    assert_trains_alike: Alike, pool2: RankPool, pool4: RankPool, name: str, ranks: int
) -> None:
    assert_trains_alike(pool2 if ranks == 2 else pool4, cp=ranks, **IN_OURS[name])


@pytest.mark.parametrize("mla", [False, True], ids=["gqa", "mla"])
def test_a_prepared_model_takes_ours_and_megatrons_in_turn(step: Alike, pool2: RankPool, mla: bool) -> None:
    """All in flight before any backward pass, and recomputed."""
    given = {"layouts": ("packed", "", "striped"), "micro_batches": 3, "recompute": "full", "mla": mla}
    for loss, gradient, name, rings, _ in step(pool2, cp=2, **given, **PACKED):
        assert (loss <= LOSS, gradient <= GRADIENT, rings) == (True, True, 6), name


def test_ours_with_tensor_and_pipeline_parallelism(assert_trains_alike: Alike, alone: Alike, pool4: RankPool) -> None:
    assert_trains_alike(pool4, cp=2, tp=2, layouts=("packed",), recompute="selective", **ODD)
    case = in_worker("mcore_training", "train", cp=2, layouts=("packed", "striped"), rows=40, recompute="full", **ODD)
    assert furthest(pool4.run_groups(case, {"pp": 2}), alone("mcore_training", "train", {}, True, **ODD)[0]) <= LOSS


@pytest.mark.parametrize("fault", ["rope", "leak", "lost"])
def test_a_wrong_position_mask_or_backward_would_be_seen(step: Alike, pool2: RankPool, fault: str) -> None:
    for _, gradient, _, _, _ in step(pool2, cp=2, fault=fault, layouts=("packed",), lengths=(21, 5, 39)):
        assert gradient > 1e-2


@pytest.mark.parametrize(("layout", "multiple"), [("packed", 1), ("striped", 8)])
def test_every_token_is_on_one_rank_and_the_rest_is_padding(pool2: RankPool, layout: str, multiple: int) -> None:
    found = pool2.run_groups(in_worker("mcore_layouts", "cut"), layout, multiple)
    positions = [i for n in ODD["lengths"] for i in range(n)]
    assert sorted(found[0][0] + found[1][0]) == [[i, at] for i, at in enumerate(positions)]
    assert found[0][1] == found[1][1] == (34 if multiple == 1 else 40)


def test_rows_that_fill_up_a_rank_are_padding_and_any_tensor_tells_the_batch(pool2: RankPool) -> None:
    for tokens, marked in pool2.run_groups(in_worker("mcore_layouts", "told_by_any_tensor")):
        assert marked == [False] * tokens + [True] * (34 - tokens)


def test_a_prepared_model_keeps_its_names_and_megatrons_angles(pool2: RankPool) -> None:
    for rotary, names in pool2.run_groups(in_worker("mcore_layouts", "kept")):
        assert (rotary, names > 30) == (5, True), "one of the model, one in each layer of latent attention"


def test_what_needs_megatrons_layout_is_refused_by_name(pool2: RankPool) -> None:
    for said in pool2.run_groups(in_worker("mcore_layouts", "refusals")):
        for message, expected in said:
            assert all(text in message for text in expected), (message, expected)
