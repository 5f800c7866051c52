import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from seqpar_ring import SequenceParallel, ring_attention
from seqpar_ring.errors import ConfigError
from seqpar_ring.passes import Pass
from seqpar_ring.testing import RankPool, run_lockstep
from seqpar_ring.trace import KINDS, Ranges, Recorder, Span, Trace, gather, load, merge, own, ranges, recording, save

TOKENS = 1031


Stages = tuple[int, list[int]]
"""Of a pass: how many there are, and at which of them the rank computes."""


def attend(sp: SequenceParallel, passes: int = 1) -> list[Stages]:
    """Forward and backward so many times."""
    torch.manual_seed(3 + sp.rank)
    plan = sp.plan(TOKENS)
    stages = []
    for _ in range(passes):
        q, k, v = (torch.randn(1, plan.local_tokens, heads, 8, requires_grad=True) for heads in (4, 2, 2))
        ring_attention(q, k, v, plan).sum().backward()
        back = plan.query_pass if sp.settings.backward == "q" else plan.backward_pass
        stages += [_stages(one) for one in (plan.forward_pass, back)]
    return stages


def _stages(one: Pass) -> Stages:
    return len(one.stages), [i for i, stage in enumerate(one.stages) if stage.uses]


def traced(sp: SequenceParallel, passes: int = 1) -> tuple[Trace, Trace, list[Stages]]:
    """(all ranks' trace, this rank's part, stages at which it computes)."""
    attend(sp)
    with recording(sp.groups.ring) as recorder:
        stages = attend(sp, passes)
    attend(sp)
    return gather(recorder, sp.groups.ring), own(recorder, sp.groups.ring), stages


def check(results: list[tuple[Trace, Trace, list[Stages]]], labels: list[str]) -> None:
    trace = results[0][0]
    assert all(found == trace for found, _, _ in results)  # the same on every rank
    assert trace.ranks == len(results)
    assert min(span.begin for span in trace.spans) == 0
    for rank, (_, _, stages) in enumerate(results):
        mine = [span for span in trace.spans if span.rank == rank]
        assert all(a.begin <= a.end <= b.begin for a, b in pairwise(mine))
        assert list(dict.fromkeys((s.run, s.label) for s in mine)) == list(enumerate(labels))
        for run, (number, computes) in enumerate(stages):
            kinds = {kind: [s.stage for s in mine if s.run == run and s.kind == kind] for kind in KINDS}
            assert kinds["compute"] == computes  # each once, in order
            assert kinds["wait"] == kinds["post"] == list(range(number))


@pytest.mark.parametrize("schedule", ["ring", "direct", "all_gather"])
def test_a_trace_has_every_stage_of_every_rank_once_and_in_order(schedule: str) -> None:
    results = run_lockstep(lambda sp: traced(sp, 2), 4, schedule=schedule)
    check(results, ["forward", "backward"] * 2)


def test_the_label_says_that_queries_travel() -> None:
    check(run_lockstep(traced, 3, backward="q"), ["forward", "backward, queries travel"])


def test_processes_are_on_one_clock(pool2: RankPool) -> None:
    results = pool2.run(traced, block_tokens=129)
    check(results, ["forward", "backward"])
    trace = results[0][0]
    begins = [min(s.begin for s in trace.spans if s.rank == rank and s.run == 0) for rank in (0, 1)]
    # They agree on their arguments just before, so neither is ahead by much, and a second is much.
    assert abs(begins[0] - begins[1]) < 1
    last = max(s.end for s in trace.spans if s.kind == "compute")
    assert 0 < last <= trace.seconds


def test_what_is_sent_late_is_waited_for(pool2: RankPool) -> None:
    trace = pool2.run(_one_is_late)[0]
    waited = [sum(s.end - s.begin for s in trace.spans if s.kind == "wait" and s.rank == rank) for rank in (0, 1)]
    assert waited[0] > 0.2
    assert waited[1] < 0.15


def _one_is_late(sp: SequenceParallel) -> Trace:
    """Rank 1 is 0.25 s late with what it sends first."""
    plan = sp.plan(TOKENS)
    q, k, v = (torch.randn(1, plan.local_tokens, heads, 8) for heads in (4, 2, 2))
    ring_attention(q, k, v, plan)
    ring = sp.groups.ring
    exchange = ring.exchange

    def late(*args: object, **settings: object) -> object:
        time.sleep(0.25 if sp.rank == 1 else 0.0)
        return exchange(*args, **settings)

    ring.exchange = late
    try:
        with recording(ring) as recorder:
            ring_attention(q, k, v, plan)
    finally:
        ring.exchange = exchange
    return gather(recorder, ring)


def test_parts_of_ranks_make_the_same_trace_as_gathering(tmp_path: Path) -> None:
    results = run_lockstep(traced, 3)
    paths = [tmp_path / f"rank{rank}.json" for rank in range(3)]
    for path, (_, part, _) in zip(paths, results, strict=True):
        save(part, path)
    whole, together = results[0][0], load(*paths)
    assert together.ranks == 3
    assert [s._replace(begin=0, end=0) for s in together.spans] == [s._replace(begin=0, end=0) for s in whole.spans]
    assert all(abs(a.begin - b.begin) < 1e-6 for a, b in zip(together.spans, whole.spans, strict=True))
    save(whole, tmp_path / "whole.json")
    assert load(tmp_path / "whole.json") == whole


def test_one_pass_begins_at_zero() -> None:
    trace = run_lockstep(traced, 2)[0][0]
    backward = trace.of(1)
    assert {span.label for span in backward.spans} == {"backward"}
    assert min(span.begin for span in backward.spans) == 0
    assert backward.seconds < trace.seconds


def test_nobody_records_twice_and_the_recorder_goes_even_after_an_error() -> None:
    def rank(sp: SequenceParallel) -> None:
        ring = sp.groups.ring
        with recording(ring), pytest.raises(ConfigError, match="being recorded already"), recording(ring):
            pass
        with pytest.raises(KeyError), recording(ring):
            raise KeyError
        assert ring.recorder is None

    run_lockstep(rank, 1)


def test_an_attention_without_a_recorder_asks_for_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Recorder, "span", forbidden)
    assert run_lockstep(attend, 2)


A = Span(0, "compute", 0.0, 1.0, 0, "forward", 0)


def not_json(path: Path) -> None:
    path.write_text("{")


def other_kind(path: Path) -> None:
    path.write_text('{"kind": "machine"}')


def other_fields(path: Path) -> None:
    path.write_text('{"kind": "trace", "ranks": 1, "fields": ["rank"], "spans": []}')


@pytest.mark.parametrize("write", [not_json, other_kind, other_fields])
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / "t.json")
    with pytest.raises(ConfigError, match="holds no trace"):
        load(tmp_path / "t.json")


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such trace"):
        load(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="twice"):
        merge([Trace(2, (A,)), Trace(2, (A,))])
    with pytest.raises(ConfigError, match="no parts of one trace"):
        merge([Trace(2, (A,)), Trace(3, (A,))])
    with pytest.raises(ConfigError, match="no parts of one trace"):
        merge([])


def named(sp: SequenceParallel) -> list[str]:
    """The ranges that torch's profiler saw of a forward and a backward pass."""
    attend(sp)
    with torch.profiler.profile() as profiler:
        attend(sp)
        with ranges(sp.groups.ring):
            attend(sp)
    assert sp.groups.ring.recorder is None
    return [event.name for event in profiler.events() if event.name.startswith("ring ")]


def test_a_profiler_sees_every_stage_by_name(pool2: RankPool) -> None:
    for found in pool2.run(named):
        for label, stages in (("forward", 3), ("backward", 4)):
            for kind in ("wait", "post"):
                expected = {f"ring {label} {stage}: {kind}" for stage in range(stages)}
                assert expected == {name for name in found if name.startswith(f"ring {label} ") and name.endswith(kind)}
            computed = sorted(n for n in found if n.startswith(f"ring {label} ") and n.endswith("compute"))
            assert computed == [f"ring {label} {stage}: compute" for stage in range(2)]


def test_ranges_and_a_recording_exclude_each_other(pool2: RankPool) -> None:
    for message in pool2.run(_both):
        assert "recorded already" in message


def _both(sp: SequenceParallel) -> str:
    ring = sp.groups.ring
    with ranges(ring):
        assert isinstance(ring.recorder, Ranges)
        try:
            with recording(ring):
                return ""
        except ConfigError as error:
            return str(error)
