"""Attention bias, refused where a model is built that would bring one.

Megatron has one source of a bias for self-attention: its RelativePositionEmbedding, of which T5Model makes two for
position_embedding_type="relative" and gives what they say to every layer of its blocks (read in megatron-core 0.15.0,
0.16.1 and 0.19.2). Neither the config nor the spec of a layer tells of that, only the model that holds both. So torch
is asked to call back where modules are put together, and a model that holds relative positions beside a ring is refused
before its constructor returns. A bias that somebody's own forward makes is in no module; that is refused when it comes.
"""

from __future__ import annotations

import functools

from megatron.core.models.common.embeddings.relative_pos_embedding import RelativePositionEmbedding
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from seqpar_ring.errors import UnsupportedError


@functools.cache
def watch(ring: type[nn.Module]) -> None:
    """From now on refuse models that hold relative positions beside layers of a ring. Does nothing the second time.

    Args:
        ring: the class of such attention.
    """
    register_module_module_registration_hook(functools.partial(_expect_no_bias, ring))


def _expect_no_bias(ring: type[nn.Module], parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Called by torch before a child gets its name in a module; a model makes relative positions first, or layers.

    Raises:
        UnsupportedError: the parent would hold both.
    """
    if child is None or isinstance(parent, nn.ModuleList):  # layers of a block: looked at where the list gets its name
        return
    if isinstance(child, RelativePositionEmbedding):
        met = any(_attends(held, ring) for held in parent.children())
    else:
        met = any(isinstance(held, RelativePositionEmbedding) for held in parent.children()) and _attends(child, ring)
    if met:
        raise UnsupportedError(
            "attention bias is not supported, and this model makes one of relative positions for every layer",
            fix='Build it with position_embedding_type="rope", or leave the core_attention of its layers as it was.',
            model=type(parent).__name__,
            module=name,
        )


def _attends(module: nn.Module, ring: type[nn.Module]) -> bool:
    return any(isinstance(one, ring) for one in module.modules())
