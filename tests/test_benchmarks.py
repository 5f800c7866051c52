"""Benchmarks run: what is timed is not looked at, only that the scripts work and write what they say."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
    assert set(record["merge"]) == {"merge_1_s", "merge_4_s", "accumulator_bytes"}
    assert (tmp_path / "gpu-cpu-32.png").stat().st_size > 5000


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
