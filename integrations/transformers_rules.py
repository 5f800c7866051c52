"""What a HuggingFace model, a call of it and a call of its attention must be, to be computed exactly in shards.

Each rule is a function that returns, or raises an error which names the values and the fix. Most transformers families
pass; those that would compute something else on a shard without saying so are what these rules are for. Facts and
exceptions were read from the source of transformers 5.23. Nothing here communicates or changes a model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from seqpar_ring.batch import PLAN_KEY
from seqpar_ring.errors import BatchError, ConfigError, PlanError, UnsupportedError
from seqpar_ring.geometry import Mask
from seqpar_ring.parallel import SequenceParallel
from seqpar_ring.plan import Plan
from seqpar_ring.remat import Kept

HARMLESS = frozenset(
    {
        *("cache_position", "num_items_in_batch", "position_embeddings", "position_ids", "labels", "shift_labels"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "use_cache"),
    }
)
"""Keywords that reach attention functions and do not change what these compute. Those that ask for more than a shard
has are refused at the model's door."""

EXACT_ROPE = ("default", "linear", "llama3", "proportional", "yarn")
"""Rotary embeddings whose angles follow from a token's position alone, not from the length of the sequence."""

EXACT_LAYERS = ("full_attention", "sliding_attention")
"""Layer types of a config that are attention over a band of keys."""

NOT_OF_A_SHARD = {
    "output_attentions": "asks for attention weights, which the ring never holds",
    "output_router_logits": "adds a balance loss that is no sum over tokens, so shards cannot compute it exactly",
}
"""Outputs that cannot be had, as arguments of a call or as switches in a config."""

LOCAL_POSITIONS = {
    "attention_chunk_size": "makes attention chunked, which the ring does not do",
    "attn_temperature_tuning": "scales queries by their place in the shard instead of in the sequence",
}
"""Switches in a config that make a layer compute something else on a shard."""

OWN_LOSS = (
    "Shard with sp.shard_batch(batch), call the model without labels and shift_labels, "
    "and compute the loss as sp.loss(outputs.logits, labels, plan)."
)
DECODE = (
    "To generate, save the model with save_pretrained(path), load it in one process with "
    "AutoModelForCausalLM.from_pretrained(path), and call generate() on that one."
)


@dataclass
class Calls:
    """What one forward did: calls of attention, those of them with a window, calls of the loss. And what it keeps:
    attention's results, the number of tiles of its head, and that head where there are more than one."""

    attention: int = 0
    windowed: int = 0
    loss: int = 0
    kept: Kept | None = None
    tiles: int = 1
    head: Any = None

    def tally(self) -> dict[str, object]:
        """The counts, by name."""
        return {"attention": self.attention, "windowed": self.windowed, "loss": self.loss}


# ---------------------------------------------------------------------------------------------------- the model


def check_model(model: nn.Module, already: bool) -> None:
    """Refuse a model of which some part would be inexact; `already`: it has been parallelized before.

    Raises:
        UnsupportedError, ConfigError: see `RULES`.
    """
    if not isinstance(model, PreTrainedModel):
        inner = next((type(m).__name__ for m in model.modules() if isinstance(m, PreTrainedModel)), None)
        raise UnsupportedError(
            "the model is wrapped already" if inner else "not a transformers model",
            fix=f"Call parallelize on the {inner} before wrapping it." if inner else "Give a PreTrainedModel.",
            model=type(model).__name__,
        )
    if already:
        raise ConfigError(
            "the model is parallelized already",
            fix="Call parallelize once; for another SequenceParallel load the model anew.",
            model=type(model).__name__,
        )
    for rule in RULES:
        rule(model, model.config.get_text_config())


def _is_a_causal_decoder(model: Any, config: Any) -> None:
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedError("encoder-decoder models are not supported", fix="Use a decoder for text.", model=name)
    both_ways = sorted({type(m).__name__ for m in model.modules() if getattr(m, "is_causal", None) is False})
    if both_ways or getattr(config, "is_causal", None) is False:
        raise _bidirectional(model=name, modules=both_ways)
    if model.loss_type not in (None, "ForCausalLM"):
        raise UnsupportedError(
            "only language models are supported, as labels are shifted before sharding",
            fix="Use the family's ForCausalLM class, or its base model with a head of your own.",
            model=name,
            loss_type=model.loss_type,
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedError(
            "the model takes no position_ids, so it would count each rank's tokens from 0",
            fix="Use a family that takes position_ids.",
            model=name,
        )


def _has_attention_layers_only(model: Any, config: Any) -> None:
    others = sorted(set(getattr(config, "layer_types", None) or ()) - set(EXACT_LAYERS))
    if others:
        raise UnsupportedError(
            "the model has layers other than plain attention, which would see this rank's tokens only",
            fix=f"Use a model whose layer_types are all of {EXACT_LAYERS}.",
            model=type(model).__name__,
            layer_types=others,
        )
    for name, why in {**LOCAL_POSITIONS, **NOT_OF_A_SHARD}.items():
        if getattr(config, name, None):
            raise UnsupportedError(
                f"the config's {name} {why}",
                fix=f"Set config.{name} to False or None if the model allows it, else use another.",
                model=type(model).__name__,
                **{name: getattr(config, name)},
            )


def _has_positions_that_stay(model: Any, config: Any) -> None:
    found = getattr(config, "rope_parameters", None) or {}
    each = [found] if "rope_type" in found else [one for one in found.values() if isinstance(one, Mapping)]
    types = sorted({one.get("rope_type", "default") for one in each} - set(EXACT_ROPE))
    if types:
        raise UnsupportedError(
            "the rotary embedding follows the length of the sequence, of which a rank sees its own tokens only",
            fix=f"Use a rope_type of {EXACT_ROPE}; yarn extends the context too.",
            model=type(model).__name__,
            rope_type=types,
        )


def _draws_nothing_at_random(model: Any, config: Any) -> None:
    found = {
        name: value
        for name, value in config.to_dict().items()
        if ("drop" in name or "jitter" in name) and not name.startswith(("classifier", "summary"))
        if isinstance(value, float | int) and not isinstance(value, bool) and value > 0
    }
    modules = {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0}
    if found:
        arguments = ", ".join(f"{name}=0.0" for name in found)
        raise _dropout(f"Load the model with from_pretrained(path, {arguments}).", found)
    if modules:
        raise _dropout("Set p of these modules to 0.", modules)


RULES: tuple[Callable[[Any, Any], None], ...] = (
    _is_a_causal_decoder,
    _has_attention_layers_only,
    _has_positions_that_stay,
    _draws_nothing_at_random,
)
"""What a model must be: each is called with the model and the config of its text part, and raises."""


# ----------------------------------------------------------------------------------------------- a call of the model


def refuse_decoding(batch: Mapping[str, Any]) -> None:
    """Refuse a step of generate(), on this rank alone: generation is often tried on one rank, which must not wait.

    Raises:
        UnsupportedError: past_key_values or logits_to_keep among the arguments.
    """
    keep, cache = batch.get("logits_to_keep", 0), batch.get("past_key_values")
    if cache is not None:
        raise _cached(past_key_values=type(cache).__name__, use_cache=batch.get("use_cache"))
    if isinstance(keep, Tensor) or keep:
        raise UnsupportedError(
            "logits_to_keep, which generate() sets, counts from the end of a rank's tokens, not of the sequence",
            fix=f"Leave it out. {DECODE}",
            logits_to_keep=keep,
        )


def check_call(batch: Mapping[str, Any], sp: SequenceParallel) -> None:
    """Refuse what a caller may ask of a whole model and cannot ask of a sharded one.

    Raises:
        UnsupportedError: a KV cache, attention weights, router logits, embeddings in place of tokens.
        BatchError, PlanError: a sharded batch that is not what `shard_batch` of this very `sp` returned.
    """
    if batch.get("use_cache"):
        raise _cached(use_cache=batch["use_cache"])
    for name, why in NOT_OF_A_SHARD.items():
        if batch.get(name):
            raise UnsupportedError(f"{name} {why}", fix=f"Leave it out, or give {name}=False.", **{name: batch[name]})
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
    for name in ("input_ids", "inputs_embeds", "position_ids", "labels", "shift_labels"):
        x = batch.get(name)
        if x is not None and (x.dim() < 2 or x.shape[1] != plan.local_tokens):
            raise BatchError(
                f"{name} does not hold this rank's tokens of the plan",
                fix="Use what shard_batch returned as it is.",
                shape=tuple(x.shape),
                expected_tokens=plan.local_tokens,
            )


def check_shares(plan: Plan) -> None:
    """Refuse a rank without tokens: models of transformers reshape by -1, which fails on none.

    Raises:
        BatchError: the same on every rank.
    """
    if not min(plan.documents.sizes):
        raise BatchError(
            "a rank would hold no token, and models of transformers cannot run on none",
            fix='Use longer sequences, or a smaller size, or layout="contiguous".',
            tokens_by_rank=plan.documents.sizes,
            lengths=plan.lengths,
        )


def check_calls(model: Any, calls: Calls, labelled: bool) -> None:
    """After a first forward: did the attention of every layer, and the loss, go through us?

    Raises:
        UnsupportedError: no.
    """
    config, name = model.config.get_text_config(), type(model).__name__
    types = getattr(config, "layer_types", None)
    if calls.attention != config.num_hidden_layers:
        raise UnsupportedError(
            "not every layer calls the attention interface once, so parts of the model may see this rank's tokens only",
            fix="Use a family whose layers all attend through transformers' AttentionInterface.",
            model=name,
            attention_calls=calls.attention,
            layers=config.num_hidden_layers,
        )
    if types and calls.windowed != list(types).count("sliding_attention"):
        raise UnsupportedError(
            "the layers that have a sliding window and those that hand one to attention are not the same",
            fix="Make the config's layer_types and sliding_window say what the layers do, or use another family.",
            model=name,
            calls_with_window=calls.windowed,
            layer_types=types,
        )
    if labelled and model.base_model is not model and calls.loss != 1:
        raise UnsupportedError(
            "the model computes a loss of its own, which is a mean over this rank's tokens",
            fix=OWN_LOSS,
            model=name,
            loss_calls=calls.loss,
        )


# ------------------------------------------------------------------------------------------------ a call of attention


def check_attention(module: nn.Module, mask: Tensor | None, dropout: float, kwargs: Mapping[str, Any]) -> None:
    """Refuse what a layer asks of attention and the ring does not do.

    Raises:
        UnsupportedError: attention in both directions, dropout, a mask tensor, an argument that is not known.
    """
    said, where = kwargs.get("is_causal"), type(module).__name__
    if (getattr(module, "is_causal", None) if said is None else said) is False:
        raise _bidirectional(modules=[where])
    if dropout:
        raise _dropout("Set the config's attention dropout to 0 when loading.", {"dropout": dropout})
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
        fix=f"Leave out past_key_values, and use_cache or give use_cache=False. {DECODE}",
        **values,
    )


def _bidirectional(**values: object) -> UnsupportedError:
    return UnsupportedError(
        "attention in both directions (an encoder, or a vision tower) is not supported",
        fix="Use a decoder for text.",
        **values,
    )


def _dropout(fix: str, found: Mapping[str, float]) -> UnsupportedError:
    return UnsupportedError("dropout above 0 is not exact, as each rank would draw its own", fix=fix, **found)
