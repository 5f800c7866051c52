"""Hardware: devices, links, and the machine that they make, as data with a source for each number.

Presets stand in `configs/hardware`; a user's own file goes first, and `seqpar-ring probe` writes one for the machine it
runs on. All numbers are in bytes, seconds and FLOP per second. A product of matrices counts 2 FLOP for each
multiplication, attention 2 (D + E) for each pair of a query and a key and each head, and 2.5 times that in backward.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from seqpar_ring.errors import ConfigError, did_you_mean
from seqpar_ring.planner.data import named, names, read

BACKWARD = 2.5
"""FLOP of attention's backward for each of its forward: five products of matrices against two."""


class _Described(BaseModel):
    # Strict about keys and signs, not about types: YAML 1.1 reads 989e12 as a string, and 8 as an integer.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_truth_value(cls, value: object) -> object:
        # YAML reads yes and on as true, and true is 1: a bandwidth of one byte a second.
        if isinstance(value, bool):
            raise ValueError("Give a value, not yes or no")
        return value


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
        matmul: FLOP per second that large products of matrices attain, in 16 bits or whatever was measured.
        matmul_of: the same by dtype, where it was measured for several: {"bf16": .., "fp32": ..}.
        attention: paces by dtype: "bf16", "fp32".
        memory: bytes that tensors can use.
        bandwidth: bytes per second of its memory, as merges and sums of partial results attain it.
        host_memory: bytes of the host's memory for each device, for what is offloaded.
        host_bandwidth: bytes per second between the device and that memory, in each direction.
        node: devices of one node.
        links: what a name without a generation means with this device: {"nvlink": "nvlink4"}.
        reported: names by which drivers report the device where the first of its links joins a node: "NVIDIA H200".
        kernel: what computes block attention on it, for the memory that it needs: "flash" or "cpu".
    """

    kind: Literal["device"] = "device"
    name: str
    source: str
    peak: float = Field(gt=0)
    matmul: float = Field(gt=0)
    matmul_of: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    attention: dict[str, Attention] = Field(min_length=1)
    memory: float = Field(gt=0)
    bandwidth: float = Field(gt=0)
    host_memory: float = Field(default=0.0, ge=0)
    host_bandwidth: float = Field(default=25e9, gt=0)
    node: int = Field(default=8, ge=1)
    links: dict[str, str] = Field(default_factory=dict)
    reported: tuple[str, ...] = ()
    kernel: Literal["flash", "cpu"] = "flash"

    def products(self, dtype: str) -> float:
        """FLOP per second of large products of matrices in this dtype; fp16 counts as bf16."""
        found: float = self.matmul_of.get("bf16" if dtype == "fp16" else dtype, self.matmul)
        return found

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


KINDS: dict[str, type[Device] | type[Link] | type[Machine]] = {"device": Device, "link": Link, "machine": Machine}


def load(name: str) -> Entry:
    """A description from a preset's name or a file. A file of this name goes first.

    Raises:
        ConfigError: no such preset or file, or one with a missing, unknown or impossible entry.
    """
    if is_file(name):
        return parse(read(Path(name), "hardware"), name)
    return parse(named("hardware", name.lower()), name)


def is_file(name: str) -> bool:
    """Whether this names a YAML file, and not a preset."""
    return Path(name).suffix.lower() in (".yaml", ".yml", ".json") or Path(name).is_file()


def parse(block: object, where: str) -> Entry:
    """A checked description from a mapping.

    Args:
        block: what was read.
        where: from where, for messages.

    Raises:
        ConfigError: it is none, or an entry is missing, unknown or impossible.
    """
    if not isinstance(block, dict):
        fix = f"Give a mapping with kind: {', '.join(KINDS)}; configs/hardware has examples."
        raise ConfigError(f"{where} describes no hardware", fix=fix, holds=type(block).__name__)
    kind = block.get("kind")
    if kind not in KINDS:
        fix = did_you_mean(str(kind), KINDS)
        raise ConfigError(f"{where} does not say what kind of hardware it describes", fix=fix, kind=kind)
    try:
        return Entry(kind, KINDS[kind](**block))
    except ValidationError as error:
        raise _refusal(KINDS[kind], error, where) from None


def machine(hardware: str, fabric: str | None = None, node: int | None = None) -> Machine:
    """The machine of a device and one or two links.

    Args:
        hardware: a device's preset or file, or the file of a whole machine, as a probe writes it.
        fabric: links as "inner+outer" ("nvlink+ndr"), or one for both; overrides those of a whole machine. A name
            without a generation is what the device says: "nvlink" is "nvlink5" with a B200.
        node: devices of a node; None: as the device says.

    Raises:
        ConfigError: no such preset or file, one of another kind, or no fabric where one is needed.
    """
    if not is_file(hardware) and hardware.lower() not in presets("device") + presets("link"):
        fix = did_you_mean(hardware, presets("device")) + " Or give the path of a YAML file."
        raise ConfigError("there is no device of this name", fix=fix, hardware=hardware)
    found = load(hardware).description
    if isinstance(found, Link):
        fix = f"Devices: {', '.join(presets('device'))}."
        raise ConfigError("this hardware is a link, where a device is needed", fix=fix, hardware=hardware)
    device = found.device if isinstance(found, Machine) else found
    if node is not None:
        if node < 1:
            raise ConfigError("a node has at least one device", fix="Give 1 or more.", node=node)
        device = device.model_copy(update={"node": node})
    if fabric is not None:
        parts = [part.strip() for part in fabric.split("+")]
        if len(parts) > 2:
            raise ConfigError("a fabric has one link or two", fix="Write inner+outer, e.g. nvlink+ndr.", fabric=fabric)
        inner, outer = (_link(part, device) for part in (parts[0], parts[-1]))
        return Machine(device=device, inner=inner, outer=outer)
    if isinstance(found, Machine):
        return found.model_copy(update={"device": device})
    fix = f"Give a fabric as inner+outer, e.g. nvlink+ndr. Links: {', '.join(presets('link'))}."
    raise ConfigError("nothing says what joins the devices", fix=fix, hardware=hardware)


@lru_cache(maxsize=16)
def reported(name: str) -> tuple[str, str] | None:
    """(hardware, fabric) of ranks of one node whose driver reports this name of their device; None: no preset is of it.

    A device of the same chip on a PCIe card has another name, and is none of these.
    """
    for preset in presets("device"):
        device = load(preset).description
        if isinstance(device, Device) and device.links and name in device.reported:
            return preset, next(iter(device.links.values()))
    return None


def presets(kind: str) -> list[str]:
    """Names of the presets of a kind: "device" or "link"."""
    return [name for name in names("hardware") if named("hardware", name).get("kind") == kind]


def _link(name: str, device: Device) -> Link:
    """The link of a name, as this device understands it."""
    called = device.links.get(name.lower(), name)
    known = presets("link")
    if not is_file(called) and called.lower() not in known + presets("device"):
        fix = did_you_mean(name, [*known, *device.links]) + " Or give the path of a YAML file."
        raise ConfigError("there is no link of this name", fix=fix, link=name)
    kind, found = load(called)
    if not isinstance(found, Link):
        fix = f"Links: {', '.join(known)}."
        raise ConfigError(f"the fabric names a {kind}, where a link is needed", fix=fix, link=name)
    return found


def _refusal(model: type[BaseModel], error: ValidationError, where: str) -> ConfigError:
    """What is wrong with a description, told of its first wrong entry."""
    first = error.errors()[0]
    key, says = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return ConfigError(f"{where} lacks {key}", fix="Give it; configs/hardware has examples.", missing=key)
    if first["type"] == "extra_forbidden":
        fix = did_you_mean(str(first["loc"][-1]), _entries(model, first["loc"]))
        return ConfigError(f"{where} has an unknown entry", fix=fix, key=key)
    return ConfigError(f"{where} has a wrong {key}", fix=f"{says}.", value=first["input"])


def _entries(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The entries that are known where this one stands."""
    for key in loc[:-1]:
        if (field := model.model_fields.get(str(key))) is not None:  # else a name in a mapping, such as a dtype
            inside = (*get_args(field.annotation), field.annotation)
            model = next(m for m in inside if isinstance(m, type) and issubclass(m, BaseModel))
    return list(model.model_fields)
