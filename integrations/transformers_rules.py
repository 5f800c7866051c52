"""What a HuggingFace model must be, to be computed exactly in shards.

Each rule is a function that returns, or raises an error which names the values and the fix. Most transformers families
pass; those that would compute something else on a shard without saying so are what these rules are for. Facts and
exceptions were read from the source of transformers 5.23, and hold with 5.24 (`tests/integrations/every_model.py`).
Nothing here communicates or changes a model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from seqpar_ring.batch import IGNORED
from seqpar_ring.errors import BatchError, ConfigError, UnsupportedError

from .transformers_calls import NOT_OF_A_SHARD, OWN_LOSS, bidirectional, dropout_above_zero, said
from .transformers_positions import FOLLOW_LENGTH
from .transformers_tokens import check_chance, refuse_mixing

RING = "seqpar_ring"
"""The attn_implementation under which the ring is registered."""

EXACT_ROPE = ("default", "linear", "llama3", "proportional", "yarn", *FOLLOW_LENGTH)
"""Rotary embeddings that are exact: their angles follow from a token's position alone, or they are told the length."""

EXACT_LAYERS = ("full_attention", "sliding_attention")
"""Layer types of a config that are attention over a band of keys."""

CHUNKED = {"llama4_text": "chunked_attention"}
"""Model types whose layers of this type are chunked as the config's attention_chunk_size says, and whose queries are
scaled by position where they have no rotary embedding: both are followed."""

LOCAL_POSITIONS = {
    "attention_chunk_size": "makes attention chunked in a way that is known of Llama 4 only",
    "attn_temperature_tuning": "scales queries by their place in the shard instead of in the sequence",
}
"""Switches in a config that make a layer compute something else on a shard."""

REPLACED = (None, "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
"""Implementations of attention that compute what the ring does, so that it may take their place."""

DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
"""Modules that draw at random, on each rank anew."""

OF_TRL = {"output_router_logits": " Where SFTTrainer sets it: SFTConfig(router_aux_loss_coef=0.0)."}
"""Where a switch comes from that the user did not set."""

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
        raise bidirectional(model=name, modules=both_ways)
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
    followed = config.model_type in CHUNKED
    known = {*EXACT_LAYERS, CHUNKED[config.model_type]} if followed else set(EXACT_LAYERS)
    others = sorted(set(getattr(config, "layer_types", None) or ()) - known)
    if others:
        raise UnsupportedError(
            "the model has layers other than plain attention, which would see this rank's tokens only",
            fix=f"Use a model whose layer_types are all of {EXACT_LAYERS}.",
            model=type(model).__name__,
            layer_types=others,
        )
    for name, why in {**({} if followed else LOCAL_POSITIONS), **NOT_OF_A_SHARD}.items():
        if said(config, name):
            raise UnsupportedError(
                f"the config's {name} {why}",
                fix=f"Set config.{name} to False or None if the model allows it, else use another."
                + OF_TRL.get(name, ""),
                model=type(model).__name__,
                **{name: getattr(config, name)},
            )


def _mixes_no_tokens_elsewhere(model: Any, config: Any) -> None:
    refuse_mixing(model)


def _has_positions_that_stay(model: Any, config: Any) -> None:
    found = getattr(config, "rope_parameters", None) or {}
    each = [found] if "rope_type" in found else [one for one in found.values() if isinstance(one, Mapping)]
    types = sorted({one.get("rope_type", "default") for one in each} - set(EXACT_ROPE))
    if types:
        raise UnsupportedError(
            "the rotary embedding is of a type that is not known to be exact on a shard",
            fix=f"Use a rope_type of {EXACT_ROPE}.",
            model=type(model).__name__,
            rope_type=types,
        )


def _counts_positions_from_zero(model: Any, config: Any) -> None:
    own = sorted({type(m).__name__ for m in model.modules() if hasattr(m, "create_position_ids_from_input_ids")})
    if own:
        raise UnsupportedError(
            "the model counts positions from the id of its padding token on, not from 0 as sharded batches do",
            fix="Use a family that counts from 0.",
            model=type(model).__name__,
            modules=own,
        )


def _is_of_no_dropout(model: Any, config: Any) -> None:
    found = {
        name: value
        for name, value in _numbers(config.to_dict())
        if ("drop" in name or "jitter" in name) and not name.startswith(("classifier", "summary")) and value > 0
    }
    if found:
        arguments = ", ".join(f"{name}=0.0" for name in found)
        raise dropout_above_zero(f"Load the model with from_pretrained(path, {arguments}).", found)
    draws_nothing_at_random(dropouts_of(model))


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a config by name, also those of configs inside it, as DBRX has for its experts."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, float | int) and not isinstance(value, bool):
            yield name, value


def _holds_whole_layers(model: Any, config: Any) -> None:
    parts = getattr(model, "tp_size", None) or 1
    if parts > 1:
        raise UnsupportedError(
            "the model's layers are spread over ranks by transformers, which must then all have the same tokens",
            fix="Load it without tp_plan and distributed_config; ZeRO-3 or FSDP spreads parameters as well.",
            model=type(model).__name__,
            tp_size=parts,
        )


def _has_the_usual_attention_and_loss(model: Any, config: Any) -> None:
    attention = getattr(config, "_attn_implementation", None)  # no public name; transformers' own examples read it
    # Kernels of the hub have the name of their repository; "paged|" is for serving.
    if attention not in (*REPLACED, RING) and "/" not in attention and not attention.startswith("paged|"):
        raise UnsupportedError(
            "the model has an attention function of its own, which the ring would replace",
            fix="Load the model with an attn_implementation of transformers if that computes the same.",
            model=type(model).__name__,
            attn_implementation=attention,
        )
    if model.loss_type is None and model.get_output_embeddings() is None:
        return  # transformers would warn of what it computes no loss of
    if model.loss_function is not ForCausalLMLoss:
        raise UnsupportedError(
            "the model has a loss function of its own, which the mean over the world's targets would replace",
            fix="Leave model.loss_function as it was. For a loss of your own shard with sp.shard_batch(batch), call "
            "the model without labels, and sum over the ranks what you compute of outputs.logits.",
            model=type(model).__name__,
            loss_function=getattr(model.loss_function, "__name__", type(model.loss_function).__name__),
        )


def dropouts_of(model: nn.Module) -> dict[str, Any]:
    """The modules of a model that may draw at random, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, DROPOUT)}


def draws_nothing_at_random(modules: Mapping[str, Any]) -> None:
    """Refuse dropout that is on.

    Raises:
        UnsupportedError: with the names of these modules.
    """
    modules = {name: m.p for name, m in modules.items() if m.p > 0}
    if modules:
        raise dropout_above_zero("Set p of these modules to 0.", modules)


def check_ids(model: Any, batch: Mapping[str, Any]) -> None:
    """Refuse a token that the model has no embedding for: one rank has it, and the others would wait for that rank.

    On a GPU the host would have to wait to see it.

    Raises:
        BatchError: with the id.
    """
    ids = batch.get("input_ids")
    try:
        words = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # a family that transformers does not know its embeddings of
        words = None
    if not isinstance(ids, Tensor) or ids.is_cuda or not ids.numel() or words is None:
        return
    least, most = (int(x) for x in ids.aminmax())
    if least < 0 or most >= words:
        raise BatchError(
            "a token id is not among the model's embeddings",
            fix="Use the tokenizer of this model, or resize its embeddings.",
            token=least if least < 0 else most,
            embeddings=words,
        )


def check_ignored(batch: Mapping[str, Any]) -> None:
    """Refuse another label than -100 for what is no target, which some families hand to their loss alone.

    Raises:
        UnsupportedError: with that label.
    """
    if batch.get("ignore_index", IGNORED) != IGNORED:
        raise UnsupportedError(
            f"the loss of a sharded model leaves out labels of {IGNORED} only",
            fix=f"Set those labels to {IGNORED}, and leave ignore_index out.",
            ignore_index=batch["ignore_index"],
        )


def check_outcome(model: Any, chance: Tensor | None, made: Tensor | None, output: Any) -> None:
    """After a forward: was nothing drawn at random? And does the model return what its loss function did, with nothing
    added?

    Args:
        chance: the state of the random numbers before; None where it is not looked at.
        made: what the loss function returned; None without labels.

    Raises:
        UnsupportedError: no.
    """
    check_chance(model, chance)
    found = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
    if made is not None and found is not made:
        raise UnsupportedError(
            "the model changes the loss after its loss function, by a term of this rank's tokens only",
            fix=OWN_LOSS,
            model=type(model).__name__,
        )


RULES: tuple[Callable[[Any, Any], None], ...] = (
    _is_a_causal_decoder,
    _has_attention_layers_only,
    _mixes_no_tokens_elsewhere,
    _has_positions_that_stay,
    _counts_positions_from_zero,
    _is_of_no_dropout,
    _holds_whole_layers,
    _has_the_usual_attention_and_loss,
)
"""What a model must be: each is called with the model and the config of its text part, and raises."""
