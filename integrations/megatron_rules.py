"""What a Megatron config may ask of attention, to be computed exactly over a ring.

Each rule returns, or raises an error which names the values and the fix, when a layer is built: before anything has
been trained; or in a forward pass, where only that shows it (a bias or a mask of somebody's own). What only a model
shows (T5's bias) is refused by `megatron_bias`. Names and meanings were read from the sources of megatron-core 0.15.0,
0.16.1 and 0.19.2; what a version does not have, it cannot ask for. Nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from seqpar_ring import kernels
from seqpar_ring.config import Settings
from seqpar_ring.errors import BatchError, ConfigError, UnsupportedError, VersionError, did_you_mean
from seqpar_ring.plan import Plan
from seqpar_ring.schedule import BUILDERS

OLDEST = (0, 15)
"""The first megatron-core that builds core_attention with today's keywords."""

NAME = "seqpar_ring"
"""What `cp_comm_type` begins with where it means this package."""

SCHEDULES = {"ring": "ring", "double": "double_ring", "all_gather": "all_gather", "direct": "direct"}
"""What stands behind `seqpar_ring:`, and the schedule that it means."""

THEIRS = {"all_gather": "all_gather"}
"""Megatron's own words that mean the same here, beside "p2p", which its command line says unless told otherwise."""

INSTEAD = {
    "a2a": f'Heads are not shared out under Megatron; use "{NAME}", which works for any number of them.',
    "a2a+p2p": f'Use "{NAME}:double": a ring inside nodes and one between them.',
}
"""For Megatron's words that mean nothing here."""

OURS_TO_SET = ("schedule", "node", "block_tokens", "cut", "backward", "kv_dtype", "dkv_dtype", "kernel", "remat")
"""Settings that mean something under Megatron. The others would be ignored: Megatron decides on them."""

CAUSAL = ("causal", "padding_causal", "causal_bottom_right")
"""Mask types in which a query sees the keys up to its own position; with as many queries as keys they are the same."""

FULL = ("no_mask", "padding")
"""Mask types in which it sees all keys of its sequence; padding is known from cu_seqlens only."""

BIASES = ("relative", "alibi")
"""What `position_embedding_type` says where positions are added to the logits: T5's, and those of others' models."""


def check_version(version: str) -> None:
    """Refuse a megatron-core that builds attention in another way.

    Raises:
        VersionError: it is older than `OLDEST`.
    """
    if version_of(version) < OLDEST:
        raise VersionError(
            f"megatron-core {version} builds attention in another way",
            fix=f"Install megatron-core {'.'.join(map(str, OLDEST))} or newer.",
            megatron_core=version,
        )


def version_of(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def settings_of(size: int, cp_comm_type: str | None, given: Mapping[str, Any] | None, node: int | None) -> Settings:
    """The settings of a layer.

    Args:
        size: ranks of the context-parallel group.
        cp_comm_type: as Megatron hands it over.
        given: settings of the spec; its schedule gives way to that of a `seqpar_ring:` string.
        node: ranks of the innermost hierarchical group, if there is one.

    Raises:
        ConfigError: an unknown name, a setting that Megatron decides on, a double ring without the size of a node.
    """
    chosen = {key: value for key, value in (given or {}).items() if key != "node"}
    node = (given or {}).get("node", node)
    for key in chosen:
        if key in Settings.model_fields and key not in OURS_TO_SET:
            raise ConfigError(
                f'"{key}" is not for the ring to decide under Megatron',
                fix=f"Leave it out; what can be set is {', '.join(OURS_TO_SET)}.",
                **{key: chosen[key]},
            )
    schedule = _schedule(cp_comm_type)
    if schedule is not None:
        chosen["schedule"] = schedule
    if isinstance(node, int) and node > 0:
        # A group that lies within a node (those of a micro-batch may be small) is all of one.
        chosen = {"schedule": "double_ring", **chosen, "node": size if node % size == 0 else node}
    elif chosen.get("schedule") == "double_ring":
        chosen["node"] = _node_unsaid(size, cp_comm_type)
    settings = Settings.parse({"size": size, **chosen}, "the settings of RingCoreAttention")
    for key, known in (("schedule", BUILDERS), ("kernel", ("auto", *kernels.names()))):
        name = getattr(settings, key)
        if name not in known:
            raise ConfigError(f"unknown {key}", fix=did_you_mean(name, known), **{key: name})
    return settings


def _node_unsaid(size: int, cp_comm_type: str | None) -> int:
    if size == 1:
        return 1
    raise ConfigError(
        "a double ring needs to know how many ranks share a node",
        fix='Set hierarchical_context_parallel_sizes=[ranks of a node, nodes], or give the setting "node".',
        cp_comm_type=cp_comm_type,
        context_parallel_size=size,
    )


def _schedule(cp_comm_type: str | None) -> str | None:
    """What a `cp_comm_type` asks for; None where it asks for nothing, or for what Megatron says by default."""
    if cp_comm_type in (None, "p2p", NAME):
        return None
    if cp_comm_type in THEIRS:
        return THEIRS[cp_comm_type]
    name, _, variant = str(cp_comm_type).partition(":")
    if name == NAME and variant in SCHEDULES:
        return SCHEDULES[variant]
    known = [NAME, "p2p", *(f"{NAME}:{one}" for one in SCHEDULES), *THEIRS]
    fix = INSTEAD.get(cp_comm_type) or did_you_mean(str(cp_comm_type), known)
    raise ConfigError("unknown cp_comm_type for a ring", fix=fix, cp_comm_type=cp_comm_type)


def window_of(config: Any, layer_number: int) -> tuple[int, int] | None:
    """How many keys before and after its own position a query of this layer sees, -1 for all; None: no window.

    Some layers may be exempt: every so-manieth, or those that a list says.
    """
    window, skip = getattr(config, "window_size", None), getattr(config, "window_attn_skip_freq", None)
    if not window or (isinstance(skip, int) and layer_number % skip == 0):
        return None
    if isinstance(skip, list) and not skip[layer_number - 1]:
        return None
    before, after = window
    return int(before), int(after)


def check(config: Any, attention_type: str, mask_type: str, dropout: float | None) -> None:
    """Refuse what a ring does not compute exactly; `dropout` overrides the config's.

    Raises:
        UnsupportedError: see `RULES`.
    """
    if attention_type != "self":
        raise UnsupportedError(
            "cross-attention over a ring is not offered under Megatron",
            fix="Leave its core_attention as it was; with_ring replaces self-attention only.",
            attention_type=attention_type,
        )
    if mask_type not in (*CAUSAL, *FULL):
        raise UnsupportedError(
            "arbitrary attention masks are not supported",
            fix=f"Build the layer with an attn_mask_type of {', '.join((*CAUSAL, *FULL))}.",
            attn_mask_type=mask_type,
        )
    if config.attention_dropout if dropout is None else dropout:
        raise UnsupportedError(
            "attention dropout is not done",
            fix="Set attention_dropout=0.0 (--attention-dropout 0); Megatron's default is 0.1.",
            attention_dropout=config.attention_dropout if dropout is None else dropout,
        )
    for rule in RULES:
        rule(config)


def check_padding(config: Any) -> None:
    """Refuse what Megatron itself gets wrong where packed sequences have padding, with any attention.

    Raises:
        UnsupportedError: multi-token prediction, whose labels it shifts by lengths without padding, as of 0.19.2.
    """
    layers = getattr(config, "mtp_num_layers", None)
    if layers:
        raise UnsupportedError(
            "multi-token prediction of packed sequences with padding: Megatron shifts its labels as if there was none",
            fix="Give the lengths with padding as cu_seqlens_q too, not only as cu_seqlens_q_padded, and mask the loss "
            "of padding: under a causal mask nothing else sees it.",
            mtp_num_layers=layers,
        )


def _attends_in_the_dtype_of_its_inputs(config: Any) -> None:
    for name in ("fp8_dot_product_attention", "fp8_multi_head_attention"):
        if getattr(config, name, False):
            raise UnsupportedError(
                "attention in FP8 is not supported",
                fix=f"Set {name}=False; linear layers may stay in FP8.",
                **{name: True},
            )


def _adds_no_bias(config: Any) -> None:
    positions = getattr(config, "position_embedding_type", None)  # of configs that describe a model as well
    if positions in BIASES:
        raise UnsupportedError(
            "attention bias is not supported, and these positions are one",
            fix='Set position_embedding_type="rope", or leave the core_attention of this model as it was.',
            position_embedding_type=positions,
        )


def _needs_no_probabilities(config: Any) -> None:
    for name in ("qk_clip", "log_max_attention_logit", "batch_invariant_mode"):
        if getattr(config, name, False):
            raise UnsupportedError(
                f"{name} asks attention for what a ring does not return or promise",
                fix=f"Set {name}=False.",
                **{name: True},
            )


def _is_not_captured(config: Any) -> None:
    captured = getattr(config, "cuda_graph_impl", "none")
    asked = getattr(config, "cuda_graph_modules", None) or getattr(config, "cuda_graph_scope", None) or ()
    parts = [asked] if isinstance(asked, str) else [str(getattr(one, "name", one)) for one in asked]
    if captured not in (None, "none") and (not parts or {"attn", "full", "full_iteration"} & set(parts)):
        raise UnsupportedError(
            "attention over a ring cannot be captured in a CUDA graph",
            fix='Set cuda_graph_impl="none", or leave attention out of what is captured.',
            cuda_graph_impl=captured,
            captured=parts or "everything",
        )


def _has_known_sinks(config: Any) -> None:
    kind = getattr(config, "softmax_type", "vanilla")
    if kind not in ("vanilla", "off-by-one", "learnable"):
        raise UnsupportedError(
            "an unknown softmax_type", fix='Use "vanilla", "off-by-one" or "learnable".', softmax_type=kind
        )


RULES: tuple[Callable[[Any], None], ...] = (
    _adds_no_bias,
    _attends_in_the_dtype_of_its_inputs,
    _needs_no_probabilities,
    _is_not_captured,
    _has_known_sinks,
)
"""What a config may say: each is called with it, and raises."""


def expect_nothing_else(bias: Tensor | None, others: Mapping[str, Any], version: str) -> None:
    """Refuse what a call of attention may bring beside queries, keys, values and lengths.

    Raises:
        UnsupportedError: a bias, or an argument that newer versions give to other kinds of attention.
    """
    if bias is not None:
        raise UnsupportedError(
            "attention bias is not supported",
            fix="Use rotary positions, or leave context parallelism off for this model.",
            attention_bias=tuple(bias.shape),
        )
    asked = sorted(name for name, value in others.items() if value is not None)
    if asked:
        raise UnsupportedError(
            "this attention is asked for more than dot-product attention",
            fix="Leave the core_attention of such layers as it was.",
            arguments=asked,
            megatron_core=version,
        )


def expect_plain(mask: Tensor | None, kind: str, plan: Plan | None) -> None:
    """Check that a mask says no more than its type does. Megatron makes causal ones by default; once each is enough.

    Raises:
        UnsupportedError: it says more, or stands beside lengths (`plan` is None).
        BatchError: it is not of this rank's queries and the keys of all ranks.
    """
    # Tensors made in inference mode count no writes, so each layer looks at them.
    known = None if mask is None or mask.is_inference() else (kind, mask._version)
    if mask is None or (known is not None and getattr(mask, "_seqpar_ring_plain", None) == known):
        return
    if plan is None:
        raise UnsupportedError(
            "packed sequences with an attention_mask beside cu_seqlens",
            fix="Give attention_mask=None: the lengths say all.",
            attention_mask=tuple(mask.shape),
        )
    shape = (plan.local_tokens, plan.tokens)
    if mask.dim() != 4 or tuple(mask.shape[2:]) != shape or mask.dtype != torch.bool:
        raise BatchError(
            "an attention_mask does not hold this rank's queries and the keys of all ranks",
            fix="Give attention_mask=None, or cut it as Megatron does: bool (batch, 1, queries, keys).",
            attention_mask=tuple(mask.shape),
            dtype=mask.dtype,
            expected=shape,
        )
    keys, queries = torch.arange(plan.tokens, device=mask.device), plan.position_ids[0].to(mask.device)
    hidden = keys[None, :] > queries[:, None] if kind in CAUSAL else torch.zeros_like(mask[0, 0])
    if not bool((mask == hidden).all()):
        raise UnsupportedError(
            "arbitrary attention masks are not supported: this one is another than its type says",
            fix='Give attention_mask=None; to keep documents apart pack them (qkv_format "thd" with cu_seqlens).',
            attn_mask_type=kind,
            attention_mask=tuple(mask.shape),
        )
    mask._seqpar_ring_plain = known  # type: ignore[attr-defined]


def expect_one_document(params: Any) -> None:
    """Refuse lengths of several documents that would be ignored: Megatron reads them with the format "thd" only.

    One document's are two numbers, which say nothing new; Megatron's own hybrid context parallelism makes such.

    Raises:
        UnsupportedError: `params` are of another format, or of none, and bring the lengths of several documents.
    """
    names = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")
    several = {name: x.numel() - 1 for name in names if (x := getattr(params, name, None)) is not None and len(x) > 2}
    if several:
        raise UnsupportedError(
            "packed_seq_params bring lengths of several documents, which their format lets nobody read",
            fix='Set qkv_format="thd" and give packed queries, keys and values (tokens, heads, width).',
            qkv_format=getattr(params, "qkv_format", None),
            documents=max(several.values()),
        )
