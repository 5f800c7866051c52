"""What a call of a parallelized HuggingFace model, and one of its attention, must be to be computed exactly in shards.

Each check returns, or raises an error which names the values and the fix. `Calls` is what one forward carries: a tally,
and what is kept for its backward. What a model itself must be is in `transformers_rules`. Nothing here communicates.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from seqpar_ring.batch import PLAN_KEY
from seqpar_ring.errors import BatchError, PlanError, UnsupportedError
from seqpar_ring.geometry import Mask
from seqpar_ring.parallel import SequenceParallel
from seqpar_ring.plan import Plan
from seqpar_ring.remat import Kept

CALLS_KEY = "seqpar_calls"
"""Under this key one forward's tally travels beside the plan."""

HARMLESS = frozenset(
    {
        *("cache_position", "num_items_in_batch", "position_embeddings", "position_ids", "labels", "shift_labels"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "use_cache"),
    }
)
"""Keywords that reach attention functions and do not change what these compute. Those that ask for more than a shard
has are refused at the model's door."""

NOT_OF_A_SHARD = {
    "output_attentions": "asks for attention weights, which the ring never holds",
    "output_router_logits": "adds a balance loss that is no sum over tokens, so shards cannot compute it exactly",
}
"""Outputs that cannot be had, as arguments of a call or as switches in a config."""

CACHES = ("past_key_values", "cache")
"""Under what name a model takes its KV cache: until transformers 5.23, and since 5.24."""

OWN_LOSS = (
    "Shard with sp.shard_batch(batch), call the model without labels and shift_labels, "
    "and compute the loss as sp.loss(outputs.logits, labels, plan)."
)
DECODE = (
    "To generate, save the model with save_pretrained(path), load it in one process with "
    "AutoModelForCausalLM.from_pretrained(path), and call generate() on that one."
)


class Calls:
    """What one forward did: calls of attention, those of them with a window, calls of the loss and what that made. And
    what it keeps: attention's results, the number of tiles of its head and that head where there are more than one, the
    number of tiles of its MLPs, and the state of the random numbers before it.

    Not a dataclass: FSDP2 with a dtype to compute in copies those among its arguments, and counts would go to copies.
    """

    def __init__(self, kept: Kept | None = None, chance: Tensor | None = None) -> None:
        self.kept, self.chance = kept, chance
        self.attention = self.windowed = self.loss = 0
        self.made: Tensor | None = None
        self.tiles = self.mlp_tiles = 1
        self.why_tiles = "asked for, or no labels"
        self.head: Any = None

    def tally(self) -> dict[str, object]:
        """The counts, by name."""
        return {"attention": self.attention, "windowed": self.windowed, "loss": self.loss}


def said(config: Any, name: str) -> Any:
    """What a config says for all layers alike; None where it says nothing, or where layers have values of their own."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers' AmbiguousGlobalPerLayerAttributeError, which has no public name
        return None


# ----------------------------------------------------------------------------------------------- a call of the model


def expect_labels(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """A whole batch to train on brings its labels: of the shards nobody outside could shift and weigh them right. In an
    evaluation it is only said once what comes back.

    Raises:
        BatchError: no labels, in training mode.
    """
    if PLAN_KEY in batch or batch.get("labels") is not None:
        return
    if model.training and torch.is_grad_enabled():
        raise BatchError(
            "a training batch has no labels",
            fix="Give labels with the batch. For a loss of your own, or a model without one, shard it with "
            "sp.shard_batch, and take what comes out as this rank's tokens, those of the plan. To evaluate, call "
            "model.eval() or use torch.no_grad().",
            keys=sorted(batch),
        )
    warnings.warn(
        "What the model returns for this whole batch is of this rank's tokens: [:, -1] is not the end of the sequence. "
        "Shard the batch with sp.shard_batch, and put results together with its plan: plan.gather(outputs.logits).",
        stacklevel=2,
    )


def refuse_decoding(batch: Mapping[str, Any]) -> None:
    """Refuse a step of generate(), on this rank alone: generation is often tried on one rank, which must not wait.

    Raises:
        UnsupportedError: a KV cache or logits_to_keep among the arguments.
    """
    keep = batch.get("logits_to_keep", 0)
    for name in CACHES:
        if batch.get(name) is not None:
            raise _cached(**{name: type(batch[name]).__name__}, use_cache=batch.get("use_cache"))
    if isinstance(keep, Tensor) or keep:
        raise UnsupportedError(
            "logits_to_keep, which generate() sets, counts from the end of a rank's tokens, not of the sequence",
            fix=f"Leave it out. {DECODE}",
            logits_to_keep=keep,
        )


def check_call(model: Any, batch: Mapping[str, Any], sp: SequenceParallel) -> None:
    """Refuse what a caller may ask of a whole model and cannot ask of a sharded one, here or in the model's config.

    Raises:
        UnsupportedError: a KV cache, attention weights, router logits, embeddings in place of tokens.
        BatchError, PlanError: a sharded batch that is not what `shard_batch` of this very `sp` returned.
    """
    if batch.get("use_cache"):
        raise _cached(use_cache=batch["use_cache"])
    for name, why in NOT_OF_A_SHARD.items():
        asked = batch[name] if batch.get(name) is not None else said(model.config.get_text_config(), name)
        if asked:
            raise UnsupportedError(f"{name} {why}", fix=f"Leave it out, or give {name}=False.", **{name: asked})
    plan = batch.get(PLAN_KEY)
    if plan is None:
        _check_whole(batch)
    elif not isinstance(plan, Plan) or plan.sequence is not sp.groups.ring or plan.mask != Mask():
        raise PlanError(
            "the batch's plan is not a causal plan of the sequence group that the model was parallelized with",
            fix="Shard the batch with shard_batch of that very SequenceParallel.",
            plan=plan,
            sequence_parallel=sp,
        )
    else:
        _check_sharded(batch, plan)


def _check_whole(batch: Mapping[str, Any]) -> None:
    for name, fix in (
        ("inputs_embeds", "Give input_ids: embeddings made outside the model would get the gradient of every rank."),
        ("shift_labels", "Give labels, not shifted: they are shifted before sharding."),
    ):
        if batch.get(name) is not None:
            raise UnsupportedError(
                f"{name} of a whole batch cannot be sharded exactly", fix=fix, shape=tuple(batch[name].shape)
            )


def _check_sharded(batch: Mapping[str, Any], plan: Plan) -> None:
    if batch.get("attention_mask") is not None:
        raise BatchError(
            "a sharded batch has an attention_mask",
            fix="Give the mask to shard_batch, which reads it, and use what that returns as it is.",
            attention_mask=tuple(batch["attention_mask"].shape),
        )
    if batch.get("position_ids") is None:
        raise BatchError(
            "a sharded batch has no position_ids", fix="Use what shard_batch returned as it is.", keys=sorted(batch)
        )
    if batch.get("labels") is not None and batch.get("shift_labels") is None:
        raise BatchError(
            "a sharded batch has labels and no shift_labels, so nobody knows whether they are shifted",
            fix="Give the labels to shard_batch, not shifted, and use what it returned as it is.",
            keys=sorted(batch),
        )
    for name in ("input_ids", "inputs_embeds", "position_ids", "labels", "shift_labels"):
        x = batch.get(name)
        if x is not None and (x.dim() < 2 or x.shape[1] != plan.local_tokens):
            raise BatchError(
                f"{name} does not hold this rank's tokens of the plan",
                fix="Use what shard_batch returned as it is.",
                shape=tuple(x.shape),
                expected_tokens=plan.local_tokens,
            )


def check_shares(plan: Plan, sp: SequenceParallel) -> None:
    """Refuse a rank without tokens: models of transformers reshape by -1, which fails on none. Collective.

    Raises:
        BatchError: on every rank, also on data ranks whose batches are fine.
    """
    problem: BatchError | None = None
    if not min(plan.documents.sizes):
        problem = BatchError(
            "a rank would hold no token, and models of transformers cannot run on none",
            fix='Use longer sequences, or a smaller size, or layout="contiguous".',
            tokens_by_rank=plan.documents.sizes,
            lengths=plan.lengths,
        )
    if problem is not None or sp.data_size > 1:  # else all ranks have the same sizes
        sp.groups.agree("the shares of the ranks", {}, problem)


def check_calls(model: Any, calls: Calls, labelled: bool) -> None:
    """After a first forward: did the attention of every layer, and the loss, go through us?

    Raises:
        UnsupportedError: no.
    """
    config, name = model.config.get_text_config(), type(model).__name__
    types = getattr(config, "layer_types", None)
    check_what_went_through_us(model, calls, labelled)
    if types and calls.windowed != list(types).count("sliding_attention"):
        raise UnsupportedError(
            "the layers that have a sliding window and those that hand one to attention are not the same",
            fix="Make the config's layer_types and sliding_window say what the layers do, or use another family.",
            model=name,
            calls_with_window=calls.windowed,
            layer_types=types,
        )
    window = said(config, "sliding_window")
    if not types and window and said(config, "use_sliding_window") is not False and not calls.windowed:
        raise UnsupportedError(
            "the config has a sliding window and no layer hands one to attention, so it may stand in a mask only",
            fix="Set config.sliding_window to None if the model allows it, else use another family.",
            model=name,
            sliding_window=window,
        )


def check_what_went_through_us(model: Any, calls: Calls, labelled: bool) -> None:
    """After every forward: did the attention of every layer, and the loss? Either may be set to another in between.

    Raises:
        UnsupportedError: no.
    """
    has_head = model.base_model is not model or model.get_output_embeddings() is not None
    # A base model hands labels down with whatever else it does not know.
    if labelled and (has_head or "labels" in inspect.signature(model.forward).parameters) and calls.loss != 1:
        raise UnsupportedError(
            "the model computes a loss of its own, which is a mean over this rank's tokens",
            fix=OWN_LOSS,
            model=type(model).__name__,
            loss_calls=calls.loss,
        )
    layers = model.config.get_text_config().num_hidden_layers
    if calls.attention != layers:
        raise UnsupportedError(
            "not every layer calls the attention interface once, so parts of the model may see this rank's tokens only",
            fix="Use a family whose layers all attend through transformers' AttentionInterface, and leave the model's "
            "attn_implementation as parallelize set it.",
            model=type(model).__name__,
            attention_calls=calls.attention,
            layers=layers,
        )


# ------------------------------------------------------------------------------------------------ a call of attention


def check_attention(module: nn.Module, mask: Tensor | None, dropout: float, kwargs: Mapping[str, Any]) -> None:
    """Refuse what a layer asks of attention and the ring does not do.

    Raises:
        UnsupportedError: attention in both directions, dropout, a mask tensor, an argument that is not known.
    """
    said, where = kwargs.get("is_causal"), type(module).__name__
    if (getattr(module, "is_causal", None) if said is None else said) is False:
        raise bidirectional(modules=[where])
    if dropout:
        raise dropout_above_zero("Set the config's attention dropout to 0 when loading.", {"dropout": dropout})
    if mask is not None:
        raise UnsupportedError(
            "a layer made an attention mask of its own, which cannot be followed exactly",
            fix="Use a model whose masks are causal or sliding windows.",
            module=where,
            attention_mask=tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__,
        )
    unknown = [k for k, v in kwargs.items() if k not in HARMLESS | {"is_causal"} and v is not None]  # None asks nothing
    if unknown:
        raise UnsupportedError(
            "attention was given arguments that the ring does not know; ignoring them could change the answer",
            fix="Leave them out of the batch; where the model itself adds them, use another family.",
            module=where,
            arguments=sorted(unknown),
        )


def _cached(**values: object) -> UnsupportedError:
    return UnsupportedError(
        "the KV cache is in use, and a sharded sequence has none",
        fix=f"Leave out the cache, and use_cache or give use_cache=False. {DECODE}",
        **values,
    )


def bidirectional(**values: object) -> UnsupportedError:
    """The error of a model, or a layer, that attends in both directions."""
    return UnsupportedError(
        "attention in both directions (an encoder, or a vision tower) is not supported",
        fix="Use a decoder for text.",
        **values,
    )


def dropout_above_zero(fix: str, found: Mapping[str, float]) -> UnsupportedError:
    """The error of a model, or a call, that draws at random."""
    return UnsupportedError("dropout above 0 is not exact, as each rank would draw its own", fix=fix, **found)
