"""The example as a user runs it, with a tiny model: it trains, saves, loads back, verifies, and refuses bad input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import finetune
import launched
import pytest
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "finetune.py"

pytestmark = pytest.mark.timeout(400)
"""torchrun starts three Pythons that import torch, transformers and DeepSpeed: minutes on a busy machine."""

FORGETFUL = """
import runpy, sys
sys.path.insert(0, {folder!r})
import longtext

whole = longtext.Row.batch
longtext.Row.batch = lambda row: {{k: v for k, v in whole(row).items() if k != "position_ids"}}
runpy.run_path({script!r}, run_name="__main__")
"""
"""The example with a fault: it forgets where documents begin, so they see each other."""


def command(*arguments: object) -> list[str]:
    shipped = [
        "--config",
        ROOT / "configs" / "quickstart.yaml",
        "--deepspeed",
        ROOT / "configs" / "deepspeed_zero1.json",
    ]
    return [str(one) for one in (*shipped, "--model", "tiny", "--seq-len", 256, "--steps", 2, *arguments)]


def torchrun(folder: Path, script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Two ranks in a folder of their own."""
    return launched.torchrun(folder, 2, script, *command(*arguments))


def real_torchrun(folder: Path, script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The same, by torch's own launcher."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        launcher + command(*arguments), cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def figure(pattern: str, text: str) -> float:
    found = re.search(pattern, text, re.MULTILINE)
    assert found, text
    return float(found.group(1))


@pytest.fixture
def books(tmp_path: Path) -> list[Path]:
    """Two texts of the user: short paragraphs in one file, and a folder with another."""
    short, folder = tmp_path / "short.txt", tmp_path / "folder"
    folder.mkdir()
    short.write_text("To be, or not to be. " * 7)
    (folder / "long.md").write_text((ROOT / "README.md").read_text()[:1500])
    return [short, folder]


@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_train_on_the_users_text_and_plain_transformers_loads_the_result(
    tmp_path: Path, books: list[Path], stage: int
) -> None:
    config = json.loads((ROOT / "configs" / f"deepspeed_zero{stage}.json").read_text())
    if stage == 3:  # or each rank holds weights as small as these whole
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine = tmp_path / "engine.json"
    engine.write_text(json.dumps(config))
    done = torchrun(tmp_path, SCRIPT, "--text", *books, "--lr", 0.003, "--output", "out", "--deepspeed", engine)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "short.txt" in done.stdout
    assert "2 documents" in done.stdout
    assert f"DeepSpeed ZeRO-{stage}" in done.stdout
    assert 'kernel: cpu ("cpu": ' in done.stdout
    assert len(re.findall(r"^step +\d/2  loss \d\.\d+ .* tokens/s .* memory \d+ MB \+ \d+ MB$", done.stdout, re.M)) == 2
    before = figure(r"^held out +(\S+) before", done.stdout)
    after = figure(r"^held out .* (\S+) after", done.stdout)
    assert after < before
    assert figure(r"^OK .*relative difference (\S+)", done.stdout) < 1e-2
    for rank in range(2):
        assert figure(rf"^rank {rank} .*sent (\S+) kB of keys and values", done.stdout) > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config._attn_implementation == "sdpa"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a", add_special_tokens=False)["input_ids"] == [100]


def test_verify_prints_differences_of_rounding_and_trains_nothing(tmp_path: Path, books: list[Path]) -> None:
    """Also of a job that accumulates gradients: one micro-batch is compared, not its share of a step."""
    asked = json.loads((ROOT / "configs" / "deepspeed_zero1.json").read_text())
    file = tmp_path / "accumulating.json"
    file.write_text(json.dumps({**asked, "gradient_accumulation_steps": 2}))
    done = real_torchrun(tmp_path, SCRIPT, "--text", *books, "--verify", "--output", "out", "--deepspeed", file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert figure(r"^OK +loss: relative difference (\S+),", done.stdout) <= 1e-6
    assert figure(r"^OK +gradients: relative difference (\S+),", done.stdout) <= 1e-5
    assert "float32" in done.stdout
    assert "step" not in done.stdout
    assert list((tmp_path / "out").iterdir()) == []


def test_verify_fails_when_documents_see_each_other(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    for i in range(9):
        (notes / f"{i}.txt").write_text(f"{i} is a number. " * (i + 1))
    faulty = tmp_path / "forgetful.py"
    faulty.write_text(FORGETFUL.format(folder=str(SCRIPT.parent), script=str(SCRIPT)))
    done = torchrun(tmp_path, faulty, "--text", notes, "--verify", "--output", "out")
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"^FAILED +gradients: ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("world", "asked", "message"),
    [
        (2, {"text": [Path("nowhere.txt")]}, r"ConfigError: there is no such text \[path='nowhere.txt'\]"),
        (2, {"seq_len": 1}, r"ConfigError: .*\"seq_len\" \[value=1"),
        (3, {}, r"GroupError: .*must divide the number of ranks \[size=2, ranks=3\]"),
        (2, {"output": Path("/dev/null/out")}, r"ConfigError: the output cannot be written"),
        (2, {"deepspeed": Path("nowhere.json")}, r"ConfigError: the DeepSpeed config cannot be read"),
        (None, {}, r"ConfigError: this job runs under torchrun.*Start it with: torchrun "),
    ],
)
def test_bad_input_is_refused_before_the_ranks_meet_and_said_once(
    world: int | None,
    asked: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(finetune, "carry_out", lambda *_: pytest.fail("the job was carried out"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", str(world))
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(typer.Exit) as left:
            finetune.main(Path("configs/quickstart.yaml"), **{"output": tmp_path, **asked})
        assert left.value.exit_code == 2
        said = capsys.readouterr().err
        if rank == 0:
            assert re.search(message, said)
            assert "Fix: " in said
        else:
            assert said == ""
