"""`"size": "auto"` in the "seqpar_ring" block of a DeepSpeed config: the planner's search, before any group is made.

The size of a sequence group cannot wait for the first batch as the other settings do, so the block says for how many
`tokens`, and on what `hardware`. ZeRO stage, offloading and dtype are the config's own and stay as they are. All ranks
find the same by arithmetic; nothing here communicates.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from seqpar_ring.errors import ConfigError
from seqpar_ring.planner.hardware import machine
from seqpar_ring.planner.job import Workload
from seqpar_ring.planner.model import of_config
from seqpar_ring.planner.savefile import block as plain
from seqpar_ring.planner.savefile import choices_of, dtype_of, micro_batch
from seqpar_ring.planner.search import Fixed, Option, search

AUTO = "auto"
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
    shapes, batch = of_config(described.to_dict(), type(model).__name__), micro_batch(config) or 1
    workload = Workload(shapes, (block["tokens"],), dtype_of(config) or "fp32", batch)
    on = machine(block["hardware"], block.get("fabric"), block.get("node"))
    fixed = {k: v for k, v in block.items() if k not in ("tokens", "hardware", "fabric") and v not in (AUTO, None)}
    found = search(workload, on, gpus, Fixed(settings=fixed, **choices_of(config, "the DeepSpeed config")))
    if not found.options:
        raise ConfigError(
            f"{block['tokens']:,} tokens fit no size on {gpus} devices",
            fix="seqpar-ring plan says what would make it fit.",
            refused=[f"{one.what}: {one.why}" for one in found.refused[:4]],
        )
    best = found.options[0]
    if rank == 0:
        LOG.info("size %s", _said(best))
    chosen = plain(best.choice.settings)
    return {**chosen, **{name: block[name] for name in ("tokens", "hardware", "fabric") if name in block}, **fixed}


def _said(option: Option) -> str:
    s = option.choice.settings
    return (
        f"{s.size}, heads {s.heads}, {s.layout}, {s.schedule}, block_tokens {s.block_tokens}: predicted "
        f"{option.step.seconds:.3g} s a step and {option.memory.peak / 2**30:.1f} GiB a device"
        f", {'with' if option.choice.checkpointing else 'without'} checkpointing"
    )
