import subprocess
import sys
from pathlib import Path

import pytest

from seqpar_ring.errors import ConfigError, DisagreementError, GroupError
from seqpar_ring.groups import Groups
from seqpar_ring.parallel import SequenceParallel
from seqpar_ring.planner import hardware
from seqpar_ring.planner.hardware import Machine, Pace
from seqpar_ring.probe import Options, fit, links, probe, run, save
from seqpar_ring.probe.compute import Shape
from seqpar_ring.probe.fit import Block
from seqpar_ring.probe.links import Message
from seqpar_ring.testing import RankPool
from seqpar_ring.testing.threads import run_lockstep_groups

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = Options(dtypes=("fp32",), quick=True, shape=Shape(2, 1, 16))


def blocks(pace: Pace, off: float = 0.0, flop: float = 4096.0) -> list[Block]:
    """Calls of many sizes at a pace, every other one slower by this share, the rest faster."""
    found = []
    for i, (rows, keys) in enumerate([(256, 256), (256, 2048), (512, 512), (2048, 256), (2048, 2048), (8192, 8192)]):
        seconds = pace.call + flop * (rows * keys + pace.row * rows) / pace.rate
        found.append(Block(rows, keys, rows * keys, flop, seconds * (1 + (off if i % 2 else -off))))
    return found


@pytest.mark.parametrize(
    "pace", [Pace(rate=5e10, call=2e-4, row=70), Pace(rate=6e14, call=1e-5), Pace(rate=1e9, row=33), Pace(rate=1e12)]
)
def test_a_fit_finds_the_pace_that_the_timings_were_made_with(pace: Pace) -> None:
    found, errors = fit.pace(blocks(pace))
    assert found.rate == pytest.approx(pace.rate, rel=1e-6)
    assert found.call == pytest.approx(pace.call, abs=1e-9)
    assert found.row == pytest.approx(pace.row, abs=1e-3)
    assert errors.worst < 1e-6


def test_a_fit_of_noisy_timings_says_how_far_it_is_off_and_stays_positive() -> None:
    found, errors = fit.pace(blocks(Pace(rate=5e10, call=1e-5, row=2), off=0.1))
    assert found.rate == pytest.approx(5e10, rel=0.15)
    assert found.call >= 0
    assert found.row >= 0
    assert 0.02 < errors.median <= errors.worst < 0.2


def test_calls_of_several_widths_are_told_by_one_pace() -> None:
    pace = Pace(rate=5e10, call=1e-4, row=70)
    found, errors = fit.pace([*blocks(pace), *blocks(pace, flop=512.0)])
    assert found.row == pytest.approx(70)
    assert errors.worst < 1e-6


def test_bandwidth_is_that_of_large_messages_and_latency_that_of_small_ones() -> None:
    sizes = [4096, 65536, 1 << 20, 4 << 20]
    found = fit.line(sizes, [1e-4 + n / 1e8 for n in sizes])
    assert found == (pytest.approx(1e-4), pytest.approx(1e8))
    # A bucket that lets 32 KiB through at once makes large messages faster by a constant, and small ones free.
    bucket = fit.line(sizes, [1e-4 + max(0, n - 32768) / 1e8 for n in sizes])
    assert bucket.bandwidth == pytest.approx(1e8)
    assert bucket.latency <= 1e-4


def test_timings_that_tell_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be fitted"):
        fit.pace(blocks(Pace(rate=1e9))[:2])
    with pytest.raises(ConfigError, match="cannot be fitted"):
        fit.line([1, 2], [0.0, 1.0])


def messages(how: str, near: bool, rate: float) -> list[Message]:
    first, second = (0, 1) if near else (0, 2)
    return [Message(how, first, second, near, n, 1e-4 + n / rate) for n in (4096, 1 << 20, 4 << 20)]


def test_ranks_that_are_slower_together_share_a_link() -> None:
    seen = messages("both ways", True, 4e9) + messages("together", True, 4e9)
    seen += messages("both ways", False, 1e9) + messages("together", False, 5.1e8)
    inner, outer = (links.link(seen, near, 2, 0.1) for near in (True, False))
    assert inner is not None
    assert outer is not None
    assert (inner.shared_by, outer.shared_by) == (1, 2)
    assert inner.bandwidth == pytest.approx(4e9)
    assert outer.bandwidth == pytest.approx(1.02e9)
    assert links.link(messages("both ways", True, 1e9), False, 2, 0.0) is None


def test_what_is_stolen_is_what_both_take_beyond_the_longer() -> None:
    assert links.Overlap(compute=2.0, transfer=1.0, both=2.5).steals == pytest.approx(0.5)
    assert links.Overlap(compute=2.0, transfer=1.0, both=1.9).steals == 0
    assert links.Overlap(compute=2.0, transfer=1.0, both=9.0).steals == 1


def test_a_probe_of_two_processes_writes_a_machine_that_the_planner_takes(tmp_path: Path) -> None:
    told: list[str] = []
    path = tmp_path / "here.yaml"
    made = run(2, path, SMALL, told.append)
    found = hardware.machine(str(path))
    assert hardware.load(str(path)).kind == "machine"
    assert found.device.attention.keys() == {"fp32"}
    assert found.device.node == 2
    assert found.outer.bandwidth == found.inner.bandwidth == pytest.approx(made.inner.bandwidth, rel=1e-5)
    assert "not there to be measured" in found.outer.source
    assert found.device.peak == found.device.matmul > 1e8
    assert found.device.memory > 1e6
    how = {(m["how"], m["near"]) for m in found.measured["messages"]}
    assert how == {("one way", True), ("both ways", True), ("together", True)}
    assert 0 <= found.inner.steals <= 1
    assert told[-1] == "computation and transfers at once"
    timed = found.measured["attention"]["fp32"]["forward"]
    assert timed["error"]["median"] <= timed["error"]["worst"]
    assert all(seconds > 0 for _, _, _, seconds in timed["rows, keys, pairs, seconds"])


@pytest.mark.slow
def test_ranks_of_two_nodes_have_two_links(pool4: RankPool) -> None:
    machines = pool4.run(_probed, SMALL._replace(node=2))
    assert all(machine == machines[0] for machine in machines)  # the same on every rank
    machine = machines[0]
    assert machine.device.node == 2
    far = {(m["first"], m["second"]) for m in machine.measured["messages"] if not m["near"]}
    assert far == {(0, 2), (0, 3), (1, 2), (1, 3)}
    assert machine.inner.name == "within a node"
    assert machine.outer.name == "between nodes"
    assert set(machine.measured["overlap"]) == {"within a node", "between nodes"}


def test_a_device_that_is_known_is_not_measured_again(pool2: RankPool) -> None:
    known = hardware.machine("h100", "nvlink").device
    found = pool2.run(_probed, SMALL._replace(device=known, node=1))[0]
    assert found.device == known
    assert found.measured["attention"] == {}
    assert "not there to be measured" in found.inner.source
    assert found.outer.source.startswith("probed")


def _probed(sp: SequenceParallel, options: Options) -> Machine:
    return probe(sp, options)


@pytest.mark.parametrize(
    ("ranks", "options", "says"),
    [
        (1, Options(), "two ranks"),
        (2, Options(dtypes=("fp23",)), 'Did you mean "fp32"'),
        (2, Options(dtypes=()), "no dtype"),
        (4, Options(node=3), "1 or 2 or 4"),
        (2, Options(shape=Shape(4, 3, 64)), "key heads divide heads"),
    ],
)
def test_what_cannot_be_probed_is_refused_before_a_process_starts(ranks: int, options: Options, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run(ranks, None, options)


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="written as YAML"):
        run(2, tmp_path / "machine.txt")
    with pytest.raises(ConfigError, match="folder that exists"):
        run(2, tmp_path / "nowhere" / "machine.yaml")
    with pytest.raises(ConfigError, match="written as YAML"):
        save(hardware.machine("h100", "nvlink"), tmp_path / "machine")


def test_ranks_that_are_asked_for_different_things_say_so() -> None:
    def rank(groups: Groups) -> None:
        probe(groups, Options(dtypes=("fp32",) if groups.rank else ("bf16",)))

    with pytest.raises(DisagreementError, match="dtypes"):
        run_lockstep_groups(rank, 2)


def test_a_node_that_does_not_divide_the_ranks_is_refused() -> None:
    with pytest.raises(GroupError, match="1 or 2 or 4"):
        run_lockstep_groups(lambda groups: links.node_size(groups, 3), 4)


def test_large_groups_try_neighbours_and_the_way_to_each_node() -> None:
    assert links._pairs(4, 2) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert links._pairs(16, 8) == [*[(r, r + 1) for r in range(15)], (0, 8)]


@pytest.mark.parametrize("near", [True, False])
def test_in_a_shift_every_rank_sends_and_receives_once(near: bool) -> None:
    def rank(groups: Groups) -> float:
        handle = links._shift(groups, 2, near, 64)()
        handle.wait()
        return groups.ring.stats.messages

    assert run_lockstep_groups(rank, 4) == [1, 1, 1, 1]


def test_the_module_reports_bad_input_with_exit_code_2() -> None:
    command = [sys.executable, "-m", "seqpar_ring.probe", "--dtype", "fp8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert "unknown dtype" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_torchrun_probes_its_ranks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "seqpar_ring.probe", "--quick", "--dtype", "fp32", "--out", str(tmp_path / "machine.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert hardware.machine(str(tmp_path / "machine.yaml")).node == 2


@pytest.mark.slow
def test_a_probe_finds_the_rate_of_shaped_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import netns
    import shaped

    if why := netns.missing():
        pytest.skip(f"no network namespaces here: {why}")
    rates = (5e6, 20e6)  # low, so that a busy machine does not limit them first
    for rate, machine in zip(rates, shaped.machines([(2, rate) for rate in rates], nice=-20), strict=True):
        seen = [m for m in machine.measured["messages"] if m["how"] == "one way"]
        found = fit.line([m["nbytes"] for m in seen], [m["seconds"] for m in seen])
        assert found.bandwidth == pytest.approx(rate, rel=0.1)
    before = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert all(name not in before for name in netns.Network(2).names)  # nothing is left


@pytest.mark.slow
def test_shaped_links_slow_attention_down_as_far_as_its_bytes_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import netns
    import shaped

    if why := netns.missing():
        pytest.skip(f"no network namespaces here: {why}")
    setting = shaped.Setting(2, 1024, rate_bytes_per_s=4e6)
    result = shaped.measure([setting], seconds=1.0, nice=-15)[0]
    sent = 512 * 2 * 2 * 64 * 4 * 0.75  # keys and values of half the tokens, of which zigzag sends three quarters
    assert result.least[0] > 0.9 * sent / setting.rate_bytes_per_s
    assert result.forward <= result.both


@pytest.mark.slow
def test_settings_that_are_compared_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import netns
    import shaped

    if why := netns.missing():
        pytest.skip(f"no network namespaces here: {why}")
    settings = [shaped.Setting(2, 512), shaped.Setting(2, 512, rate_bytes_per_s=1e6)]
    lines: list[str] = []
    results = shaped.measure(settings, nice=-15, progress=lines.append, turns=2)
    assert [("no limit" in line, f"{n} runs" in line) for line, n in zip(lines, (1, 1, 2, 2), strict=True)] == [
        (True, True),
        (False, True),
    ] * 2
    assert [(r.setting, r.repeats, len(r.cpu)) for r in results] == [(s, 2, 2) for s in settings]
    sent = 256 * 2 * 2 * 64 * 4 * 0.75
    assert results[1].least[0] > 0.9 * sent / 1e6  # the link was shaped anew in each turn
