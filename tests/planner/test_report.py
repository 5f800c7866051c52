"""What a plan says: the question is read as it is written, each choice has a reason that is true, limits are limits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from seqpar_ring.errors import ConfigError
from seqpar_ring.lengths import MOST_TOKENS
from seqpar_ring.planner.asked import Asked, Given, asked, documents, pairs
from seqpar_ring.planner.memory import memory
from seqpar_ring.planner.reasons import COMPARED, _shown, reasons
from seqpar_ring.planner.remedy import _numbers, fewest_devices, largest_sequences, remedies
from seqpar_ring.planner.report import Answer, answer, as_data
from seqpar_ring.planner.savefile import as_saved, load, merged, save
from seqpar_ring.planner.search import Fixed, search
from seqpar_ring.planner.sections import Section, _millions, limits_section, sections, text

JOB = Given("llama-3.1-8b", "h100", "nvlink+ndr", "128K", gpus=16)


@pytest.fixture(scope="module")
def found() -> Answer:
    what = asked(JOB)
    return answer(what, search(what.workload, what.machine, what.gpus, what.fixed))


@pytest.fixture(scope="module")
def nowhere() -> Answer:
    what = asked(JOB._replace(seq_len="100M"))
    return answer(what, search(what.workload, what.machine, what.gpus, what.fixed))


# ------------------------------------------------------------------------------------------------ the question


def test_documents_are_listed_repeated_and_cut() -> None:
    assert documents("5000,300", "") == (5000, 300)
    assert documents("2x1K,300", "") == (1024, 1024, 300)
    assert documents("1K,300", "4K") == (1024, 300, 1024, 300, 1024, 300, 124)
    assert documents("", "4K") == (4096,)
    assert documents("8K", "4K") == (4096,)
    with pytest.raises(ConfigError, match="too many documents"):
        documents("1", "1M")


def test_settings_are_read_as_json_where_they_are_any() -> None:
    assert pairs(["size=8", "layout=packed", "offload=true", 'remat="none"']) == {
        "size": 8, "layout": "packed", "offload": True, "remat": "none",
    }  # fmt: skip


def test_what_is_written_goes_before_a_config_and_a_length_replaces_both_of_its() -> None:
    config = Given("m", "h", "f", "1M", "5,6", 8, dtype="fp16", fixed=Fixed({"size": 4, "heads": 2}, zero=1))
    both = merged(Given(seq_len="2K", fixed=Fixed({"size": 8}, zero=3)), config)
    assert both == Given("m", "h", "f", "2K", "", 8, dtype="fp16", fixed=Fixed({"size": 8, "heads": 2}, zero=3))


@pytest.mark.parametrize(
    ("text", "number"),
    [("40M", 40_000_000), ("1_500_000", 1_500_000), ("1.5b", 1_500_000_000), ("0.5%", 40_151_306), ("7k", 7000)],
)
def test_trained_parameters_are_counted_in_powers_of_ten_or_as_a_share(text: str, number: int) -> None:
    assert asked(JOB._replace(trained=text)).workload.trained == number


@pytest.mark.parametrize("text", ["", "100%", "8_030_261_248"])
def test_all_parameters_are_trained_where_nothing_else_is_said(text: str) -> None:
    workload = asked(JOB._replace(trained=text)).workload
    assert workload.trained is None
    assert workload.parameters_trained == 8_030_261_248


@pytest.mark.parametrize("text", ["0", "9B", "101%", "-1", "few", "1e6", "40MM", "%", "9" * 400])
def test_what_is_no_number_of_the_parameters_is_refused_with_how_many_there_are(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--trained is no number.*parameters=8030261248.*LoRA"):
        asked(JOB._replace(trained=text))


# ------------------------------------------------------------------------------------------------ the answer


def test_every_choice_has_a_reason(found: Answer) -> None:
    assert [reason.choice for reason in found.reasons][:2] == ["size", "heads"]
    assert {"checkpointing", "zero"} <= {reason.choice for reason in found.reasons}
    assert all(reason.why for reason in found.reasons)


def test_what_was_decided_says_so() -> None:
    what = asked(JOB._replace(fixed=Fixed({"size": 8, "heads": 1, "schedule": "ring"}, checkpointing=True, zero=3)))
    why = {r.choice: r.why for r in reasons(search(what.workload, what.machine, 16, what.fixed), what)}
    assert {why[name] for name in ("size", "heads", "schedule", "checkpointing", "zero")} == {"as asked"}
    assert why["block_tokens"] != "as asked"


def test_a_reason_that_memory_is_short_is_true() -> None:
    what = asked(Given("llama-3.1-8b", "h100", "nvlink+ndr", "1M", gpus=64))
    options = search(what.workload, what.machine, what.gpus)
    why = {reason.choice: reason.why for reason in reasons(options, what)}["checkpointing"]
    needed = memory(what.workload, options.options[0].choice._replace(checkpointing=False), what.machine.device).peak
    assert needed > what.machine.device.memory
    assert why == f"no checkpointing: {needed / 2**30:.1f} GiB needed, there are 77.5 GiB"


def test_the_data_is_json_and_names_the_same_choice(found: Answer) -> None:
    data = json.loads(json.dumps(as_data(found, top=2)))
    assert len(data["options"]) == 2
    assert found.best is not None
    assert data["chosen"]["settings"]["size"] == found.best.choice.settings.size
    assert data["asked"]["tokens"] == 131072


def test_the_text_has_its_columns_aligned(found: Answer) -> None:
    whole = text(sections(found))
    assert whole.startswith("Asked\n  llama-3.1-8b, 8.03 billion parameters, bf16\n")
    assert not [line for line in whole.splitlines() if line != line.rstrip()]
    small = Section("Title", (("a", "1.5"), ("bcd", "22.5")), ("what", "number"), (1,))
    assert text([small]) == "Title\n  what  number\n  a        1.5\n  bcd     22.5"


def test_the_time_table_adds_up(found: Answer) -> None:
    table = next(section for section in sections(found) if section.title.startswith("Time: "))
    seconds = {row[0]: float(row[1]) for row in table.rows}
    whole = seconds.pop("step")
    seconds.pop("  of both, nothing computed", None)
    assert sum(seconds.values()) == pytest.approx(whole, abs=0.01)


def test_alternatives_differ_in_size_heads_or_schedule(found: Answer) -> None:
    table = next(section for section in sections(found, top=50) if section.title.startswith("The best of "))
    kinds = [(row[1], row[2], row[4]) for row in table.rows]
    assert len(set(kinds)) == len(kinds) > 3


def test_where_nothing_fits_the_remedies_stand_there(nowhere: Answer) -> None:
    assert nowhere.best is None
    assert nowhere.reasons == ()
    titles = [section.title for section in sections(nowhere)]
    assert titles[1:3] == ["Nothing fits", "What would make it fit"]
    assert as_data(nowhere)["would_fit"] == list(nowhere.remedies)


def test_what_memory_does_not_forbid_is_not_called_too_large() -> None:
    """A double ring within one node: its own refusal says why, and fewer tokens would be no remedy."""
    what = asked(JOB._replace(seq_len="64K", gpus=8, fixed=Fixed(settings={"schedule": "double_ring", "size": 8})))
    refused = answer(what, search(what.workload, what.machine, what.gpus, what.fixed))
    titles = [section.title for section in sections(refused)]
    assert titles[1:3] == ["Nothing is possible", "Refused"]
    assert "What would make it fit" not in titles
    assert as_data(refused)["would_fit"] == []


def test_a_reason_compares_with_an_option_that_differs_in_nothing_else_or_says_in_what(found: Answer) -> None:
    """Numbers of another size were given for another degree of heads."""
    assert found.best is not None
    for reason in found.reasons:
        if reason.choice not in COMPARED or " takes " not in reason.why:
            continue
        value, _, slower = reason.why.partition(" takes ")
        percent = float(slower.split("%")[0])
        value, _, beside = value.partition(" (with ")
        chosen = {name: getattr(found.best.choice.settings, name) for name in COMPARED}
        others = {part.partition(" ")[0]: part.partition(" ")[2] for part in beside.rstrip(")").split(", ") if part}
        wanted = {name: _shown(name, v) for name, v in chosen.items()} | others | {reason.choice: value}
        same = [
            option
            for option in found.found.options
            if all(_shown(name, getattr(option.choice.settings, name)) == wanted[name] for name in COMPARED)
        ]
        costs = {round(100 * (o.seconds_a_token / found.best.seconds_a_token - 1), 1) for o in same}
        assert percent in costs, (reason, costs)


# ------------------------------------------------------------------------------------------------ limits


def fits(what: Asked, choice: object) -> bool:
    needed = memory(what.workload, choice, what.machine.device)  # type: ignore[arg-type]
    return needed.peak <= what.machine.device.memory and needed.host <= what.machine.device.host_memory


def test_the_largest_sequence_of_each_way_fits_and_a_hundredth_more_does_not() -> None:
    what = asked(JOB)
    limits = largest_sequences(what)
    assert len(limits) > 3
    assert [limit.tokens for limit in limits] == sorted(limit.tokens or 0 for limit in limits)
    for limit in limits:
        assert limit.tokens
        for length, expected in ((limit.tokens, True), (limit.tokens * 101 // 100, False)):
            longer = what._replace(workload=what.workload._replace(lengths=(length,)))
            assert fits(longer, limit.choice) is expected


def test_the_fewest_devices_of_each_way_hold_the_sequence() -> None:
    what = asked(JOB._replace(seq_len="512K"))
    for limit in fewest_devices(what):
        assert limit.gpus
        assert limit.choice.gpus == limit.gpus
        assert fits(what, limit.choice)


@pytest.mark.parametrize(("size", "most"), [(24, 3072), (6, 3072), (None, 4096)])
def test_devices_that_are_tried_are_multiples_of_a_decided_size_in_whole_nodes(size: int | None, most: int) -> None:
    """Powers of two are none of 24: no number of devices was said to hold what 240 hold."""
    what = asked(JOB._replace(gpus=24, fixed=Fixed({"size": size} if size else {})))
    tried = _numbers(what)
    assert tried
    assert all(n % (size or 1) == 0 and (n <= 8 or n % 8 == 0) for n in tried)
    assert max(tried) == most
    assert min(tried) == (size or 1)


def test_a_job_of_groups_of_24_that_fits_on_240_devices_is_not_said_to_fit_nowhere() -> None:
    what = asked(Given("llama-3.1-405b", "h200", "nvlink+ndr", "256K", gpus=24, fixed=Fixed({"size": 24})))
    held = [limit.gpus for limit in fewest_devices(what) if limit.gpus]
    assert held
    assert all(gpus % 24 == 0 for gpus in held)
    assert not any("no number of devices" in line and line.startswith("As decided") for line in remedies(what))


def test_devices_are_not_said_to_hold_what_the_search_would_leave_out() -> None:
    """Groups of six in nodes of eight: beyond one node some would be of two."""
    what = asked(JOB._replace(gpus=6, seq_len="1M", fixed=Fixed({"size": 6})))
    assert {limit.gpus for limit in fewest_devices(what)} <= {6, None}


def test_the_largest_sequence_is_asked_for_with_and_without_shared_heads() -> None:
    """A ring alone may hold more."""
    what = asked(JOB)
    plain = {limit.way: limit.tokens for limit in largest_sequences(what._replace(fixed=Fixed({"heads": 1})))}
    for limit in largest_sequences(what):
        assert (limit.tokens or 0) >= (plain[limit.way] or 0)


def test_no_sequence_is_longer_than_can_be_counted() -> None:
    what = asked(Given("smollm2-135m", "b200", "nvlink+ndr", "1K", gpus=4096))
    assert {limit.tokens for limit in largest_sequences(what) if "host" in limit.way} == {MOST_TOKENS}
    with pytest.raises(ConfigError, match="more tokens than can be counted"):
        asked(JOB._replace(seq_len="4G"))


def test_settings_that_contradict_each_other_are_no_want_of_memory() -> None:
    with pytest.raises(ConfigError, match="offload moves what remat keeps"):
        asked(JOB._replace(fixed=Fixed({"remat": "none", "offload": True})))


def test_what_was_decided_stays_where_nothing_is_recomputed() -> None:
    what = asked(JOB._replace(seq_len="8K", fixed=Fixed({"remat": "none"}, checkpointing=False)))
    best = search(what.workload, what.machine, what.gpus, what.fixed).options[0]
    assert best.choice.settings.remat == "none"


def test_ways_that_contradict_what_was_decided_are_left_out() -> None:
    what = asked(JOB._replace(fixed=Fixed({"remat": "attention"}, offload_optimizer=False)))
    ways = [limit.choice for limit in largest_sequences(what)]
    assert ways
    assert not any(choice.offload_optimizer for choice in ways)
    assert {choice.settings.remat for choice in ways} == {"attention"}
    assert any("offload_optimizer is switched off" in line for line in remedies(what))


def test_limits_are_a_table() -> None:
    table = limits_section(fewest_devices(asked(JOB)))
    assert table.head == ("way", "devices", "with")
    assert all(row[1].replace(",", "").isdigit() or row[1] == "none" for row in table.rows)


# ------------------------------------------------------------------------------------------------ files


def test_a_saved_plan_tells_everything_that_was_asked(found: Answer, tmp_path: Path) -> None:
    assert found.best is not None
    path = tmp_path / "plan.yaml"
    save(path, found.asked, found.best)
    read = load(path)
    assert read._replace(fixed=Fixed()) == JOB._replace(dtype="bf16", batch=1, causal=True)
    choice = found.best.choice
    assert read.fixed.zero == choice.zero
    assert read.fixed.settings["size"] == choice.settings.size
    assert as_saved(found.asked, found.best)["versions"]["seqpar_ring"]


@pytest.mark.parametrize(
    ("number", "words"),
    [(40_151_306, "40.15"), (7000, "0.007"), (202_900_000_000, "202,900"), (1_500_000_000, "1,500")],
)
def test_trained_parameters_are_written_in_millions(number: int, words: str) -> None:
    assert _millions(number) == words


def test_a_plan_for_few_trained_parameters_says_so_and_is_saved_with_them(tmp_path: Path) -> None:
    what = asked(JOB._replace(trained="0.5%"))
    best = answer(what, search(what.workload, what.machine, what.gpus, what.fixed))
    assert "of which 40.15 million are trained" in text(sections(best, 1))
    assert as_data(best, 1)["asked"]["trained"] == 40_151_306
    assert best.best is not None
    save(tmp_path / "plan.yaml", what, best.best)
    assert asked(load(tmp_path / "plan.yaml")).workload == what.workload


def test_hardware_in_a_settings_block_is_what_is_planned_for(tmp_path: Path) -> None:
    path = tmp_path / "ring.yaml"
    path.write_text("ring: {size: 4, heads: auto, hardware: h100, fabric: nvlink}\n")
    assert load(path) == Given(hardware="h100", fabric="nvlink", fixed=Fixed({"size": 4}))


def test_a_file_that_cannot_be_written_is_named(found: Answer, tmp_path: Path) -> None:
    assert found.best is not None
    with pytest.raises(ConfigError, match="the plan cannot be saved"):
        save(tmp_path / "no" / "plan.yaml", found.asked, found.best)


DEEPSPEED = {"zero_optimization": {"stage": 3}, "seqpar_ring": {"size": "auto"}}


@pytest.mark.parametrize(
    ("config", "dtype", "batch"),
    [
        ({}, "fp32", None),
        ({"bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 4}, "bf16", 4),
        ({"bfloat16": {"enabled": True}}, "bf16", None),
        ({"bf16": {"enabled": False}, "bfloat16": {"enabled": True}}, "fp32", None),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "fp32", None),
        ({"bf16": {"enabled": "auto"}, "train_micro_batch_size_per_gpu": "auto"}, "", None),
    ],
)
def test_a_deepspeed_config_says_its_dtype_and_its_micro_batch(
    config: dict[str, object], dtype: str, batch: int | None, tmp_path: Path
) -> None:
    """fp32 without a switch, as DeepSpeed trains; it was planned as bf16, and every micro-batch as one sequence."""
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({**DEEPSPEED, **config}))
    assert (load(file).batch, load(file).dtype) == (batch, dtype)


@pytest.mark.parametrize(
    ("key", "value"),
    [("gpus", "8"), ("batch", 1.5), ("causal", "no"), ("model", ["a"])],
)
def test_a_saved_plan_with_a_wrong_value_is_refused_by_its_name(
    found: Answer, tmp_path: Path, key: str, value: object
) -> None:
    assert found.best is not None
    saved = as_saved(found.asked, found.best)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({**saved, "made_for": {**saved["made_for"], key: value}}))
    with pytest.raises(ConfigError, match=f"has a wrong value.*made_for.{key}="):
        load(file)
    file.write_text(json.dumps({**saved, "choices": {**saved["choices"], "checkpointing": "no"}}))
    with pytest.raises(ConfigError, match=r"has a wrong value.*choices.checkpointing='no'"):
        load(file)
    for wrong in ({"made_for": None}, {"choices": [1]}):
        file.write_text(json.dumps({**saved, **wrong}))
        with pytest.raises(ConfigError, match="has a wrong value"):
            load(file)
