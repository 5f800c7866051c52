"""The shipped configs load, and what is wrong with a job is said before a model is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
import yaml
from engine import BLOCK
from job import Job

from seqpar_ring.config import Settings
from seqpar_ring.errors import ConfigError, GroupError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def changed(folder: Path, **values: Any) -> Path:
    """The quickstart's config with some values changed (None: taken out)."""
    whole = {**yaml.safe_load(Path("configs/quickstart.yaml").read_text()), **values}
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in whole.items() if v is not None}))
    return file


def job(folder: Path, **values: Any) -> Job:
    return Job.load(changed(folder, **values), {})


JOBS = [file for file in sorted((ROOT / "configs").glob("*.yaml")) if "ring" not in yaml.safe_load(file.read_text())]
"""Of finetune.py; those of the short examples have a block "ring", and are loaded by their tests."""


@pytest.mark.parametrize("file", JOBS, ids=lambda f: f.name)
def test_every_shipped_job_loads_and_its_engine_config_turns_the_ring_on(file: Path) -> None:
    loaded = Job.load(file, {})
    assert loaded.seq_len >= 4096
    assert Settings.parse(loaded.engine_config(None)[BLOCK]).size == 2


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("deepspeed_*.json")), ids=lambda f: f.name)
def test_every_shipped_engine_config_is_ready_for_a_machine_without_a_compiler(file: Path) -> None:
    config = json.loads(file.read_text())
    assert Settings.parse(config[BLOCK]).layout == "zigzag"
    assert config["zero_optimization"]["stage"] == int(file.stem[-1])
    assert config["optimizer"]["type"] == "AdamW"
    assert config["optimizer"]["params"]["torch_adam"] is True
    assert config["gradient_clipping"] > 0


def test_the_command_line_overrides_and_what_it_leaves_out_stays(tmp_path: Path) -> None:
    loaded = Job.load(changed(tmp_path), {"seq_len": 333, "steps": None, "text": [], "output": tmp_path})
    assert (loaded.seq_len, loaded.steps, loaded.text, loaded.output) == (333, job(tmp_path).steps, (), tmp_path)


def test_only_a_processor_that_has_no_instructions_for_16_bits_is_slow_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, slow in (("AVX2", True), ("AVX512", False), ("DEFAULT", False), ("SVE256", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert engine.slow_in_16_bits() is slow
        assert ("slow" in engine.precision_of(torch.nn.Linear(1, 1))) is slow


def test_the_learning_rate_and_the_precision_of_the_engine_can_be_overridden(tmp_path: Path) -> None:
    asked = job(tmp_path).engine_config(0.5, fp32=True)
    assert asked["optimizer"]["params"]["lr"] == 0.5
    assert "bf16" not in asked
    assert job(tmp_path).engine_config(None)["bf16"] == {"enabled": True}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seqlen": 5}, r"unknown key \[key='seqlen'.*Did you mean \"seq_len\"\?"),
        ({"steps": "many"}, r"missing or wrong \"steps\" \[value='many'"),
        ({"steps": 0}, r"missing or wrong \"steps\" \[value=0"),
        ({"output": None}, r"missing or wrong \"output\""),
    ],
)
def test_a_wrong_config_is_refused_with_its_key(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job(tmp_path, **values)


@pytest.mark.parametrize("text", ["a: [", "just a line", ""])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config (cannot be read|is not a mapping).*job.yaml"):
        Job.load(tmp_path / "job.yaml", {})


def test_a_config_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read.*nowhere.yaml"):
        Job.load(tmp_path / "nowhere.yaml", {})
    with pytest.raises(ConfigError, match=r"DeepSpeed config cannot be read.*nowhere.json"):
        job(tmp_path, deepspeed="nowhere.json").engine_config(None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ('{"bf16": {}}', 'has no "seqpar_ring" block'),
        (
            '{"seqpar_ring": {"size": 2}, "optimizer": {"type": "AdamW"}}',
            r"how to optimize \[optimizer={'type': 'AdamW'}",
        ),
        (
            '{"seqpar_ring": {"size": 2}, "train_micro_batch_size_per_gpu": 3}',
            "one row.*train_micro_batch_size_per_gpu=3",
        ),
    ],
)
def test_an_engine_config_that_the_job_cannot_follow_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "engine.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        job(tmp_path, deepspeed=str(tmp_path / "engine.json")).engine_config(None)


def test_ranks_that_make_no_whole_groups_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GroupError, match=r"size=2, ranks=3.*Start a multiple of 2 ranks"):
        job(tmp_path, output=str(tmp_path)).check(Settings(size=2), world=3)


def test_a_row_shorter_than_its_ranks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"fewer tokens than ranks.*seq_len=3, size=4"):
        job(tmp_path, seq_len=3, output=str(tmp_path)).check(Settings(size=4), world=4)


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"output cannot be written.*file"):
        job(tmp_path, output=str(tmp_path / "file")).check(Settings(size=2), world=2)
    before = os.listdir(tmp_path)
    job(tmp_path, output=str(tmp_path)).check(Settings(size=2), world=2)
    assert os.listdir(tmp_path) == before, "the check leaves nothing behind"
