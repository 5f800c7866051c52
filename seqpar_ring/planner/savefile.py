"""Savefile: configs that a plan is read from, and the file that it is saved to.

Three kinds are read: a DeepSpeed config with a "seqpar_ring" block, whose ZeRO stage, offload and dtype count too; a
YAML or JSON file with a `ring` or `seqpar_ring` block of settings, or of nothing else; and what `save` wrote, which
also says for which job it was made. Values "auto" are left to the search.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from seqpar_ring import __version__
from seqpar_ring.config import Settings
from seqpar_ring.errors import ConfigError, did_you_mean
from seqpar_ring.planner.asked import Asked, Given, decided
from seqpar_ring.planner.search import Fixed, Option

FORMAT = 1
"""Of saved plans and of printed JSON. It grows when a field changes its meaning or goes; new fields leave it."""

BLOCKS = ("ring", "seqpar_ring")
CHOICES = ("checkpointing", "zero", "offload_optimizer", "offload_parameters")
MADE_FOR = (
    "model", "hardware", "fabric", "seq_len", "documents", "gpus", "node", "batch", "dtype", "causal", "trained",
)  # fmt: skip

MICRO_BATCH = "train_micro_batch_size_per_gpu"

HEAD = """\
# Written by `seqpar-ring plan --save`. `ring` is a settings block: SequenceParallel(**ring), or the "seqpar_ring" block
# of a DeepSpeed config. `seqpar-ring plan --config` and `timeline --config` take the whole file.
"""


def save(path: Path, asked: Asked, option: Option) -> None:
    """Write the chosen option, what it was made for, and what was predicted, as YAML.

    Raises:
        ConfigError: the file cannot be written.
    """
    text = HEAD + yaml.safe_dump(as_saved(asked, option), sort_keys=False, allow_unicode=True)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        fix = "Give another path."
        raise ConfigError("the plan cannot be saved", fix=fix, path=str(path), says=str(error)) from None


def as_saved(asked: Asked, option: Option) -> dict[str, Any]:
    """What a saved plan holds."""
    choice, given = option.choice, asked.given
    made_for = {name: getattr(given, name) for name in MADE_FOR}
    made_for |= {"dtype": asked.workload.dtype, "batch": asked.workload.batch, "causal": asked.workload.causal}
    return {
        "format": FORMAT,
        "ring": block(choice.settings),
        "choices": {name: getattr(choice, name) for name in CHOICES},
        "made_for": {name: value for name, value in made_for.items() if value not in ("", None)},
        "predicted": {
            "seconds_a_step": round(option.step.seconds, 6),
            "tokens_a_second": round(option.step.tokens_a_second, 3),
            "mfu": round(option.step.mfu, 4),
            "peak_gib": round(option.memory.peak / 2**30, 3),
        },
        "versions": {"seqpar_ring": __version__},
    }


def block(settings: Settings) -> dict[str, Any]:
    """The settings that differ from the defaults, and those that a plan decides in any case."""
    always = {"size", "layout", "schedule", "heads", "block_tokens", "remat", "logits"}
    default = Settings(size=1).model_dump()
    dumped = settings.model_dump()
    return {name: value for name, value in dumped.items() if name in always or value != default[name]}


def load(path: Path) -> Given:
    """What a config says.

    Raises:
        ConfigError: there is no such file, or it holds no settings of the ring, or wrong ones.
    """
    where = str(path)
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML too
    except FileNotFoundError:
        raise ConfigError("there is no such config file", fix="Check the path.", path=where) from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        says = " ".join(str(error).split())
        raise ConfigError(f"{where} is no YAML or JSON", fix="configs/ has examples.", says=says) from None
    if not isinstance(config, Mapping):
        raise ConfigError(f"{where} is no mapping", fix='Give e.g. {"seqpar_ring": {"size": 8}}.')
    named = next((key for key in BLOCKS if isinstance(config.get(key), Mapping)), None)
    if named is None and "zero_optimization" not in config and not set(config) & set(Settings.model_fields):
        fix = 'Give a file with a "ring" or "seqpar_ring" block, or a DeepSpeed config.'
        raise ConfigError(f"{where} holds no settings of a ring", fix=fix, keys=sorted(map(str, config))[:12])
    bare = named is None and "zero_optimization" not in config
    settings = dict(config[named]) if named else dict(config) if bare else {}
    for key in settings:
        if key not in Settings.model_fields:
            fix = did_you_mean(str(key), Settings.model_fields)
            raise ConfigError(f"{where} has an unknown key", fix=fix, key=key)
    named_hardware = {key: str(settings.pop(key)) for key in ("hardware", "fabric") if settings.get(key) is not None}
    choices = {**choices_of(config, where), **_choices(config, where)}
    made_for = {**named_hardware, **_made_for(config, where)}
    dtype = made_for.pop("dtype", "") or dtype_of(config)
    if (batch := micro_batch(config)) is not None:
        made_for.setdefault("batch", batch)
    return Given(dtype=dtype, fixed=Fixed(settings=decided(settings), **choices), **made_for)


def merged(given: Given, config: Given) -> Given:
    """What the user wrote, and for the rest what the config says."""
    base = config._asdict()
    if given.seq_len or given.documents:  # either tells the whole length, so neither is filled up from the config
        base |= {"seq_len": "", "documents": ""}
    filled = {k: base[k] if v in ("", None) else v for k, v in given._asdict().items() if k != "fixed"}
    mine, theirs = given.fixed, config.fixed
    choices = {n: getattr(theirs, n) if getattr(mine, n) is None else getattr(mine, n) for n in CHOICES}
    return Given(**filled, fixed=Fixed(decided({**theirs.settings, **mine.settings}), **choices))


def _choices(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    choices = config.get("choices", {}) if "format" in config else {}
    if "format" in config and config["format"] != FORMAT:
        fix = f"This version reads format {FORMAT}; make the plan anew."
        raise ConfigError(f"{where} has another format", fix=fix, format=config["format"])
    _expect(isinstance(choices, Mapping), where, "choices", choices)
    found = {name: choices[name] for name in CHOICES if choices.get(name) is not None}
    for name, value in found.items():
        _expect(type(value) is (int if name == "zero" else bool), where, f"choices.{name}", value)
    return found


def _expect(right: bool, where: str, key: str, value: object) -> None:
    """A saved plan is for people to change, too."""
    if not right:
        fix = "Write numbers and true or false without quotes, or make the plan anew."
        raise ConfigError(f"{where} has a wrong value", fix=fix, **{key: value})


def _made_for(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    made_for = config.get("made_for", {}) if "format" in config else {}
    _expect(isinstance(made_for, Mapping), where, "made_for", made_for)
    for key in made_for:
        if key not in MADE_FOR:
            fix = did_you_mean(str(key), MADE_FOR)
            raise ConfigError(f"{where} has an unknown entry", fix=fix, key=f"made_for.{key}")
    texts = ("model", "hardware", "fabric", "seq_len", "documents", "dtype", "trained")
    for key, value in made_for.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        right = isinstance(value, bool) if key == "causal" else isinstance(value, str | int) if key in texts else whole
        _expect(right, where, f"made_for.{key}", value)
    return {name: str(value) if name in texts else value for name, value in made_for.items()}


def choices_of(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The choices of a DeepSpeed config's "zero_optimization"; none are decided without it."""
    zero = config.get("zero_optimization")
    zero = {"stage": int(zero)} if isinstance(zero, bool) else zero  # an old way to say stage 1, or 0
    if not isinstance(zero, Mapping):
        return {}
    found: dict[str, Any] = {}
    stage = zero.get("stage", 0)
    if stage != "auto":
        if isinstance(stage, bool) or not isinstance(stage, int):
            fix = 'Give 0, 1, 2, 3 or "auto".'
            raise ConfigError(f"{where} has a wrong zero_optimization.stage", fix=fix, stage=stage)
        found["zero"] = stage
    for key, name in (("offload_optimizer", "offload_optimizer"), ("offload_param", "offload_parameters")):
        there = zero.get(key)
        if isinstance(there, Mapping):
            found[name] = there.get("device", "none") != "none"
        elif key not in zero and stage != "auto":
            found[name] = False
    return found


def dtype_of(config: Mapping[str, Any]) -> str:
    """What a DeepSpeed config trains in: fp32 where it asks for nothing else. "" where it leaves that open.

    Under its `torch_autocast` weights are fp32 and most activations of 16 bits: fp32 here, so memory is no less.
    """
    switches = {"bf16": config.get("bf16", config.get("bfloat16")), "fp16": config.get("fp16")}  # the older name, too
    asked = {key: part.get("enabled") for key, part in switches.items() if isinstance(part, Mapping)}
    for key, enabled in asked.items():
        if enabled is True:
            return key
    is_open = "auto" in asked.values() or not {"zero_optimization", MICRO_BATCH} & set(config)
    return "" if is_open else "fp32"


def micro_batch(config: Mapping[str, Any]) -> int | None:
    """Sequences that a group holds at a time, by a DeepSpeed config; None where it does not say."""
    found = config.get(MICRO_BATCH)
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else None
