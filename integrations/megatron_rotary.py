"""Rotary embeddings for our layouts: a built Megatron model, prepared for batches that `shard_batch` has cut.

Megatron slices its table of angles in its own layout. In a prepared model the table's rows are picked by the positions
that a batch brings. A rotary embedding is asked twice, first for a length, with the batch's `packed_seq_params`, and
then for the angles of that length: what is returned as the length of a batch of ours carries its positions to the
second call, so that no state is kept between them, with any number of micro-batches in flight and in a recompute.
Batches in Megatron's layout are answered as before. The modules stay the same objects with the same parameters and
names; what else in a model counts on Megatron's layout is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import megatron.core
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from torch import Tensor, nn

from seqpar_ring.errors import UnsupportedError, VersionError

from .megatron_batch import LayoutParams
from .megatron_rules import version_of

Model = TypeVar("Model")

KEEPS_BATCH = (0, 16)
"""The first megatron-core in which plain attention drops the batch dimension for the format "thd" only."""

HARMLESS = ("MambaStack", "MLPLayer")
"""Classes of `megatron.core.ssm` that hold layers, or treat each token by itself."""


class OwnRows(NamedTuple):
    """What stands for a length where the angles of this rank's own rows are wanted.

    Attributes:
        params: of the micro-batch.
        flat: whether attention drops the batch dimension before it applies the angles.
    """

    params: LayoutParams
    flat: bool


class _ByRow:
    """A rotary embedding that picks angles by the positions of a micro-batch, where it brings such."""

    def get_rotary_seq_len(self, *args: Any, **keywords: Any) -> Any:
        """Megatron's length, or for a batch of ours its rows."""
        called = inspect.signature(RotaryEmbedding.get_rotary_seq_len).bind(self, *args, **keywords).arguments
        params, config = called.get("packed_seq_params"), called["transformer_config"]
        if not isinstance(params, LayoutParams):
            return super().get_rotary_seq_len(*args, **keywords)  # type: ignore[misc]
        return OwnRows(params, params.batch == 1 and _drops_batch(config))

    def forward(self, max_seq_len: Any, *args: Any, **keywords: Any) -> Any:
        """Megatron's angles, or for a batch of ours those of its rows: (rows, 1, 1, D), or (rows, 1, D).

        With what Megatron's forward returns beside them.
        """
        whole: Callable[..., Any] = super().forward  # type: ignore[misc]
        if not isinstance(max_seq_len, OwnRows):
            return whole(max_seq_len, *args, **keywords)
        params, flat = max_seq_len
        # Megatron keeps the last tables, by their lengths: powers of two are few.
        table = whole(1 << (max(params.lengths) - 1).bit_length(), packed_seq=True)
        angles, *others = table if isinstance(table, tuple) else (table,)
        picked: Tensor = angles.index_select(0, params.positions.to(angles.device))
        picked = picked.squeeze(1) if flat else picked
        return (picked, *others) if others else picked


class RotaryByRow(_ByRow, RotaryEmbedding):  # type: ignore[misc]
    """Megatron's, for our layouts too."""


class YarnByRow(_ByRow, YarnRotaryEmbedding):  # type: ignore[misc]
    """Megatron's, for our layouts too."""


BY_ROW: dict[type, type] = {RotaryEmbedding: RotaryByRow, YarnRotaryEmbedding: YarnByRow}
"""The rotary embeddings whose angles depend on a token's position only, and what they become."""


def with_layouts(model: Model) -> Model:
    """Prepare a built model for batches that `shard_batch` has cut; it takes Megatron's as before.

    Args:
        model: a model whose attention is `RingCoreAttention`, or a list of its parts, wrapped in DDP or not. On every
            stage of a pipeline.

    Returns:
        The same object.

    Raises:
        UnsupportedError: something in it needs Megatron's layout: other attention, state-space layers, multi-token
            prediction, rotary embeddings of another kind, or fused with latent attention.
        VersionError: rotary embeddings of this megatron-core are called in another way.
    """
    _expect_known_calls()
    parts: Sequence[Any] = model if isinstance(model, list | tuple) else [model]
    modules: list[nn.Module] = [module for part in parts for module in part.modules()]
    for module in modules:
        _expect_any_layout(module)
    for module in modules:
        # As torch's own parametrizations do: everything that refers to the module goes on doing so.
        module.__class__ = BY_ROW.get(type(module), type(module))
        if hasattr(module, "takes_layouts"):
            module.takes_layouts = True  # type: ignore[assignment]
    return model


def _drops_batch(config: Any) -> bool:
    """Whether attention drops a batch dimension of 1 because there are packed_seq_params, of whatever format."""
    return bool(config.multi_latent_attention) or version_of(megatron.core.__version__) < KEEPS_BATCH


def _expect_known_calls() -> None:
    for method, name in (
        (RotaryEmbedding.get_rotary_seq_len, "packed_seq_params"),
        (RotaryEmbedding.forward, "packed_seq"),
    ):
        if name not in inspect.signature(method).parameters:
            raise VersionError(
                f"rotary embeddings of megatron-core {megatron.core.__version__} are called in another way",
                fix="Use Megatron's own layout (batch_on_this_rank), and please report it.",
                method=method.__name__,
                lacks=name,
            )


def _expect_any_layout(module: nn.Module) -> None:
    """Refuse what counts on Megatron's layout."""
    name, config = type(module).__name__, getattr(module, "config", None)
    attention = getattr(module, "core_attention", None)
    if attention is not None:
        if not hasattr(attention, "takes_layouts"):
            raise _refused("attention other than RingCoreAttention", "Build the model with with_ring(spec).", attention)
        if getattr(config, "apply_rope_fusion", False) and _drops_batch(config):
            fix = "Set apply_rope_fusion=False (--no-rope-fusion)."
            raise _refused("fused rotary embeddings that slice by themselves", fix, module)
    if getattr(config, "mtp_num_layers", None):
        raise _refused("multi-token prediction, which shifts tokens", "Set mtp_num_layers=None.", module)
    own = {one.__name__ for one in type(module).__mro__ if one.__module__.startswith("megatron.core.ssm")}
    if own and name not in HARMLESS:
        raise _refused("layers that mix tokens outside of attention", "Use Megatron's own layout.", module)
    if "Rotary" in name and type(module) not in (*BY_ROW, *BY_ROW.values()):
        fix = "Use Megatron's own layout, or its plain or YaRN rotary embeddings."
        raise _refused("rotary embeddings of an unknown kind", fix, module)


def _refused(what: str, fix: str, module: nn.Module) -> UnsupportedError:
    return UnsupportedError(
        f"a model has {what}, and so only takes Megatron's layout", fix=fix, module=type(module).__name__
    )
