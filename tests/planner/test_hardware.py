"""Devices, links and machines: every preset loads and says where its numbers are from, and a wrong file is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from seqpar_ring.errors import ConfigError
from seqpar_ring.planner.data import names
from seqpar_ring.planner.hardware import BACKWARD, Device, Link, Machine, Pace, load, machine, parse, presets

ROOT = Path(__file__).resolve().parents[2]
DEVICES = ["a100", "b200", "cpu", "h100", "h200", "mi300x"]
LINKS = ["100gbe", "efa", "hdr", "loopback", "ndr", "nvlink3", "nvlink4", "nvlink5", "pcie4", "pcie5", "xgmi"]
LINK = {"kind": "link", "name": "mine", "source": "a test", "bandwidth": 1e9}
PACES = {"forward": {"rate": "2e12"}, "backward": {"rate": "1e12"}}
DEVICE = {
    **{"kind": "device", "name": "mine", "source": "a test", "peak": "4e12", "matmul": "3e12"},
    **{"attention": {"bf16": PACES}, "memory": "8e9", "bandwidth": "1e11"},
}


def written(folder: Path, block: object) -> str:
    """The path of a file that holds this."""
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(block))
    return str(path)


def seconds(pace: Pace, flop: float, pairs: float, rows: float) -> float:
    return pace.call + flop * (pairs + pace.row * rows) / pace.rate


def test_the_presets_are_these() -> None:
    assert presets("device") == DEVICES
    assert presets("link") == LINKS
    assert names("hardware") == sorted(DEVICES + LINKS)


@pytest.mark.parametrize("name", DEVICES + LINKS)
def test_every_preset_says_where_its_numbers_are_from(name: str) -> None:
    found = load(name).description
    assert isinstance(found, Device | Link)
    assert len(found.source) > 40
    text = (ROOT / "configs" / "hardware" / f"{name}.yaml").read_text().lower()
    assert "estimated" in text, "no preset is without an estimate, and each must say which it is"


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_attains_less_than_its_peak_and_has_its_links(name: str) -> None:
    device = machine(name, "ndr").device
    assert device.matmul < device.peak
    for attention in device.attention.values():
        assert attention.backward.rate <= attention.forward.rate < device.peak
    assert set(device.links.values()) <= set(LINKS)
    assert device.node == 8


@pytest.mark.parametrize(
    ("tokens", "causal", "fa3", "cudnn"),
    [
        (1024, False, 565, 574),
        (2048, False, 625, 617),
        (4096, False, 638, 609),
        (8192, False, 646, 600),
        (16384, False, 648, 595),
        (1024, True, 423, 410),
        (2048, True, 521, 484),
        (4096, True, 579, 518),
        (8192, True, 602, 529),
        (16384, True, 616, 539),
    ],
)
def test_the_pace_of_an_h100_meets_the_published_forward_rates(tokens: int, causal: bool, fa3: int, cudnn: int) -> None:
    # arXiv 2407.08608, figures 4 and 5: head width 128, 16 heads, 16k tokens in all. TFLOP/s.
    pairs, flop = 16384 * tokens / (1 + causal), 4 * 2048
    rate = flop * pairs / seconds(machine("h100", "ndr").device.paces("bf16").forward, flop, pairs, 16384) / 1e12
    assert rate == pytest.approx((fa3 + cudnn) / 2, rel=0.21 if tokens == 1024 and causal else 0.11)
    assert abs(rate / fa3 - 1) < 0.14 or abs(rate / cudnn - 1) < 0.14


@pytest.mark.parametrize(
    ("tokens", "fa3", "cudnn"),
    [(1024, 424, 408), (2048, 501, 465), (4096, 542, 499), (8192, 559, 518), (16384, 561, 516)],
)
def test_the_pace_of_an_h100_meets_the_published_backward_rates(tokens: int, fa3: int, cudnn: int) -> None:
    pairs, flop = 16384 * tokens, 4 * 2048 * BACKWARD
    rate = flop * pairs / seconds(machine("h100", "ndr").device.paces("bf16").backward, flop, pairs, 16384) / 1e12
    assert cudnn * 0.97 < rate < fa3 * 1.03


def test_data_sheet_figures() -> None:
    peaks = {name: machine(name, "ndr").device.peak for name in DEVICES}
    assert [peaks[n] / 1e12 for n in ("a100", "h100", "h200", "b200", "mi300x")] == [312, 989, 989, 2250, 1307]
    gib = {name: machine(name, "ndr").device.memory / 2**30 for name in DEVICES}
    for name, sheet in (("a100", 80), ("h100", 80), ("h200", 141), ("b200", 180), ("mi300x", 192)):
        assert sheet * 0.94 < gib[name] < sheet, "usable memory is a little less than the card's"
    rates = {name: machine("h100", name).inner.bandwidth / 1e9 for name in LINKS}
    for name, sheet in {"nvlink3": 300, "nvlink4": 450, "nvlink5": 900, "ndr": 50, "hdr": 25, "efa": 50}.items():
        assert 0.7 * sheet <= rates[name] < sheet
    assert machine("h100", "100gbe").outer.shared_by == 8


def test_a_fabric_is_two_links_or_one_for_both() -> None:
    two, one = machine("h100", "nvlink4+ndr"), machine("h100", "ndr")
    assert (two.inner.name, two.outer.name) == ("NVLink 4", "InfiniBand NDR 400")
    assert one.inner == one.outer == two.outer
    assert machine("H100", " NVLink4 + NDR ") == two


@pytest.mark.parametrize(
    ("device", "name", "meant"),
    [
        *[("a100", "nvlink", "nvlink3"), ("h100", "nvlink", "nvlink4"), ("h200", "NVLink", "nvlink4")],
        *[("b200", "nvlink", "nvlink5"), ("a100", "pcie", "pcie4"), ("mi300x", "pcie", "pcie5")],
    ],
)
def test_a_name_without_a_generation_is_the_devices_own(device: str, name: str, meant: str) -> None:
    assert machine(device, f"{name}+ndr") == machine(device, f"{meant}+ndr")


def test_a_node_may_be_of_another_size() -> None:
    assert machine("h100", "nvlink+ndr").node == 8
    assert machine("b200", "nvlink+ndr", node=72).node == 72
    with pytest.raises(ConfigError, match="a node has at least one device"):
        machine("h100", "nvlink+ndr", node=0)


@pytest.mark.parametrize("text", ["989e12", "989.0e+12", "989000000000000", "9.89e14"])
def test_a_number_may_be_written_as_yaml_1_1_would_read_it_as_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.yaml").write_text(f"kind: link\nname: mine\nsource: a test\nbandwidth: {text}\n")
    found = load(str(tmp_path / "mine.yaml")).description
    assert isinstance(found, Link)
    assert found.bandwidth == 989e12


def test_a_file_of_ones_own_is_a_device_a_link_or_a_whole_machine(tmp_path: Path) -> None:
    link, device = tmp_path / "link.yaml", tmp_path / "device.yaml"
    link.write_text(yaml.safe_dump(LINK))
    device.write_text(yaml.safe_dump(DEVICE))
    built = machine(str(device), f"{link}+ndr", node=4)
    assert (built.device.peak, built.inner.bandwidth, built.node) == (4e12, 1e9, 4)
    (tmp_path / "machine.yaml").write_text(yaml.safe_dump({**built.model_dump(mode="json"), "measured": {"x": [1, 2]}}))
    again = machine(str(tmp_path / "machine.yaml"))
    assert again.model_copy(update={"measured": {}}) == built
    assert machine(str(tmp_path / "machine.yaml"), "ndr").inner == built.outer
    assert machine(str(tmp_path / "machine.yaml"), node=2).node == 2


def test_a_file_goes_before_a_preset_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ndr").write_text(yaml.safe_dump(LINK))
    assert machine("h100", "ndr").inner.name == "mine"


def test_paces_are_by_dtype_and_those_of_bf16_are_fp16s_too() -> None:
    device = machine("h100", "ndr").device
    assert device.paces("fp16") == device.paces("bf16")
    with pytest.raises(ConfigError, match=r"has no attention rates for this dtype \[dtype='fp32'\]") as caught:
        device.paces("fp32")
    assert "seqpar-ring probe --dtype fp32" in caught.value.fix


@pytest.mark.parametrize(
    ("hardware", "fabric", "says", "fix"),
    [
        ("h10", "ndr", "there is no device of this name", 'Did you mean "h100"? Or give the path of a YAML file.'),
        ("zzz", "ndr", "there is no device of this name", "Known: a100, b200, cpu, h100, h200, mi300x. Or give"),
        ("ndr", "ndr", "this hardware is a link, where a device is needed", "Devices: a100, b200, cpu"),
        ("gone.yaml", "ndr", "there is no such hardware file", "Check the path."),
        ("h100", "nvlnk+ndr", "there is no link of this name", 'Did you mean "nvlink"?'),
        ("mi300x", "nvlink", "there is no link of this name", 'Did you mean "nvlink'),
        ("h100", "nvlink+", "there is no link of this name", "Known: 100gbe, efa"),
        ("h100", "h200", "the fabric names a device, where a link is needed", "Links: 100gbe, efa"),
        ("h100", "gone.yaml", "there is no such hardware file", "Check the path."),
        ("h100", "nvlink+ndr+efa", "a fabric has one link or two", "Write inner+outer, e.g. nvlink+ndr."),
        ("h100", None, "nothing says what joins the devices", "Give a fabric as inner+outer"),
    ],
)
def test_what_is_unknown_is_refused_with_the_nearest(hardware: str, fabric: str | None, says: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        machine(hardware, fabric)
    assert caught.value.fix.startswith(fix)


@pytest.mark.parametrize("entry", ["name", "source", "peak", "matmul", "attention", "memory", "bandwidth"])
def test_a_missing_entry_of_a_device_is_named(tmp_path: Path, entry: str) -> None:
    path = written(tmp_path, {key: value for key, value in DEVICE.items() if key != entry})
    with pytest.raises(ConfigError, match=rf"mine\.yaml lacks {entry} ") as caught:
        machine(path, "ndr")
    assert caught.value.fix == "Give it; configs/hardware has examples."


@pytest.mark.parametrize("entry", ["name", "source", "bandwidth"])
def test_a_missing_entry_of_a_link_is_named(tmp_path: Path, entry: str) -> None:
    path = written(tmp_path, {key: value for key, value in LINK.items() if key != entry})
    with pytest.raises(ConfigError, match=rf"mine\.yaml lacks {entry} "):
        machine("h100", path)


@pytest.mark.parametrize(
    ("block", "key", "says"),
    [
        ({**LINK, "bandwidth": -1}, "bandwidth", "Input should be greater than 0."),
        ({**LINK, "bandwidth": 0}, "bandwidth", "Input should be greater than 0."),
        ({**LINK, "bandwidth": "450 GB/s"}, "bandwidth", "Input should be a valid number"),
        ({**LINK, "bandwidth": float("nan")}, "bandwidth", "Input should be a finite number."),
        ({**LINK, "bandwidth": True}, "bandwidth", "Give a value, not yes or no."),
        ({**LINK, "latency": -1e-6}, "latency", "Input should be greater than or equal to 0."),
        ({**LINK, "shared_by": 0}, "shared_by", "Input should be greater than or equal to 1."),
        ({**LINK, "shared_by": 1.5}, "shared_by", "Input should be a valid integer"),
        ({**LINK, "steals": 1.1}, "steals", "Input should be less than or equal to 1."),
        ({**DEVICE, "peak": "-4e12"}, "peak", "Input should be greater than 0."),
        ({**DEVICE, "memory": None}, "memory", "Input should be a valid number."),
        ({**DEVICE, "node": 0}, "node", "Input should be greater than or equal to 1."),
        ({**DEVICE, "attention": {}}, "attention", "Dictionary should have at least 1 item"),
        (
            {**DEVICE, "attention": {"bf16": {**PACES, "forward": {"rate": 0}}}},
            "attention.bf16.forward.rate",
            "Input should be greater than 0.",
        ),
    ],
)
def test_an_impossible_number_is_refused_with_its_entry_and_value(block: Any, key: str, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"mine has a wrong {key} \[value=") as caught:
        parse(block, "mine")
    assert caught.value.fix.startswith(says)


@pytest.mark.parametrize(
    ("block", "key", "near"),
    [
        ({**LINK, "bandwidths": 1}, "bandwidths", "bandwidth"),
        ({**DEVICE, "memori": 1}, "memori", "memory"),
        ({**DEVICE, "attention": {"bf16": {**PACES, "fordward": {}}}}, "attention.bf16.fordward", "forward"),
        (
            {**DEVICE, "attention": {"bf16": {**PACES, "forward": {"rate": 1, "rows": 2}}}},
            "attention.bf16.forward.rows",
            "row",
        ),
        ({"kind": "machine", "device": {**DEVICE, "nodes": 4}, "inner": LINK, "outer": LINK}, "device.nodes", "node"),
    ],
)
def test_an_unknown_entry_is_refused_with_the_nearest_of_its_place(block: Any, key: str, near: str) -> None:
    with pytest.raises(ConfigError, match="mine has an unknown entry") as caught:
        parse(block, "mine")
    assert caught.value.values["key"] == key
    assert caught.value.fix == f'Did you mean "{near}"?'


@pytest.mark.parametrize("block", [None, [LINK], "link", 3])
def test_what_is_no_mapping_describes_no_hardware(block: object) -> None:
    with pytest.raises(ConfigError, match="mine describes no hardware"):
        parse(block, "mine")


KIND_FIXES = [("devise", 'Did you mean "device"?'), (None, "Known: device, link, machine.")]


@pytest.mark.parametrize(("kind", "fix"), KIND_FIXES)
def test_a_description_says_of_what_it_is(kind: str | None, fix: str) -> None:
    with pytest.raises(ConfigError, match="mine does not say what kind of hardware it describes") as caught:
        parse({**LINK, "kind": kind}, "mine")
    assert caught.value.fix == fix


def test_a_machine_holds_a_device_and_links_and_not_the_other_way_round() -> None:
    with pytest.raises(ConfigError, match=r"mine has a wrong device\.kind"):
        parse({"kind": "machine", "device": {**DEVICE, "kind": "link"}, "inner": LINK, "outer": LINK}, "mine")
    whole = parse({"kind": "machine", "device": DEVICE, "inner": LINK, "outer": LINK}, "mine").description
    assert isinstance(whole, Machine)
    assert whole.node == 8
