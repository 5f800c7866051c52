"""The batch edge: from a whole batch, the same on every rank of a sequence group, to this rank's tokens and a plan.

Labels are shifted here, before sharding, so that no token is lost at a shard's border and none predicts across
documents. All that can be wrong with a batch is found here, on integers, before the model has done any work, and
raised on every rank. Reading is pure (`read`); what is collective is in `SequenceParallel.shard_batch`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from seqpar_ring.errors import BatchError, PlanError, UnsupportedError
from seqpar_ring.fingerprint import fingerprint
from seqpar_ring.geometry import Mask
from seqpar_ring.lengths import of_each
from seqpar_ring.plan import Documents, Plan

IGNORED = -100
"""The label of a token without a target: torch's and transformers' ignore_index."""

PLAN_KEY = "seqpar_plan"
"""Under this key the plan travels with the batch, through the model's keyword arguments, to attention."""

DESCRIPTIVE = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Keys by which other kernels learn of packed documents; read where needed, and replaced by the plan."""

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Reading:
    """What a batch turned out to be.

    Attributes:
        shape: (B, S) of the whole batch.
        lengths: tokens of each document of a row; all rows have the same.
        labels: (B, S) int64, shifted: entry i is the target of token i; None if the batch has no labels.
        position_ids: (1, S) within each document.
        padded: whether rows have padding at the right, which counts as the last document's.
        longest: tokens of the longest document, by the positions that were given: padding may have small ones.
    """

    shape: tuple[int, int]
    lengths: tuple[int, ...]
    labels: Tensor | None
    position_ids: Tensor
    padded: bool
    longest: int


class Padded(Documents):
    """Documents with padding at the right, which no token sees as long as none sees what comes after it."""

    def plan(self, mask: Mask) -> Plan:
        """See `Documents.plan`.

        Raises:
            PlanError: a mask under which tokens would see the padding.
        """
        if not mask.causal:
            raise PlanError(
                "the batch was padded at the right, and under a mask that is not causal tokens would see the padding",
                fix="Pack the documents without padding, with position_ids that restart.",
                lengths=self.lengths,
            )
        return super().plan(mask)


def read(batch: Batch, lengths: Sequence[int] | None = None) -> Reading:
    """Look at a whole batch and find out its documents and targets.

    Args:
        batch: input_ids (B, S) or inputs_embeds (B, S, ..); labels (B, S), not shifted; attention_mask (B, S), ones,
            then zeros at the right; position_ids (B, S) or (1, S), which restart at 0 where a packed document begins.
        lengths: tokens of each packed document, where position_ids do not say.

    Raises:
        BatchError: shapes that differ, lengths that do not sum to the row, left padding or holes, labels on padding,
            positions that do not count up from 0 in each document, rows that are packed differently, shift_labels.
        UnsupportedError: a mask that is not a padding mask.
    """
    shape = _shape(batch)
    if PLAN_KEY in batch:
        raise BatchError(
            "the batch is one rank's part already", fix="Give the whole batch, once.", shape=shape, plan=batch[PLAN_KEY]
        )
    if batch.get("shift_labels") is not None:
        raise BatchError(
            "shift_labels of a whole batch would be replaced",
            fix="Give labels, not shifted: they are shifted before sharding.",
            keys=sorted(batch),
        )
    labels, mask = _targets(batch.get("labels")), batch.get("attention_mask")
    if labels is not None and tuple(labels.shape) != shape:
        fix, theirs = "Give one label for each token, not shifted; -100 where there is no target.", tuple(labels.shape)
        raise BatchError("labels and input_ids differ in shape", fix=fix, labels=theirs, input_ids=shape)
    real = _real_tokens(mask, shape)
    if labels is not None and real is not None and bool((labels[~real.to(labels.device)] != IGNORED).any()):
        raise BatchError(
            "padding tokens have labels",
            fix="Set labels to -100 where attention_mask is 0.",
            padding_tokens=int((~real).sum()),
        )
    found = _lengths(batch, lengths, shape, real)
    device = next(batch[key].device for key in ("input_ids", "inputs_embeds") if batch.get(key) is not None)
    position_ids = torch.cat([torch.arange(n, device=device) for n in found])[None]
    shifted = None if labels is None else shift_labels(labels, found)
    given = batch.get("position_ids")
    longest = max(found) if given is None or real is None else int(given.max()) + 1
    return Reading(shape, found, shifted, position_ids, real is not None, longest)


def _targets(labels: Any) -> Tensor | None:
    """Labels as int64."""
    if labels is None:
        return None
    whole = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.dtype is torch.bool)
    if not whole:
        raise BatchError(
            "labels are not a tensor of whole numbers",
            fix="Give int64 labels of shape (batch, tokens).",
            labels=labels.dtype if isinstance(labels, Tensor) else type(labels).__name__,
        )
    found: Tensor = labels.to(torch.int64)
    if bool(((found < 0) & (found != IGNORED)).any()):
        raise BatchError(
            "there are negative labels", fix=f"Use {IGNORED} where there is no target.", least=int(found.min())
        )
    return found


def shift_labels(labels: Tensor, lengths: Sequence[int]) -> Tensor:
    """The target of each token: the next label of its document, and none at the document's last token.

    Args:
        labels: (B, S), not shifted.
        lengths: tokens of each document of a row, summing to S.
    """
    shifted = torch.full_like(labels, IGNORED)
    shifted[:, :-1] = labels[:, 1:]
    ends = torch.tensor(list(lengths), device=labels.device).cumsum(0) - 1
    shifted[:, ends] = IGNORED
    return shifted


def token_keys(batch: Batch, shape: tuple[int, int]) -> tuple[str, ...]:
    """The keys of a batch, beside labels, position_ids and masks, whose tensors hold one entry for each token.

    Raises:
        BatchError: a tensor that is neither per token nor a scalar, so that nobody can say how to shard it.
    """
    keys = []
    for key, value in batch.items():
        if key in ("labels", "shift_labels", "attention_mask", "position_ids", PLAN_KEY, *DESCRIPTIVE):
            continue
        if isinstance(value, Tensor) and value.dim():
            if tuple(value.shape[:2]) != shape:
                raise BatchError(
                    "a tensor of the batch has no entry for each token, so it cannot be sharded",
                    fix="Leave it out of the batch, or give it the shape (batch, tokens, ...).",
                    key=key,
                    shape=tuple(value.shape),
                    batch_and_tokens=shape,
                )
            keys.append(key)
    return tuple(keys)


def refuse_trained(batch: Batch, keys: Sequence[str]) -> None:
    """Refuse what has a gradient: that of a whole tensor is the same, whole, on every rank, and averages to too much.

    Raises:
        BatchError: a tensor of these keys requires a gradient.
    """
    for key in keys:
        if batch[key].requires_grad:
            raise BatchError(
                f"{key} has a gradient, which would be counted once for each rank",
                fix="Shard input_ids and embed this rank's tokens, or detach it.",
                key=key,
            )


def _shape(batch: Batch) -> tuple[int, int]:
    for key in ("input_ids", "inputs_embeds"):
        value = batch.get(key)
        if isinstance(value, Tensor):
            if value.dim() < 2 or value.shape[0] == 0 or value.shape[1] == 0:
                raise BatchError(
                    f"{key} must be (batch, tokens) with at least one of each",
                    fix="Add the batch dimension; leave out empty batches.",
                    shape=tuple(value.shape),
                )
            return value.shape[0], value.shape[1]
    raise BatchError("the batch has no input_ids", fix="Give input_ids of shape (batch, tokens).", keys=sorted(batch))


def _real_tokens(mask: Any, shape: tuple[int, int]) -> Tensor | None:
    """Where a 2-D padding mask has real tokens; None where all are real."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise UnsupportedError(
            "attention_mask is not a padding mask, and other masks cannot be followed exactly",
            fix="Leave it out; pack documents with position_ids that restart, or pad at the right with a 2-D mask.",
            attention_mask=tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__,
        )
    if tuple(mask.shape) != shape:
        raise BatchError(
            "attention_mask and input_ids differ in shape",
            fix="Give one entry for each token.",
            attention_mask=tuple(mask.shape),
            input_ids=shape,
        )
    real = mask != 0
    if bool((real & (mask != 1)).any()):
        raise UnsupportedError(
            "attention_mask has other numbers than 0 and 1, and what they mean cannot be followed exactly",
            fix="If they number documents, give position_ids that restart, or lengths, in their place.",
            values=mask.unique().tolist()[:5],
        )
    if bool(real.all()):
        return None
    rises = real[:, 1:] & ~real[:, :-1]
    for row, bad in (("left padding", ~real[:, 0]), ("a hole", rises.any(1))):
        if bool(bad.any()):
            raise BatchError(
                f"attention_mask has {row}",
                fix='Pad at the right (tokenizer.padding_side = "right"), or pack the documents without padding.',
                rows=bad.nonzero().flatten().tolist(),
            )
    return real


def _lengths(
    batch: Batch, lengths: Sequence[int] | None, shape: tuple[int, int], real: Tensor | None
) -> tuple[int, ...]:
    """Document lengths as the argument, positions, cumulative lengths or numbers say; all that are given must agree."""
    said: dict[str, tuple[int, ...]] = {}
    if lengths is not None:
        said["lengths"] = of_each(lengths, "lengths", BatchError)
    if batch.get("position_ids") is not None:
        said["position_ids"] = _lengths_of_positions(batch["position_ids"], shape, real)
    for key in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if batch.get(key) is not None:
            said[key] = _lengths_between(key, batch[key])
    if batch.get("seq_idx") is not None:
        said["seq_idx"] = _lengths_of_numbers(batch["seq_idx"], shape)
    for source, found in said.items():
        if sum(found) != shape[1] or min(found, default=0) < 1:
            raise BatchError(
                f"document lengths from {source} do not fit the row",
                fix="Give lengths of at least 1 that sum to the number of tokens of a row.",
                lengths=found,
                sum=sum(found),
                tokens=shape[1],
            )
    if len(set(said.values())) > 1:
        raise BatchError("the batch says its document lengths twice, and differently", fix="Drop one of them.", **said)
    return next(iter(said.values()), (shape[1],))


def _lengths_between(key: str, cu_seq_lens: Any) -> tuple[int, ...]:
    """Lengths of documents of these cumulative ones."""
    whole = isinstance(cu_seq_lens, Tensor) and cu_seq_lens.dtype in (torch.int32, torch.int64)
    if not whole or cu_seq_lens.dim() != 1 or not len(cu_seq_lens) or int(cu_seq_lens[0]) != 0:
        raise BatchError(
            f"{key} is not a row of cumulative lengths from 0",
            fix="Give an int32 tensor (documents + 1,): 0, n0, n0 + n1, ..; or position_ids.",
            **{key: cu_seq_lens},
        )
    return tuple(cu_seq_lens.diff().tolist())


def _lengths_of_numbers(seq_idx: Any, shape: tuple[int, int]) -> tuple[int, ...]:
    """Lengths of documents that are numbered: (B, S) or (1, S), the same in all rows."""
    fits = isinstance(seq_idx, Tensor) and tuple(seq_idx.shape) in (shape, (1, shape[1]))
    if not fits or bool((seq_idx != seq_idx[:1]).any()):
        raise BatchError(
            "seq_idx does not say one packing for all rows",
            fix="Give the number of each token's document, (batch, tokens), the same in every row; or position_ids.",
            seq_idx=tuple(seq_idx.shape) if isinstance(seq_idx, Tensor) else type(seq_idx).__name__,
            input_ids=shape,
        )
    return tuple(seq_idx[0].unique_consecutive(return_counts=True)[1].tolist())


def _lengths_of_positions(position_ids: Any, shape: tuple[int, int], real: Tensor | None) -> tuple[int, ...]:
    if not isinstance(position_ids, Tensor) or tuple(position_ids.shape) not in (shape, (1, shape[1])):
        raise BatchError(
            "position_ids do not fit input_ids",
            fix="Give one position for each token: (batch, tokens) or (1, tokens).",
            position_ids=getattr(position_ids, "shape", type(position_ids).__name__),
            input_ids=shape,
        )
    rows = set()
    for i, row in enumerate(position_ids):
        its = slice(None) if position_ids.shape[0] == 1 else slice(i, i + 1)  # the rows that these positions are of
        known = shape[1] if real is None else int(real[its].sum(1).max())
        steps = row[:known].diff()
        starts = (row[:known] == 0).nonzero().flatten()
        bad = ((steps != 1) & (row[1:known] != 0)).nonzero().flatten()
        if known and (int(row[0]) != 0 or bad.numel()):
            at = 0 if int(row[0]) != 0 else int(bad[0]) + 1
            raise BatchError(
                "position_ids do not count up from 0 in each document",
                fix="Give 0, 1, 2, .. for each document, restarting at 0 where the next one begins.",
                row=i,
                token=at,
                positions=row[max(0, at - 2) : at + 3].tolist(),
            )
        borders = [*starts.tolist(), shape[1]]  # padding at the right counts as the last document's
        rows.add(tuple(b - a for a, b in pairwise(borders)))
    if len(rows) > 1:
        raise BatchError(
            "the rows of the batch are packed differently",
            fix="Put all documents in one row (batch size 1), or give every row the same document lengths.",
            rows=sorted(rows)[:3],
        )
    return rows.pop()


def record(batch: Mapping[str, Any], reading: Reading) -> dict[str, object]:
    """What the ranks of a group must have in common. The contents too: a loader that hands each rank its own sample is
    the commonest silent error of sequence parallelism. Not those of embeddings, which each rank may have computed, and
    which then differ by rounding."""
    whole = [key for key in token_keys(batch, reading.shape) if key != "inputs_embeds"]
    return {
        "keys": sorted(batch),
        "batch and tokens": reading.shape,
        "lengths": reading.lengths,
        **{f"{key} (checksum)": fingerprint(batch[key]) for key in whole},
        "labels (checksum)": fingerprint(reading.labels),
    }
