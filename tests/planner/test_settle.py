""" "auto" in the settings of a job: decided by prices, once, the same on all ranks, and never guessed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from seqpar_ring import SequenceParallel
from seqpar_ring.config import Settings
from seqpar_ring.errors import ConfigError
from seqpar_ring.groups import Groups
from seqpar_ring.planner import settle as settling
from seqpar_ring.planner.hardware import machine
from seqpar_ring.planner.job import Choice, Workload
from seqpar_ring.planner.model import Model
from seqpar_ring.planner.settle import on_device, settle
from seqpar_ring.planner.step import Prices
from seqpar_ring.schedule import BUILDERS
from seqpar_ring.testing import Case, RankPool, dense_results, relative_error, ring_results, run_lockstep
from seqpar_ring.testing.threads import run_lockstep_groups

AUTO = {"layout": "auto", "schedule": "auto", "heads": "auto", "hardware": "h100", "fabric": "nvlink4+ndr"}
MODEL = Model.of_attention(32, 8, 128)


def workload(tokens: int, *more: int) -> Workload:
    return Workload(MODEL, (tokens, *more))


def seconds(settings: Settings, asked: Workload) -> float:
    on = machine(str(settings.hardware), settings.fabric)
    ring = Prices(asked, on).ring(Choice(settings.size, settings), asked.model.spans[0])
    return ring.forward.seconds + ring.backward.seconds


def test_nothing_open_is_left_as_it_is() -> None:
    plain = Settings.parse({"size": 4})
    assert settle(plain, workload(4096)) == (plain, "")


def test_what_is_decided_is_as_fast_as_anything_that_could_be() -> None:
    asked = workload(65536)
    found = settle(Settings.parse({"size": 8, **AUTO}), asked)
    assert found.settings.undecided == ("block_tokens",) or isinstance(found.settings.block_tokens, int)
    least = seconds(found.settings, asked)
    for heads in (1, 2, 4, 8):
        for schedule in set(BUILDERS) - {"double_ring"}:
            other = Settings.parse({"size": 8, "heads": heads, "schedule": schedule, **_on()})
            assert least <= 1.005 * seconds(other, asked), (heads, schedule)
    assert "ms of attention a step on" in found.reason


def test_what_the_user_fixed_stays() -> None:
    found = settle(Settings.parse({"size": 8, **AUTO, "heads": 2, "schedule": "direct"}), workload(65536))
    assert (found.settings.head_degree, found.settings.schedule) == (2, "direct")
    tokens = settle(Settings.parse({"size": 8, **_on(), "block_tokens": 1024}), workload(65536))
    assert (tokens.settings.block_tokens, tokens.settings.layout) == (1024, "zigzag")


def test_heads_that_cannot_be_shared_out_are_not_chosen() -> None:
    odd = Workload(Model.of_attention(9, 3, 64), (65536,))
    found = settle(Settings.parse({"size": 8, **AUTO}), odd)
    assert found.settings.head_degree == 1
    with pytest.raises(ConfigError, match="9 query heads cannot be shared out among 4"):
        settle(Settings.parse({"size": 8, **AUTO, "heads": 4}), odd)


def test_many_documents_are_packed() -> None:
    lengths = (30000, *[700] * 40)
    assert settle(Settings.parse({"size": 8, **AUTO, "heads": 1}), workload(*lengths)).settings.layout == "packed"


def test_without_hardware_nothing_is_guessed() -> None:
    with pytest.raises(ConfigError, match=r"layout cannot be decided.*seqpar-ring probe"):
        settle(Settings.parse({"size": 8, "layout": "auto"}), workload(4096))


def test_all_that_is_missing_for_a_decision_is_said_at_once() -> None:
    """A user who had said what the model is was asked for the hardware next."""
    for given, asked in (({}, True), ({"hardware": "h100", "fabric": "nvlink4+ndr"}, False)):
        with pytest.raises(ConfigError, match=r"layout.* cannot be decided: nothing is known of the model") as found:
            SequenceParallel(1, layout="auto", **given).plan(8)
        assert ("seqpar-ring probe" in str(found.value)) == asked


@pytest.mark.parametrize(("key", "value", "words"), [("hardware", "h10", "h100"), ("fabric", "nvlnk4", "nvlink4")])
def test_an_unknown_machine_is_an_error_that_names_the_nearest(key: str, value: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settle(Settings.parse({"size": 8, **AUTO, key: value}), workload(4096))


def _decided(sp: SequenceParallel) -> tuple[Any, ...]:
    sp.describe(Model.of_attention(4, 2, 16), "fp32")
    batch = sp.shard_batch({"input_ids": torch.arange(512)[None], "labels": torch.arange(512)[None]})
    first = sp.settle((512,))
    assert sp.settle((100000,)) is first, "it is decided once"
    return first, sp.decided, batch["seqpar_plan"].schedule


def test_all_ranks_of_a_job_decide_the_same_and_say_why(pool2: RankPool) -> None:
    found = pool2.run(_decided, layout="auto", schedule="auto", heads="auto", hardware="cpu", fabric="loopback")
    assert found[0] == found[1]
    settings, reason, _ = found[0]
    assert settings.layout != "auto"
    assert reason.startswith("heads ")


def test_what_is_decided_for_a_given_length_does_not_hang_on_the_first_batch() -> None:
    def rank(sp: SequenceParallel) -> str:
        sp.describe(MODEL)
        sp.plan(64)
        return sp.decided

    fixed = {**AUTO, "hardware": "cpu", "fabric": "loopback", "tokens": 4096}
    assert "for 4,096 tokens" in run_lockstep(rank, 2, **fixed)[0]


def test_a_plan_without_a_description_says_what_to_do() -> None:
    def rank(sp: SequenceParallel) -> None:
        sp.plan(64)

    with pytest.raises(ConfigError, match=r"sp.describe\(Model.of_attention"):
        run_lockstep(rank, 2, **{**AUTO, "hardware": "cpu", "fabric": "loopback"})


def test_attention_over_decided_settings_is_exact() -> None:
    case = Case(4, 2, 16)
    found = run_lockstep(partial(_described_ring, case=case), 4, **{**AUTO, "hardware": "cpu", "fabric": "loopback"})
    truth = dense_results(37, case)
    for name, whole in found[0].items():
        assert relative_error(whole, truth[name]) <= 1e-12, name


def _described_ring(sp: SequenceParallel, case: Case) -> dict[str, torch.Tensor]:
    sp.describe(Model.of_attention(case.heads, case.kv_heads, case.head_dim), "fp32")
    return ring_results(sp, 37, case)


def _on() -> dict[str, str]:
    return {"hardware": AUTO["hardware"], "fabric": AUTO["fabric"]}


def test_ranks_of_one_node_with_a_known_gpu_get_large_blocks_on_fast_links() -> None:
    found = on_device(Settings.parse({"size": 8}), "NVIDIA H100 80GB HBM3")
    assert (found.hardware, found.fabric, found.undecided) == ("h100", "nvlink4", ("block_tokens",))
    settled = settle(found, workload(65536))
    assert isinstance(settled.settings.block_tokens, int)
    assert settled.settings.block_tokens >= 4 * 8192, "one or two remote calls instead of seven"
    assert "block_tokens" in settled.reason
    assert "NVLink" in settled.reason


@pytest.mark.parametrize(
    ("device", "settings"),
    [
        ("", {}),
        ("NVIDIA H100 PCIe", {}),
        ("NVIDIA H100 80GB HBM3", {"block_tokens": 1024}),
        ("NVIDIA H100 80GB HBM3", {"hardware": "cpu", "fabric": "loopback"}),
    ],
)
def test_no_hardware_is_guessed_where_it_is_unknown_or_the_user_decided(device: str, settings: dict[str, Any]) -> None:
    asked = Settings.parse({"size": 8, **settings})
    assert on_device(asked, device) is asked


def test_what_nobody_asked_for_is_left_alone_where_it_cannot_be_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ConfigError("nothing fits", fix="Fix less.")

    monkeypatch.setattr(settling, "settle", fails)
    for asked, found in (({}, "auto"), ({"heads": "auto"}, None)):
        decision = settling.Decision(Settings.parse({"size": 8, **asked}), "NVIDIA H100 80GB HBM3")
        decision.describe(MODEL, "bf16")
        if found is None:
            with pytest.raises(ConfigError, match="nothing fits"):
                decision.settle([65536])
        else:
            assert (decision.settle([65536]).block_tokens, decision.reason) == (found, "")


def _on_h100(described: bool) -> Any:
    def rank(groups: Groups) -> tuple[int | str, str]:
        sp = SequenceParallel.over(replace(groups, device="NVIDIA H100 80GB HBM3"), Settings.parse({"size": 4}))
        if described:
            sp.describe(MODEL)
        return sp.plan(32768).documents.settings.block_tokens, sp.decided

    return run_lockstep_groups(rank, 4)[0]


def test_the_default_block_follows_the_gpu_once_the_model_is_known_and_is_whole_until_then() -> None:
    block, reason = _on_h100(described=True)
    assert block == 2 * 8192 or block == 3 * 8192
    assert reason.startswith(f"block_tokens {block}: ")
    assert _on_h100(described=False) == ("auto", "")
