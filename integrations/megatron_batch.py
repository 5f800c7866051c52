"""Our layouts under Megatron: this rank's part of a batch of documents, and what tells the model where it lies.

Megatron's own layout pads every document to a multiple of 2 cp and cuts it over all ranks. `shard_batch` takes
documents of any lengths in a layout of ours ("packed" keeps short ones whole on one rank), gives every rank as many
rows, and returns `LayoutParams` in place of Megatron's `PackedSeqParams`. These travel with the batch through the
model to its rotary embeddings (`megatron_rotary`) and to `RingCoreAttention`, so nothing keeps a current batch. Labels
are not shifted here: Megatron's data sets have done it. Nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from seqpar_ring import layout as layouts
from seqpar_ring.compat import Ring
from seqpar_ring.config import Settings
from seqpar_ring.errors import BatchError, PlanError, UnsupportedError
from seqpar_ring.lengths import of_each
from seqpar_ring.sharding import TokenOrder

from .megatron_layout import Packed

PADDING = {"padding_mask": 1}
"""What rows that fill up a rank hold, where that is not zero: True says padding there."""


class LayoutParams(PackedSeqParams):  # type: ignore[misc] # Megatron is not typed
    """Where the rows of a micro-batch lie, as the `packed_seq_params` of a model that `with_layouts` has prepared.

    Its format is "sbhd": Megatron keeps the batch dimension and slices nothing by itself. `cu_seqlens` are none, and a
    rotary embedding that is not prepared meets an error where it reads `max_seqlen`.

    Attributes:
        lengths: tokens of each document, of all ranks together.
        layout: its name.
        batch: B; all batch rows hold documents of the same lengths.
        rows: rows of every rank, the same number on all: tokens first, then padding.
        tokens: how many of this rank's rows hold tokens.
        positions: int64 (rows,), within each document; 0 for padding.
        cp_group: the ranks that share the documents.
    """

    def __init__(  # the fields of PackedSeqParams keep their defaults, which are attributes of the class
        self, lengths: tuple[int, ...], layout: str, batch: int, rows: int, positions: Tensor, cp_group: Any
    ) -> None:
        self.qkv_format = "sbhd"
        self.lengths, self.layout, self.batch, self.rows, self.cp_group = lengths, layout, batch, rows, cp_group
        self.tokens = len(positions)
        self.positions = _filled(positions, 0, rows)
        self._real: dict[torch.device, Tensor] = {}

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        shown = self.lengths if len(self.lengths) < 9 else (*self.lengths[:8], "...")
        return f"LayoutParams(lengths={shown}, layout={self.layout!r}, {self.tokens} of {self.rows} rows)"

    @property
    def max_seqlen_q(self) -> int:
        """Not for Megatron's rotary embeddings, which would slice their angles in Megatron's layout.

        Raises:
            UnsupportedError: always.
        """
        raise unprepared(self)

    max_seqlen_kv = max_seqlen_q

    def real(self, device: torch.device) -> Tensor | None:
        """Which rows hold tokens, int64; None where all do."""
        if self.tokens == self.rows:
            return None
        if device not in self._real:
            self._real[device] = torch.arange(self.tokens, device=device)
        return self._real[device]


def unprepared(params: LayoutParams) -> UnsupportedError:
    """For what meets a batch in a layout of ours in a model that was not prepared for them."""
    return UnsupportedError(
        "a batch in a layout of seqpar_ring has reached a model that only knows Megatron's",
        fix="Prepare the model once it is built: model = with_layouts(model).",
        layout=params.layout,
        lengths=params.lengths[:8],
    )


def shard_batch(
    batch: Mapping[str, Any],
    cp_group: dist.ProcessGroup,
    lengths: int | Sequence[int],
    layout: str = "packed",
    multiple: int = 1,
    rows: int | None = None,
) -> tuple[dict[str, Any], LayoutParams]:
    """This rank's part of a batch in a layout of ours, and the `packed_seq_params` for the model.

    Args:
        batch: the same on all ranks of the group: tensors (B, T, ...), as tokens, labels (shifted, as Megatron's data
            sets have them) and loss_mask; what is no tensor passes through. May be empty on the middle stages of a
            pipeline, which read none, where B is 1; else give any tensor (B, T) there.
        cp_group: the context-parallel ranks.
        lengths: tokens of each document, the same in all B rows, or of the one document; they sum to T.
        layout: "packed", "zigzag", "striped" or "contiguous".
        multiple: of which the number of rows is one; of the tensor-parallel size with sequence_parallel.
        rows: of each rank, where the number must be known before, as in a pipeline of fixed shapes (seq_length // cp);
            None: as few as fit.

    Returns:
        The batch with B x rows entries on every rank, and position_ids within each document in place of what was given.
        Padding is zero everywhere, in loss_mask too, but True in a padding_mask, by which Megatron's experts leave it
        out of their losses; it stays out of the ring.

    Raises:
        BatchError: tensors that do not hold B x T entries, labels without a loss_mask.
        UnsupportedError: an attention_mask.
        PlanError: lengths below 1, too few rows.
        ConfigError: an unknown layout.
    """
    documents = of_each(lengths, "lengths", PlanError)
    order = _order(layout, documents, dist.get_world_size(cp_group), dist.get_rank(cp_group))
    tensors, size, device = _read(batch, sum(documents))
    here = _rows(order, multiple, rows)
    mine = order.mine(device)
    params = LayoutParams(documents, layout, size, here, order.positions.to(device), cp_group)
    held = {key: x.index_select(1, mine.to(x.device)) for key, x in tensors.items()}
    cut = {key: _filled(x, 1, here, PADDING.get(key, 0)) for key, x in held.items()}
    return {**batch, **cut, "position_ids": params.positions.expand(size, here)}, params


def laid_out(ring: Ring, settings: Settings, params: LayoutParams, query_BSHD: Tensor) -> Packed:
    """The documents of a micro-batch in a layout of ours, and which rows of this rank are theirs.

    Raises:
        BatchError: queries that are not the rows of this micro-batch.
    """
    shape = tuple(query_BSHD.shape[:2])
    if shape != (params.batch, params.rows):
        raise BatchError(
            "attention got other rows than shard_batch has made",
            fix="Give the model the batch that shard_batch returned together with these packed_seq_params; where a "
            "stage of a pipeline reads no batch, give shard_batch any tensor (B, T), or it takes B for 1.",
            batch_and_rows=shape,
            expected=(params.batch, params.rows),
        )
    named = settings.model_copy(update={"layout": params.layout})
    return Packed(ring.placed(named, params.lengths, Named(params.layout)), params.real(query_BSHD.device))


class Named(NamedTuple):
    """A placement for `Ring.placed`: the layout of this name."""

    layout: str

    def __call__(self, lengths: Sequence[int], world: int) -> layouts.Layout:
        """Where the tokens lie."""
        return layouts.make(self.layout, lengths, world)


@lru_cache(maxsize=64)
def _order(layout: str, lengths: tuple[int, ...], world: int, rank: int) -> TokenOrder:
    return TokenOrder(lengths, layouts.make(layout, lengths, world), rank)


def _read(batch: Mapping[str, Any], tokens: int) -> tuple[dict[str, Tensor], int, torch.device]:
    """The tensors to be cut, B, and the device that they are on."""
    if batch.get("attention_mask") is not None:
        raise UnsupportedError(
            "an attention_mask beside the lengths of the documents",
            fix="Leave it out (--no-create-attention-mask-in-dataloader): the lengths say which tokens see each other.",
            attention_mask=tuple(batch["attention_mask"].shape),
        )
    tensors = {key: x for key, x in batch.items() if isinstance(x, Tensor) and x.dim() > 1}
    shapes = {key: tuple(x.shape[:2]) for key, x in tensors.items()}
    if len(set(shapes.values())) > 1 or any(tokens != T for _, T in shapes.values()):
        raise BatchError(
            "the tensors of a batch do not hold the tokens of its documents",
            fix="Give (batch, tokens) each, and lengths that sum to the tokens; leave padding away.",
            **shapes,
            tokens_of_documents=tokens,
        )
    if batch.get("labels") is not None and batch.get("loss_mask") is None:
        raise BatchError(
            "labels without a loss_mask: rows that fill up a rank would count",
            fix="Give a loss_mask of the shape of labels, 1 where a label counts.",
            labels=shapes.get("labels"),
        )
    size, _ = next(iter(shapes.values()), (1, tokens))
    return tensors, size, next((x.device for x in tensors.values()), torch.device("cpu"))


def _rows(order: TokenOrder, multiple: int, rows: int | None) -> int:
    """How many rows every rank has."""
    most = max(order.sizes)
    here = -(-most // max(multiple, 1)) * multiple if rows is None else rows
    if multiple < 1 or here < most or here % multiple:
        raise PlanError(
            "the rows of a rank do not hold its tokens, or are no multiple of what they should be",
            fix=f"Give at least {most} rows for these documents in this layout, and a multiple of {max(multiple, 1)}.",
            rows=rows,
            tokens_of_ranks=order.sizes,
            multiple=multiple,
        )
    return here


def _filled(x: Tensor, dim: int, rows: int, value: int = 0) -> Tensor:
    """With this value behind, so that it has so many rows along `dim`."""
    missing = rows - x.shape[dim]
    return torch.cat([x, x.new_full((*x.shape[:dim], missing, *x.shape[dim + 1 :]), value)], dim) if missing else x
