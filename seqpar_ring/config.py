"""The one settings object, whatever it comes from: keyword arguments, a DeepSpeed config block, YAML, the command line.

All ways in meet `Settings.parse`, so an unknown key or a wrong type gives the same message everywhere. The settings say
what the user wants; what is chosen where they say "auto" is decided later and explained by the plan. Nothing here reads
the environment or imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from seqpar_ring.errors import ConfigError, did_you_mean

TOKEN_COUNTS = {"block_tokens": "auto", "logits": "whole", "mlp": "whole"}
"""Settings that are a number of tokens, and what stands for all of a rank's."""


class Settings(BaseModel):
    """What the user asks for. Every field has a default but `size`.

    Attributes:
        size: ranks that share one sequence (W); must divide the world.
        layout: which rank holds which tokens: "zigzag", "striped", "contiguous", or (for many documents) "packed"; or
            "auto": the planner decides, once, for the first batch.
        schedule: how keys and values travel: "ring", "double_ring", "all_gather" or "direct"; or "auto".
        heads: degree of head sharding (Ulysses): so many ranks share out the heads, size / heads ranks the sequence; or
            "auto".
        node: ranks of a sequence group that share a node; "double_ring" needs it; None: all of them.
        block_tokens: tokens that arrive and are computed with at a time: a rank's block ("auto"; where `hardware` is
            given, or all ranks are in one node with a GPU of a preset, the planner decides), pieces of it (a smaller
            number), or several blocks at once (a larger one).
        cut: where blocks travel in pieces, how they are cut: "even" (equal work on all ranks at each step) or "halves"
            (in a causal zigzag a ring sends up to a quarter less, and ranks wait more).
        hardware: what the planner decides for: a preset ("h100"), or a file that `seqpar-ring probe` wrote.
        fabric: links of that hardware, "inner+outer": "nvlink+ndr"; a probe's file holds its own.
        tokens: of the sequence that "auto" is decided for; None: those of the first batch.
        backward: what travels in backward: "kv", "q", or by the bytes of the model's heads ("auto").
        kv_dtype: what keys and values go round the ring in: theirs ("same"), or one byte a number ("int8"), which is
            not exact. Ranks that share out heads exchange them as they are.
        dkv_dtype: what their gradients come back in: "fp32" (fp64 for fp64), or "bf16", which rounds at each hop.
        balance_tokens: how far above the mean a rank's tokens may be in "packed", as a factor.
        balance_area: the same for attention work.
        kernel: block attention kernel: "auto" (by capability, and on a GPU by a trial and its rate), or its name:
            "flash3", "flash4", "cudnn", "torch_cudnn", "flash2", "torch_flash", "cpu", "reference", or one that you
            registered.
        remat: what becomes of attention in a checkpointed layer of a transformers model: its result is kept
            ("attention"), it runs again ("none"), or that is chosen by the length of the documents ("auto").
        offload: whether results that are kept wait in the host's memory instead of the device's.
        logits: tokens whose logits exist at a time in the loss of a transformers model: all of a rank's ("whole"), so
            many, or as few as keep them small ("auto").
        mlp: tokens that the MLPs of a transformers model work on at a time; "whole": all of a rank's.
        timeout: seconds after which a rank that waits for another gives up with an error.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    size: int = Field(ge=1)
    layout: str = "zigzag"
    schedule: str = "ring"
    heads: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    node: int | None = Field(default=None, ge=1)
    block_tokens: int | Literal["auto"] = "auto"
    cut: Literal["even", "halves"] = "even"
    hardware: str | None = None
    fabric: str | None = None
    tokens: int | None = Field(default=None, ge=1)
    backward: Literal["auto", "kv", "q"] = "auto"
    kv_dtype: Literal["same", "int8"] = "same"
    dkv_dtype: Literal["fp32", "bf16"] = "fp32"
    balance_tokens: float = Field(default=1.01, gt=1)
    balance_area: float = Field(default=1.03, gt=1)
    kernel: str = "auto"
    remat: Literal["auto", "attention", "none"] = "auto"
    offload: bool = False
    logits: int | Literal["auto", "whole"] = "auto"
    mlp: int | Literal["whole"] = "whole"
    timeout: float = Field(default=600.0, gt=0)

    @classmethod
    def parse(cls, block: Mapping[str, Any], where: str = "settings") -> Settings:
        """Checked settings from a mapping.

        Args:
            block: field names to values, e.g. the "seqpar_ring" block of a DeepSpeed config.
            where: how messages name the place the block came from.

        Raises:
            ConfigError: an unknown key (with the nearest known one), a missing `size`, or a value of a wrong type or
            range.
        """
        if not isinstance(block, Mapping):
            raise ConfigError(
                f"{where} must be a mapping of setting names to values",
                fix='Write e.g. {"size": 4, "layout": "zigzag"}.',
                got=block,
            )
        known = set(cls.model_fields)
        for key in block:
            if key not in known:
                raise ConfigError(f"{where} has an unknown key", fix=did_you_mean(str(key), known), key=key)
        try:
            settings = cls(**block)
        except ValidationError as error:
            raise _readable(error, block, where) from None
        for key, otherwise in TOKEN_COUNTS.items():
            value = getattr(settings, key)
            if isinstance(value, int) and value < 1:
                fix = f'Give a positive number of tokens, or "{otherwise}" for all of a rank\'s.'
                raise ConfigError(f"{where} has a {key} below 1", fix=fix, **{key: value})
        settings._check_degrees(where)
        return settings

    @property
    def head_degree(self) -> int:
        """`heads` as a number.

        Raises:
            ConfigError: it is not decided yet.
        """
        if self.heads == "auto":
            fix = "The planner decides with the first batch."
            raise ConfigError('"heads" is not decided yet', fix=fix, heads=self.heads)
        return self.heads

    @property
    def undecided(self) -> tuple[str, ...]:
        """Names of the settings that are left to the planner."""
        names = [name for name in ("heads", "layout", "schedule") if getattr(self, name) == "auto"]
        return (*names, *(["block_tokens"] if self.block_tokens == "auto" and self.hardware is not None else []))

    def _check_degrees(self, where: str) -> None:
        """Heads share out the group's ranks, and nodes the ranks that are left for the ring."""
        heads = 1 if self.heads == "auto" else self.heads
        for name, degree, whole in (("heads", heads, self.size), ("node", self.node or self.size, self.size)):
            if whole % degree:
                fitting = [n for n in range(1, whole + 1) if whole % n == 0]
                raise ConfigError(
                    f'{where} has a "{name}" that does not divide the sequence group',
                    fix=f"Give {' or '.join(map(str, fitting))}.",
                    **{name: degree, "size": whole},
                )
        if self.backward == "q" and (self.kv_dtype, self.dkv_dtype) != ("same", "fp32"):
            raise ConfigError(
                f"{where} has keys or their gradients travel in another form, and queries travel in backward",
                fix='Leave "backward" at "auto": what becomes of keys only counts where keys travel.',
                kv_dtype=self.kv_dtype,
                dkv_dtype=self.dkv_dtype,
            )
        if self.schedule == "double_ring" and self.node is None:
            raise ConfigError(
                f'{where} has the schedule "double_ring" and no "node"',
                fix='Give "node": how many ranks of a sequence group are in one node, e.g. 8; or use "ring".',
                size=self.size,
            )
        if self.node is not None and self.node % heads:
            raise ConfigError(
                f"{where} would share heads across nodes",
                fix='Give "heads" that divide "node": heads are exchanged all to all, which wants the fast links.',
                heads=self.heads,
                node=self.node,
            )


def _readable(error: ValidationError, block: Mapping[str, Any], where: str) -> ConfigError:
    """The first complaint of pydantic in our own words: the key, the value, its type, and what was expected."""
    first = error.errors()[0]
    key = str(first["loc"][0])
    if first["type"] == "missing":
        return ConfigError(
            f'{where} lacks "{key}"', fix=f"Give {key}: the number of ranks that share a sequence.", given=dict(block)
        )
    value = block[key]
    expected = _expected(key)
    return ConfigError(
        f'{where} has a wrong value for "{key}"',
        fix=f"Give {expected}.",
        value=value,
        type=type(value).__name__,
    )


def _expected(key: str) -> str:
    return {
        "size": "a whole number of ranks, at least 1 (a number, not a string)",
        "heads": 'a whole number, at least 1, or "auto"',
        "hardware": "the name of a preset or a file, as a string",
        "tokens": "a whole number of tokens, at least 1",
        "fabric": 'links as a string, e.g. "nvlink+ndr"',
        "node": "a whole number of ranks, at least 1, or none",
        "backward": '"auto", "kv" or "q"',
        "cut": '"even" or "halves"',
        "kv_dtype": '"same" or "int8"',
        "dkv_dtype": '"fp32" or "bf16"',
        "balance_tokens": "a factor above 1, e.g. 1.01",
        "balance_area": "a factor above 1, e.g. 1.03",
        "block_tokens": 'a whole number of tokens, or "auto"',
        "remat": '"auto", "attention" or "none"',
        "offload": "true or false",
        "logits": 'a whole number of tokens, "auto" or "whole"',
        "mlp": 'a whole number of tokens, or "whole"',
        "timeout": "a positive number of seconds",
    }.get(key, "a name as a string")
