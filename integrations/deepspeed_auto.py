"""`"size": "auto"` in the "seqpar_ring" block of a DeepSpeed config: the planner's search, before any group is made.

The size of a sequence group cannot wait for the first batch as the other settings do, so the block says for how many
`tokens`, and on what `hardware`. ZeRO stage, offloading and dtype are the config's own and stay as they are; what is
recomputed and what is frozen (LoRA) is seen on the model. All ranks find the same by arithmetic; nothing here
communicates.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from seqpar_ring.errors import ConfigError
from seqpar_ring.planner.hardware import machine
from seqpar_ring.planner.job import Workload
from seqpar_ring.planner.model import Model, of_config
from seqpar_ring.planner.savefile import MICRO_BATCH, choices_of, dtype_of, micro_batch
from seqpar_ring.planner.savefile import block as plain
from seqpar_ring.planner.search import Fixed, Option, search

AUTO = "auto"
COUNTED = 0.9, 1.1
"""Between these the planner's count of a model's parameters is near enough, relative to the model's own."""

LOG = logging.getLogger(__name__)
"""Says at INFO, on the first rank, what was chosen."""


def undecided(block: object) -> bool:
    """Whether the block leaves the size to the planner."""
    return isinstance(block, Mapping) and block.get("size") == AUTO


def decide(block: Mapping[str, Any], config: Mapping[str, Any], model: Any, world: tuple[int, int]) -> dict[str, Any]:
    """The block with a size, and with what else it left open.

    Args:
        block: the "seqpar_ring" block.
        config: the DeepSpeed config around it.
        model: of transformers; its configuration says the shapes.
        world: ranks of the world, and this one.

    Raises:
        ConfigError: the block does not say for how many tokens or on what hardware, the model is none of transformers,
            or nothing fits.
    """
    for key, example in (("tokens", "131072"), ("hardware", '"h100", with "fabric": "nvlink+ndr"')):
        if block.get(key) is None:
            raise ConfigError(
                f'"size" is "auto", and the block does not say {key}',
                fix=f'Give "{key}": {example}.',
                block=dict(block),
            )
    described = getattr(model, "config", None)
    if described is None or not hasattr(described, "to_dict"):
        fix = "Give a model of transformers, or a size."
        raise ConfigError('"size" is "auto", and the model has no configuration', fix=fix, model=type(model).__name__)
    gpus, rank = world
    shapes, batch = of_config(described.to_dict(), type(model).__name__), _micro_batch(config)
    _expect_counted(shapes, model)
    workload = Workload(shapes, (block["tokens"],), dtype_of(config) or "fp32", batch, trained=_trained(model, shapes))
    on = machine(block["hardware"], block.get("fabric"), block.get("node"))
    fixed = {k: v for k, v in block.items() if k not in ("tokens", "hardware", "fabric") and v not in (AUTO, None)}
    choices = choices_of({"zero_optimization": False, **config}, "the DeepSpeed config")
    recomputes = _recomputes(model)
    found = search(workload, on, gpus, Fixed(settings=fixed, checkpointing=recomputes, **choices))
    if not found.options:
        raise ConfigError(
            f"{block['tokens']:,} tokens fit no size on {gpus} devices",
            fix="seqpar-ring plan says what would make it fit."
            + ("" if recomputes else " Turn the model's activation checkpointing on before, if it recomputes layers."),
            refused=[f"{one.what}: {one.why}" for one in found.refused[:4]],
        )
    best = found.options[0]
    if rank == 0:
        LOG.info("size %s", _said(best))
    chosen = plain(best.choice.settings)
    return {**chosen, **{name: block[name] for name in ("tokens", "hardware", "fabric") if name in block}, **fixed}


def _micro_batch(config: Mapping[str, Any]) -> int:
    """Sequences that a group holds at a time; DeepSpeed's default is one where nothing says.

    Raises:
        ConfigError: only the whole batch is given, whose share follows from the size that is asked for.
    """
    said = micro_batch(config)
    if said is None and isinstance(config.get("train_batch_size"), int):
        raise ConfigError(
            '"size" is "auto", and the config does not say how many sequences a group holds at a time',
            fix=f'Give "{MICRO_BATCH}" beside train_batch_size, or a size.',
            train_batch_size=config["train_batch_size"],
        )
    return said or 1


def _recomputes(model: Any) -> bool:
    """Whether the model recomputes layers, or one within it, as where PEFT has wrapped it."""
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")  # the second before transformers 5.20 or so
    found = (getattr(part, name) for part in model.modules() for name in names if hasattr(type(part), name))
    return any(found)


def _trained(model: Any, shapes: Model) -> int | None:
    """Parameters that are trained, as DeepSpeed sees it: what asks for gradients. None: all of them."""
    if all(p.requires_grad for p in model.parameters()):
        return None
    return min(sum(_size(p) for p in model.parameters() if p.requires_grad), shapes.parameters)


def _size(parameter: Any) -> int:
    """Of the whole parameter, also where ZeRO 3 has parted it already."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _expect_counted(shapes: Model, model: Any) -> None:
    """The planner knows many families and takes others for a Llama; here the model itself can be counted.

    Raises:
        ConfigError: it has other parameters than would be planned for.
    """
    there = sum(_size(p) for p in model.parameters())
    if not COUNTED[0] < shapes.parameters / max(there, 1) < COUNTED[1]:
        raise ConfigError(
            '"size" is "auto", and the planner does not know this model: it would plan for other parameters',
            fix="Give a size.",
            model=type(model).__name__,
            parameters=there,
            counted=shapes.parameters,
        )


def _said(option: Option) -> str:
    s = option.choice.settings
    return (
        f"{s.size}, heads {s.heads}, {s.layout}, {s.schedule}, block_tokens {s.block_tokens}: predicted "
        f"{option.step.seconds:.3g} s a step and {option.memory.peak / 2**30:.1f} GiB a device"
        f", {'with' if option.choice.checkpointing else 'without'} checkpointing"
    )
