"""After a pass that failed in the middle, and where ranks run different backward passes: an error on all ranks.

Messages are told apart by their order alone, so whatever is sent and not received is taken for the next of its lane.
"""

from __future__ import annotations

import re
from threading import Event, Thread
from typing import Any

import pytest
import torch
import torch.distributed as dist
from saying import said_of
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

from seqpar_ring import groups as process_groups
from seqpar_ring import ring_attention, run
from seqpar_ring.errors import DisagreementError, PlanError, SeqparError
from seqpar_ring.groups import Groups
from seqpar_ring.parallel import SequenceParallel
from seqpar_ring.plan import Plan
from seqpar_ring.testing import RankPool, run_lockstep
from seqpar_ring.transport.base import Agreed


def tensors(plan: Plan, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(1, plan.tokens, 2, 4, dtype=torch.float64, generator=generator)
    return [plan.shard(whole).requires_grad_() for _ in range(3)]


def fail_and_try_again(groups: Groups) -> list[str]:
    """What two calls say, of which the first has the last rank run out of memory in its last stage."""
    sp = SequenceParallel(size=groups.size)  # its own, since it cannot be used after that
    plan, said = sp.plan(24), []
    inputs = tensors(plan)
    use, stage = run.Run._seen, [0]

    def full(self: Any, work: Any) -> Any:
        stage[0] += sp.rank == sp.size - 1
        if stage[0] == sp.size:
            stage[0] = 0
            raise torch.OutOfMemoryError("out of memory")
        return use(self, work)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Run, "_seen", full)
        for _ in range(2):
            try:
                ring_attention(*inputs, plan)
                said.append("fine")
            except (SeqparError, torch.OutOfMemoryError) as error:
                said.append(f"{type(error).__name__}: {error}")
    return said


def test_a_pass_is_not_tried_again_over_messages_that_a_failed_one_left(pool2: RankPool) -> None:
    """A rank has its error in its last stage and tries again; the other has all it needs and goes on. They took each
    other's messages, and answers were off by half."""
    for rank, (first, second) in enumerate(pool2.run_groups(fail_and_try_again)):
        assert first == ("fine" if rank == 0 else "OutOfMemoryError: out of memory")
        assert second.startswith("TransportError")
        assert "failed in the middle of a pass on this rank (OutOfMemoryError: out of memory)" in second
        assert ("rank 1 failed" in second) == (rank == 0)


def one_of_two(sp: SequenceParallel) -> None:
    """Each rank differentiates another one of two calls."""
    plan = sp.plan(24)
    a, b = (tensors(plan, seed) for seed in (1, 2))
    outs = [ring_attention(*x, plan) for x in (a, b)]
    (outs[sp.rank].sum()).backward()  # type: ignore[union-attr]


def the_other_order(sp: SequenceParallel) -> None:
    plans = [sp.plan(24), sp.plan([7, 17])]
    outs = [ring_attention(*tensors(plan), plan) for plan in plans]
    for out in outs if sp.rank == 0 else outs[::-1]:
        out.sum().backward()  # type: ignore[union-attr]


@pytest.mark.parametrize("what", [one_of_two, the_other_order])
def test_ranks_that_run_backward_of_different_calls_are_told_so(what: Any) -> None:
    with pytest.raises(DisagreementError, match=r"attention's backward.*of which call"):
        run_lockstep(what, 2)


def test_calls_may_be_differentiated_in_any_order_that_all_ranks_have() -> None:
    def grads(sp: SequenceParallel) -> list[Tensor]:
        plan = sp.plan(24)
        inputs = [tensors(plan, seed) for seed in (1, 2, 3)]
        with torch.no_grad():
            ring_attention(*inputs[0], plan)  # an evaluation in between counts, too, on all alike
        outs: list[Any] = [ring_attention(*x, plan) for x in inputs]
        found = []
        for i in (1, 0, 2, 1):
            found += torch.autograd.grad(outs[i].sum(), inputs[i], retain_graph=True)
        return found

    for found in run_lockstep(grads, 3):
        assert all(torch.equal(a, b) for a, b in zip(found[:3], found[9:], strict=True))


def test_what_ranks_could_not_agree_on_is_not_taken_for_agreed() -> None:
    """As on a GPU, where what is known is not compared again: the rank with the error would be the only one to ask."""

    def retry(sp: SequenceParallel) -> bool:
        ring = sp.groups.ring
        problem = PlanError("wrong here", fix="None.") if sp.rank == 1 else None
        with pytest.raises(PlanError):
            ring.agree_at_first("a call", {"of": 1}, problem)
        before = ring.agreed.knows(("a call", repr({"of": 1})))
        ring.agree_at_first("a call", {"of": 1})
        ring.agree = lambda *_: pytest.fail("it was asked again")  # type: ignore[method-assign]
        ring.agree_at_first("a call", {"of": 1})
        return before

    assert run_lockstep(retry, 2) == [False] * 2
    short = Agreed(kept=1)
    short.add("a")
    short.add("b")
    assert [short.knows(x) for x in "ab"] == [False, True]


def mesh_of_two(groups: Groups) -> str:
    """What is said of a mesh over half of four ranks."""
    return said_of(lambda: process_groups.make(2, DeviceMesh("cpu", [0, 1], mesh_dim_names=("ring",))))


def test_a_mesh_over_part_of_the_world_is_refused_on_all_ranks(pool4: RankPool) -> None:
    for said in pool4.run_groups(mesh_of_two):
        assert said.startswith("GroupError")
        assert "this rank is not in the mesh" in said
        assert "mesh=[0, 1]" in said


def use_after_destruction(groups: Groups) -> str:
    before = set(dist.distributed_c10d._world.pg_map)
    mine = process_groups.make(2, timeout=60.0)
    for group in [group for group in dist.distributed_c10d._world.pg_map if group not in before]:
        dist.destroy_process_group(group)
    del before, group
    return said_of(lambda: mine.ring.agree("anything", {}))


def test_groups_that_were_destroyed_are_named(pool2: RankPool) -> None:
    for said in pool2.run_groups(use_after_destruction):
        assert said.startswith("TransportError: the process groups of this SequenceParallel were destroyed")


def two_threads(groups: Groups) -> list[str]:
    """What two threads of each rank say that attend at once; they meet in the middle of a pass of the first."""
    sp = SequenceParallel(size=groups.size)  # its own, since it cannot be used after that
    plan, said = sp.plan(24), ["nothing", "nothing", "nothing"]
    inside, done = Event(), Event()
    use = run.Run._seen

    def slow(self: Any, work: Any) -> Any:
        inside.set()
        assert done.wait(20)
        return use(self, work)

    def attend(i: int) -> None:
        said[i] = said_of(lambda: ring_attention(*tensors(plan, i), plan))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Run, "_seen", slow)
        first = Thread(target=attend, args=(0,))
        first.start()
        assert inside.wait(20)
        attend(1)
        done.set()
        first.join(20)
    attend(2)
    return said


def test_two_threads_of_a_rank_do_not_take_each_others_messages(pool2: RankPool) -> None:
    """Without an error about half of the results were wrong."""
    for first, second, third in pool2.run_groups(two_threads):
        assert first == "nothing was raised"  # the messages of this one were its own
        assert re.search("TransportError: .*while another was in attention.*in one thread at a time", second)
        assert re.search("TransportError: .*while another was in attention.*messages may be on their way", third)


def fail_in_the_loss(groups: Groups) -> list[str]:
    """What two losses say, of which the first has the last rank run out of memory for its logits."""
    sp, said = SequenceParallel(size=groups.size), []
    logits, labels = torch.randn(1, 3, 4), torch.ones(1, 3, dtype=torch.int64)
    whole, times = functional.cross_entropy, [0]

    def full(*args: Any, **kwargs: Any) -> Tensor:
        times[0] += 1
        if sp.rank == 1 and times[0] == 1:
            raise torch.OutOfMemoryError("out of memory")
        return whole(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "cross_entropy", full)
        for _ in range(2):
            try:
                sp.loss(logits, labels)
                said.append("fine")
            except (SeqparError, torch.OutOfMemoryError) as error:
                said.append(f"{type(error).__name__}: {error}")
    return said


def test_a_loss_that_fails_on_one_rank_fails_on_all_and_can_be_tried_again(pool2: RankPool) -> None:
    """The others waited in its sum until the timeout, and took a second try for it."""
    for rank, (first, second) in enumerate(pool2.run_groups(fail_in_the_loss)):
        assert "out of memory" in first
        assert ("rank 1 failed" in first) == (rank == 0)
        assert second == "fine"


def test_one_rank_alone_may_try_again() -> None:
    """There are no messages: memory was full, say, and the batch is made smaller."""
    sp = SequenceParallel(size=1)
    plan = sp.plan(24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Run, "_seen", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
        with pytest.raises(torch.OutOfMemoryError):
            ring_attention(*tensors(plan), plan)
    assert isinstance(ring_attention(*tensors(plan), plan), Tensor)
