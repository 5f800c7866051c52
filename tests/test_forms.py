"""Keys and values as one byte a number, gradients as bf16: just what was asked for, its error, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from seqpar_ring import ring_attention
from seqpar_ring.cargo import Cargo, Coded, Fields, Form, within
from seqpar_ring.config import Settings
from seqpar_ring.errors import ConfigError
from seqpar_ring.parallel import SequenceParallel
from seqpar_ring.schedule import BUILDERS, Row
from seqpar_ring.testing import (
    Case,
    RankPool,
    dense_attention,
    dense_results,
    relative_error,
    ring_results,
    run_lockstep,
)

NAMES = ("out", "lse", "dq", "dk", "dv")


def some(*shape: int, seed: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def packed(form: Form, *fields: Tensor) -> Fields:
    rows = fields[0].shape[1]
    message = form.store(rows + 3).at(2, rows)
    form.write(message, fields)
    return message


def there_and_back(x: Tensor) -> Tensor:
    form, again = Coded((x,)), torch.empty_like(x)
    form.read(packed(form, x), (again,))
    return again


@pytest.mark.parametrize("width", [64, 128])
def test_a_coded_row_of_normal_numbers_is_off_by_six_in_a_thousand(width: int) -> None:
    x = some(2, 50, 3, width)
    assert relative_error(there_and_back(x), x) == pytest.approx(0.006, abs=0.001)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_number_is_off_by_more_than_half_a_step_of_its_rows_largest(dtype: torch.dtype) -> None:
    x = some(1, 9, 2, 16, dtype=dtype)
    off = (there_and_back(x).double() - x.double()).abs()
    rounding = 0 if dtype in (torch.float64, torch.float32) else torch.finfo(dtype).eps
    assert there_and_back(x).dtype == dtype
    assert (off <= x.double().abs().amax(-1, keepdim=True) * (1 / 254 + rounding) * (1 + 1e-6)).all()


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30], ids=str)
def test_rows_of_zeros_and_rows_far_from_one_stay_finite_and_as_good(scale: float) -> None:
    x = some(1, 4, 1, 8, dtype=torch.float32) * scale
    again = there_and_back(x)
    assert again.isfinite().all()
    assert (again - x).norm() <= 0.012 * x.norm()


def test_a_message_holds_one_byte_a_number_and_a_scale_for_each_token_and_head() -> None:
    k, v = some(2, 7, 3, 64), some(2, 7, 3, 32)
    message = packed(Coded((k, v)), k, v)
    assert sum(x.nbytes for x in message) == 2 * 7 * 3 * (64 + 32 + 2 * 4)
    assert all(x.is_contiguous() for x in message)
    row = Row(6, 3, 64, 32, 2).sent("int8", "bf16")
    assert row.out("kv") == 3 * (64 + 32 + 2 * 4)
    assert row.back("kv") == 3 * (64 + 32) * 2
    assert row.cheaper(10**9, 1) == "kv"
    plain = Row(6, 3, 64, 32, 2).sent("same", "fp32")
    assert (plain.out("kv"), plain.back("kv"), plain.both("kv")) == (3 * 96 * 2, 3 * 96 * 4, 3 * 96 * 6)


def test_what_lies_together_is_sent_from_where_it_is_and_a_narrow_sum_is_cast() -> None:
    x = some(1, 4, 2, 8, dtype=torch.float32)
    assert Cargo((x,)).ready((x,))
    assert Cargo((x,)).ready((x[:, 1:3],))
    assert not Cargo((x,)).ready((x.transpose(0, 2),))
    assert not Cargo((x.repeat(2, 1, 1, 1),)).ready((x.repeat(2, 1, 1, 1)[:, 1:3],))
    narrow = Cargo((x,), torch.bfloat16)
    assert not narrow.ready((x,))
    assert torch.equal(packed(narrow, x)[0], x.bfloat16())


def test_parts_of_a_store_share_its_memory_and_no_other_part_s() -> None:
    x, y = some(2, 5, 3, 4, dtype=torch.float32), some(2, 5, 7, dtype=torch.float64)
    store = Cargo((x, y)).store(9)
    first, second = store.at(0, 5), store.at(5, 4)
    for mine in (first, second):
        assert [(t.shape[0], t.shape[2:], t.dtype) for t in mine] == [
            (2, (3, 4), torch.float32), (2, (7,), torch.float64)
        ]
        assert all(t.is_contiguous() for t in mine)
    for t in second:
        t.zero_()
    for t, value in zip(first, (x, y), strict=True):
        t.copy_(value)
    assert all(bool((t == 0).all()) for t in second)
    assert all(torch.equal(t, value) for t, value in zip(store.at(0, 5), (x, y), strict=True))
    assert torch.equal(store.at(0, 0)[0], x[:, :0])


def test_rows_within_a_block_are_found_where_they_lie() -> None:
    rows = ((10, 13), (20, 21), (30, 36))
    memory = [x for a, b in rows for x in range(a, b)]
    for first in range(11):
        for end in range(first, 11):
            found = list(within(rows, first, end))
            assert [x for a, b, _ in found for x in range(a, b)] == memory[first:end]
            assert [memory.index(a) for a, _, _ in found] == [number for _, _, number in found]


def as_seen_by(rank: int, owner: Tensor, whole: Tensor) -> Tensor:
    """Keys as a rank meets them: its own as they are, others' after their way."""
    mine = (owner == rank)[None, :, None, None]
    return torch.where(mine, whole, there_and_back(whole))


def on_rank(sp: SequenceParallel, lengths: list[int], tensors: list[Tensor]) -> list[Tensor]:
    plan = sp.plan(lengths)
    q, k, v, dout = (plan.shard(x, dim=1) for x in tensors)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = ring_attention(*leaves, plan, return_lse=True)
    grads = torch.autograd.grad(out, leaves, dout)
    return [plan.gather(x, dim=1) for x in (out.detach(), lse.transpose(1, 2), *grads)]


@pytest.mark.parametrize("schedule", sorted(BUILDERS))
@pytest.mark.parametrize(("world", "block_tokens"), [(2, "auto"), (3, 5), (4, 30), (4, "auto")], ids=str)
def test_coded_keys_give_the_attention_of_coded_keys_exactly(
    world: int, block_tokens: int | str, schedule: str
) -> None:
    lengths = [23, 1, 40]
    q, k, v, dout = (some(1, 64, h, 8, seed=s) for s, h in enumerate((4, 2, 2, 4)))
    how: dict[str, Any] = {"schedule": schedule, "block_tokens": block_tokens, "node": 2 if world == 4 else world}
    got = run_lockstep(lambda sp: on_rank(sp, lengths, [q, k, v, dout]), world, kv_dtype="int8", **how)[0]

    def owners(sp: SequenceParallel) -> Tensor:
        plan = sp.plan(lengths)
        return plan.gather(torch.full((1, plan.local_tokens), float(sp.groups.rank)), dim=1)[0]

    owner = run_lockstep(owners, world, **how)[0].long()
    want = [torch.zeros_like(x) for x in got]
    for rank in range(world):
        leaves = [q.clone().requires_grad_(), *(as_seen_by(rank, owner, x).requires_grad_() for x in (k, v))]
        out, lse = dense_attention(*leaves, lengths)
        rows = (owner == rank)[None, :, None, None]
        grads = torch.autograd.grad(out, leaves, torch.where(rows, dout, 0.0))
        want[0] = torch.where(rows, out.detach(), want[0])
        want[1] = torch.where(rows[..., 0], lse.detach().transpose(1, 2), want[1])
        for i, grad in enumerate(grads, 2):
            want[i] = want[i] + grad
    for name, mine, truth in zip(NAMES, got, want, strict=True):
        assert relative_error(mine, truth) <= 1e-12, name


def off_by(lengths: list[int], case: Case, **how: Any) -> dict[str, float]:
    """Errors of four ranks against exact attention, by name."""
    got, want = run_lockstep(lambda sp: ring_results(sp, lengths, case), 4, **how)[0], dense_results(lengths, case)
    return {name: relative_error(got[name], want[name]) for name in NAMES}


def test_against_exact_attention_coded_keys_are_off_by_less_than_a_percent() -> None:
    lengths, case = [300, 41], Case(4, 2, head_dim=64)
    errors = off_by(lengths, case, kv_dtype="int8")
    assert all(1e-3 < error < 0.01 for name, error in errors.items() if name != "lse"), errors


@pytest.mark.parametrize("schedule", ["ring", "direct"])
def test_narrow_gradients_round_dk_and_dv_and_nothing_else(schedule: str) -> None:
    lengths, case = [50, 13], Case(4, 2)
    errors = off_by(lengths, case, dkv_dtype="bf16", schedule=schedule)
    assert max(errors[name] for name in ("out", "lse", "dq")) <= 1e-12
    assert all(1e-5 < errors[name] < 6e-3 for name in ("dk", "dv")), errors


def over_gloo(sp: SequenceParallel, lengths: list[int], tensors: list[Tensor]) -> tuple[list[Tensor], dict[str, int]]:
    sp.groups.ring.stats.reset()
    return on_rank(sp, lengths, tensors), dict(sp.groups.ring.stats.bytes_sent)


def test_over_processes_the_bytes_are_those_that_the_planner_counts(pool2: RankPool) -> None:
    lengths = [200]
    tensors = [some(1, 200, h, 64, seed=s, dtype=torch.float32) for s, h in enumerate((4, 2, 2, 4))]
    found = {}
    for name, how in (("exact", {}), ("coded", {"kv_dtype": "int8", "dkv_dtype": "bf16"})):
        results = pool2.run(over_gloo, lengths, tensors, backward="kv", **how)
        found[name] = {lane: sum(sent.get(lane, 0) for _, sent in results) for lane in ("kv", "dkv")}
    exact, coded = Row(4, 2, 64, 64, 4), Row(4, 2, 64, 64, 4).sent("int8", "bf16")
    assert found["coded"]["kv"] * exact.out("kv") == found["exact"]["kv"] * coded.out("kv")
    assert found["coded"]["dkv"] * 2 == found["exact"]["dkv"]


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"kv_dtype": "fp8"}, 'Give "same" or "int8"'),
        ({"dkv_dtype": "int8"}, 'Give "fp32" or "bf16"'),
        ({"kv_dtype": "int8", "backward": "q"}, "what becomes of keys only counts where keys travel"),
        ({"dkv_dtype": "bf16", "backward": "q"}, "what becomes of keys only counts where keys travel"),
    ],
)
def test_forms_that_there_are_not_are_refused(block: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Settings.parse({"size": 2, **block})


def test_coded_keys_travel_in_backward_whatever_the_bytes_say() -> None:
    """As many key heads as query heads, wide ones: queries would be the lighter side."""
    assert Row(8, 8, 128, 128, 2).cheaper(64, 64) == "q"
    assert Row(8, 8, 128, 128, 2).sent("int8", "fp32").cheaper(64, 64) == "kv"
