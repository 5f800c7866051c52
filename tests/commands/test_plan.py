"""`seqpar-ring plan`: what it prints and saves, what its exit codes say, and that it needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from seqpar_ring import cli
from seqpar_ring.config import Settings
from seqpar_ring.planner.savefile import choices_of, load

JOB = ("--model", "llama-3.1-8b", "--gpus", "8", "--hardware", "h100", "--fabric", "nvlink+ndr")
SHORT = (*JOB, "--seq-len", "64K")


def plan(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["plan", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    _, out, _ = plan(capsys, *arguments, "--json")
    found: dict[str, Any] = json.loads(out)
    return found


def test_a_plan_has_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = plan(capsys, *SHORT)
    assert code == 0
    for title in ("Asked", "Chosen: ", "Memory of a device, by part", "by moment", "Time: ", "The best of ", "Advice"):
        assert title in out
    assert "8.03 billion parameters" in out
    assert "65,536 tokens (one document), causal" in out
    assert "peak: " in out
    assert "MFU" in out
    assert "H100 data sheet" in out, "assumptions come with their source"


def test_json_is_the_documented_format(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, *SHORT, "--top", "3")
    assert found["format"] == 1
    assert found["fits"] is True
    assert set(found) == {
        "format", "seqpar_ring", "asked", "fits", "chosen", "options", "refused", "looked_at", "advice", "would_fit",
        "assumptions",
    }  # fmt: skip
    chosen = found["chosen"]
    assert len(found["options"]) == 3
    assert {k: v for k, v in chosen.items() if k != "reasons"} == found["options"][0]
    Settings.parse(chosen["settings"])
    memory, seconds = chosen["memory"], chosen["seconds"]
    assert memory["moments"][memory["at"]] == memory["peak_bytes"] == max(memory["moments"].values())
    assert memory["peak_bytes"] <= memory["limit_bytes"]
    parts = [value for name, value in seconds.items() if name not in ("step", "exposed")]
    assert sum(parts) == pytest.approx(seconds["step"])
    assert chosen["tokens_a_second"] == pytest.approx(chosen["tokens"] / seconds["step"])
    assert {"what", "name", "source"} == set(found["assumptions"][0])
    assert all(set(reason) == {"choice", "value", "why"} for reason in chosen["reasons"])


def test_every_key_of_the_json_is_in_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    def keys(value: Any) -> set[str]:
        if isinstance(value, dict):
            return set(value) | {k for one in value.values() for k in keys(one)}
        return {k for one in value for k in keys(one)} if isinstance(value, list) else set()

    found = as_json(capsys, *SHORT, "--top", "1")
    for memory in [found["chosen"]["memory"], *(option["memory"] for option in found["options"])]:
        memory["moments"] = {}  # their names are the planner's own
    for option in [found["chosen"], *found["options"]]:
        option["settings"] = {}
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    assert {key for key in keys(found) if f"`{key}`" not in page} == set()


def test_a_saved_plan_is_read_back_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "plan.yaml"
    first = as_json(capsys, *SHORT, "--save", saved)
    whole = yaml.safe_load(saved.read_text())
    assert Settings.parse(whole["ring"]) == Settings.parse(first["chosen"]["settings"])
    assert whole["made_for"]["model"] == "llama-3.1-8b"
    again = as_json(capsys, "--config", saved)
    for found in (first, again):
        found["chosen"].pop("reasons")
    assert again["chosen"] == first["chosen"]
    assert again["asked"]["fixed"]["zero"] == first["chosen"]["zero"]


def test_what_the_command_line_says_goes_before_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "plan.yaml"
    plan(capsys, *SHORT, "--save", saved)
    found = as_json(
        capsys, "--config", saved, "--seq-len", "32K", "--setting", "size=4", "--setting", "heads=1", "--zero", "3"
    )
    assert found["asked"]["tokens"] == 32768
    assert found["chosen"]["settings"]["size"] == 4
    assert found["chosen"]["zero"] == 3


def test_a_deepspeed_config_decides_its_stage_offload_and_dtype(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "fp16": {"enabled": True},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
        "seqpar_ring": {"size": 4, "layout": "auto"},
    }
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    given = load(path)
    assert given.dtype == "fp16"
    assert given.fixed.zero == 3
    assert given.fixed.offload_optimizer is True
    assert given.fixed.offload_parameters is False
    assert given.fixed.settings == {"size": 4}
    found = as_json(capsys, *SHORT, "--config", path)
    chosen = found["chosen"]
    assert (chosen["zero"], chosen["offload_optimizer"], chosen["settings"]["size"]) == (3, True, 4)
    assert found["asked"]["dtype"] == "fp16"


def test_a_block_of_settings_alone_is_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("size: 8\nheads: 2\n", "ring: {size: 8, heads: 2}\nsteps: 6\n"):
        path = tmp_path / "ring.yaml"
        path.write_text(text)
        settings = as_json(capsys, *SHORT, "--config", path)["chosen"]["settings"]
        assert (settings["size"], settings["heads"]) == (8, 2)


def test_what_fits_nowhere_is_exit_code_3_and_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = plan(capsys, *JOB, "--seq-len", "16M")
    assert code == 3
    assert "Nothing fits" in out
    assert "devices hold this sequence" in out
    assert "8 of these devices hold a sequence of" in out
    found = as_json(capsys, *JOB, "--seq-len", "16M")
    assert (found["fits"], found["chosen"], found["options"]) == (False, None, [])
    assert len(found["would_fit"]) >= 2


def test_the_largest_sequence_fits_and_a_larger_one_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    limits = as_json(capsys, *JOB, "--largest")["largest"]
    most = max(limit["tokens"] for limit in limits)
    assert most == limits[-1]["tokens"], "the last way needs the least memory"
    assert plan(capsys, *JOB, "--seq-len", most)[0] == 0
    assert plan(capsys, *JOB, "--seq-len", int(most * 1.5))[0] == 3


def test_the_fewest_devices_hold_the_sequence(capsys: pytest.CaptureFixture[str]) -> None:
    job = ("--model", "llama-3.1-8b", "--hardware", "h100", "--fabric", "nvlink+ndr", "--seq-len", "1M")
    fewest = as_json(capsys, *job, "--fewest")["fewest"]
    gpus = min(limit["gpus"] for limit in fewest if limit["gpus"])
    assert plan(capsys, *job, "--gpus", gpus)[0] == 0
    assert plan(capsys, *job, "--gpus", gpus // 2)[0] == 3


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (["--model", "lama-3.1-8b"], 'Did you mean "llama-3.1-8b"?'),
        (["--hardware", "h10"], 'Did you mean "h100"?'),
        (["--fabric", "nvlnk+ndr"], 'Did you mean "nvlink"?'),
        (["--fabric", "a+b+c"], "a fabric has one link or two"),
        (["--fabric", ""], "nothing says what joins the devices"),
        (["--gpus", "-8"], "--gpus is below 1 [gpus=-8]"),
        (["--gpus", "12"], "the devices do not fill whole nodes [gpus=12, node=8]"),
        (["--gpus", "100000"], "too many devices to plan for [gpus=100000, most=4096]"),
        (["--node", "0"], "--node is below 1"),
        (["--batch", "0"], "--batch is below 1"),
        (["--seq-len", "-1"], "--seq-len is no number of tokens"),
        (["--seq-len", "1X"], "--seq-len is no number of tokens"),
        (["--seq-len", "0"], "--seq-len is no number of tokens"),
        (["--documents", "3,x"], "--documents is no"),
        (["--documents", "0x5"], "--documents is no list of lengths"),
        (["--dtype", "fp8"], "unknown dtype"),
        (["--zero", "4"], "there is no such ZeRO stage [zero=4]"),
        (["--setting", "size=3"], "the size does not divide the devices [size=3, gpus=8]"),
        (["--setting", "layuot=packed"], 'Did you mean "layout"?'),
        (["--setting", "layout=zigzg"], 'Did you mean "zigzag"?'),
        (["--setting", "schedule=rng"], 'Did you mean "ring"?'),
        (["--setting", "heads=3"], "does not divide the sequence group"),
        (["--setting", "layout"], "--setting has no value"),
        (["--setting", "hardware=h200"], "hardware is no setting of a plan [setting='h200']. Fix: Give --hardware"),
        (["--setting", "tokens=5"], "Give --seq-len"),
        (["--config", "/no/such.yaml"], "there is no such config file"),
        (["--largest", "--fewest"], "two questions"),
        (["--largest", "--save", "x.yaml"], "nothing that could be saved"),
    ],
)
def test_bad_input_is_one_named_error_and_exit_code_2(
    change: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, said = plan(capsys, *SHORT, *change)
    assert code == 2
    assert text in said
    assert said.count("\n") == 1, "one message"
    assert "Traceback" not in said


@pytest.mark.parametrize("option", ["--model", "--hardware", "--gpus", "--seq-len"])
def test_what_is_missing_is_named(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = list(SHORT)
    at = arguments.index(option)
    del arguments[at : at + 2]
    code, _, said = plan(capsys, *arguments)
    assert code == 2
    assert f"Give {option}" in said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1, 2]", "is no mapping"),
        ("steps: 3\n", "holds no settings of a ring"),
        ("{", "is no YAML or JSON"),
        ("format: 2\nring: {size: 2}\n", "has another format"),
        ("ring: {size: 2, laoyut: zigzag}\n", 'Did you mean "layout"?'),
        ("zero_optimization: {stage: high}\n", "wrong zero_optimization.stage"),
        (
            "zero_optimization: {stage: 0, offload_optimizer: {device: cpu}}\nbf16: {enabled: true}\n",
            "offloaded with ZeRO 1 to 3 only",
        ),
        ("zero_optimization: {stage: 1}\n", "no attention rates for this dtype [dtype='fp32']"),
        ("format: 1\nring: {size: 2}\nmade_for: {models: x}\n", 'Did you mean "model"?'),
    ],
)
def test_a_bad_config_is_named(text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    code, _, said = plan(capsys, *SHORT, "--config", path)
    assert code == 2
    assert says in said


def test_a_mix_of_documents_fills_the_sequence(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, *JOB, "--seq-len", "64K", "--documents", "4K,300")
    assert (found["asked"]["tokens"], found["asked"]["documents"]) == (65536, 29)


def test_planning_needs_no_torch_and_json_no_rich_and_stands_alone() -> None:
    code = (
        "import sys\nfrom seqpar_ring import cli\n"
        f"code = cli.main(['plan', *{list(SHORT)!r}, '--json'])\n"
        "print(code, [n for n in ('torch', 'matplotlib', 'rich') if n in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.split("\n")[0] == "0 []"
    assert json.loads(done.stdout)["fits"]


def test_the_fewest_devices_may_be_asked_for_with_a_decided_size(capsys: pytest.CaptureFixture[str]) -> None:
    """It was said not to divide one device, which nobody had asked for."""
    code, out, _ = plan(capsys, *JOB[:2], *JOB[4:], "--seq-len", "512K", "--fewest", "--setting", "size=4")
    assert code == 0
    assert "devices" in out


@pytest.mark.parametrize(("zero", "stage"), [(True, 1), (False, 0), ({"stage": 2}, 2)])
def test_the_old_way_to_say_zero_is_understood(zero: object, stage: int) -> None:
    found = choices_of({"zero_optimization": zero}, "a config")
    assert found == {"zero": stage, "offload_optimizer": False, "offload_parameters": False}
