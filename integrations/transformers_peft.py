"""What PEFT adds to a HuggingFace model, and whether that is exact on a shard.

Methods that change weights, or what a layer does with one token, are exact; the list is of those that the tests compare
with one process. Others draw at random, look at the whole sequence, or add tokens or keys that are in no batch. PEFT
may wrap a model before it is parallelized or after, and add adapters, so this is looked at again at every forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from seqpar_ring.errors import UnsupportedError

from .transformers_calls import dropout_above_zero

EXACT = (
    *("LORA", "DELORA", "RANDLORA", "VERA", "VBLORA", "LOHA", "LOKR", "IA3", "OFT", "HRA", "ROAD"),
    *("FOURIERFT", "WAVEFT", "C3A", "MISS", "SHIRA", "LN_TUNING", "TRAINABLE_TOKENS"),
)
"""PEFT's methods that are known to be exact on a shard, by their `peft_type`."""

NOT_EXACT = {
    "alora_invocation_tokens": "looks for its tokens in the whole sequence, of which a rank has a part",
    "monteclora_config": "draws at random in every forward, on each rank anew",
    "velora_config": "computes gradients from means over the tokens of a shard",
    "arrow_config": "routes by adapters in a way that was not compared with one process",
}
"""Fields of their configs with which these methods are not exact, or not known to be."""


def bare(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, which calls it as any other caller does; else the model itself.

    Raises:
        UnsupportedError: see `check`.
    """
    inner = getattr(model, "get_base_model", None)
    if inner is None or not isinstance(getattr(model, "peft_config", None), Mapping):
        return model
    check(model)
    found: nn.Module = inner()
    return found


def check(model: nn.Module) -> None:
    """Refuse what PEFT has added to a model, or to the one inside it, if a shard could not compute it exactly.

    Raises:
        UnsupportedError: prompt learning, activated LoRA, dropout, a method that is not known to be exact.
    """
    configs = getattr(model, "peft_config", None)
    for config in configs.values() if isinstance(configs, Mapping) else ():
        _check_config(config)


def _check_config(config: Any) -> None:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if getattr(config, "is_prompt_learning", False):
        raise UnsupportedError(
            "PEFT's prompt learning adds tokens or keys that are in no batch, so they cannot be sharded",
            fix="Use LoRA or another method that changes layers only.",
            peft_type=kind,
        )
    if kind not in EXACT:
        raise UnsupportedError(
            "this method of PEFT is not known to be exact on a shard",
            fix=f"Use LoRA, or another of {', '.join(EXACT[1:])}.",
            peft_type=kind,
        )
    for name, why in NOT_EXACT.items():
        if getattr(config, name, None):
            fix = f"Leave {name} out: plain LoRA is exact."
            raise UnsupportedError(f"{name} {why}", fix=fix, **{name: getattr(config, name)})
    drawn = {
        name: value
        for name, value in vars(config).items()
        if "dropout" in name and isinstance(value, float | int) and not isinstance(value, bool) and value > 0
    }
    if drawn:
        raise dropout_above_zero(f"Give {', '.join(f'{name}=0.0' for name in drawn)} to PEFT's config.", drawn)
