"""Around a call of a HuggingFace model: its arguments by name, what it gives back, and what is said of it once."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn

from seqpar_ring.errors import SeqparError
from seqpar_ring.parallel import SequenceParallel
from seqpar_ring.plan import Plan
from seqpar_ring.planner.model import of_config
from seqpar_ring.remat import choose

from .transformers_calls import Calls, said

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Names of dtypes as the planner has them; the others are computed in fp32 or wider."""


def named(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    if not args:
        return dict(kwargs)
    signature = inspect.signature(model.forward)
    signature.bind_partial(*args, **kwargs)  # raises TypeError as the call itself would
    return {**signature.bind_partial(*args).arguments, **kwargs}


def without_logits(output: Any) -> Any:
    """What a model returned, without its logits: of one token, better none than a few."""
    if isinstance(output, tuple):  # return_dict=False: the loss, the logits, what else was asked for
        return (output[0], None, *output[2:])
    output.logits = None
    return output


def record(model: nn.Module) -> dict[str, object]:
    """What the ranks' models must have in common; of the config only what is cheap to say."""
    config = getattr(model, "config", None)
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    values = {name: said(config, name) for name in names}
    return {"model": type(model).__name__, **values, "transformers": transformers.__version__}


def describe(sp: SequenceParallel, model: Any) -> None:
    """Say what the model computes, where that decides something.

    Raises:
        SeqparError: somebody asked for a decision, and the planner does not know such models. What nobody asked for
            stays as it is: blocks are whole.
    """
    try:
        if sp.undecided:
            sp.describe(of_config(model.config.to_dict(), type(model).__name__), DTYPES.get(model.dtype, "fp32"))
    except SeqparError:
        if sp.settings.undecided:
            raise


def explanation(plan: Plan, calls: Calls, decided: str) -> str:
    """The choices of the first forward with their reasons, a line each."""
    kept, why = choose(plan.documents.settings.remat, plan.keys_per_query)
    if calls.kept is not None:
        why += f"; {calls.kept.bytes / 2**20:.2f} MiB kept by this rank"
    head_in = "whole" if calls.tiles == 1 else f"{calls.tiles} tiles"
    auto = f"\n  auto: {decided}" if decided else ""
    return f"{plan.explain()}{auto}\n  remat: {kept} ({why})\n  logits: {head_in} ({calls.why_tiles})"
