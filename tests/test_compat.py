"""The names of ring-flash-attn against dense attention over the whole sequence, sharded here by their definition.

Shards are cut with index arithmetic of this file's own, not with the package's layouts. Ranks are threads in fp64, but
for one test of each family, where they are processes and find their ring by the process group.
"""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from seqpar_ring import compat
from seqpar_ring.compat.arguments import Options
from seqpar_ring.compat.rings import _RINGS, Group, Ring, ring_of
from seqpar_ring.errors import DisagreementError, GroupError, PlanError, SeqparError, UnsupportedError
from seqpar_ring.groups import Groups
from seqpar_ring.parallel import SequenceParallel
from seqpar_ring.testing import (
    Case,
    RankPool,
    dense_attention,
    dense_results,
    relative_error,
    run_lockstep_groups,
)

BATCH, VARLEN = ("ring", "zigzag_ring", "stripe"), ("ring", "zigzag_ring")
PACKINGS = ("", "kvpacked_", "qkvpacked_")
WORLDS = [1, 2, 4]
HEADS = {"": (4, 2), "kvpacked_": (3, 1), "qkvpacked_": (2, 2)}
MASKS: list[tuple[dict[str, Any], dict[str, Any]]] = [  # as these functions take it, and as dense attention does
    ({}, {"causal": False}),
    ({"causal": True}, {}),
    ({"causal": True, "window_size": (5, -1)}, {"window": 6}),
    ({"causal": True, "window_size": (0, 7)}, {"window": 1}),
    ({"window_size": (3, 2)}, {"causal": False, "window": (3, 2)}),
    ({"window_size": (-1, 4)}, {"causal": False, "window": (99, 4)}),
    ({"window_size": (2, -1)}, {"causal": False, "window": (2, 99)}),
]
CU = {"ring": [0, 3, 4, 9], "zigzag_ring": [0, 6, 8, 18]}
"""cu_seqlens of a rank: odd and single numbers of tokens where a family takes them."""


def share(family: str, cu_seqlens: Sequence[int], world: int, rank: int) -> Tensor:
    """Where in all documents in a row the tokens of a rank stand, whose own borders these are."""
    found = []
    for begin, end in pairwise(cu_seqlens):
        whole, n = torch.arange(world * begin, world * end), end - begin
        if family == "ring":
            found.append(whole[rank * n : (rank + 1) * n])
        elif family == "stripe":
            found.append(whole[rank::world])
        else:
            chunks = whole.chunk(2 * world)
            found += [chunks[rank], chunks[2 * world - 1 - rank]]
    return torch.cat(found)


def pack(q: Tensor, k: Tensor, v: Tensor, packing: str, dim: int) -> tuple[Tensor, ...]:
    """q, k and v as the functions take them."""
    if packing == "":
        return q, k, v
    return (q, torch.stack((k, v), dim)) if packing == "kvpacked_" else (torch.stack((q, k, v), dim),)


class Place(NamedTuple):
    """A rank of a group."""

    group: Group
    world: int
    rank: int


class Ask(NamedTuple):
    """What is asked of a function: the case, how its tensors are packed, and options by their names there."""

    case: Case
    packing: str
    options: dict[str, Any]


def call(name: str, place: Place, ask: Ask, mine: Tensor, args: Sequence[Any]) -> dict[str, Tensor]:
    """out, lse, dq, dk and dv of this rank's tokens `mine`, with a batch dimension."""
    case, varlen = ask.case, "varlen" in name
    q, k, v, dout = (x[:, mine] for x in case.inputs(len(mine) * place.world))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    given = [x.squeeze(0) for x in leaves] if varlen else leaves
    packed = pack(given[0], given[1], given[2], ask.packing, 1 if varlen else 2)
    options = {"softmax_scale": case.scale, "return_attn_probs": True, "group": place.group, **case.by_head()}
    out, lse, nothing = getattr(compat, f"{name}_{ask.packing}func")(*packed, *args, **options, **ask.options)
    assert nothing is None
    assert not lse.requires_grad
    out, lse = (out.unsqueeze(0), lse.unsqueeze(0)) if varlen else (out, lse)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *torch.autograd.grad(out, leaves, dout)), strict=True))


def assert_shards_equal_dense(
    shards: Sequence[dict[str, Tensor]], indices: Sequence[Tensor], lengths: Sequence[int], case: Case
) -> None:
    """The ranks' results, put where their tokens stand, are those of one device."""
    assert sorted(torch.cat(list(indices)).tolist()) == list(range(sum(lengths)))
    # Under a window of one key dq and dk are zero but for rounding, so they have no scale of their own.
    floor = 1e-3 * case.inputs(sum(lengths))[3].norm().item()
    for name, truth in dense_results(lengths, case).items():
        whole = torch.full_like(truth, torch.nan)
        for shard, index in zip(shards, indices, strict=True):
            whole.index_copy_(2 if name == "lse" else 1, index, shard[name].detach())
        assert relative_error(whole, truth, floor) <= 1e-12, (name, lengths, case)


def attend_batch(place: Place, ask: Ask, family: str) -> dict[str, Tensor]:
    """One rank's call of a batch function with ten tokens."""
    return call(f"{family}_flash_attn", place, ask, share(family, [0, 10], place.world, place.rank), ())


def attend_varlen(place: Place, ask: Ask, family: str) -> dict[str, Tensor]:
    """One rank's call of a varlen function."""
    cu = CU[family]
    args = torch.tensor(cu, dtype=torch.int32), 10
    return call(f"{family}_flash_attn_varlen", place, ask, share(family, cu, place.world, place.rank), args)


def attend_llama3(place: Place, ask: Ask, cu: list[int]) -> dict[str, Tensor]:
    """One rank's call of a function after Llama 3, with documents of these global borders."""
    causal = bool(ask.options.get("causal"))
    given = compat.llama3_flash_attn_prepare_cu_seqlens(torch.tensor(cu), causal, place.rank, place.world)
    mine = torch.arange(cu[-1]).chunk(place.world)[place.rank]
    return call("llama3_flash_attn_varlen", place, ask, mine, (*given[:4], ask.case.kv_heads, given[4]))


def in_lockstep(fn: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """Call `fn(place, *args)` on ranks that are threads."""
    def run(groups: Groups) -> Any:
        return fn(Place(Ring(groups.ring), world, groups.rank), *args)

    return run_lockstep_groups(run, world)


def in_process(sp: SequenceParallel, fn: Callable[..., Any], *args: Any) -> Any:
    """Call it twice on a rank that is a process, over the default group; the ring is made once."""
    first = fn(Place(None, sp.size, sp.rank), *args)
    ring = ring_of(None)
    second = fn(Place(dist.group.WORLD, sp.size, sp.rank), *args)
    assert ring_of(dist.group.WORLD) is ring
    assert all(torch.equal(first[name], second[name]) for name in first)
    return {name: x.detach() for name, x in second.items()}


def lengths_of(cu: Sequence[int], world: int = 1) -> list[int]:
    return [world * (b - a) for a, b in pairwise(cu)]


# ------------------------------------------------------------------------------------------------ equal to dense


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("family", BATCH)
@pytest.mark.parametrize("world", WORLDS)
def test_batch_functions_equal_dense_attention(world: int, family: str, packing: str) -> None:
    for options, mask in MASKS:
        case = Case(*HEADS[packing], batch=2, **mask)
        shards = in_lockstep(attend_batch, world, Ask(case, packing, options), family)
        indices = [share(family, [0, 10], world, rank) for rank in range(world)]
        assert_shards_equal_dense(shards, indices, [10 * world], case)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("family", VARLEN)
@pytest.mark.parametrize("world", WORLDS)
def test_varlen_functions_equal_dense_attention_of_every_document(world: int, family: str, packing: str) -> None:
    cu = CU[family]
    for options, mask in MASKS:
        case = Case(*HEADS[packing], **mask)
        shards = in_lockstep(attend_varlen, world, Ask(case, packing, options), family)
        indices = [share(family, cu, world, rank) for rank in range(world)]
        assert_shards_equal_dense(shards, indices, lengths_of(cu, world), case)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("world", WORLDS)
def test_llama3_functions_equal_dense_attention_of_every_document(world: int, packing: str) -> None:
    turns = [[0, 1, 14, 16, 23, 24], [0, 24], [0, 6, 12, 18, 24], [0, 13, 24]]
    for i, (options, mask) in enumerate(MASKS):
        for cu in (turns[i % 4], turns[(i + 1) % 4]):
            case = Case(*HEADS[packing], **mask)
            shards = in_lockstep(attend_llama3, world, Ask(case, packing, options), cu)
            assert_shards_equal_dense(shards, torch.arange(24).chunk(world), lengths_of(cu), case)


@pytest.mark.parametrize("world", WORLDS)
def test_scale_and_alibi_are_those_of_dense_attention(world: int) -> None:
    case = Case(scale=0.3, alibi=True, window=4)
    options = {"causal": True, "window_size": (3, 0)}
    for family in BATCH:
        shards = in_lockstep(attend_batch, world, Ask(case, "", options), family)
        indices = [share(family, [0, 10], world, rank) for rank in range(world)]
        assert_shards_equal_dense(shards, indices, [10 * world], case)
    for family in VARLEN:
        cu = CU[family]
        shards = in_lockstep(attend_varlen, world, Ask(case, "", options), family)
        indices = [share(family, cu, world, rank) for rank in range(world)]
        assert_shards_equal_dense(shards, indices, lengths_of(cu, world), case)
    shards = in_lockstep(attend_llama3, world, Ask(case, "", options), [0, 13, 24])
    assert_shards_equal_dense(shards, torch.arange(24).chunk(world), [13, 11], case)


@pytest.mark.parametrize("family", BATCH)
def test_batch_functions_over_a_process_group_equal_dense_attention(pool2: RankPool, family: str) -> None:
    case = Case()
    shards = pool2.run(in_process, attend_batch, Ask(case, "kvpacked_", {"causal": True}), family)
    assert_shards_equal_dense(shards, [share(family, [0, 10], 2, rank) for rank in (0, 1)], [20], case)


@pytest.mark.parametrize("family", VARLEN)
def test_varlen_functions_over_a_process_group_equal_dense_attention(pool2: RankPool, family: str) -> None:
    case, cu = Case(), CU[family]
    shards = pool2.run(in_process, attend_varlen, Ask(case, "", {"causal": True}), family)
    assert_shards_equal_dense(shards, [share(family, cu, 2, rank) for rank in (0, 1)], lengths_of(cu, 2), case)


def test_llama3_functions_over_a_process_group_equal_dense_attention(pool2: RankPool) -> None:
    case, cu = Case(causal=False), [0, 5, 21, 24]
    shards = pool2.run(in_process, attend_llama3, Ask(case, "", {}), cu)
    assert_shards_equal_dense(shards, torch.arange(24).chunk(2), lengths_of(cu), case)


# ------------------------------------------------------------------------------------------------ the interface


def test_every_function_has_the_arguments_of_ring_flash_attn_in_their_order() -> None:
    tail = ["dropout_p", "softmax_scale", "causal", "window_size", "alibi_slopes", "deterministic"]
    tail += ["return_attn_probs", "group"]
    head = {"": ["q", "k", "v"], "kvpacked_": ["q", "kv"], "qkvpacked_": ["qkv"]}
    lengths = {"": [], "varlen_": ["cu_seqlens", "max_seqlen"]}
    prepared = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "heads_k_stride", "local_k_slice"]
    expected = {"llama3_flash_attn_prepare_cu_seqlens": ["cu_seqlens", "causal", "rank", "world_size"]}
    for packing, tensors in head.items():
        expected[f"llama3_flash_attn_varlen_{packing}func"] = [*tensors, *prepared, *tail]
        for kind, families in (("", BATCH), ("varlen_", VARLEN)):
            for family in families:
                expected[f"{family}_flash_attn_{kind}{packing}func"] = [*tensors, *lengths[kind], *tail]
    names = [name for name in compat.__all__ if name not in ("Ring", "own_lanes")]
    assert {name: list(inspect.signature(getattr(compat, name)).parameters) for name in names} == expected
    defaults = inspect.signature(compat.ring_flash_attn_func).parameters
    assert [defaults[name].default for name in tail] == [0.0, None, False, (-1, -1), None, False, False, None]


def test_one_rank_without_torch_distributed_takes_all_arguments_by_position() -> None:
    case = Case(causal=False, window=(3, 0), scale=0.5)
    q, k, v, _ = case.inputs(7)
    slopes = torch.tensor([0.5, 0.25, 0.125, 1.0])
    first = q[:, :6], k[:, :6], v[:, :6]
    truth, truth_lse = dense_attention(*first, 6, case.causal, case.window, case.scale, alibi_slopes=slopes)
    tail: Any = (0.0, 0.5, False, (3, 0), slopes, True, True, None)
    out, lse, nothing = compat.zigzag_ring_flash_attn_func(*first, *tail)
    assert nothing is None
    assert relative_error(out, truth) <= 1e-12
    assert relative_error(lse, truth_lse) <= 1e-12
    cu = torch.tensor([0, 0, 6, 6], dtype=torch.int32)
    out = compat.ring_flash_attn_varlen_func(q[0, :6], k[0, :6], v[0, :6], cu, 6, *tail[:6])
    assert isinstance(out, Tensor)
    assert relative_error(out, truth[0]) <= 1e-12


def test_sixteen_bit_inputs_give_sixteen_bit_outputs_and_a_wide_lse() -> None:
    q, k, v, _ = Case(dtype=torch.bfloat16).inputs(6)
    out, lse, _ = compat.stripe_flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert out.dtype == torch.bfloat16
    assert out.shape == q.shape
    assert lse.dtype == torch.float32
    assert lse.shape == (1, 4, 6)


# ------------------------------------------------------------------------------------------------ llama3's lengths


@pytest.mark.parametrize(
    ("world", "rank", "causal", "q", "k", "keys"),
    [
        (1, 0, True, [0, 5, 8, 16], [0, 5, 8, 16], (0, 16)),
        (2, 0, True, [0, 5, 8], [0, 5, 8], (0, 8)),
        (2, 1, False, [0, 8], [0, 8], (8, 16)),
        (4, 0, True, [0, 4], [0, 4], (0, 4)),
        (4, 0, False, [0, 4], [0, 5], (0, 5)),
        (4, 1, True, [0, 1, 4], [0, 5, 8], (0, 8)),
        (4, 1, False, [0, 1, 4], [0, 5, 8], (0, 8)),
        (4, 2, True, [0, 4], [0, 4], (8, 12)),
        (4, 2, False, [0, 4], [0, 8], (8, 16)),
        (4, 3, True, [0, 4], [0, 8], (8, 16)),
    ],
)
def test_llama3_prepare_gives_a_ranks_tokens_and_the_keys_they_need(
    world: int, rank: int, causal: bool, q: list[int], k: list[int], keys: tuple[int, int]
) -> None:
    cu = torch.tensor([0, 5, 5, 8, 16], dtype=torch.int64)  # the second document has no tokens
    cu_q, cu_k, max_q, max_k, local = compat.llama3_flash_attn_prepare_cu_seqlens(cu, causal, rank, world)
    assert (cu_q.tolist(), cu_k.tolist(), local) == (q, k, slice(*keys))
    assert (cu_q.dtype, cu_k.dtype) == (torch.int32, torch.int32)
    assert (max_q, max_k) == (max(lengths_of(q)), max(lengths_of(k)))
    assert type(max_q) is type(max_k) is int


@pytest.mark.parametrize(
    ("cu", "rank", "world", "says"),
    [
        ([0, 5, 16], 0, 3, "cannot be shared equally"),
        ([0, 5, 16], 2, 2, "no such rank"),
        ([0, 5, 16], 0, 0, "no such rank"),
        ([1, 5, 16], 0, 2, "does not ascend from 0"),
        ([0, 5, 4], 0, 2, "does not ascend from 0"),
        ([0], 0, 1, "does not ascend from 0"),
        ([0.0, 4.0], 0, 1, "not a row of cumulative lengths"),
        ([[0, 4]], 0, 1, "not a row of cumulative lengths"),
    ],
)
def test_llama3_prepare_refuses_what_cannot_be_cut(cu: list[Any], rank: int, world: int, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        compat.llama3_flash_attn_prepare_cu_seqlens(torch.tensor(cu), True, rank, world)


# ------------------------------------------------------------------------------------------------ refusals


llama3: Any = compat.llama3_flash_attn_varlen_func  # Any: its arguments come as tuples, whose length mypy loses


def tokens(n: int = 8, heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(n, 4, 8), torch.randn(n, heads, 8), torch.randn(n, heads, 8)


def batch(n: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = tokens(n)
    return q[None], k[None], v[None]


@pytest.mark.parametrize("name", [name for name in compat.__all__ if name.endswith("_func")])
def test_every_function_refuses_dropout(name: str) -> None:
    packing = "qkvpacked_" if "qkvpacked" in name else "kvpacked_" if "kvpacked" in name else ""
    varlen = "varlen" in name
    cu = torch.tensor([0, 8])
    args: tuple[Any, ...] = (cu, cu, 8, 8, 1, slice(0, 8)) if "llama3" in name else (cu, 8) if varlen else ()
    packed = pack(*(tokens() if varlen else batch()), packing, 1 if varlen else 2)
    with pytest.raises(UnsupportedError, match="attention dropout"):
        getattr(compat, name)(*packed, *args, 0.1)


def test_determinism_on_a_gpu_is_refused_where_torch_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Options(0.0, None, True, (-1, -1), None, deterministic=True, return_attn_probs=False)
    asked.check("cuda")  # conftest tells it
    for name, value in (
        ("is_deterministic_algorithms_warn_only_enabled", True),  # then kernels need not be
        ("are_deterministic_algorithms_enabled", False),
    ):
        monkeypatch.setattr(torch, name, lambda value=value: value)
        asked.check("cpu")
        asked._replace(deterministic=False).check("cuda")
        with pytest.raises(UnsupportedError, match="use_deterministic_algorithms"):
            asked.check("cuda")


@pytest.mark.parametrize("window", [(-2, 0), (3,), 3, (1.0, 2), (True, 0), None])
def test_a_window_that_does_not_exist_is_refused(window: Any) -> None:
    with pytest.raises(PlanError, match="a window is"):
        compat.ring_flash_attn_func(*batch(), window_size=window)


def test_tensors_of_another_shape_are_refused_with_the_right_one() -> None:
    q, k, v = tokens()
    with pytest.raises(PlanError, match=r"Give q \(B, S, H, D\), k"):
        compat.ring_flash_attn_func(q, k, v)
    with pytest.raises(PlanError, match=r"kv \(T, 2, G, D\)"):
        compat.ring_flash_attn_varlen_kvpacked_func(q, torch.stack((k, v, v), 1), torch.tensor([0, 8]), 8)
    with pytest.raises(PlanError, match=r"qkv \(B, S, 3, H, D\)"):
        compat.stripe_flash_attn_qkvpacked_func(torch.stack((q, k), 1)[None])
    with pytest.raises(PlanError, match="do not fit each other"):
        compat.ring_flash_attn_func(*batch()[:2], batch(6)[2])
    with pytest.raises(PlanError, match="holds no tokens"):
        compat.ring_flash_attn_func(*batch(0))


def test_zigzag_refuses_an_odd_number_of_tokens() -> None:
    with pytest.raises(PlanError, match="even number"):
        compat.zigzag_ring_flash_attn_func(*batch(7), causal=True)
    with pytest.raises(PlanError, match="even number"):
        compat.zigzag_ring_flash_attn_varlen_func(*tokens(), torch.tensor([0, 3, 8]), 5, causal=True)


def test_lengths_that_do_not_fit_are_refused() -> None:
    varlen = compat.ring_flash_attn_varlen_func
    with pytest.raises(PlanError, match="max_seqlen is smaller"):
        varlen(*tokens(), torch.tensor([0, 3, 8]), 4)
    with pytest.raises(PlanError, match="max_seqlen is no whole number"):
        varlen(*tokens(), torch.tensor([0, 3, 8]), 5.0)
    with pytest.raises(PlanError, match=r"max_seqlen is smaller .*max_seqlen=4"):  # as `lengths.max()` gives it
        varlen(*tokens(), torch.tensor([0, 3, 8]), torch.tensor(4))
    with pytest.raises(PlanError, match="does not end with"):
        varlen(*tokens(), torch.tensor([0, 3, 7]), 8)
    with pytest.raises(PlanError, match="does not ascend"):
        varlen(*tokens(), torch.tensor([0, 9, 8]), 9)
    with pytest.raises(UnsupportedError, match="share their ALiBi slopes"):
        varlen(*tokens(), torch.tensor([0, 3, 8]), 5, alibi_slopes=torch.ones(2, 4))
    assert isinstance(varlen(*tokens(), torch.tensor([0, 8]), 8, alibi_slopes=torch.ones(1, 4)), Tensor)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"heads_k_stride": 3}, "heads_k_stride must divide"),
        ({"heads_k_stride": 0}, "heads_k_stride must divide"),
        ({"heads_k_stride": 8}, "heads_k_stride must divide"),
        ({"max_seqlen_q": 3}, "max_seqlen_q is smaller"),
        ({"max_seqlen_k": 3}, "max_seqlen_k is smaller"),
        ({"local_k_slice": slice(0, 7)}, "does not follow"),
        ({"local_k_slice": slice(None, 8)}, "not a slice"),
        ({"local_k_slice": (0, 8)}, "not a slice"),
        ({"cu_seqlens_k": torch.tensor([0, 4, 8])}, "does not follow"),
        ({"cu_seqlens_q": torch.tensor([0, 4, 7])}, "does not end with"),
    ],
)
def test_llama3_refuses_what_was_not_prepared_together(change: dict[str, Any], says: str) -> None:
    prepared = compat.llama3_flash_attn_prepare_cu_seqlens(torch.tensor([0, 5, 8]), True, 0, 1)
    given: dict[str, Any] = {**prepared._asdict(), "heads_k_stride": 2, "causal": True}
    with pytest.raises(PlanError, match=says):
        compat.llama3_flash_attn_varlen_func(*tokens(), **{**given, **change})


def errors_of(world: int, fn: Callable[[Ring, int], Any]) -> list[SeqparError | None]:
    """What each rank raises."""
    def run(groups: Groups) -> SeqparError | None:
        try:
            fn(Ring(groups.ring), groups.rank)
        except SeqparError as error:
            return error
        return None

    return run_lockstep_groups(run, world, timeout=100.0)


def test_llama3_refuses_what_was_prepared_for_another_causal_or_other_documents() -> None:
    def mixed(causal: bool, documents: Callable[[int], list[int]]) -> Callable[[Ring, int], Any]:
        def run(ring: Ring, rank: int) -> Any:
            given = compat.llama3_flash_attn_prepare_cu_seqlens(torch.tensor(documents(rank)), causal, rank, 2)
            args = (*given[:4], 1, given[4])
            return llama3(*tokens(), *args, causal=True, group=ring)

        return run

    assert errors_of(2, mixed(True, lambda _: [0, 13, 16])) == [None, None]
    for error in errors_of(2, mixed(False, lambda _: [0, 13, 16])):
        assert isinstance(error, PlanError)
        assert "does not follow" in str(error)
    for error in errors_of(2, mixed(True, lambda rank: [0, 3 + rank, 16])):
        assert isinstance(error, PlanError)
        assert "does not follow" in str(error)


def test_what_is_wrong_on_one_rank_is_raised_on_all() -> None:
    def one_drops(ring: Ring, rank: int) -> Any:
        return compat.ring_flash_attn_func(*batch(), dropout_p=0.1 * rank, group=ring)

    def one_strides(ring: Ring, rank: int) -> Any:
        given = compat.llama3_flash_attn_prepare_cu_seqlens(torch.tensor([0, 13, 16]), True, rank, 2)
        args = (*given[:4], 1 + 2 * rank, given[4])
        return llama3(*tokens(), *args, causal=True, group=ring)

    def one_is_longer(ring: Ring, rank: int) -> Any:
        return compat.ring_flash_attn_func(*batch(8 + rank), group=ring)

    def one_llama_is_longer(ring: Ring, rank: int) -> Any:
        n = 8 + rank
        cu = torch.tensor([0, n])
        return compat.llama3_flash_attn_varlen_func(*tokens(n), cu, cu, n, n, 1, slice(0, n), group=ring)

    for fn, kind, says in (
        (one_drops, UnsupportedError, "attention dropout"),
        (one_strides, PlanError, "heads_k_stride"),
        (one_is_longer, DisagreementError, "different values"),
        (one_llama_is_longer, PlanError, "unequal numbers"),
    ):
        errors = errors_of(2, fn)
        assert [type(error) for error in errors] == [kind, kind]
        assert all(says in str(error) for error in errors)
    assert "rank 1 failed" in str(errors_of(2, one_drops)[0])


@pytest.mark.parametrize("group", [0, "ring", -100])
def test_what_is_no_process_group_is_refused(group: Any) -> None:
    with pytest.raises(GroupError, match="not a process group"):
        compat.ring_flash_attn_func(*batch(), group=group)


# ------------------------------------------------------------------------------------------------ what is kept


def test_a_ring_makes_a_plan_once() -> None:
    ring = ring_of(None)
    assert ring.equally("zigzag", [4, 2]) is ring.equally("zigzag", [4, 2])
    assert ring.equally("zigzag", [4, 2]) is not ring.equally("parts", [4, 2])


def uses_a_group_and_destroys_it(sp: SequenceParallel) -> tuple[bool, int]:
    """Whether a ring stays after its group is destroyed, and how many more rings there are."""
    before = len(_RINGS)
    group = dist.new_group([0, 1])
    q, k, v = batch()
    compat.ring_flash_attn_func(q, k, v, causal=True, group=group)
    ring = weakref.ref(ring_of(group))
    assert len(_RINGS) == before + 1
    dist.destroy_process_group(group)
    del group
    gc.collect()
    return ring() is not None, len(_RINGS) - before


def test_a_ring_goes_with_its_process_group(pool2: RankPool) -> None:
    assert pool2.run(uses_a_group_and_destroys_it) == [(False, 0), (False, 0)]
