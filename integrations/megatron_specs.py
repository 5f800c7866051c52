"""Specs: the description of a Megatron model's layers, with attention exchanged for another.

A spec is a tree of `ModuleSpec`s, dataclasses, lists and partial functions, deeper in some models than in others. It is
walked as it stands, whatever it is called, and every plain `core_attention` in it is exchanged, in a copy. What is not
plain dot-product attention is refused rather than replaced. No model is built or changed here.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from seqpar_ring.errors import ConfigError, UnsupportedError

FIELD = "core_attention"
"""The field of a spec's submodules that this is about."""

PLAIN = "DotProductAttention"
"""How the classes end that compute what a ring can: Megatron's own, Transformer Engine's and Kitchen's."""


def exchanged(spec: Any, attention: Any, own: type) -> Any:
    """A copy of a spec in which every plain `core_attention` is another.

    Args:
        spec: of a layer, a block, or anything that holds such.
        attention: what is put in.
        own: a class that may be replaced too, whatever it is called.

    Raises:
        UnsupportedError: attention in it that is not plain, or cross-attention, or one with parameters of its own.
        ConfigError: no attention in it.
    """
    spec = copy.deepcopy(spec)
    found = list(_attentions(spec, set()))
    for submodules in found:
        name = _name(getattr(submodules, FIELD))
        if not name.endswith(PLAIN) and name != own.__name__:
            raise UnsupportedError(
                "a spec has attention that is not plain dot-product attention",
                fix=f"Leave such layers out, or set {FIELD} in their submodules by hand if it is.",
                core_attention=name,
            )
        if name != own.__name__:
            _expect_no_parameters(name, getattr(submodules, FIELD))
        if "Cross" in type(submodules).__name__:
            raise UnsupportedError(
                "a spec has cross-attention, which is not offered over a ring under Megatron",
                fix=f"Set {FIELD} in the submodules of self-attention by hand.",
                submodules=type(submodules).__name__,
            )
        setattr(submodules, FIELD, attention)
    if not found:
        raise ConfigError(
            f"a spec has no {FIELD} to replace", fix="Give the spec of a layer or a block.", spec=type(spec).__name__
        )
    return spec


def _expect_no_parameters(name: str, attention: Any) -> None:
    """Refuse to lose what a spec says of the attention that is taken out.

    Raises:
        UnsupportedError: it says something.
    """
    partly = isinstance(attention, functools.partial)
    said = attention.keywords if partly else getattr(attention, "params", None)
    if said:
        bias = [key for key in said if "bias" in key or "alibi" in key]
        raise UnsupportedError(
            "attention bias is not supported"
            if bias
            else f"a spec builds its {FIELD} with parameters, which another would not be built with",
            fix=f"Leave them out, or set {FIELD} by hand to RingCoreAttention with those that it has too.",
            core_attention=name,
            **said,
        )


def _attentions(node: Any, met: set[int]) -> Iterator[Any]:
    """Everything in a spec that has a `core_attention`, each once."""
    if isinstance(node, type) or id(node) in met:
        return
    met.add(id(node))
    if isinstance(node, dict):
        inside = list(node.values())
    elif isinstance(node, list | tuple):
        inside = list(node)
    elif isinstance(node, functools.partial):
        inside = [*node.args, *node.keywords.values()]
    elif dataclasses.is_dataclass(node):
        if getattr(node, FIELD, None) is not None:
            yield node
        inside = [getattr(node, one.name, None) for one in dataclasses.fields(node) if one.name != FIELD]
    else:
        return
    for one in inside:
        yield from _attentions(one, met)


def _name(attention: Any) -> str:
    """The class that a spec names, whichever way it does."""
    if isinstance(attention, functools.partial):
        return _name(attention.func)
    if not isinstance(attention, type) and hasattr(attention, "module"):
        return _name(attention.module)
    if isinstance(attention, tuple):
        return str(attention[-1])
    return str(getattr(attention, "__name__", type(attention).__name__))
