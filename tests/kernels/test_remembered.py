"""What is made of a call is made once, and never given for another call."""

from __future__ import annotations

import gc

from seqpar_ring.geometry import INF
from seqpar_ring.kernels.remembered import remembered
from seqpar_ring.schedule import Call


def call(rows: int) -> Call:
    return Call(0, 0, INF, 0, (0, rows), (0, rows))


class Making:
    def __init__(self) -> None:
        self.times = 0

    def __call__(self, one: Call, batch: int = 1) -> tuple[int, int]:
        self.times += 1
        return one.cu_q[-1], batch


def test_a_calls_result_is_made_once_for_each_of_the_other_arguments() -> None:
    making, one = Making(), call(5)
    found = remembered(making)
    assert found(one, 1) is found(one, 1)
    assert found(one, batch=2) == found(one, batch=2) == (5, 2)
    assert making.times == 2


def test_calls_that_come_and_go_at_the_same_address_are_told_apart() -> None:
    found, addresses = remembered(Making(), size=2), set()
    for rows in range(1, 500):
        one = call(rows)
        addresses.add(id(one))
        assert found(one) == (rows, 1)
        del one
        gc.collect(0)
    assert len(addresses) < 499, "no address came twice: the test shows nothing"


def test_the_oldest_is_forgotten() -> None:
    making, calls = Making(), [call(rows) for rows in (1, 2, 3)]
    found = remembered(making, size=2)
    for one in calls:
        found(one)
    found(calls[2])
    assert making.times == 3
    found(calls[0])
    assert making.times == 4
