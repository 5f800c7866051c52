"""The same traffic over both transports: threads in lockstep, and processes over gloo."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from seqpar_ring.errors import TransportError
from seqpar_ring.groups import Groups
from seqpar_ring.testing import RankPool, run_lockstep_groups
from seqpar_ring.transport import Recv, Send

Run = Callable[..., list[Any]]


@pytest.fixture(params=["lockstep", "gloo"])
def run(request: pytest.FixtureRequest) -> Run:
    """Calls fn(groups, *args) on four ranks."""
    if request.param == "gloo":
        pool: RankPool = request.getfixturevalue("pool4")
        return pool.run_groups
    return lambda fn, *args, **where: run_lockstep_groups(lambda groups: fn(groups, *args), 4, **where)


def block(rank: int, to: int, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A message that no other pair of ranks would send."""
    return (torch.arange(n) + 1000 * rank + 100 * to).to(dtype)


def pass_round_the_ring(groups: Groups) -> list[int]:
    ring, held, seen = groups.ring, torch.tensor([groups.rank]), []
    for _ in range(ring.world):
        arriving = torch.full_like(held, -1)
        handle = ring.exchange(
            [Send((ring.rank + 1) % ring.world, held)], [Recv((ring.rank - 1) % ring.world, arriving)]
        )
        seen.append(int(held))
        handle.wait()
        held = arriving
    return seen


def test_a_block_that_travels_the_ring_visits_every_rank(run: Run) -> None:
    assert run(pass_round_the_ring) == [[0, 3, 2, 1], [1, 0, 3, 2], [2, 1, 0, 3], [3, 2, 1, 0]]


def send_to_all_in_several_dtypes(groups: Groups) -> bool:
    ring = groups.ring
    others = [r for r in range(ring.world) if r != ring.rank]
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        arriving = {r: torch.zeros(3 + r, 2, dtype=dtype) for r in others}
        sends = [Send(r, block(ring.rank, r, 6 + 2 * ring.rank, dtype).view(-1, 2)) for r in others]
        ring.exchange(sends, [Recv(r, arriving[r]) for r in others]).wait()
        for r in others:
            assert torch.equal(arriving[r].flatten(), block(r, ring.rank, 6 + 2 * r, dtype))
    return True


def test_all_ranks_send_to_all_others_blocks_of_unequal_size(run: Run) -> None:
    assert run(send_to_all_in_several_dtypes) == [True] * 4


def keep_several_in_flight(groups: Groups) -> list[list[float]]:
    """Three messages to one neighbour in one lane, two in the other; waited for in another order than posted.

    Neighbours post the lanes in different orders, so that a message in the wrong lane would meet another's receive.
    """
    ring = groups.ring
    right, left = (ring.rank + 1) % ring.world, (ring.rank - 1) % ring.world
    kv = [torch.zeros(2) for _ in range(3)]
    dkv = [torch.zeros(5) for _ in range(2)]
    handles = []
    for lane in ("kv", "dkv") if ring.rank % 2 else ("dkv", "kv"):
        for i, arriving in enumerate(kv if lane == "kv" else dkv):
            sign = 1 if lane == "kv" else -1
            sends = [Send(right, torch.full_like(arriving, sign * (10.0 * ring.rank + i)))]
            handles.append(ring.exchange(sends, [Recv(left, arriving)], lane))
    for handle in reversed(handles):
        handle.wait()
        handle.wait()  # a second wait finds nothing to do
    return [[float(x[-1]) for x in kv], [float(x[-1]) for x in dkv]]


def test_messages_of_a_pair_match_in_posting_order_within_each_lane(run: Run) -> None:
    for rank, (kv, dkv) in enumerate(run(keep_several_in_flight)):
        left = (rank - 1) % 4
        assert kv == [10.0 * left, 10.0 * left + 1, 10.0 * left + 2]
        assert dkv == [-10.0 * left, -10.0 * left - 1]


def send_where_some_have_nothing(groups: Groups) -> list[float]:
    """Only rank 0 has tokens; it sends to rank 2, and everything else is of size zero."""
    ring = groups.ring
    n = 3 if ring.rank == 0 else 0
    arriving = torch.full((3 if ring.rank == 2 else 0, 2), -1.0)
    sends = [Send((ring.rank + 2) % 4, torch.ones(n, 2))]
    ring.exchange(sends, [Recv((ring.rank + 2) % 4, arriving)]).wait()
    ring.exchange([], []).wait()
    assert ring.stats.messages == (1 if n else 0)
    return arriving.flatten().tolist()


def fresh_statistics(fn: Callable[[Groups], Any], groups: Groups) -> Any:
    """Pools keep their groups, and the groups their statistics."""
    groups.ring.stats.reset()
    return fn(groups)


def test_tensors_without_elements_are_not_sent(run: Run) -> None:
    assert run(partial(fresh_statistics, send_where_some_have_nothing)) == [[], [], [1.0] * 6, []]


def gather_unequal(groups: Groups) -> list[Tensor]:
    ring, sizes = groups.ring, [3, 0, 1, 5]
    rows = torch.arange(sizes[ring.rank] * 2).view(-1, 2) + 100 * ring.rank
    strided = rows.t()  # the ranks' parts lie along dim 1, and are not contiguous
    return [ring.all_gather(rows, sizes), ring.all_gather(strided, sizes, dim=1), ring.all_gather(strided, sizes, -1)]


def test_all_gather_takes_unequal_parts_along_any_dimension(run: Run) -> None:
    whole = torch.cat([torch.arange(n * 2).view(-1, 2) + 100 * r for r, n in enumerate([3, 0, 1, 5])])
    for rows, columns, last in run(gather_unequal):
        assert torch.equal(rows, whole)
        assert torch.equal(columns, whole.t())
        assert torch.equal(last, whole.t())


def gather_in_many_dtypes(groups: Groups) -> set[torch.dtype]:
    """What travels."""
    ring, known, sent = groups.ring, groups.ring.exchange, set[torch.dtype]()

    def watched(sends: Any, recvs: Any, lane: str = "kv") -> Any:
        sent.update(message.tensor.dtype for message in (*sends, *recvs))
        return known(sends, recvs, lane)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring, "exchange", watched)
        for dtype in (torch.int16, torch.uint16, torch.uint64, torch.bool, torch.complex64, torch.float64, torch.int64):
            mine = torch.tensor([[ring.rank, 0, 1]]).to(dtype)
            whole = torch.tensor([[r, 0, 1] for r in range(ring.world)]).to(dtype)
            assert torch.equal(ring.all_gather(mine, [1] * ring.world), whole)
    return sent


def test_all_gather_takes_what_no_backend_knows(run: Run) -> None:
    """NCCL sends no 16-bit integers, nor some unsigned ones; gloo sends all."""
    assert run(gather_in_many_dtypes) == [{torch.uint8}] * 4


def sum_up(groups: Groups) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(groups.rank)
    x = torch.randn(1001, generator=generator)
    total = groups.ring.all_reduce(x)
    assert total is not x
    assert torch.equal(x, torch.randn(1001, generator=generator.manual_seed(groups.rank)))  # the input stays
    return total, groups.ring.all_reduce(x[::2]), groups.everyone.all_reduce(torch.tensor(groups.global_rank + 1))


def test_all_reduce_gives_every_rank_the_same_bits(run: Run) -> None:
    results = run(sum_up)
    exact = (
        torch.stack([torch.randn(1001, generator=torch.Generator().manual_seed(r)) for r in range(4)]).double().sum(0)
    )
    for total, half, everyone in results:
        assert torch.equal(total, results[0][0])
        torch.testing.assert_close(total.double(), exact, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(half.double(), exact[::2], atol=1e-6, rtol=1e-6)
        assert everyone == 10


def count_traffic(groups: Groups) -> dict[str, object]:
    ring = groups.ring
    ring.stats.reset()
    arriving = torch.zeros(7)
    right, left = (ring.rank + 1) % 4, (ring.rank - 1) % 4
    ring.exchange([Send(right, torch.zeros(7))], [Recv(left, arriving)], "kv").wait()
    ring.exchange([Send(right, torch.zeros(7).double())], [Recv(left, arriving.double())], "dkv").wait()
    return ring.stats.as_dict()


def test_statistics_count_bytes_by_lane_and_messages(run: Run) -> None:
    for stats in run(count_traffic):
        assert stats["bytes_sent"] == {"kv": 28, "dkv": 56}
        assert stats["messages"] == 2
        assert stats["seconds_waited"] >= 0


def two_rings(groups: Groups) -> tuple[list[int], list[int]]:
    mine = torch.tensor([groups.global_rank])
    return groups.ring.all_gather(mine, [1, 1]).tolist(), groups.everyone.all_gather(mine, [1] * 4).tolist()


def test_rings_of_two_in_a_world_of_four_do_not_mix(run: Run) -> None:
    everyone = [0, 1, 2, 3]
    assert run(two_rings, size=2) == [([0, 1], everyone), ([0, 1], everyone), ([2, 3], everyone), ([2, 3], everyone)]


def post(groups: Groups, peer: int | None, tensor: Tensor, lane: str) -> str:
    to = (groups.rank + 1) % 4 if peer is None else peer
    with pytest.raises(TransportError) as caught:
        groups.ring.exchange([Send(to, tensor)], [], lane)
    with pytest.raises(TransportError) as caught_receiving:
        groups.ring.exchange([], [Recv(to, tensor)], lane)
    assert str(caught_receiving.value) == str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("peer", "tensor", "lane", "expected"),
    [
        (4, torch.ones(1), "kv", "another rank of this group as its peer [peer=4"),
        (-1, torch.ones(1), "dkv", "peer=-1"),
        (None, torch.ones(4)[::2], "kv", "not contiguous [lane='kv'"),
        (None, torch.ones(1), "kw", "unknown lane [lane='kw']"),
    ],
)
def test_what_cannot_be_posted_is_refused(run: Run, peer: int | None, tensor: Tensor, lane: str, expected: str) -> None:
    for message in run(post, peer, tensor, lane):
        assert expected in message


def post_to_itself(groups: Groups) -> str:
    return post(groups, groups.rank, torch.ones(1), "kv")


def test_a_rank_does_not_send_to_itself(run: Run) -> None:
    assert "peer=2, rank=2, world=4" in run(post_to_itself)[2]
