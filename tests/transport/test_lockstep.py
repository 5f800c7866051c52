"""What only lockstep can show: copies, exact sizes, and ranks that fail, end or never come."""

import time
from threading import Thread

import pytest
import torch

from seqpar_ring.errors import TransportError
from seqpar_ring.groups import Groups
from seqpar_ring.testing import run_lockstep_groups
from seqpar_ring.transport import Link, LockstepWorld, Recv, Send


def test_what_the_sender_writes_later_does_not_show() -> None:
    world = LockstepWorld(2)
    x, y = torch.ones(3), torch.zeros(3)
    world.transport(0).exchange([Send(1, x)], []).wait()
    x.fill_(9)
    world.transport(1).exchange([], [Recv(0, y)]).wait()
    assert y.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("sent", "expected", "says"),
    [
        (torch.ones(3), torch.zeros(4), r"sent=\(torch.float32, \(3,\)\), expected=\(torch.float32, \(4,\)\)"),
        (torch.ones(3), torch.zeros(3, dtype=torch.float64), "torch.float64"),
    ],
)
def test_a_size_or_dtype_that_does_not_match_is_an_error(sent: torch.Tensor, expected: torch.Tensor, says: str) -> None:
    world = LockstepWorld(2)
    world.transport(0).exchange([Send(1, sent)], [])
    with pytest.raises(TransportError, match=says):
        world.transport(1).exchange([], [Recv(0, expected)]).wait()


def test_a_rank_that_fails_ends_those_that_wait_and_those_that_call_later() -> None:
    world = LockstepWorld(3, timeout=60)
    caught: dict[str, TransportError] = {}

    def wait() -> None:
        try:
            world.transport(0).exchange([], [Recv(1, torch.zeros(1))]).wait()
        except TransportError as error:
            caught["waiting"] = error

    thread = Thread(target=wait)
    thread.start()
    started = time.monotonic()
    world.fail(2, ZeroDivisionError("division by zero"))  # not even the rank that is waited for
    thread.join(10)
    assert time.monotonic() - started < 10
    with pytest.raises(
        TransportError, match="rank 1 stopped because rank 2 failed with ZeroDivisionError: division by"
    ):
        world.transport(1).exchange([Send(0, torch.zeros(1))], [])
    assert isinstance(caught["waiting"].__cause__, ZeroDivisionError)


def test_a_message_that_never_comes_times_out_and_says_who_waited_for_whom() -> None:
    world = LockstepWorld(2, timeout=0.05)
    one = world.transport(1)
    handle = one.exchange([], [Recv(0, torch.zeros(1))], lane="dkv")
    with pytest.raises(TransportError, match=r"rank 1 waited for a message from rank 0 in lane dkv.*within 0.05 s"):
        handle.wait()
    assert one.stats.seconds_waited >= 0.05


def test_a_sender_that_has_ended_is_not_waited_for() -> None:
    world = LockstepWorld(2, timeout=60)
    world.transport(0).exchange([Send(1, torch.ones(1))], [])
    world.finish(0)
    one, x = world.transport(1), torch.zeros(1)
    one.exchange([], [Recv(0, x)]).wait()  # sent before the end
    assert x == 1
    with pytest.raises(TransportError, match="which ended without sending it"):
        one.exchange([], [Recv(0, x)]).wait()


def test_subsets_number_their_ranks_anew_and_keep_their_messages_to_themselves() -> None:
    world = LockstepWorld(4, timeout=0.05)
    part = world.subset([1, 3])
    part.transport(0).exchange([Send(1, torch.tensor([7.0]))], [])  # rank 1 of the world to rank 3
    x = torch.zeros(1)
    with pytest.raises(TransportError, match="rank 3 waited for a message from rank 1"):
        world.transport(3).exchange([], [Recv(1, x)]).wait()
    part.transport(1).exchange([], [Recv(0, x)]).wait()
    assert x == 7
    with pytest.raises(TransportError, match=r"rank 1 waited for a message from rank 3.*group=\[1, 3\]"):
        part.transport(0).exchange([], [Recv(1, x)]).wait()


def test_ranks_that_sum_different_shapes_are_told_so() -> None:
    with pytest.raises(TransportError, match="do not sum the same thing"):
        run_lockstep_groups(lambda g: g.ring.all_reduce(torch.zeros(2 + g.rank)), 2)


def test_all_gather_refuses_sizes_that_do_not_fit_the_tensor() -> None:
    with pytest.raises(TransportError, match=r"sizes=\[2, 3\], shape=\(4, 5\), dim=0"):
        run_lockstep_groups(lambda g: g.ring.all_gather(torch.zeros(4, 5), [2, 3]), 2)


def test_a_tensor_that_requires_grad_travels_without_its_graph() -> None:
    def swap(groups: Groups) -> bool:
        x, y = torch.full((2,), float(groups.rank), requires_grad=True), torch.zeros(2)
        groups.ring.exchange([Send(1 - groups.rank, x * 2)], [Recv(1 - groups.rank, y)]).wait()
        return y.requires_grad or groups.ring.all_reduce(x).requires_grad

    assert run_lockstep_groups(swap, 2) == [False, False]


def test_a_link_makes_messages_arrive_after_the_time_that_their_bytes_take() -> None:
    def waits(groups: Groups) -> float:
        ring, there = groups.ring, torch.empty(1000)
        send = [Send(1, torch.zeros(1000))] if ring.rank == 0 else []
        handles = [ring.exchange(send, [] if send else [Recv(0, there)]) for _ in range(3)]
        started = time.monotonic()
        for handle in handles:
            handle.wait()
        return time.monotonic() - started

    sender, receiver = run_lockstep_groups(waits, 2, at_once=2, link=Link(bandwidth=40_000.0, latency=0.05))
    assert receiver >= 0.3  # three messages of 4,000 bytes, one after the other, then the latency
    assert sender < receiver


def test_ranks_take_turns_and_give_them_up_while_they_wait() -> None:
    """With one turn, ranks that wait for each other in a ring still all get through."""
    running: list[int] = []

    def pass_on(groups: Groups) -> None:
        for _ in range(5):
            running.append(groups.rank)
            assert len(running) == 1
            time.sleep(0.002)
            running.remove(groups.rank)
            groups.ring.all_reduce(torch.ones(1))

    run_lockstep_groups(pass_on, 4)


def test_a_rank_that_waited_in_vain_goes_on_when_it_is_its_turn_again() -> None:
    """Its time is up while another rank runs, and runs on."""
    running: list[int] = []

    def late(groups: Groups) -> str:
        if groups.rank == 0:
            with pytest.raises(TransportError, match="rank 0 waited for a message from rank 1"):
                groups.ring.exchange([], [Recv(1, torch.zeros(1))]).wait()
            return f"next to {running}"
        running.append(groups.rank)
        time.sleep(0.3)
        running.remove(groups.rank)
        return "ran"

    assert run_lockstep_groups(late, 2, timeout=0.05) == ["next to []", "ran"]
