"""Groups: which rank is where, over threads and over processes, and every wrong size or mesh by name."""

import gc
import os
import weakref
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from saying import said_of
from torch.distributed.device_mesh import init_device_mesh

from seqpar_ring import SequenceParallel, places, ring_attention
from seqpar_ring import groups as process_groups
from seqpar_ring.errors import DisagreementError, GroupError, TransportError
from seqpar_ring.groups import Groups
from seqpar_ring.testing import RankPool, run_lockstep_groups
from seqpar_ring.transport import DistributedTransport


def place(groups: Groups) -> tuple[int, ...]:
    assert groups.ring.rank == groups.rank
    assert groups.ring.world == groups.size
    assert groups.everyone.rank == groups.global_rank
    assert groups.everyone.world == groups.world_size
    return groups.global_rank, groups.data_rank, groups.rank, groups.data_size


def test_two_rings_of_two_are_consecutive_ranks(pool4: RankPool) -> None:
    expected = [(0, 0, 0, 2), (1, 0, 1, 2), (2, 1, 0, 2), (3, 1, 1, 2)]
    assert run_lockstep_groups(place, 4, size=2) == expected
    assert pool4.run_groups(place, size=2) == expected


def test_one_ring_and_rings_of_one_are_the_two_ends(pool4: RankPool) -> None:
    whole, single = [(r, 0, r, 1) for r in range(4)], [(r, r, 0, 4) for r in range(4)]
    assert pool4.run_groups(place) == run_lockstep_groups(place, 4) == whole
    assert pool4.run_groups(place, size=1) == run_lockstep_groups(place, 4, size=1) == single


def one_group_serves_both(groups: Groups) -> bool:
    assert isinstance(groups.ring, DistributedTransport)
    assert isinstance(groups.everyone, DistributedTransport)
    total = groups.everyone.all_reduce(torch.tensor([groups.global_rank]))
    assert total.item() == sum(range(groups.world_size))
    return groups.everyone._lanes["control"] is groups.ring._lanes["control"]


def test_no_group_is_made_for_everyone_where_all_share_one_sequence(pool4: RankPool) -> None:
    assert pool4.run_groups(one_group_serves_both) == [True] * 4
    assert pool4.run_groups(one_group_serves_both, size=2) == [False] * 4


def test_a_world_of_one_needs_no_torch_distributed() -> None:
    assert not dist.is_initialized()
    groups = process_groups.make(1)
    assert place(groups) == (0, 0, 0, 1)
    groups.ring.agree("plan", {"S": 1})
    groups.everyone.agree("plan", {"S": 1})
    assert groups.mesh is None


def test_several_ranks_without_torch_distributed_are_told_how_to_start_it() -> None:
    with pytest.raises(GroupError, match=r"not initialised \[size=2\].*torchrun"):
        process_groups.make(2)


def test_lanes_over_nccl_have_streams_of_high_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    class Options:
        def __init__(self, is_high_priority_stream: bool = False) -> None:
            self.high, self._timeout = is_high_priority_stream, None

    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=Options), raising=False)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    limit = timedelta(seconds=7)
    for backend in ("nccl", "cpu:gloo,cuda:nccl"):
        made = [process_groups.options_of(lane, backend, limit) for lane in ("kv", "dkv", "kv_far")]
        assert [(one.high, one._timeout) for one in made] == [(True, limit)] * 3
        assert made[0] is not made[1]  # torch writes the group's name into it
        assert process_groups.options_of("control", backend, limit) is None
    assert process_groups.options_of("kv", "nccl", None)._timeout is None
    assert process_groups.options_of("kv", "gloo", limit) is None

    asked: list[Any] = []
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    monkeypatch.setattr(dist, "new_group", lambda line, timeout, pg_options: asked.append((timeout, pg_options)))
    process_groups._my_group([(0, 1), (2, 3)], 0, 7.0, "dkv")
    assert [(timeout, options.high) for timeout, options in asked] == [(limit, True)] * 2


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_below_one_is_refused(size: int) -> None:
    with pytest.raises(GroupError, match=f"size={size}, world=1"):
        process_groups.make(size)


def mesh_of_default(groups: Groups) -> tuple[Any, ...]:
    assert groups.mesh is not None
    return groups.mesh.mesh_dim_names, groups.mesh.mesh.tolist(), groups.mesh.get_local_rank("ring")


def test_the_default_mesh_is_data_by_ring(pool4: RankPool) -> None:
    assert pool4.run_groups(mesh_of_default, size=2)[3] == (("data", "ring"), [[0, 1], [2, 3]], 1)


def make_and_say(
    _: Groups, size: int, shape: tuple[int, ...] | None, names: tuple[str, ...] | None, part: str | None = None
) -> tuple[Any, ...] | str:
    """Make groups over a mesh (or a dimension of one) and return this rank's place and its ring's global ranks."""
    mesh = None if shape is None else init_device_mesh("cpu", shape, mesh_dim_names=names)
    if mesh is not None and part is not None:
        mesh = mesh[part]
    try:
        groups = process_groups.make(size, mesh, timeout=30)
    except (GroupError, DisagreementError) as error:
        return f"{type(error).__name__}: {error}"
    ring = groups.ring.all_gather(torch.tensor([dist.get_rank()]), [1] * size).tolist()
    assert mesh is None or groups.mesh is mesh
    return groups.data_rank, groups.rank, ring


def test_a_mesh_decides_which_ranks_form_a_ring(pool4: RankPool) -> None:
    expected = [(0, 0, [0, 2]), (1, 0, [1, 3]), (0, 1, [0, 2]), (1, 1, [1, 3])]
    assert pool4.run_groups(make_and_say, 2, (2, 2), ("ring", "data")) == expected
    assert pool4.run_groups(make_and_say, 2, (2, 2), ("ring", "data"), "ring") == expected


def test_a_mesh_of_one_unnamed_dimension_is_the_ring(pool4: RankPool) -> None:
    assert pool4.run_groups(make_and_say, 4, (4,), None) == [(0, r, [0, 1, 2, 3]) for r in range(4)]


def worlds_of(_: Groups) -> tuple[Any, ...]:
    """Place in a mesh that has parts of a model too, and the global ranks of `everyone`."""
    mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("data", "ring", "model"))
    groups = process_groups.make(2, mesh, timeout=30)
    everyone = groups.everyone.all_gather(torch.tensor([dist.get_rank()]), [1] * groups.world_size).tolist()
    return groups.data_rank, groups.data_size, groups.rank, everyone


def test_ranks_with_other_parts_of_the_model_are_another_world(pool4: RankPool) -> None:
    expected = [(0, 1, 0, [0, 2]), (0, 1, 0, [1, 3]), (0, 1, 1, [0, 2]), (0, 1, 1, [1, 3])]
    assert pool4.run_groups(worlds_of) == expected


@pytest.mark.parametrize(
    ("size", "shape", "names", "expected"),
    [
        (3, None, None, "size=3, world=4]. Fix: Give a size of 1 or 2 or 4"),
        (8, None, None, "size=8, world=4"),
        (4, (2, 2), ("data", "ring"), "Fix: Give size=2, or a mesh whose ring has 4 ranks."),
        (2, (2, 2), ("dp", "cp"), "no dimension named \"ring\" [mesh_dim_names=('dp', 'cp'), shape=(2, 2)]"),
        (2, (2, 2), None, 'no dimension named "ring"'),
    ],
)
def test_a_size_or_mesh_that_does_not_fit_is_refused_on_every_rank(
    pool4: RankPool, size: int, shape: tuple[int, ...] | None, names: tuple[str, ...] | None, expected: str
) -> None:
    for message in map(str, pool4.run_groups(make_and_say, size, shape, names)):
        assert message.startswith("GroupError")
        assert expected in message


def ask_for_different_sizes(groups: Groups) -> str:
    return str(make_and_say(groups, 2 if groups.rank == 3 else 4, None, None))


def test_ranks_that_ask_for_different_sizes_are_told_so_before_any_group_is_made(pool4: RankPool) -> None:
    for message in pool4.run_groups(ask_for_different_sizes):
        assert message.startswith("DisagreementError: sequence groups: the ranks hold different values of 'size'")
        assert "rank 0, 1, 2=4, rank 3=2" in message


def ask_for_another_layout(groups: Groups) -> str:
    return said_of(lambda: SequenceParallel(size=2, **{"layout": "zigzag" if groups.global_rank else "zig zag"}))


def test_a_setting_that_is_wrong_on_one_rank_is_every_ranks_error(pool2: RankPool) -> None:
    """The others waited for it until the timeout of the default group."""
    mine, theirs = pool2.run_groups(ask_for_another_layout)
    assert "ConfigError: unknown layout" in mine
    assert "ConfigError: rank 0 failed: unknown layout" in theirs


def test_a_lockstep_world_refuses_a_size_that_does_not_divide_it() -> None:
    with pytest.raises(GroupError, match="size=2, world=3"):
        run_lockstep_groups(place, 3, size=2)


def destroyed_groups_are_gone(groups: Groups) -> list[bool]:
    """Of a new ring's process groups: whether each is gone once it is destroyed, the ring still there."""
    before = set(dist.distributed_c10d._world.pg_map)
    mine = process_groups.make(2, timeout=60.0)
    made = [weakref.ref(group) for group in dist.distributed_c10d._world.pg_map if group not in before]
    for group in [ref() for ref in made]:
        dist.destroy_process_group(group)
    del group, before
    gc.collect()
    assert mine.size == 2
    return [ref() is None for ref in made]


def test_a_ring_does_not_keep_destroyed_groups_and_their_threads_until_the_interpreter_ends(pool2: RankPool) -> None:
    for gone in pool2.run_groups(destroyed_groups_are_gone):
        assert sum(gone) >= 3, "three lanes; the mesh may hold one, over which nothing goes"


def threads_left_by_three_rings(groups: Groups, size: int, close: bool) -> tuple[int, str]:
    """How many threads this process has more than before, and what a call after the last says."""
    process_groups.make(size, timeout=60.0).close()  # what torch starts once
    before, said = len(os.listdir("/proc/self/task")), ""
    for _ in range(3):
        sp = SequenceParallel(size=size)
        plan = sp.plan(24)
        ring_attention(*(torch.randn(1, plan.local_tokens, 2, 4) for _ in range(3)), plan)
        if close:
            sp.close()
            sp.close()  # nothing is left to do
    try:
        ring_attention(*(torch.randn(1, plan.local_tokens, 2, 4) for _ in range(3)), plan)
    except TransportError as error:
        said = str(error)
    gc.collect()
    return len(os.listdir("/proc/self/task")) - before, said


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted as Linux shows them")
@pytest.mark.parametrize("size", [2, 4])
def test_a_closed_sequence_parallel_leaves_no_threads(pool4: RankPool, size: int) -> None:
    for threads, said in pool4.run_groups(threads_left_by_three_rings, size, True):
        assert threads <= 0
        assert said.startswith("the process groups of this SequenceParallel were destroyed")
    for threads, said in pool4.run_groups(threads_left_by_three_rings, size, False):
        assert threads > 0
        assert not said


def close_over_a_given_mesh(groups: Groups) -> float:
    """A sum over the mesh's own group after the SequenceParallel on it is closed."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "ring"))
    SequenceParallel(size=2, mesh=mesh).close()
    total = torch.ones(1)
    dist.all_reduce(total, group=mesh.get_group("ring"))
    dist.all_reduce(total)  # nor the world's
    return total.item()


def test_closing_leaves_the_groups_of_a_given_mesh(pool2: RankPool) -> None:
    assert pool2.run_groups(close_over_a_given_mesh) == [4.0, 4.0]


IDS = torch.arange(4)[None]


def close_while_another_goes_on(groups: Groups) -> str:
    sp = SequenceParallel(size=2)
    try:
        if groups.rank == 0:
            sp.close()
        else:
            sp.count_targets([{"input_ids": IDS, "labels": IDS}])
    except DisagreementError as error:
        return str(error)
    return ""


def test_a_rank_that_closes_while_another_goes_on_is_told_so(pool2: RankPool) -> None:
    for said in pool2.run_groups(close_while_another_goes_on):
        assert "[rank 0=close, rank 1=count_targets]" in said


def close_beside_a_dead_rank(groups: Groups, report: Path) -> None:
    mine = process_groups.make(2, timeout=60.0)
    mine.ring.agree("start", {})
    if groups.rank == 1:
        os._exit(7)
    mine.close()
    report.write_text("closed")


def test_closing_does_not_fail_where_a_rank_is_dead(tmp_path: Path, pool2: RankPool) -> None:
    with pytest.raises(TransportError, match="rank 1 ended with exit code 7"):
        pool2.run_groups(close_beside_a_dead_rank, tmp_path / "report")
    assert (tmp_path / "report").read_text() == "closed"


def on_gpus_of_one_host(_: Groups) -> tuple[str, str]:
    """What two ranks say of GPUs of the same kind, each its own, and of different ones."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for kinds in (("H100", "H100"), ("H100", "H200")):
            place = places.Place("here", kinds[dist.get_rank()], str(dist.get_rank()))
            patch.setattr(process_groups, "place_of", lambda _, place=place: place)
            found.append(process_groups.make(2).device)
    return found[0], found[1]


def test_the_device_of_a_ring_is_the_kind_of_gpu_that_its_ranks_have_each_of_their_own(pool2: RankPool) -> None:
    assert pool2.run_groups(on_gpus_of_one_host) == [("H100", "")] * 2


def test_ranks_on_one_gpu_are_told_so_before_nccl_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where nobody set a device: over NCCL two ranks cannot share one."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="4a-01"))
    for backend, gpu in (("cpu:gloo,cuda:nccl", "4a-01"), ("cpu:gloo,cuda:gloo", "")):
        monkeypatch.setattr(dist, "get_backend_config", lambda backend=backend: backend)
        assert places.place_of(torch.device("cuda", 0))[1:] == ("H100", gpu)
    apart = [places.Place(*place) for place in (("a", "H100", "4a"), ("b", "H100", "4a"), ("a", "H100", "4b"))]
    places.refuse_shared_gpus(apart)
    places.refuse_shared_gpus([places.Place("a", "H100")] * 2)
    with pytest.raises(GroupError, match=r"use the same GPU .*ranks=\[1, 3\].*set_device"):
        places.refuse_shared_gpus([*apart, apart[1]])


def test_ranks_on_one_gpu_are_told_so_where_nccl_finds_out_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the backend "nccl" alone the exchange of places goes over NCCL, which refuses before anything is known."""
    said = "NCCL error in: ProcessGroupNCCL.cpp:77, invalid usage\nLast error:\n{}"

    def failing(last: str) -> Any:
        def fail(*_: Any) -> None:
            raise RuntimeError(said.format(last))

        return fail

    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(process_groups, "place_of", lambda device: places.Place("a", "H100", "4a"))
    twice = "Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 4a000"
    monkeypatch.setattr(dist, "all_gather_object", failing(twice + "\nand more"))
    with pytest.raises(GroupError, match=r"the same GPU.*rank 0 and rank 1 both on CUDA device 4a000'?].*set_device"):
        process_groups._agreed_lines(2, None, 60.0, ("control",))
    monkeypatch.setattr(dist, "all_gather_object", failing("socketPollConnect failed"))
    with pytest.raises(RuntimeError, match="socketPollConnect"):
        process_groups._agreed_lines(2, None, 60.0, ("control",))
