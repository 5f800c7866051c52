"""Hardware: devices, links, and the machine that they make, as data with a source for each number.

Presets stand in `configs/hardware`; a user's own file overrides them, and `seqpar-ring probe` writes one for the machine
it runs on. All numbers are in bytes, seconds and FLOP per second. A product of matrices counts 2 FLOP for each
multiplication, attention 2 (D + E) for each pair of a query and a key and each head, and 2.5 times that in backward.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from seqpar_ring.errors import ConfigError, did_you_mean
from seqpar_ring.planner.data import named, names

BACKWARD = 2.5
"""FLOP of attention's backward for each of its forward: five products of matrices against two."""


class _Described(BaseModel):
    # Strict about keys and signs, not about types: YAML 1.1 reads 989e12 as a string, and 8 as an integer.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Pace(_Described):
    """How fast a device computes one pass of block attention: a call of `pairs` pairs and `rows` query rows takes

        call + FLOP of a pair * (pairs + row * rows) / rate     seconds.

    Attributes:
        rate: FLOP per second of large blocks.
        call: seconds that each kernel call costs, whatever it computes.
        row: what a query row costs beside its pairs, as pairs: the number of keys at which half the rate is reached.
    """

    rate: float = Field(gt=0)
    call: float = Field(default=0.0, ge=0)
    row: float = Field(default=0.0, ge=0)


class Attention(_Described):
    """Paces of block attention in one dtype."""

    forward: Pace
    backward: Pace


class Device(_Described):
    """One accelerator, or one process of a CPU.

    Attributes:
        name: what it is.
        source: where the numbers are from.
        peak: FLOP per second of its data sheet, dense, in 16 bits; what MFU is counted against.
        matmul: FLOP per second that large products of matrices attain.
        attention: paces by dtype: "bf16", "fp32".
        memory: bytes that tensors can use.
        bandwidth: bytes per second of its memory, as merges and sums of partial results attain it.
        host_memory: bytes of the host's memory for each device, for what is offloaded.
        host_bandwidth: bytes per second between the device and that memory, in each direction.
        node: devices of one node.
        links: what a name without a generation means with this device: {"nvlink": "nvlink4"}.
    """

    kind: Literal["device"] = "device"
    name: str
    source: str
    peak: float = Field(gt=0)
    matmul: float = Field(gt=0)
    attention: dict[str, Attention] = Field(min_length=1)
    memory: float = Field(gt=0)
    bandwidth: float = Field(gt=0)
    host_memory: float = Field(default=0.0, ge=0)
    host_bandwidth: float = Field(default=25e9, gt=0)
    node: int = Field(default=8, ge=1)
    links: dict[str, str] = Field(default_factory=dict)

    def paces(self, dtype: str) -> Attention:
        """The paces of this dtype; those of bf16 are fp16's too, if fp16 has none of its own.

        Raises:
            ConfigError: they are not known.
        """
        dtype = "bf16" if dtype == "fp16" and dtype not in self.attention else dtype
        if dtype not in self.attention:
            fix = f"Give one of {', '.join(self.attention)}, or measure it: seqpar-ring probe --dtype {dtype}."
            raise ConfigError(f"{self.name} has no attention rates for this dtype", fix=fix, dtype=dtype)
        return self.attention[dtype]


class Link(_Described):
    """What joins two ranks.

    Attributes:
        name: what it is.
        source: where the numbers are from.
        bandwidth: bytes per second in each direction, as one sharer attains them alone.
        latency: seconds from posting a message to its first byte.
        shared_by: ranks of a node that share it; 1: each has its own.
        steals: seconds of computation that a rank loses for each second in which it transfers: cores or
            multiprocessors that copy instead of computing.
    """

    kind: Literal["link"] = "link"
    name: str
    source: str
    bandwidth: float = Field(gt=0)
    latency: float = Field(default=0.0, ge=0)
    shared_by: int = Field(default=1, ge=1)
    steals: float = Field(default=0.0, ge=0, le=1)


class Machine(_Described):
    """Devices and what joins them.

    Attributes:
        device: each rank's.
        inner: between ranks of a node.
        outer: between nodes.
        measured: what a probe saw, kept as it was; nothing reads it.
    """

    kind: Literal["machine"] = "machine"
    device: Device
    inner: Link
    outer: Link
    measured: dict[str, Any] = Field(default_factory=dict)

    @property
    def node(self) -> int:
        """Devices of one node."""
        return self.device.node


class Entry(NamedTuple):
    """A description by name: what it is of, and what it says."""

    kind: str
    description: Device | Link | Machine


T = TypeVar("T", Device, Link, Machine)
KINDS: dict[str, type[Device] | type[Link] | type[Machine]] = {"device": Device, "link": Link, "machine": Machine}


def load(name: str) -> Entry:
    """A description from a preset's name or a file.

    Raises:
        ConfigError: no such preset or file, or one with a missing, unknown or impossible entry.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise ConfigError("there is no such hardware file", fix="Give a YAML file; seqpar-ring probe writes one.", path=name)
        try:
            block = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is no YAML", fix="See configs/hardware for examples.", says=str(error)) from None
        return parse(block, str(path))
    return parse(named("hardware", name.lower()), name)


def parse(block: object, where: str) -> Entry:
    """A checked description from a mapping.

    Raises:
        ConfigError: it is none, or an entry is missing, unknown or impossible.
    """
    kind = block.get("kind") if isinstance(block, dict) else None
    if not isinstance(block, dict) or kind not in KINDS:
        known = ", ".join(KINDS)
        raise ConfigError(f"{where} describes no hardware", fix=f"Give a mapping with kind: {known}.", kind=kind)
    try:
        return Entry(kind, KINDS[kind](**block))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise ConfigError(f"{where} lacks {key}", fix="Give it; configs/hardware has examples.", missing=key) from None
        if first["type"] == "extra_forbidden":
            fix = did_you_mean(str(first["loc"][-1]), KINDS[kind].model_fields)
            raise ConfigError(f"{where} has an unknown entry", fix=fix, key=key) from None
        raise ConfigError(f"{where} has a wrong {key}", fix=f"{first['msg']}.", value=first["input"]) from None


def machine(hardware: str, fabric: str | None = None, node: int | None = None) -> Machine:
    """The machine of a device and one or two links.

    Args:
        hardware: a device's preset or file, or the file of a whole machine, as a probe writes it.
        fabric: links as "inner+outer" ("nvlink+ndr"), or one for both; overrides those of a whole machine.
        node: devices of a node; None: as the device says.

    Raises:
        ConfigError: no such preset or file, one of another kind, or no fabric where one is needed.
    """
    kind, found = load(hardware)
    if isinstance(found, Link):
        raise ConfigError("--hardware names a link", fix=f"Devices: {', '.join(presets('device'))}.", hardware=hardware)
    device = found.device if isinstance(found, Machine) else found
    if node is not None:
        if node < 1:
            raise ConfigError("a node has at least one device", fix="Give 1 or more.", node=node)
        device = device.model_copy(update={"node": node})
    if fabric is not None:
        parts = [part.strip() for part in fabric.split("+")]
        if len(parts) > 2:
            raise ConfigError("a fabric has one link or two", fix="Write inner+outer, e.g. nvlink+ndr.", fabric=fabric)
        inner, outer = (_link(device.links.get(part.lower(), part)) for part in (parts[0], parts[-1]))
        return Machine(device=device, inner=inner, outer=outer)
    if isinstance(found, Machine):
        return found.model_copy(update={"device": device})
    fix = f"Give --fabric inner+outer, e.g. nvlink+ndr. Links: {', '.join(presets('link'))}."
    raise ConfigError("nothing says what joins the devices", fix=fix, hardware=hardware)


def presets(kind: str) -> list[str]:
    """Names of the presets of a kind: "device" or "link"."""
    return [name for name in names("hardware") if named("hardware", name).get("kind") == kind]


def _link(name: str) -> Link:
    if not Path(name).is_file() and name.lower() not in presets("link"):
        fix = did_you_mean(name.lower(), presets("link"))
        raise ConfigError("there is no link of this name, nor such a file", fix=fix, link=name)
    kind, found = load(name)
    if not isinstance(found, Link):
        raise ConfigError("the fabric names no link", fix=f"Links: {', '.join(presets('link'))}.", name=name, kind=kind)
    return found
