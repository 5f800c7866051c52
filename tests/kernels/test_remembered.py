"""What is made of a call is made once, and never given for another call."""

from __future__ import annotations

import gc
import sys
import weakref

import pytest
import torch

from seqpar_ring.geometry import INF
from seqpar_ring.kernels.remembered import capturing, remembered
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


def test_what_a_graph_was_captured_with_is_never_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph holds addresses: its lengths would be overwritten once other calls have come."""
    found, calls = remembered(lambda one: torch.tensor(one.cu_q), size=2), [call(rows) for rows in range(1, 9)]
    kept = []
    for graph in (True, False):
        monkeypatch.setattr(sys.modules[capturing.__module__], "capturing", lambda graph=graph: graph)
        kept.append(weakref.ref(found(calls[graph])))
    for one in calls[2:]:
        found(one)
    gc.collect()
    assert [ref() is not None for ref in kept] == [True, False]


def test_nothing_is_captured_where_cuda_has_not_begun() -> None:
    assert not capturing()
