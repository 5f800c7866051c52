"""Megatron's layout as ours: which tokens a context-parallel rank holds, of a batch that Megatron has cut.

Megatron cuts every sequence in 2 cp equal chunks and gives rank r the chunks r and 2 cp - 1 - r: whole batches in
`get_batch_on_this_cp_rank`, packed ones sequence by sequence. Packed sequences are padded to a multiple of 2 cp, and
`PackedSeqParams` says how long they are with padding and without; all its numbers count tokens of all ranks together.
Here that becomes documents in a placed layout, and `batch_on_this_rank` makes such a batch, which for packed sequences
Megatron does only with Transformer Engine. Nothing here communicates, and nothing decides on another layout: Megatron
slices its rotary embeddings in this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from seqpar_ring import layout as layouts
from seqpar_ring.compat import Ring
from seqpar_ring.config import Settings
from seqpar_ring.errors import BatchError, PlanError, UnsupportedError
from seqpar_ring.geometry import Ints
from seqpar_ring.plan import Documents

KEPT = "_seqpar_ring_packed"
"""Under this name a `PackedSeqParams` carries what was read of it, for all layers of its micro-batch."""

WHOLE_MASK_DIM = 2
"""The dimension of an attention_mask (B, 1, S, S) along which Megatron cuts it; all other tensors along 1."""


class Chunks(NamedTuple):
    """Every sequence in 2 W equal chunks of its padded length, of which rank r holds r and 2 W - 1 - r.

    A placement for `Ring.placed`: the lengths it is given are those without padding, so ranks may hold unequal counts.
    """

    padded: tuple[int, ...]

    def __call__(self, lengths: Sequence[int], world: int) -> layouts.Layout:
        """Where the real tokens lie."""
        n = np.array(lengths, dtype=np.int64)
        chunk = -(-np.array(self.padded, dtype=np.int64) // (2 * world))  # rounded up: one rank's need not be even
        rank, doc = (np.tile(x.ravel(), 2) for x in np.indices((world, len(n)), dtype=np.int64))
        half = np.repeat((0, 1), world * len(n))
        start = np.where(half == 0, rank, 2 * world - 1 - rank) * chunk[doc]
        return layouts.place(world, rank, doc, start, np.clip(n[doc] - start, 0, chunk[doc]))


class Packed(NamedTuple):
    """Documents, and which of this rank's rows are theirs.

    Attributes:
        documents: the sequences without padding.
        rows: int64, the rows of this rank that hold real tokens; None where all do.
    """

    documents: Documents
    rows: Tensor | None


def whole(ring: Ring, settings: Settings, local_tokens: int) -> Packed:
    """One sequence a batch row, of which every rank holds so many tokens."""
    length = local_tokens * ring.transport.world
    _expect_chunks((length,), ring.transport.world)
    return Packed(ring.placed(settings, (length,), Chunks((length,))), None)


def packed(ring: Ring, settings: Settings, params: Any, local_tokens: int, device: torch.device) -> Packed:
    """The sequences that a `PackedSeqParams` tells of; read once a micro-batch, as reading waits for the device.

    Raises:
        PlanError: lengths that do not ascend, that do not fit the tokens or that Megatron's layout cannot cut.
        UnsupportedError: keys of other lengths than queries.
    """
    tensors = (params.cu_seqlens_q, params.cu_seqlens_kv, params.cu_seqlens_q_padded, params.cu_seqlens_kv_padded)
    if any(x is not None and x.is_inference() for x in tensors):  # these count no writes: each layer reads them
        return _packed(ring, settings, read(params), local_tokens, device)
    key = (settings, local_tokens, device, *(None if x is None else x._version for x in tensors))
    kept: _Kept | None = getattr(params, KEPT, None)
    if kept is None or kept.key != key or any(a is not b for a, b in zip(kept.of, (ring, *tensors), strict=True)):
        kept = _Kept(key, (ring, *tensors), _packed(ring, settings, read(params), local_tokens, device))
        setattr(params, KEPT, kept)
    return kept.found


class _Kept(NamedTuple):
    """What was read, and of which very objects: held, so that no other takes the place of one in memory."""

    key: tuple[object, ...]
    of: tuple[object, ...]
    found: Packed


def read(params: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths of the sequences, without and with padding, of all ranks together.

    Raises, as `packed`.
    """
    real = _row("cu_seqlens_q", params.cu_seqlens_q)
    padded = real if params.cu_seqlens_q_padded is None else _row("cu_seqlens_q_padded", params.cu_seqlens_q_padded)
    for name, keys, queries in (("", params.cu_seqlens_kv, real), ("_padded", params.cu_seqlens_kv_padded, padded)):
        if keys is not None and keys is not getattr(params, f"cu_seqlens_q{name}") and keys.tolist() != queries:
            raise UnsupportedError(
                "keys of other lengths than the queries are not supported under context parallelism",
                fix=f"Give the same cu_seqlens_kv{name} and cu_seqlens_q{name}.",
                **{f"cu_seqlens_q{name}": queries, f"cu_seqlens_kv{name}": keys.tolist()},
            )
    lengths, room = (tuple(b - a for a, b in pairwise(row)) for row in (real, padded))
    if len(lengths) != len(room) or any(n > m for n, m in zip(lengths, room, strict=False)):
        raise PlanError(
            "cu_seqlens_q_padded has no room for the sequences of cu_seqlens_q",
            fix="Give for each sequence its length and, in cu_seqlens_q_padded, its length with padding.",
            cu_seqlens_q=real,
            cu_seqlens_q_padded=padded,
        )
    return lengths, room


def _row(name: str, cu_seqlens: Tensor | None) -> list[int]:
    row: list[int] = [] if cu_seqlens is None else cu_seqlens.tolist()
    if len(row) < 2 or row[0] != 0 or row[-1] < 1 or any(a > b for a, b in pairwise(row)):
        fix = "Give the cumulative lengths of the sequences, of all ranks together: 0, n0, n0 + n1, ..."
        raise PlanError(f"{name} does not ascend from 0", fix=fix, **{name: row})
    return row


def _packed(
    ring: Ring, settings: Settings, lengths: tuple[tuple[int, ...], ...], local_tokens: int, device: torch.device
) -> Packed:
    real, padded = lengths
    world = ring.transport.world
    _expect_chunks(padded, world)
    if sum(padded) != local_tokens * world:
        raise PlanError(
            "the sequences do not fill the tokens of all ranks",
            fix="cu_seqlens count the tokens of all context-parallel ranks together; give padding behind the last "
            "sequence as part of that in cu_seqlens_q_padded.",
            tokens_of_all_ranks=local_tokens * world,
            cu_seqlens_end=sum(padded),
        )
    there = [i for i, n in enumerate(real) if n]
    placement = Chunks(tuple(padded[i] for i in there))
    documents = ring.placed(settings, tuple(real[i] for i in there), placement)
    if real == padded:
        return Packed(documents, None)
    rows = np.flatnonzero(_positions(padded, world, ring.transport.rank) < np.repeat(real, np.array(padded) // world))
    return Packed(documents, torch.from_numpy(rows).to(device))


def _positions(padded: Sequence[int], world: int, rank: int) -> Ints:
    """The position within its padded sequence of each row of a rank."""
    runs = Chunks(tuple(padded))(padded, world).columns(rank)
    positions: Ints = np.concatenate([np.arange(a, a + n) for a, n in zip(runs.start, runs.n, strict=True)])
    return positions


def _expect_chunks(padded: Sequence[int], world: int) -> None:
    wrong = [n for n in padded if n % (2 * world)]
    if world > 1 and wrong:
        raise PlanError(
            "Megatron cuts every sequence in 2 x cp equal chunks, and a length is no multiple of that",
            fix=f"Pad each sequence to a multiple of {2 * world} and say so in cu_seqlens_q_padded.",
            length=wrong[0],
            context_parallel_size=world,
        )


@lru_cache(maxsize=64)
def _tokens(padded: tuple[int, ...], world: int, rank: int) -> Tensor:
    """Which of all tokens a rank holds, int64."""
    runs, base = Chunks(padded)(padded, world).columns(rank), layouts.offsets(padded)
    rows = [np.arange(a, a + n) + base[d] for d, a, n in zip(runs.doc, runs.start, runs.n, strict=True)]
    return torch.from_numpy(np.concatenate(rows))


def batch_on_this_rank(
    batch: Mapping[str, Any], cp_group: dist.ProcessGroup, packed_seq_params: Any = None
) -> dict[str, Any]:
    """This rank's part of a batch, as Megatron cuts it: also of packed sequences without Transformer Engine.

    Args:
        batch: tensors (B, S, ..) of all ranks together, among them attention_mask (B, 1, S, S); others pass through.
        cp_group: the context-parallel ranks.
        packed_seq_params: of a batch (1, T) of packed sequences; None: one sequence a row.

    Raises:
        BatchError: tensors of different numbers of tokens.
        PlanError: lengths that Megatron's layout cannot cut.
    """
    world, rank = dist.get_world_size(cp_group), dist.get_rank(cp_group)
    tensors = {key: x for key, x in batch.items() if isinstance(x, Tensor) and x.dim() > 1}
    dims = {key: WHOLE_MASK_DIM if key == "attention_mask" else 1 for key in tensors}
    sizes = {key: x.shape[dims[key]] for key, x in tensors.items()}
    padded = tuple(set(sizes.values())) if packed_seq_params is None else read(packed_seq_params)[1]
    if any(size != sum(padded) for size in sizes.values()) or not sizes:
        fix = "Give (batch, tokens) each, and as many tokens as cu_seqlens say."
        raise BatchError("the tensors of a batch do not hold the same tokens", fix=fix, **sizes, expected=sum(padded))
    _expect_chunks(padded, world)
    mine = _tokens(tuple(n for n in padded if n), world, rank)
    cut = {key: x.index_select(dims[key], mine.to(x.device)) for key, x in tensors.items()}
    return {**batch, **cut}
