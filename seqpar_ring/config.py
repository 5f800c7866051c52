"""The one settings object, whatever it comes from: keyword arguments, a DeepSpeed config block, YAML, the command line.

All ways in meet `Settings.parse`, so an unknown key or a wrong type gives the same message everywhere. The settings say
what the user wants; what is chosen where they say "auto" is decided later and explained by the plan. Nothing here reads
the environment or imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from seqpar_ring.errors import ConfigError, did_you_mean


class Settings(BaseModel):
    """What the user asks for. Every field has a default but `size`.

    Attributes:
        size: ranks that share one sequence (W); must divide the world.
        layout: which rank holds which tokens: "zigzag", "striped" or "contiguous".
        schedule: how keys and values travel: "ring".
        heads: degree of head sharding (Ulysses) inside the sequence group; only 1 in this version.
        block_tokens: tokens that travel in one message: a whole rank's block ("auto"), or pieces of at most so many.
        kernel: block attention kernel: "auto" (by capability, with a reason), "cpu" or "reference".
        timeout: seconds after which a rank that waits for another gives up with an error.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    size: int = Field(ge=1)
    layout: str = "zigzag"
    schedule: str = "ring"
    heads: int = Field(default=1, ge=1)
    block_tokens: int | Literal["auto"] = "auto"
    kernel: str = "auto"
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
        if isinstance(settings.block_tokens, int) and settings.block_tokens < 1:
            raise ConfigError(
                f"{where} has a block_tokens below 1",
                fix='Give a positive number of tokens, or "auto" for a whole rank\'s block in one message.',
                block_tokens=settings.block_tokens,
            )
        return settings


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
        "heads": "a whole number, at least 1",
        "block_tokens": 'a whole number of tokens, or "auto"',
        "timeout": "a positive number of seconds",
    }.get(key, "a name as a string")
