"""Ring attention against dense attention in fp64: out, lse, dq, dk, dv, dsinks, over all that a plan may be.

Every mask, layout and schedule, 1 to 8 ranks, grouped, multi-query and plain heads, odd and tiny lengths, ranks without
tokens. What must fail, and what is refused, is in `test_attention_faults.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from seqpar_ring import SequenceParallel, ring_attention
from seqpar_ring.kernels import cpu
from seqpar_ring.kernels.cpu import LONG, CpuKernel
from seqpar_ring.layout import LAYOUTS
from seqpar_ring.schedule import BUILDERS
from seqpar_ring.testing import (
    Case,
    RankPool,
    assert_matches_dense,
    dense_results,
    relative_error,
    ring_results,
    run_lockstep,
)

WORLDS = [1, 2, 3, 4, 8]
LAYOUT_NAMES, SCHEDULES = sorted(LAYOUTS), sorted(BUILDERS)
HEADS = [(4, 2), (3, 1), (2, 2)]
NODE = {8: 4, 4: 2}

# One document, one token, one document longer than all others together, fewer tokens than ranks, odd lengths.
LENGTHS = [[67], [1], [13, 1, 30, 7, 1, 3, 22], [5, 2, 1, 1], [1, 61, 19]]


def masks_of(lengths: list[int]) -> list[dict[str, Any]]:
    """Every kind of mask for these documents; windows of one key and windows larger than a document among them."""
    several: tuple[int | None, ...] = tuple([3, None, 99, 1, 5, 2, 8][: len(lengths)])
    return [
        {"causal": False},
        {},
        {"window": 1},
        {"window": 5},
        {"window": several},
        {"causal": False, "window": (3, 2)},
        {"chunk": 8},
        {"chunk": 8, "window": 3},
        {"prefix": tuple(n // 2 for n in lengths)},
        {"causal": False, "kv_lengths": tuple((7 * n) % 23 for n in lengths)},
    ]


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("world", WORLDS)
def test_every_mask_equals_dense_attention_in_fp64(world: int, schedule: str, layout: str) -> None:
    """Each mask with some of the lengths; which ones differs by layout and schedule, so that together they have all."""
    first = SCHEDULES.index(schedule) + LAYOUT_NAMES.index(layout)
    turns = itertools.islice(itertools.cycle(itertools.product(("auto", 5, 40), HEADS, ("kv", "q"))), first, None)
    for number, lengths in enumerate(LENGTHS[2:] if world > 1 else LENGTHS, first):
        for mask in masks_of(lengths)[number % 3 :: 3]:
            size, heads, backward = next(turns)
            how = {"layout": layout, "schedule": schedule, "block_tokens": size, "node": NODE.get(world, world)}
            assert_matches_dense(lengths, world, Case(*heads, **mask), 1e-12, backward=backward, **how)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("world", WORLDS)
def test_every_number_of_heads_and_every_length_equals_dense_in_fp64(world: int, schedule: str, layout: str) -> None:
    kinds = itertools.cycle(HEADS[world % 3 :] + HEADS)
    for lengths, heads in zip(LENGTHS, kinds, strict=False):
        how = {"layout": layout, "schedule": schedule, "node": NODE.get(world, world)}
        assert_matches_dense(lengths, world, Case(*heads, batch=2), 1e-12, **how)


@pytest.mark.parametrize("backward", ["kv", "q"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("world", [1, 3, 4])
def test_every_way_to_make_logits_equals_dense_in_fp64(world: int, schedule: str, backward: str) -> None:
    cases = [
        Case(scale=0.3),
        Case(softcap=1.5),
        Case(sinks=True),
        Case(alibi=True, window=9),
        Case(causal=False, alibi=True, sinks=True, softcap=2.0, batch=2),
        Case(value_dim=5),
        Case(value_dim=12, sinks=True),
        Case(6, 2, head_dim=192, value_dim=128),
        Case(2, 1, head_dim=256, window=7),
    ]
    for case, layout in itertools.product(cases, ("zigzag", "striped")):
        how = {"layout": layout, "schedule": schedule, "node": NODE.get(world, world), "block_tokens": 8}
        assert_matches_dense([21, 1, 18], world, case, 1e-12, backward=backward, **how)


@pytest.mark.parametrize(("world", "heads"), [(2, 2), (4, 2), (4, 4), (8, 2), (8, 4), (6, 2)])
@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_heads_shared_out_inside_a_ring_equal_dense_in_fp64(world: int, heads: int, layout: str) -> None:
    """As many key heads as ranks that share them, fewer (then they are replicated), one, and more."""
    cases = [Case(8, 8, batch=2), Case(8, 2), Case(8, 1, sinks=True, batch=3), Case(4, 4, alibi=True)]
    cases.append(Case(8, 4, window=5, value_dim=5, batch=2))
    schedules = itertools.cycle(SCHEDULES)
    for case, lengths in itertools.product(cases, ([67], [13, 1, 30, 7], [2, 1])):
        node = world // 2 if world == 8 else world
        how = {"layout": layout, "heads": heads, "schedule": next(schedules), "node": node}
        assert_matches_dense(lengths, world, case, 1e-12, **how)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("world", WORLDS)
def test_the_reference_kernel_alone_equals_dense_in_fp64(world: int, layout: str) -> None:
    for case in (Case(), Case(window=5), Case(causal=False)):
        assert_matches_dense([13, 1, 30, 7, 22], world, case, 1e-12, layout=layout, kernel="reference")


# Strategies are made once: hypothesis looks through each new one, which takes as long as drawing from it.
SIZES = st.integers(1, 40)
MAYBE = st.none() | SIZES
UP_TO = [st.integers(0, n) for n in range(31)]
MASKS: tuple[Callable[[st.DrawFn, list[int]], dict[str, Any]], ...] = (
    lambda _, __: {},
    lambda _, __: {"causal": False},
    lambda draw, _: {"window": draw(SIZES)},
    lambda draw, _: {"chunk": draw(SIZES), "window": draw(MAYBE)},
    lambda draw, lengths: {"window": tuple(draw(MAYBE) for _ in lengths)},
    lambda draw, _: {"causal": False, "window": (draw(SIZES), draw(SIZES))},
    lambda draw, lengths: {"prefix": tuple(draw(UP_TO[n]) for n in lengths)},
    lambda draw, lengths: {"causal": False, "kv_lengths": tuple(draw(UP_TO[30]) for _ in lengths)},
)
DRAWN = {
    "lengths": st.lists(st.integers(1, 24), min_size=1, max_size=5),
    "mask": st.sampled_from(MASKS),
    "logits": st.fixed_dictionaries(
        {
            "sinks": st.booleans(),
            "alibi": st.sampled_from([False, False, True]),
            "value_dim": st.sampled_from([None, 3]),
        }
    ),
    "kv_heads": st.sampled_from([1, 2, 4]),
    "world": st.sampled_from([2, 3, 4, 1, 5, 8, 6]),  # what comes first comes most often
    "settings": st.fixed_dictionaries(
        {
            "layout": st.sampled_from(LAYOUT_NAMES),
            "schedule": st.sampled_from(SCHEDULES),
            "backward": st.sampled_from(["auto", "kv", "q"]),
            "block_tokens": st.just("auto") | st.integers(1, 60),
        }
    ),
}
NODES = {world: st.sampled_from([n for n in range(1, world + 1) if world % n == 0]) for world in range(1, 9)}
SHARING = {node: st.sampled_from([h for h in (1, 1, 2, 4) if node % h == 0]) for node in range(1, 9)}


@st.composite
def random_cases(draw: st.DrawFn) -> tuple[list[int], int, Case, dict[str, Any]]:
    """Lengths from 1, ranks that may hold nothing, any mask, any way to make logits, any setting."""
    lengths = draw(DRAWN["lengths"])
    case = Case(4, draw(DRAWN["kv_heads"]), **draw(DRAWN["mask"])(draw, lengths), **draw(DRAWN["logits"]))
    world = draw(DRAWN["world"])
    node = draw(NODES[world])
    return lengths, world, case, {**draw(DRAWN["settings"]), "node": node, "heads": draw(SHARING[node])}


@pytest.mark.timeout(600)
@settings(max_examples=500, deadline=None)
@given(random_cases())
def test_random_cases_equal_dense_in_fp64(drawn: tuple[list[int], int, Case, dict[str, Any]]) -> None:
    lengths, world, case, how = drawn
    assert_matches_dense(lengths, world, case, 1e-12, **how)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(20))
# Not derandomized, as hypothesis would do by itself where it sees a CI: all parts would draw the same cases.
@settings(max_examples=500, deadline=None, derandomize=False, suppress_health_check=[HealthCheck.too_slow])
@given(drawn=random_cases())
def test_ten_thousand_random_cases_equal_dense_in_fp64(
    part: int, drawn: tuple[list[int], int, Case, dict[str, Any]]
) -> None:
    """In parts, so that workers share them and none is left with one that takes long."""
    lengths, world, case, how = drawn
    assert_matches_dense(lengths, world, case, 1e-12, **how)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("world", [2, 4])
def test_processes_over_gloo_equal_dense_in_fp32(world: int, layout: str, request: pytest.FixtureRequest) -> None:
    pool: RankPool = request.getfixturevalue(f"pool{world}")
    for lengths in ([197], [13, 1, 90, 7, 1, 3, 22], [2]):
        case = Case(6, 2, 16, dtype=torch.float32)
        errors = assert_matches_dense(lengths, world, case, 2e-6, pool=pool, layout=layout)
        assert max(errors.values()) > 0 or lengths == [2]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_over_gloo_equals_dense_in_fp32(schedule: str, pool4: RankPool) -> None:
    cases = [Case(4, 4, 16), Case(6, 2, 16, sinks=True), Case(4, 2, 16, window=20), Case(4, 2, 16, chunk=50)]
    for case, (size, heads) in zip(cases, [("auto", 1), (20, 1), (130, 1), ("auto", 2)], strict=True):
        case = Case(**{**vars(case), "dtype": torch.float32})
        how = {"schedule": schedule, "node": 2, "block_tokens": size, "heads": heads}
        assert_matches_dense([131, 1, 64], 4, case, 2e-6, pool=pool4, **how)


@pytest.mark.parametrize("backward", ["kv", "q"])
@pytest.mark.parametrize("layout", ["contiguous", "striped", "zigzag"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bf16_is_as_precise_as_one_kernel_on_the_whole_sequence(schedule: str, layout: str, backward: str) -> None:
    """Error of out, dq, dk, dv against fp64 at W = 8: at most 1.05 times that of torch's own kernel, per tensor."""
    case = Case(8, 2, 64, dtype=torch.bfloat16)
    lengths, how = [1031], {"layout": layout, "schedule": schedule, "node": 4, "backward": backward}
    truth = dense_results(lengths, case)
    ring = run_lockstep(lambda sp: ring_results(sp, lengths, case), 8, **how)[0]
    alone = flash_on_the_whole_sequence(case, sum(lengths))
    for name in ("out", "dq", "dk", "dv"):
        ours, theirs = relative_error(ring[name], truth[name]), relative_error(alone[name], truth[name])
        assert ours <= 1.05 * theirs, (name, ours, theirs)


@pytest.mark.parametrize("tiles", [False, True], ids=["", "tiles"])
@pytest.mark.parametrize(("world", "layout"), [(2, "striped"), (4, "zigzag")])
def test_a_long_document_in_bf16_is_as_precise_as_one_kernel_and_computed_in_bf16(
    world: int, layout: str, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks below `cpu.LARGE`, whose partial results are rounded each; against fp32 over the whole sequence.

    Where forward is in bf16, too, all roundings of parts together are at most one more like that of the final result.
    """
    case, computed = Case(2, 1, 32, dtype=torch.bfloat16), {"_attend": set(), "_differentiate": set()}

    def spied(plain: Callable[..., Any], dtypes: set[torch.dtype]) -> Callable[..., Any]:
        def spy(self: CpuKernel, qkv: Any, *args: Any) -> Any:
            dtypes.add(qkv[0].dtype)
            return plain(self, qkv, *args)

        return spy

    for name, dtypes in computed.items():
        monkeypatch.setattr(CpuKernel, name, spied(getattr(CpuKernel, name), dtypes))
    monkeypatch.setattr(cpu, "FAST_IN_16_BITS", True)
    monkeypatch.setattr(cpu, "TILES", tiles)
    truth = flash_on_the_whole_sequence(case, LONG, torch.float32)
    ring = run_lockstep(lambda sp: ring_results(sp, [LONG], case), world, layout=layout)[0]
    alone = flash_on_the_whole_sequence(case, LONG)
    forward = torch.bfloat16 if tiles else torch.float32
    assert computed == {"_attend": {forward}, "_differentiate": {torch.bfloat16}}
    for name in ("out", "dq", "dk", "dv"):
        ours, theirs = relative_error(ring[name], truth[name]), relative_error(alone[name], truth[name])
        once_more = relative_error(truth[name].bfloat16(), truth[name]) if tiles and name == "out" else 0.0
        assert ours <= 1.05 * (theirs**2 + once_more**2) ** 0.5, (name, ours, theirs, once_more)


@pytest.mark.parametrize("masked", [{"window": LONG}, {"chunk": LONG}], ids=["window", "chunk"])
def test_short_sums_in_bf16_are_computed_in_fp32(masked: dict[str, int]) -> None:
    """Of a window or a chunk nobody knows here how many keys its last query sees, so it counts as short."""
    def fewest(sp: SequenceParallel) -> tuple[int, ...]:
        plans = sp.plan([LONG, LONG + 1]), sp.plan([LONG, 7]), sp.plan([2 * LONG], **masked)
        return tuple(plan.fewest_keys for plan in plans)

    assert run_lockstep(fewest, 2) == [(LONG, 7, 0)] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("logits", [{}, {"alibi": True}, {"softcap": 1.5}, {"sinks": True}], ids=str)
def test_autocast_changes_no_bit(logits: dict[str, Any], dtype: torch.dtype) -> None:
    """It casts what matrix products are given, also inside of an operator. Positions up to 300 are not all in bf16."""
    case = Case(4, 2, 16, dtype=dtype, **logits)

    def under_autocast(sp: SequenceParallel) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return ring_results(sp, [300, 31], case)

    plain, cast = (
        run_lockstep(fn, 2)[0] for fn in (lambda sp: ring_results(sp, [300, 31], case), under_autocast)
    )
    assert all(torch.equal(plain[name], cast[name]) for name in plain)


def test_a_sink_of_minus_infinity_is_none_in_rows_without_keys_too() -> None:
    lengths, keys = [5, 9, 4], [7, 0, 3]

    def run(sp: SequenceParallel) -> list[list[Tensor]]:
        plan = sp.plan(lengths, causal=False, kv_lengths=keys)
        generator = torch.Generator().manual_seed(4)
        shapes = (sum(lengths), 2, 8), (sum(keys), 2, 8), (sum(keys), 2, 8)
        q, k, v = (torch.randn(1, *shape, generator=generator, dtype=torch.float64) for shape in shapes)
        shards = plan.shard(q), plan.shard_keys(k), plan.shard_keys(v)
        results = []
        for sinks in (torch.full((2,), -torch.inf, dtype=torch.float64), None):
            leaves = [x.clone().requires_grad_() for x in (*shards, *(() if sinks is None else (sinks,)))]
            out = ring_attention(*leaves[:3], plan, sinks=leaves[3] if leaves[3:] else None)
            assert isinstance(out, Tensor)
            results.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
        return results

    for (*those, dsinks), without in run_lockstep(run, 3):
        assert (dsinks == 0).all()
        assert all(torch.equal(one, two) for one, two in zip(those, without, strict=True))


def flash_on_the_whole_sequence(case: Case, tokens: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    q, k, v, dout = (x.transpose(1, 2).to(dtype or case.dtype) for x in case.inputs(tokens))
    for x in (q, k, v):
        x.requires_grad_()
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    return {n: x.transpose(1, 2) for n, x in zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True)}
