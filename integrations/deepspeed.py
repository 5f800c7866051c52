"""DeepSpeed over a sequence group: a "seqpar_ring" block in the DeepSpeed config turns the ring on.

`initialize` takes what `deepspeed.initialize` takes and returns what it returns; `install` makes `deepspeed.initialize`
itself honour the block. DeepSpeed is not told of the sequence group: to it every rank of the world is a data rank that
averages gradients, and only the batch arithmetic counts data ranks (world / size). The loss carries the rest, which is
exact in ZeRO 0 to 3, where each of DeepSpeed's own ways to declare a sequence group is wrong in at least one stage. No
checkpoint conversion, no data loading of its own.
"""

from __future__ import annotations

import base64
import difflib
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from seqpar_ring.config import Settings
from seqpar_ring.errors import ConfigError, SeqparError, UnsupportedError, VersionError
from seqpar_ring.parallel import SequenceParallel

from . import deepspeed_auto as size
from .deepspeed_mpu import HiddenSequenceGroup, WholeModel, check, mesh_of

try:
    import deepspeed
    import hjson  # DeepSpeed reads its config with it: JSON that may have comments and commas at the end
    from deepspeed.accelerator import get_accelerator
except ImportError as error:
    raise VersionError(
        "deepspeed is missing, or too old", fix='Install it: pip install "seqpar-ring[deepspeed]".', error=str(error)
    ) from error

BLOCK = "seqpar_ring"
"""The key of the DeepSpeed config under which the settings stand."""

GROUPED = {
    "mics_shard_size": (None, -1, 0),
    "zero_hpz_partition_size": (None, 0, 1),
    "zero_quantized_gradients": (None, False),
}
"""Keys of "zero_optimization" by which ZeRO works in groups of its own, and codes gradients to be averaged there, which
was not compared with one process; with the values that ask for nothing."""

ORIGINAL = "__seqpar_ring_original__"
"""Under this attribute our `deepspeed.initialize` keeps DeepSpeed's own."""

NEEDED = ("args", "model", "mpu", "config", "config_params", "mesh_param")
"""Arguments of `deepspeed.initialize` that are read or set here."""

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

ALIKE = 0.7
"""A top-level key this similar to the block's name is taken for a misspelling of it. DeepSpeed's own reach 0.62."""


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize`, honouring a "seqpar_ring" block in its config. Collective over the world.

    Takes the arguments of `deepspeed.initialize`; an `mpu` says which ranks hold which part of a model that is in parts
    already, and sequence groups are laid inside its data-parallel groups. With the block a transformers model is
    parallelized (`seqpar_ring.integrations.transformers.parallelize`); another model is left as it is, and calls
    `seqpar_ring.ring_attention` itself. Without the block this is `deepspeed.initialize`.

    Returns:
        engine, optimizer, training data loader, learning rate scheduler; `engine.seqpar_ring` is the SequenceParallel.

    Raises:
        ConfigError: an unknown key or wrong value in the block, or batch sizes that do not fit the data ranks.
        GroupError: the block's size does not divide the world.
        UnsupportedError: the block together with DeepSpeed's own ways of splitting, an mpu that declares more than
            parts of a model, or a model that cannot be exact.
        VersionError: a DeepSpeed that lacks what is needed here.
    """
    original = getattr(deepspeed.initialize, ORIGINAL, deepspeed.initialize)
    signature = inspect.signature(original)
    missing = [name for name in NEEDED if name not in signature.parameters]
    missing += [name for name in ("init_distributed",) if not hasattr(deepspeed, name)]
    if missing:
        raise _unknown_version("deepspeed lacks arguments of initialize, or functions, that are needed here", missing)
    given = signature.bind(*args, **kwargs).arguments
    config = _config(given)
    ready = _group_of(given.get("model"))
    if ready is not None and config is not None:
        return _with_group(ready, given, config, original)
    if config is None or BLOCK not in config:
        _refuse_misspelt(config or {})
        _forget_earlier_engine()
        result: tuple[Any, Any, Any, Any] = original(*args, **kwargs)
        return result
    block = config[BLOCK]
    if size.undecided(block):
        _start_torch_distributed(given)
        world = dist.get_world_size(), dist.get_rank()
        block = size.decide(block, config, given.get("model"), world)
    settings = Settings.parse(block, f'the "{BLOCK}" block of the DeepSpeed config')
    _refuse_other_splits(given, config)
    _refuse_cpu_checkpointing(config)
    _start_torch_distributed(given)
    mpu = given.get("mpu")
    mesh = None if mpu is None else mesh_of(mpu, settings.size, get_accelerator().device_name())
    sp = SequenceParallel(mesh=mesh, **settings.model_dump())
    sp.groups.everyone.agree("the DeepSpeed config", settings.model_dump(), _wrong_batch_sizes(config, sp))
    if _holds_transformers(given.get("model")):
        from .transformers import parallelize

        parallelize(given["model"], sp)
    return _engine(sp, given, original)


def _engine(sp: SequenceParallel, given: dict[str, Any], original: Callable[..., Any]) -> tuple[Any, Any, Any, Any]:
    """The engine, to which the sequence group is hidden."""
    given["mpu"] = HiddenSequenceGroup(sp, given.get("mpu") or WholeModel())
    engine, *rest = original(**given)
    parts = engine.autotp_size() if hasattr(engine, "autotp_size") else 1
    if parts > 1:  # not of the config, which was looked at: DeepSpeed adds what tp_model_init was told
        raise _cannot_be_combined("deepspeed.tp_model_init", parts)
    engine.seqpar_ring = sp
    return (engine, *rest)


def _with_group(
    sp: SequenceParallel, given: dict[str, Any], config: dict[str, Any], original: Callable[..., Any]
) -> tuple[Any, Any, Any, Any]:
    """The engine of a model that is parallelized already, as Trainer's is; a block must say the same."""
    block = {key: value for key, value in config.items() if key != BLOCK}
    if size.undecided(config.get(BLOCK)):
        raise ConfigError(
            f'the "{BLOCK}" block leaves "size" open, and the model is parallelized already',
            fix="Leave the block out, or give the bare model.",
            size=sp.size,
        )
    if BLOCK in config and Settings.parse(config[BLOCK]) != sp.settings:
        raise ConfigError(
            f'the model was parallelized with other settings than the "{BLOCK}" block says',
            fix="Leave the block out, or parallelize the model with its settings.",
            block=config[BLOCK],
            model=sp.settings,
        )
    _refuse_other_splits(given, config)
    _refuse_cpu_checkpointing(config)
    _expect_mpu_of_groups(given.get("mpu"), sp)
    sizes = [config.get(key) for key in BATCH_KEYS]
    name = "config_params" if given.get("config_params") is not None else "config"
    if name == "config_params" and all(isinstance(size, int) for size in sizes):
        # accelerate, which alone still uses this argument, takes every rank for a data rank when it fills in "auto"
        total, *others = (int(size or 0) for size in sizes)
        if total == math.prod(others) * sp.world_size:
            block[BATCH_KEYS[0]] = math.prod(others) * sp.data_size
    given[name] = block
    sp.groups.everyone.agree("the DeepSpeed config", {}, _wrong_batch_sizes(block, sp))
    return _engine(sp, given, original)


def install() -> None:
    """Make `deepspeed.initialize` honour the block, for code that calls it by that name. Idempotent."""
    if hasattr(deepspeed.initialize, ORIGINAL):
        return

    def hooked(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
        return initialize(*args, **kwargs)

    hooked.__doc__ = initialize.__doc__
    setattr(hooked, ORIGINAL, deepspeed.initialize)
    deepspeed.initialize = hooked


def uninstall() -> None:
    """Undo `install`."""
    deepspeed.initialize = getattr(deepspeed.initialize, ORIGINAL, deepspeed.initialize)


def _config(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config as a dict, wherever `deepspeed.initialize` takes it from; None if it is for DeepSpeed to complain."""
    found = given.get("config")
    found = given.get("config_params") if found is None else found
    for name in ("deepspeed_config", "deepscale_config"):
        found = getattr(given.get("args"), name, None) if found is None else found
    if isinstance(found, Mapping):
        return dict(found)
    if not isinstance(found, str | Path):
        return None
    try:
        file = Path(found)
        text = file.read_text() if file.exists() else base64.urlsafe_b64decode(str(found)).decode()
        parsed = hjson.loads(text)
    except (OSError, ValueError):
        return None  # DeepSpeed reads it again, and says what is wrong with it
    return parsed if isinstance(parsed, dict) else None


def _refuse_misspelt(config: Mapping[str, Any]) -> None:
    """DeepSpeed ignores top-level keys it does not know, so the ring would silently be off."""
    for key in config:
        if difflib.SequenceMatcher(None, str(key).lower(), BLOCK).ratio() > ALIKE:
            raise ConfigError(
                "the DeepSpeed config has an unknown key", fix=f'Did you mean "{BLOCK}"?', key=key, value=config[key]
            )


def _refuse_other_splits(given: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """What would make DeepSpeed split the world in a way of its own: measured wrong in some stage, or not measured."""
    model = given.get("model")
    pipeline = getattr(getattr(deepspeed, "pipe", None), "PipelineModule", None)
    modules = model.modules() if isinstance(model, nn.Module) else ()
    experts = any(type(module).__module__.startswith("deepspeed.moe") for module in modules)
    if given.get("mpu") is not None:
        check(given["mpu"])
    # One rank a sequence, and a block that is switched off, which it is by default, ask for nothing.
    degree, block = config.get("sequence_parallel_size"), config.get("expert_parallel")
    parts = (config.get("tensor_parallel") or {}).get("autotp_size")
    idle = isinstance(block, Mapping) and not block.get("enabled")
    zero = config.get("zero_optimization")
    zero = zero if isinstance(zero, Mapping) else {}  # true is an old way to say stage 1
    reasons = {
        "mesh_param": given.get("mesh_param"),
        "sequence_parallel_size": None if degree == 1 else degree,
        "data_parallel_size": config.get("data_parallel_size"),
        "tensor_parallel.autotp_size": None if parts in (0, 1) else parts,
        "expert_parallel": None if idle else block,
        # It deals out states by the number of data ranks, of which the ranks of a sequence are one.
        "checkpoint.writer": (config.get("checkpoint") or {}).get("writer"),
        # Losses are such that gradients are averaged; a sum would be so many times too large as there are ranks.
        "gradient_allreduce_op": "sum" if str(config.get("gradient_allreduce_op")).lower() == "sum" else None,
        # It cuts the rows of a data rank once more by the number of all ranks, and drops the rest.
        "data_efficiency.data_sampling.curriculum_learning": True if _draws_by_difficulty(config) else None,
        **{f"zero_optimization.{name}": zero[name] for name, off in GROUPED.items() if zero.get(name) not in off},
        "a pipeline model": True if pipeline and isinstance(model, pipeline) else None,
        "DeepSpeed's expert layers": True if experts else None,
    }
    for name, value in reasons.items():
        if value is not None:
            raise _cannot_be_combined(name, value)


def _draws_by_difficulty(config: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed's data efficiency library deals out the samples: each of its blocks has a switch."""
    block: Any = config
    for name in ("data_efficiency", "data_sampling", "curriculum_learning"):
        block = block.get(name) if isinstance(block, Mapping) else None
        if not isinstance(block, Mapping) or not block.get("enabled"):
            return False
    return True


def _cannot_be_combined(name: str, value: Any) -> UnsupportedError:
    return UnsupportedError(
        f'the "{BLOCK}" block and {name} cannot be combined in this version',
        fix=f"Leave out {name}: the block alone arranges all ranks, as sequence groups and data ranks.",
        value=value,
    )


def _expect_mpu_of_groups(mpu: Any, sp: SequenceParallel) -> None:
    """The sequence groups of a model that is parallelized already must lie in the mpu's data-parallel groups."""
    ranks = dist.get_world_size(None if mpu is None else mpu.get_data_parallel_group()) if dist.is_initialized() else 1
    if ranks != sp.world_size:
        raise UnsupportedError(
            "the model was parallelized over other ranks than the mpu averages gradients over",
            fix="Give SequenceParallel mesh=mesh_of(mpu, size, device) of seqpar_ring.integrations.deepspeed_mpu.",
            data_parallel_group=ranks,
            sequence_groups=sp.world_size,
        )


def _refuse_cpu_checkpointing(config: Mapping[str, Any]) -> None:
    """DeepSpeed's way to keep layers' inputs in host memory fails on its CPU accelerator with an IndexError."""
    asked = (config.get("activation_checkpointing") or {}).get("cpu_checkpointing")
    if asked and get_accelerator().device_name() == "cpu":
        raise UnsupportedError(
            "cpu_checkpointing does not work on a CPU: there is no other memory to move activations to",
            fix="Leave it out of activation_checkpointing.",
            cpu_checkpointing=asked,
        )


def _forget_earlier_engine() -> None:
    """DeepSpeed keeps the mpu of its last engine in a module; one without the block must not inherit it."""
    groups: Any = getattr(deepspeed.utils, "groups", None)
    if isinstance(getattr(groups, "mpu", None), HiddenSequenceGroup):
        groups.mpu = None


def _start_torch_distributed(given: Mapping[str, Any]) -> None:
    """As `deepspeed.initialize` would, with the device that it would set, but without compiling an operator that only
    CPU inference uses."""
    compatible = getattr(getattr(deepspeed, "ops", None), "__compatible_ops__", {})
    if get_accelerator().device_name() == "cpu" and "deepspeed_shm_comm" in compatible:
        compatible["deepspeed_shm_comm"] = False  # else its first use runs a C++ compiler for minutes
    names = ("distributed_port", "dist_init_required")
    backend = get_accelerator().communication_backend_name()
    deepspeed.init_distributed(dist_backend=backend, **{name: given[name] for name in names if name in given})
    # The engine does so as well, but later: groups made before it would all be of the first GPU.
    device = getattr(given.get("args"), "device_rank", None)
    device = os.environ.get("LOCAL_RANK") if device is None else device
    if device is not None and int(device) >= 0:
        get_accelerator().set_device(int(device))


def _wrong_batch_sizes(config: Mapping[str, Any], sp: SequenceParallel) -> SeqparError | None:
    """DeepSpeed's own check counts data ranks too, but its message calls them the world, and it comes on assertions."""
    sizes = {key: config.get(key) for key in BATCH_KEYS}
    given = [size for size in sizes.values() if size is not None]
    total, *others = sizes.values()
    if total is None or not all(isinstance(size, int) and size > 0 for size in given):
        return None  # DeepSpeed works out what is left out, or says what is wrong
    unit = sp.data_size * math.prod(size for size in others if size is not None)
    if total == unit or (None in others and total % unit == 0):
        return None
    return ConfigError(
        "train_batch_size is not micro-batch x accumulation x data ranks",
        fix=f'Set it to {unit}{" or a multiple" if None in others else ""}, or leave it out (do not write "auto"). '
        f"The {sp.size} ranks of a sequence group share their samples.",
        **sizes,
        data_ranks=sp.data_size,
        world=sp.world_size,
    )


def _group_of(model: Any) -> SequenceParallel | None:
    """The sequence group that a transformers model was parallelized with before."""
    if not _holds_transformers(model):
        return None
    from .transformers import group_of

    return group_of(model)


def _holds_transformers(model: Any) -> bool:
    """Whether it is, or wraps, a transformers model; without importing transformers, for else nobody has made one."""
    loaded = sys.modules.get("transformers")
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return loaded is not None and any(isinstance(module, loaded.PreTrainedModel) for module in modules)


def _unknown_version(what: str, missing: list[str]) -> VersionError:
    return VersionError(
        what,
        fix="Use DeepSpeed 0.19, with which this was tested.",
        deepspeed=getattr(deepspeed, "__version__", "unknown"),
        missing=missing,
    )
