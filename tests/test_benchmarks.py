"""Benchmarks run: what is timed is not looked at, only that the scripts work and write what they say."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from seqpar_ring import ring_attention

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)


def test_the_gpus_benchmark_writes_a_row_for_each_case_and_kernel(tmp_path: Path) -> None:
    small = ("--ranks", "2", "--tokens", "32", "--heads", "4", "2", "32", "--kernels", "cpu", "reference")
    done = run("gpu.py", "--device", "cpu", *small, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    with (tmp_path / "gpu-cpu-32.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["kernel"]) for row in rows] == [
        (case, kernel) for case in ("causal", "causal, all blocks at once", "packed") for kernel in ("cpu", "reference")
    ]
    assert all(float(row["forward_tflops"]) > 0 for row in rows)
    record = json.loads((tmp_path / "gpu-cpu-32.json").read_text())
    assert set(record["merge"]) == {"merge_1_s", "merge_4_s", "accumulator_bytes", "fused"}
    assert record["merge"]["fused"] is False  # on a CPU
    assert (tmp_path / "gpu-cpu-32.png").stat().st_size > 5000


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that times one GPU."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


def test_a_kernel_that_fails_in_the_gpus_benchmark_takes_no_other_row_with_it(
    on_gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fault on the device came at the end of all rows once, and nothing was written."""
    rows_before: list[int] = []

    def timed(shape: Any, lengths: list[int], kernel: str, settings: dict[str, Any]) -> dict[str, float]:
        path = tmp_path / "gpu-cpu-32.json"
        rows_before.append(len(json.loads(path.read_text())["rows"]) if path.exists() else 0)
        if kernel == "cpu":
            raise RuntimeError("CUDA error: unspecified launch failure")
        return {"forward_s": 1.0, "backward_s": 1.0, "host_us_a_step": 1.0}

    monkeypatch.setattr(on_gpu, "timed", timed)
    small = ["--ranks", "2", "--tokens", "32", "--heads", "4", "2", "32", "--kernels", "cpu", "reference"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", *small, "--out", str(tmp_path)])
    on_gpu.main()
    assert rows_before == [0, 0, 1, 1, 2, 2]
    assert "causal, cpu: RuntimeError: CUDA error: unspecified launch failure" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "gpu-cpu-32.json").read_text())["rows"]) == 3


def test_no_ranks_work_is_under_way_when_the_clock_of_the_gpus_benchmark_is_read(
    on_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that woke first began the next pass while the one whose clock counts still waited for the device."""
    shape = on_gpu.Shape(4, 2, 32, 4, 32, "cpu")
    events: list[str] = []

    def attend(q: Any, k: Any, v: Any, plan: Any) -> Any:
        events.append("begin")
        found = ring_attention(q, k, v, plan)
        events.append("end")
        return found

    def read() -> float:
        events.append("read")
        return time.perf_counter()

    monkeypatch.setattr(on_gpu, "ring_attention", attend)
    monkeypatch.setattr(on_gpu, "time", SimpleNamespace(perf_counter=read, thread_time=time.thread_time))
    on_gpu.timed(shape, [128], "cpu", {"layout": "zigzag"})
    assert events.count("read") == 4 * 3 * (1 + on_gpu.REPEATS)
    at_work = done = 0
    for event in events:
        at_work, done = at_work + (event == "begin"), done + (event == "end")
        if event == "read":
            assert at_work == done
            assert at_work % 4 == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_its_benchmark_says_so() -> None:
    done = run("gpu.py")
    assert done.returncode == 2
    assert "there is no GPU here" in done.stderr


def test_a_kernel_that_there_is_not_is_refused_by_its_benchmark() -> None:
    done = run("gpu.py", "--device", "cpu", "--kernels", "flash9")
    assert done.returncode == 2
    assert "invalid choice: 'flash9'" in done.stderr


def test_committed_results_say_on_what_they_were_taken() -> None:
    found = sorted((BENCHMARKS / "results").glob("*.json"))
    assert found
    for path in found:
        machine = json.loads(path.read_text())["machine"]
        assert {"processor", "cores", "python", "torch", "commit"} <= set(machine), path.name


def test_the_ways_and_repetitions_of_peers_can_be_chosen(tmp_path: Path) -> None:
    done = run("attention.py", "peers", "--quick", "--ways", "seqpar_ring", "--times", "2", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "attention-peers.json").read_text())["rows"]
    assert {row["way"] for row in rows} == {"one process", "seqpar_ring"}
    assert all(len(row["cpu"]) == 2 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("packed", "--times", "2"), "--times is for overhead, overhead16, peers, peers16"),
        (("peers", "--times", "0"), "at least 1: peers, 0"),
        (("overhead", "--ways", "seqpar_ring"), "--ways is for peers and peers16, not for overhead"),
    ],
)
def test_what_a_part_does_not_repeat_or_compare_is_refused(arguments: tuple[str, ...], says: str) -> None:
    done = run("attention.py", *arguments)
    assert done.returncode == 2
    assert says in done.stderr


def launched(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(BENCHMARKS / "multi_gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)


def test_the_benchmark_of_many_gpus_runs_over_gloo(tmp_path: Path) -> None:
    small = ("--device", "cpu", "--tokens", "32", "--heads", "4", "2", "16", "--block-tokens", "0", "8", "--times", "1")
    ours = ("--schedules", "ring", "--kernels", "cpu")
    done = launched(2, *small, *ours, "--ways", "torch context parallel, all-to-all", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    with (tmp_path / "multi-gpu-2-cpu-32.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["way"], row["block_tokens"], row["not timed"]) for row in rows] == [
        ("causal", "seqpar_ring", "auto", ""),
        ("packed", "seqpar_ring", "auto", ""),
        ("causal", "seqpar_ring", "8", ""),
        ("packed", "seqpar_ring", "8", ""),
        ("causal", "torch context parallel, all-to-all", "", ""),
    ]
    assert all(float(row["backward_tflops"]) > 0 for row in rows)
    assert json.loads((tmp_path / "multi-gpu-2-cpu-32.json").read_text())["machine"]["device"] == "2 x cpu"


def test_the_benchmark_of_many_gpus_says_how_to_start_it() -> None:
    done = run("multi_gpu.py", "--device", "cpu")
    assert done.returncode == 2
    assert "start it with torchrun" in done.stderr


def test_all_benchmarks_are_listed_with_what_hinders_them() -> None:
    done = run("", "--list")
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()]
    on_cpu = ["planning", "overhead", "overhead16", "packed", "memory", "peers", "peers16", "host", "overlap", "shaped"]
    assert names == [*on_cpu, "gpu", "multi_gpu"]
    if not torch.cuda.is_available():
        assert "(not here: needs 2 GPUs, and there are 0)" in done.stdout


def test_the_hosts_benchmark_times_ours_and_says_what_others_lack(tmp_path: Path) -> None:
    done = run("host.py", "--quick", "--ranks", "4", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = {row["way"]: row for row in json.loads((tmp_path / "host.json").read_text())["rows"]}
    ours = [row for way, row in rows.items() if way.startswith("seqpar_ring")]
    assert len(ours) == 2
    assert all(row["forward_us"] > 0 and row["backward_us"] > 0 and row["ranks"] == 4 for row in ours)
    # A computation is one operator, each of the three merges five; at most two more each.
    assert rows["seqpar_ring"]["forward_launches"] <= 4 * (1 + 2) + 3 * 5
    assert all("not timed" in row or row["forward_launches"] > 0 for row in rows.values())
    assert "not timed" not in rows["torch context parallel, all-to-all"]


def test_a_ring_of_one_has_no_host_time(tmp_path: Path) -> None:
    done = run("host.py", "--ranks", "1", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "a ring has two ranks at least" in done.stderr


def test_a_benchmark_that_there_is_not_is_refused_with_the_nearest_name() -> None:
    done = run("", "--only", "peer")
    assert done.returncode == 2
    assert 'Did you mean "peers"?' in done.stderr


def test_a_short_run_writes_every_figure_with_its_machine_and_prints_a_table(tmp_path: Path) -> None:
    done = run("", "--quick", "--only", "planning", "gpu", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    [path] = tmp_path.iterdir()
    assert path.name.endswith("-quick.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = "benchmark setting ranks metric value unit date commit hardware instructions cores python torch numpy"
    assert list(rows[0]) == wanted.split()
    planned = [row for row in rows if row["benchmark"] == "planning"]
    assert len(planned) == 4
    assert all(float(row["value"]) > 0 and row["unit"] == "ms" and row["torch"] for row in planned)
    assert "| planning | ranks | total ms, ms |" in done.stdout
    assert "planning: done" in done.stdout
    if not torch.cuda.is_available():
        assert "gpu: skipped, needs 1 GPU, and there are 0" in done.stdout


def test_a_benchmark_that_fails_is_shown_with_its_last_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("all_benchmarks", BENCHMARKS / "__main__.py")
    assert spec
    assert spec.loader
    runner = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, runner)
    spec.loader.exec_module(runner)
    part = runner.Part("fails", ("-c", "print('last words'); raise SystemExit(3)"), (), "none.json")
    monkeypatch.setitem(runner.PARTS, "planning", part)
    heard: list[str] = []
    ended = runner.run("planning", False, tmp_path, heard.append)
    assert heard == ["last words"]
    assert ended.how == "failed"
    assert ended.why.startswith("last words\nexit code 3: ")


def test_the_reason_why_something_was_not_timed_is_among_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    report = importlib.import_module("report")
    rows = [
        {"ranks": 2, "way": "theirs", "pass": "forward", "cpu_over_one_process": 1.25, "wall_over_ours": 0.5},
        {"ranks": 4, "way": "others", "not timed": "its answer is not exact"},
    ]
    found = report.figures("peers", rows)
    assert [(f.ranks, f.metric, f.value) for f in found] == [
        ("2", "cpu_over_one_process", "1.25"),
        ("2", "wall_over_ours", "0.5"),
        ("4", "not timed", "its answer is not exact"),
    ]
    table = report.tables(found)
    assert "| pass forward, way theirs | 2 | 1.25 | 0.5 |" in table
    assert "| way others | 4 | not timed: its answer is not exact |  |" in table


def figures(path: Path, *rows: tuple[str, str, str]) -> str:
    """A file such as `make bench` writes, of rows (metric, value, unit)."""
    lines = ["benchmark,setting,ranks,metric,value,unit,date,commit,hardware"]
    for metric, value, unit in rows:
        lines.append(f'peers,"way ours, pass both",2,{metric},{value},{unit},2026-01-02,abc1234,a box')
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_two_runs_are_compared_by_their_ratios_and_counts(tmp_path: Path) -> None:
    before = figures(tmp_path / "a.csv", ("ratio", "1.02", "x"), ("steps", "52", "operators"), ("wall", "4", "s"))
    after = figures(tmp_path / "b.csv", ("ratio", "1.05", "x"), ("steps", "52", "operators"), ("wall", "9", "s"))
    done = run("compare.py", before, after)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "| peers | x | 1 | 1.029 | 1.029 | 1.029 | 1 of 1 the same |" in done.stdout
    assert "| peers | s | 1 | 2.250 | 2.250 | 2.250 | no |" in done.stdout
    assert "Not the same" not in done.stdout


@pytest.mark.parametrize(("metric", "value"), [("ratio", "1.2"), ("ratio", "0.85"), ("steps", "53"), ("ratio", "nan")])
def test_what_did_not_come_out_again_is_listed(metric: str, value: str, tmp_path: Path) -> None:
    rows = {"ratio": ("ratio", "1.02", "x"), "steps": ("steps", "52", "operators")}
    before = figures(tmp_path / "a.csv", *rows.values())
    rows[metric] = (metric, value, rows[metric][2])
    done = run("compare.py", before, figures(tmp_path / "b.csv", *rows.values()))
    assert done.returncode == 1, done.stderr
    [listed] = [line for line in done.stdout.splitlines() if line.startswith("  ")]
    assert listed.startswith("  peers: way ours, pass both, 2 ranks: " + metric)
    assert listed.endswith(f"now {value}")


def test_what_is_no_file_of_figures_is_not_compared(tmp_path: Path) -> None:
    good = figures(tmp_path / "a.csv", ("ratio", "1.02", "x"))
    other = tmp_path / "b.csv"
    other.write_text("name,value\na,1\n")
    for second, says in ((other, "not a file of figures"), (tmp_path / "none.csv", "cannot read figures")):
        done = run("compare.py", good, str(second))
        assert done.returncode == 2
        assert says in done.stderr
    done = run("compare.py", good, figures(tmp_path / "c.csv", ("another", "1", "x")))
    assert done.returncode == 2
    assert "no figure in common" in done.stderr
    done = run("compare.py", good, figures(tmp_path / "d.csv", ("ratio", "fast", "x")))
    assert done.returncode == 2
    assert "'fast'" in done.stderr
    done = run("compare.py", good, good, "--within", "-0.1")
    assert done.returncode == 2
    assert "--within -0.1: at least 0" in done.stderr


def test_several_runs_are_shown_by_their_median_and_how_far_they_lie_apart(tmp_path: Path) -> None:
    ratios, rare = ("1.02", "1.09", "1.05"), ("wall_over_ours", "0.97", "x")
    runs = [
        figures(tmp_path / f"{i}.csv", ("cpu_over_one_process", ratio, "x"), *([rare] if i == 1 else []))
        for i, ratio in enumerate(ratios)
    ]
    done = run("runs.py", *runs)
    assert done.returncode == 0, done.stderr
    assert "| way ours, pass both | 2 | 1.05 (1.02 to 1.09) | 0.97 (1 of 3 runs) |" in done.stdout
    assert done.stdout.count("a box  abc1234 : ") == 3
    done = run("runs.py", *runs, "--only", "host")
    assert done.returncode == 0, done.stderr
    assert "way ours" not in done.stdout


def test_runs_of_different_machines_are_not_taken_together(tmp_path: Path) -> None:
    here, there = (figures(tmp_path / f"{name}.csv", ("cpu_over_one_process", "1", "x")) for name in "ab")
    Path(there).write_text(Path(there).read_text().replace("a box", "another box"))
    done = run("runs.py", here, there)
    assert done.returncode == 2
    assert "different machines" in done.stderr
    done = run("runs.py", here, figures(tmp_path / "c.csv", ("cpu_over_one_process", "fast", "x")))
    assert done.returncode == 2
    assert "'fast'" in done.stderr
    done = run("runs.py", str(tmp_path / "none.csv"))
    assert done.returncode == 2
    assert "cannot read figures" in done.stderr
