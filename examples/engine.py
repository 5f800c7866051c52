"""The DeepSpeed config of a job, and what it must say; read before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from seqpar_ring.errors import ConfigError

BLOCK = "seqpar_ring"
"""The block of the DeepSpeed config that turns the ring on."""


def slow_in_16_bits() -> bool:
    """Whether torch multiplies bf16 on this processor without its vector units: 28 times as slow as fp32, with AVX2."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def precision_of(model: torch.nn.Module) -> str:
    """The dtype of its weights, and why it may not be the config's."""
    why = " (16 bits are slow on this processor)" if slow_in_16_bits() else ""
    return str(next(model.parameters()).dtype).removeprefix("torch.") + why


def engine_config(file: Path, learning_rate: float | None, fp32: bool = False) -> dict[str, Any]:
    """The DeepSpeed config with the job's changes: the learning rate if given, and fp32 if asked for.

    Raises:
        ConfigError: no such file, no JSON object in it, no "seqpar_ring" block or optimizer, or micro-batches
            of several rows.
    """
    config = mapping(file, json.loads, "DeepSpeed config")
    if BLOCK not in config:
        raise ConfigError(
            f'the DeepSpeed config has no "{BLOCK}" block',
            fix=f'Add "{BLOCK}": {{"size": 2}}.',
            deepspeed=str(file),
        )
    rows = config.get("train_micro_batch_size_per_gpu", 1)
    if rows != 1:
        raise ConfigError(
            "a micro-batch of this job is one row, for each row is packed in its own way",
            fix='Set "train_micro_batch_size_per_gpu" to 1 and use "gradient_accumulation_steps" for more.',
            train_micro_batch_size_per_gpu=rows,
            deepspeed=str(file),
        )
    optimizer = config.get("optimizer", {})
    if not {"type", "params"} <= optimizer.keys() or "lr" not in optimizer["params"]:
        raise ConfigError(
            "the DeepSpeed config does not say how to optimize",
            fix='Add "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": true}}.',
            optimizer=optimizer,
            deepspeed=str(file),
        )
    if learning_rate is not None:
        config["optimizer"]["params"]["lr"] = learning_rate
    if fp32:
        config = {key: value for key, value in config.items() if key not in ("bf16", "fp16")}
    return config


def mapping(file: Path, parse: Callable[[str], Any], name: str) -> dict[str, Any]:
    try:
        found = parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"the {name} cannot be read", fix="Correct it.", file=str(file), reason=error) from None
    if not isinstance(found, dict):
        raise ConfigError(f"the {name} is not a mapping", fix="Write keys with their values.", file=str(file))
    return found
