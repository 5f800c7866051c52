"""The short examples as their first lines say to run them, each with its shipped config."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import launched
import pytest
import yaml

from seqpar_ring import Settings

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
DEEPSPEED = (str(Path(sys.executable).parent / "deepspeed"), "--master_port")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(folder: Path, *command: object) -> str:
    """What it prints, run in a folder of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "examples")}
    return checked(
        subprocess.run(
            [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
        )
    )


def forked(folder: Path, world: int, script: Path, *arguments: object) -> str:
    """The same over so many ranks, without torchrun's own start and imports."""
    return checked(launched.torchrun(folder, world, script, *arguments, PYTHONPATH=str(ROOT / "examples")))


def checked(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def losses(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"step \d.*loss ([\d.]+)", text)]


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.py")), ids=lambda file: file.name)
def test_every_file_of_the_examples_is_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) < 120


@pytest.mark.parametrize("name", ["plain_loop", "trainer", "sft_lora"])
def test_the_settings_of_a_shipped_config_are_settings(name: str) -> None:
    assert Settings.parse(yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())["ring"]).size == 2


def test_the_plain_loop_learns_and_gives_the_same_with_and_without_a_ring(tmp_path: Path) -> None:
    shipped = ROOT / "configs" / "plain_loop.yaml"
    ring = losses(run(tmp_path, *TORCHRUN, 2, ROOT / "examples" / "plain_loop.py", "--config", shipped))
    single = tmp_path / "single.yaml"
    single.write_text(shipped.read_text().replace("size: 2 ", "size: 1 "))
    alone = losses(forked(tmp_path, 1, ROOT / "examples" / "plain_loop.py", "--config", single))
    assert len(ring) == 6
    assert ring == pytest.approx(alone, abs=2e-4)
    assert ring[-1] < ring[0] - 1


def test_deepspeed_trains_the_same_under_torchrun_and_its_own_launcher(tmp_path: Path) -> None:
    script = (ROOT / "examples" / "deepspeed_zero3.py", "--config", ROOT / "configs" / "deepspeed_zero3.json")
    found = losses(run(tmp_path, *TORCHRUN, 2, *script, "--steps", 2))
    port = 20_000 + os.getpid() % 20_000
    other = run(tmp_path, *DEEPSPEED, port, "--num_accelerators", 2, *script, "--steps", 2)
    assert len(found) == 2
    assert losses(other) == found


def evaluations(text: str) -> list[float]:
    before, after = re.findall(r"evaluation loss ([\d.]+) -> ([\d.]+)", text)[0]
    return [float(before), float(after)]


def test_trainer_learns_also_by_deepspeed(tmp_path: Path) -> None:
    script, shipped = ROOT / "examples" / "trainer.py", ROOT / "configs" / "trainer.yaml"
    before, after = evaluations(forked(tmp_path, 2, script, "--config", shipped))
    assert after < before - 1
    job = yaml.safe_load(shipped.read_text())
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    engine = {
        **dict.fromkeys(sizes, "auto"),
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "seqpar_ring": job.pop("ring"),
    }
    (tmp_path / "zero2.json").write_text(json.dumps(engine))
    job["training"]["deepspeed"] = "zero2.json"
    (tmp_path / "zero2.yaml").write_text(yaml.safe_dump(job))
    text = forked(tmp_path, 2, script, "--config", tmp_path / "zero2.yaml")
    assert evaluations(text) == pytest.approx([before, after], abs=2e-4)


def test_sfttrainer_learns_and_saves_its_adapter(tmp_path: Path) -> None:
    shipped = ROOT / "configs" / "sft_lora.yaml"
    text = forked(tmp_path, 2, ROOT / "examples" / "sft_lora.py", "--config", shipped)
    before, after = map(float, re.findall(r"\nloss ([\d.]+) -> ([\d.]+)", text)[0])
    assert after < before - 0.2
    assert (tmp_path / "runs" / "sft_lora" / "adapter_model.safetensors").exists()


def test_a_stopped_run_goes_on_at_another_size(tmp_path: Path) -> None:
    script = (ROOT / "examples" / "resume.py", "--config", ROOT / "configs" / "resume.json", "--tokens", 256)
    four = forked(tmp_path, 4, *script, "--size", 4, "--until", 2)
    two = forked(tmp_path, 2, *script, "--size", 2, "--until", 4)
    alone = losses(forked(tmp_path, 1, *script, "--size", 1, "--until", 4, "--folder", tmp_path / "alone"))
    assert losses(four) + losses(two) == pytest.approx(alone, rel=1e-6)


def test_megatron_learns_and_gives_the_same_with_and_without_a_ring(tmp_path: Path) -> None:
    """On a machine without a GPU, so through the launcher that stands CUDA in."""
    launcher, script = ROOT / "tests" / "integrations" / "mcore_launch.py", ROOT / "examples" / "megatron_finetune.py"
    options = (launcher, script, "--clip", 0, "--tokens", 512, "--steps", 4)
    ring = losses(forked(tmp_path, 2, *options, "--cp", 2))
    alone = losses(forked(tmp_path, 1, *options, "--cp", 1))
    assert len(ring) == 4
    assert ring == pytest.approx(alone, abs=2e-4)
    assert ring[-1] < ring[0] - 1
