"""The test helpers themselves: a wrong answer, an error or a death in a rank must come out as what it is."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from seqpar_ring.errors import BatchError, ConfigError, GroupError, PlanError, TransportError
from seqpar_ring.groups import Groups
from seqpar_ring.parallel import SequenceParallel
from seqpar_ring.testing import (
    Case,
    RankPool,
    assert_matches_dense,
    dense_attention,
    relative_error,
    run_lockstep,
    run_lockstep_groups,
    run_processes,
)

# ------------------------------------------------------------------------------------------------ lockstep


def place(sp: SequenceParallel) -> tuple[int, int, str]:
    return sp.rank, sp.data_rank, sp.settings.layout


def test_run_lockstep_calls_every_rank_and_keeps_their_order() -> None:
    assert run_lockstep(place, 3, layout="striped") == [(0, 0, "striped"), (1, 0, "striped"), (2, 0, "striped")]
    assert [where[:2] for where in run_lockstep(place, 4, size=2)] == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_run_lockstep_raises_the_root_cause_and_not_what_it_led_to() -> None:
    def fail_on_one(sp: SequenceParallel) -> None:
        if sp.rank == 2:
            time.sleep(0.05)  # the others are waiting by now
            raise ZeroDivisionError("rank 2 divided by zero")
        sp.groups.ring.all_reduce(torch.ones(1))

    started = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="divided by zero") as caught:
        run_lockstep(fail_on_one, 4)
    assert caught.value.__notes__ == ["(raised on rank 2 of 4 lockstep ranks)"]
    assert time.monotonic() - started < 10


def test_run_lockstep_times_out_when_a_rank_waits_for_nothing() -> None:
    def wait_on_one(groups: Groups) -> None:
        if groups.rank == 0:
            groups.ring.all_reduce(torch.ones(1))
        time.sleep(0.3)

    with pytest.raises(TransportError, match=r"rank 0 waited for a message from rank 1 .* within 0.1 s"):
        run_lockstep_groups(wait_on_one, 2, timeout=0.1, at_once=2)


def test_run_lockstep_does_not_wait_for_ever_for_a_rank_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seqpar_ring.testing.threads.GRACE", 0.0)
    released = threading.Event()
    with pytest.raises(TransportError, match=r"did not end in time.*ranks=\[1\]"):
        run_lockstep_groups(lambda g: released.wait(20) if g.rank == 1 else None, 2, timeout=0.2)
    released.set()


def test_wrong_settings_are_refused_before_any_rank_starts() -> None:
    with pytest.raises(ConfigError, match='Did you mean "layout"'):
        run_lockstep(place, 2, layuot="zigzag")
    with pytest.raises(GroupError, match="size=2, world=3"):
        run_lockstep(place, 3, size=2)


# ------------------------------------------------------------------------------------------------ processes


def process_id(sp: SequenceParallel, x: torch.Tensor, offset: int) -> tuple[int, torch.Tensor]:
    assert torch.get_num_threads() == 1
    return os.getpid(), sp.groups.ring.all_reduce(x + sp.rank) + offset


def test_a_pool_keeps_its_processes_and_takes_arguments(pool2: RankPool) -> None:
    first = pool2.run(process_id, torch.tensor([1.0, 2.0]), 100)
    again = pool2.run(process_id, torch.tensor([1.0, 2.0]), 100)
    pids = [pid for pid, _ in first]
    assert pids == [pid for pid, _ in again] == pool2.pids()
    assert len({*pids, os.getpid()}) == 3
    assert [total.tolist() for _, total in first] == [[103.0, 105.0]] * 2


def is_deterministic(_: Any) -> bool:
    return torch.are_deterministic_algorithms_enabled()


def test_workers_are_as_deterministic_as_their_parent(pool2: RankPool) -> None:
    assert torch.are_deterministic_algorithms_enabled()
    assert pool2.run_groups(is_deterministic) == [True, True]


def fail_on_last(sp: SequenceParallel) -> None:
    if sp.rank == sp.size - 1:
        raise KeyError("no such thing")
    sp.groups.ring.all_reduce(torch.ones(1))


def test_an_error_in_a_worker_comes_back_with_its_traceback_and_the_pool_goes_on(pool2: RankPool) -> None:
    before = pool2.run_groups(own_id)
    with pytest.raises(KeyError, match="no such thing") as caught:
        pool2.run(fail_on_last)
    assert "in fail_on_last" in str(caught.value.__cause__)
    assert caught.value.__notes__ == ["(raised on rank 1 of 2 processes)"]
    after = pool2.run_groups(own_id)
    assert not {*before} & {*after}  # started anew: a message may have been on its way


def own_id(_: Any) -> int:
    return os.getpid()


def agree_to_fail(sp: SequenceParallel) -> None:
    sp.groups.ring.agree("batch", {}, BatchError("no labels", fix="Give labels.") if sp.rank == 0 else None)


def test_an_error_that_all_ranks_agreed_on_does_not_cost_a_restart(pool2: RankPool) -> None:
    before = pool2.run_groups(own_id)
    with pytest.raises(BatchError, match="no labels"):
        pool2.run(agree_to_fail)
    assert pool2.run_groups(own_id) == before
    assert [total.item() for _, total in pool2.run(process_id, torch.zeros(1), 0)] == [1.0, 1.0]


def leave_without_a_word(sp: SequenceParallel) -> None:
    if sp.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    sp.groups.ring.all_reduce(torch.ones(1))


def test_a_worker_that_dies_is_named_with_its_exit_code(pool2: RankPool) -> None:
    with pytest.raises(TransportError, match="rank 0 ended with exit code -9"):
        pool2.run(leave_without_a_word)
    assert len(pool2.run_groups(own_id)) == 2


class StubbornError(Exception):
    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle this")


def raise_what_cannot_travel(_: Any) -> None:
    raise StubbornError("hello")


def test_an_error_that_cannot_be_pickled_comes_back_as_text(pool2: RankPool) -> None:
    with pytest.raises(RuntimeError, match="StubbornError: hello"):
        pool2.run_groups(raise_what_cannot_travel)


def test_what_workers_cannot_import_is_refused_with_the_fix(pool2: RankPool) -> None:
    with pytest.raises(ConfigError, match=r"does not pickle.*lambda.*top level of a module"):
        pool2.run(lambda sp: sp.rank)


def said(_: Any) -> str | None:
    return os.environ.get("SAID")


def test_workers_have_the_environment_of_the_moment_at_which_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for word in ("hello", "world"):
        monkeypatch.setenv("SAID", word)
        with RankPool(1, timeout=60) as pool:
            assert pool.run_groups(said) == [word]


def wait_long(sp: SequenceParallel, folder: Path) -> None:
    (folder / str(sp.rank)).write_text(str(os.getpid()))
    time.sleep(60 if sp.rank == 1 else 0)


def test_run_processes_ends_all_it_started_even_when_time_is_up(tmp_path: Path) -> None:
    with RankPool(2, timeout=60) as pool:
        pool.run_groups(own_id)  # the start has a limit of its own
        pool.timeout = 1.0
        with pytest.raises(TransportError, match="rank 1 did not answer, after 1"):
            pool.run(wait_long, tmp_path)
        assert pool.pids() == []
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / str(rank)).read_text()), 0)


@pytest.mark.slow
def test_run_processes_is_a_pool_for_one_run() -> None:
    assert run_processes(place, 2, layout="contiguous") == [(0, 0, "contiguous"), (1, 0, "contiguous")]


# ------------------------------------------------------------------------------------------------ dense and compare


def one_query(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softcap: float | None) -> tuple[torch.Tensor, float]:
    """Textbook attention of one query of width D over keys (n, D) and values (n, E)."""
    logits = [float(q @ key) / len(q) ** 0.5 for key in k]
    if softcap:
        logits = [softcap * float(torch.tanh(torch.tensor(x, dtype=torch.float64) / softcap)) for x in logits]
    weights = torch.tensor(logits, dtype=torch.float64).exp()
    return (weights[:, None] * v).sum(0) / weights.sum(), float(weights.sum().log())


@pytest.mark.parametrize(
    ("causal", "window", "softcap"), [(True, None, None), (False, None, None), (True, 3, None), (True, 1, 2.0)]
)
def test_dense_attention_is_textbook_attention_within_each_document(
    causal: bool, window: int | None, softcap: float | None
) -> None:
    case = Case(heads=6, kv_heads=2, head_dim=5, value_dim=3, batch=2)
    q, k, v, _ = case.inputs(10)
    out, lse = dense_attention(q, k, v, [4, 1, 5], causal, window, softcap=softcap)
    assert out.shape == (2, 10, 6, 3)
    assert lse.shape == (2, 6, 10)
    for start, stop in ((0, 4), (4, 5), (5, 10)):
        for s in range(start, stop):
            first, last = (max(start, s + 1 - window) if window else start), (s + 1 if causal else stop)
            for h in range(6):
                keys, values = k[1, first:last, h // 3], v[1, first:last, h // 3]
                expected, expected_lse = one_query(q[1, s, h], keys, values, softcap)
                torch.testing.assert_close(out[1, s, h], expected, atol=1e-14, rtol=1e-12)
                assert lse[1, h, s].item() == pytest.approx(expected_lse, abs=1e-13)


def test_dense_attention_has_the_gradient_of_finite_differences() -> None:
    case = Case(heads=2, kv_heads=1, head_dim=3)
    inputs = [x.requires_grad_() for x in case.inputs(5)[:3]]
    assert torch.autograd.gradcheck(lambda q, k, v: dense_attention(q, k, v, [2, 3], softcap=3.0)[0], inputs)


def test_dense_attention_refuses_lengths_that_do_not_sum_up() -> None:
    q, k, v, _ = Case().inputs(5)
    with pytest.raises(ValueError, match="do not sum to 5 queries and 5 keys"):
        dense_attention(q, k, v, [3, 1])
    with pytest.raises(PlanError, match="a window is a pair"):
        dense_attention(q, k, v, 5, causal=False, window=2)


def test_relative_error_is_safe_where_tensors_are_empty_infinite_or_zero() -> None:
    inf = torch.inf
    assert relative_error(torch.tensor([3.0, 4.1]), torch.tensor([3.0, 4.0])) == pytest.approx(0.02, rel=1e-5)
    assert relative_error(torch.zeros(0, 3), torch.zeros(0, 3)) == 0
    assert relative_error(torch.tensor([-inf, 1.0]), torch.tensor([-inf, 1.0])) == 0
    assert relative_error(torch.tensor([0.0, 1.0]), torch.tensor([-inf, 1.0])) == inf
    assert relative_error(torch.ones(2), torch.zeros(2)) == inf
    assert relative_error(torch.zeros(2), torch.ones(2)) == 1  # an answer of all zeros passes no tolerance below 1
    assert not relative_error(torch.tensor([torch.nan]), torch.ones(1)) <= 1e30
    with pytest.raises(ValueError, match=r"\(2,\) and \(1, 2\)"):
        relative_error(torch.ones(2), torch.ones(1, 2))


def test_the_ring_matches_dense_in_threads_and_in_processes(pool2: RankPool) -> None:
    errors = assert_matches_dense([7, 1, 13], 3, layout="striped")
    assert sorted(errors) == ["dk", "dq", "dv", "lse", "out"]
    assert all(0 < error < 1e-14 for error in errors.values())
    assert_matches_dense([7, 1, 13], 2, Case(dtype=torch.float32), tolerance=2e-6, pool=pool2)
    with pytest.raises(ValueError, match="the pool has 2 ranks, not 3"):
        assert_matches_dense(21, 3, pool=pool2)


def test_a_comparison_fails_when_a_rank_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    import seqpar_ring.attention as attention

    right = attention.ring_attention

    def slightly_wrong(q: Any, *args: Any, **options: Any) -> Any:
        out, lse = right(q, *args, **options)
        return torch.cat([out[:, :-1], out[:, -1:] * (1 + 1e-6)], dim=1), lse

    monkeypatch.setattr(attention, "ring_attention", slightly_wrong)
    with pytest.raises(AssertionError, match=r"above 1e-12: \{'out': .*'dq': .*'dk': .*'dv'"):
        assert_matches_dense([5, 4], 2)
