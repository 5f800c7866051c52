"""What only processes can show: a peer that dies, one that never comes, and the cost of agreeing."""

import os
import time
from pathlib import Path

import pytest
import torch

from seqpar_ring.errors import PlanError, TransportError
from seqpar_ring.groups import Groups
from seqpar_ring.testing import RankPool
from seqpar_ring.transport import Recv, Send


def receive_from_one_that_dies(groups: Groups, report: Path) -> None:
    groups.ring.agree("start", {})
    if groups.rank == 1:
        os._exit(7)
    started = time.monotonic()
    try:
        groups.ring.exchange([], [Recv(1, torch.zeros(3))], lane="dkv").wait()
    except TransportError as error:
        report.write_text(f"{time.monotonic() - started}\n{error}")
        raise


def test_a_peer_that_dies_ends_the_wait_for_it_with_its_name(tmp_path: Path, pool2: RankPool) -> None:
    with pytest.raises(TransportError, match="rank 1 ended with exit code 7"):
        pool2.run_groups(receive_from_one_that_dies, tmp_path / "report")
    seconds, message = (tmp_path / "report").read_text().split("\n", 1)
    assert float(seconds) < 10
    assert "rank 0 waited" in message
    assert "for a message from rank 1 in lane dkv" in message


def wait_for_one_that_is_late(groups: Groups) -> tuple[float, str, str]:
    """Rank 0 waits in the KV lane, where rank 1 posts nothing."""
    message, cause, seconds = "", "", 0.0
    if groups.rank == 0:
        try:
            groups.ring.exchange([], [Recv(1, torch.zeros(3))]).wait()
        except TransportError as error:
            message, cause = str(error), type(error.__cause__).__name__
        seconds = groups.ring.stats.seconds_waited
    return seconds, message, cause


def test_a_peer_that_never_comes_times_out_with_a_clear_message(pool2: RankPool) -> None:
    seconds, message, cause = pool2.run_groups(wait_for_one_that_is_late, timeout=1.5)[0]
    assert 1.4 < seconds < 20
    assert "for a message from rank 1 in lane kv, in vain" in message
    assert "timeout=1.5" in message
    assert "global_ranks=[0, 1]" in message
    assert cause == "RuntimeError"


def come_to_different_collectives(groups: Groups) -> str:
    if groups.rank == 1:
        return ""
    try:
        groups.ring.agree("plan", {"S": 1})
    except TransportError as error:
        return str(error)
    return "agreed"


def test_an_agreement_that_a_rank_does_not_come_to_times_out(pool2: RankPool) -> None:
    assert (
        "for ranks [1] in agreement on plan, in vain" in pool2.run_groups(come_to_different_collectives, timeout=1.0)[0]
    )


def say_what_calls_after_a_failure_say(groups: Groups) -> list[str]:
    said = []
    for call in (
        lambda: groups.ring.agree("plan", {"S": 1}),
        lambda: groups.everyone.all_reduce(torch.ones(1)),
        lambda: groups.ring.all_gather(torch.ones(1), [1, 1]),
    ):
        if groups.rank == 0:
            with pytest.raises(TransportError) as found:
                call()
            said.append(str(found.value))
    if groups.rank == 0:
        with pytest.raises(PlanError, match="wrong here"):  # what is wrong on this rank is not hidden by it
            groups.ring.agree("plan", {}, PlanError("wrong here", fix="None."))
    return said


def test_calls_after_a_failure_name_what_failed_first(pool2: RankPool) -> None:
    """They said that 0.0 seconds were waited in vain, each for something else; the ring and the world share a group."""
    first, *later = pool2.run_groups(say_what_calls_after_a_failure_say, timeout=1.0)[0]
    assert "for ranks [1] in agreement on plan, in vain" in first
    for message in later:
        assert message.startswith("the other ranks cannot be reached any more, since rank 0 waited")
        assert "in agreement on plan, in vain" in message


def send_without_waiting_for_the_receiver(groups: Groups) -> float:
    """Posting returns at once, though the receiver comes half a second later and the message is large."""
    big = torch.ones(1 << 20) * (groups.rank + 1)
    groups.ring.agree("start", {})
    started = time.monotonic()
    if groups.rank == 0:
        handle = groups.ring.exchange([Send(1, big)], [])
    else:
        time.sleep(0.5)
        handle = groups.ring.exchange([], [Recv(0, big)])
    posted = time.monotonic() - started
    handle.wait()
    assert big.unique().tolist() == [1.0]
    return posted


def test_exchange_never_blocks(pool2: RankPool) -> None:
    assert pool2.run_groups(send_without_waiting_for_the_receiver)[0] < 0.4


def time_agreement(groups: Groups, n: int) -> float:
    record = {"lengths": tuple(range(100)), "dtype": torch.float32}
    started = time.perf_counter()
    for _ in range(n):
        groups.ring.agree("plan", record)
    return (time.perf_counter() - started) / n


def test_agreeing_is_cheap_enough_for_every_new_plan(pool4: RankPool) -> None:
    assert (
        min(pool4.run_groups(time_agreement, 50)) < 0.05
    )  # under a millisecond on an idle machine; tests share theirs


def gather_conjugated(groups: Groups) -> tuple[list[complex], list[float], complex]:
    """Of tensors that torch conjugates or negates when it reads them."""
    numbers = torch.complex(torch.ones(1), torch.full((1,), 1.0 + groups.rank))
    gathered = groups.ring.all_gather(numbers.conj(), [1, 1])
    negated = groups.ring.all_gather(numbers.conj().imag, [1, 1])
    return gathered.tolist(), negated.tolist(), groups.ring.all_reduce(numbers.conj()).item()


def test_what_is_conjugated_when_it_is_read_is_sent_as_it_reads(pool2: RankPool) -> None:
    """Backends send what lies in memory, or fail, and the group was taken for lost."""
    for gathered, negated, total in pool2.run_groups(gather_conjugated):
        assert gathered == [1 - 1j, 1 - 2j]
        assert negated == [-1.0, -2.0]
        assert total == 2 - 3j
