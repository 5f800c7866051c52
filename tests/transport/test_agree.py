"""Agreement over both transports, and the settling of claims without any."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from seqpar_ring.errors import BatchError, DisagreementError, TransportError
from seqpar_ring.groups import Groups
from seqpar_ring.testing import RankPool, run_lockstep_groups
from seqpar_ring.transport.agreement import claim, digest, settle

Run = Callable[..., list[Any]]


@pytest.fixture(params=["lockstep", "gloo"])
def run(request: pytest.FixtureRequest) -> Run:
    """Calls fn(groups, *args) on four ranks."""
    if request.param == "gloo":
        pool: RankPool = request.getfixturevalue("pool4")
        return pool.run_groups
    return lambda fn, *args: run_lockstep_groups(lambda groups: fn(groups, *args), 4)


def say(groups: Groups, what: list[str], records: list[dict[str, object]]) -> str:
    """What the rank is told after it said its part; twice, so that the transport must still be in step afterwards."""
    told = ""
    for _ in range(2):
        try:
            groups.ring.agree(what[groups.rank], records[groups.rank])
        except DisagreementError as error:
            told = str(error)
    return told


def test_equal_records_pass(run: Run) -> None:
    record = {"lengths": (3, 4), "dtype": torch.bfloat16, "layout": "zigzag"}
    assert run(say, ["plan"] * 4, [record] * 4) == [""] * 4


def test_a_field_that_differs_is_named_with_each_rank_s_value_on_every_rank(run: Run) -> None:
    records: list[dict[str, object]] = [{"dtype": "bf16", "lengths": (3, 4)} for _ in range(4)]
    records[2]["lengths"] = (3, 5)
    for message in run(say, ["plan"] * 4, records):
        assert "plan: the ranks hold different values of 'lengths'" in message
        assert "rank 0, 1, 3=(3, 4)" in message
        assert "rank 2=(3, 5)" in message


def test_a_field_that_only_some_ranks_give_counts_as_different(run: Run) -> None:
    records: list[dict[str, object]] = [{"S": 1}, {"S": 1}, {"S": 1, "window": 4}, {"S": 2}]
    for message in run(say, ["plan"] * 4, records):
        assert "different values of 'S'" in message
        assert "also different=window" in message


def test_ranks_at_different_points_are_told_so(run: Run) -> None:
    for message in run(say, ["forward", "forward", "backward", "forward"], [{}] * 4):
        assert "point in the program" in message
        assert "rank 2=backward" in message


def be_in_trouble(groups: Groups, error: Exception, where: int) -> tuple[str, str]:
    with pytest.raises(Exception) as caught:
        groups.ring.agree("batch", {"S": 1}, error if groups.rank == where else None)
    assert (caught.value is error) == (groups.rank == where)
    return caught.typename, str(caught.value)


def test_one_rank_s_error_is_raised_on_all_in_its_own_class(run: Run) -> None:
    error = BatchError("labels are missing", fix="Give labels.", keys=["input_ids"])
    results = run(be_in_trouble, error, 1)
    assert results[1] == ("BatchError", str(error))
    for kind, text in (results[0], results[2], results[3]):
        assert kind == "BatchError"
        assert text == "rank 1 failed: labels are missing [keys=['input_ids']]. Fix: Give labels."


def test_foreign_errors_cross_too(run: Run) -> None:
    assert run(be_in_trouble, KeyError("labels"), 3)[0] == ("KeyError", repr("rank 3 failed: labels"))
    kind, text = run(be_in_trouble, UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), 3)[0]
    assert kind == "TransportError"
    assert "batch: rank 3 failed with UnicodeDecodeError" in text


def test_an_error_outweighs_a_difference() -> None:
    claims = [claim("plan", {"S": 1}), claim("plan", {"S": 2}), claim("plan", {}, BatchError("bad", fix="Mend it."))]
    with pytest.raises(BatchError, match="rank 2 failed: bad"):
        settle(claims, 0)


def test_an_error_that_cannot_be_pickled_still_says_its_text() -> None:
    class LocalError(ValueError):
        pass

    with pytest.raises(TransportError, match="rank 1 failed with LocalError: no way"):
        settle([claim("plan", {}), claim("plan", {}, LocalError("no way"))], 0)


def test_digests_differ_by_point_field_value_and_error() -> None:
    said = [
        claim("plan", {"S": 1}),
        claim("loss", {"S": 1}),
        claim("plan", {"T": 1}),
        claim("plan", {"S": 2}),
        claim("plan", {"S": "1"}),
        claim("plan", {"S": 1}, ValueError()),
    ]
    assert digest(said[0]) == digest(claim("plan", {"S": 1}))
    assert len({digest(one) for one in said}) == len(said)
    assert all(-(2**63) <= number < 2**63 for one in said for number in digest(one))
