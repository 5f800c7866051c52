"""Families: what the models of one `model_type` have in common and their configurations do not say.

One line for each family whose parameters are counted exactly; the tests build them all with transformers and compare.
What is left out of a configuration means the family's default, since transformers leaves defaults out of nested ones. A
family that is not here is taken to be like Llama: plans for it are good, its parameter count may be a little off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Config = Mapping[str, Any]
Kinds = Callable[[Config, int], list[str]]

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
"""Kinds of layers, in the words of `layer_types`."""


def everything(config: Config, layers: int) -> list[str]:
    """Every layer sees all that is before it."""
    return [FULL] * layers


def windowed(config: Config, layers: int) -> list[str]:
    """Every layer sees the window, if there is one."""
    return [SLIDING] * layers


def all_but_every(n: int) -> Kinds:
    """Every n-th layer sees everything, the others the window; n may be given as `sliding_window_pattern`."""

    def kinds(config: Config, layers: int) -> list[str]:
        period = config.get("sliding_window_pattern") or n
        return [SLIDING if (i + 1) % period else FULL for i in range(layers)]

    return kinds


def late(config: Config, layers: int) -> list[str]:
    """Layers from `max_window_layers` on see the window."""
    first = config.get("max_window_layers") or 0
    return [FULL if i < first else SLIDING for i in range(layers)]


def early(config: Config, layers: int) -> list[str]:
    """Every other layer before `max_window_layers` sees the window."""
    first = config.get("max_window_layers") or 0
    return [SLIDING if i % 2 == 0 and i < first else FULL for i in range(layers)]


def unrotated(kind: str, rotated: bool) -> Kinds:
    """Every fourth layer (or `no_rope_layer_interval`-th) is not rotated; those, or all others, are of this kind."""

    def kinds(config: Config, layers: int) -> list[str]:
        period = config.get("no_rope_layer_interval") or 4
        given = config.get("no_rope_layers") or [int((i + 1) % period != 0) for i in range(layers)]
        return [kind if bool(has) is rotated else FULL for has in given]

    return kinds


class Biases(NamedTuple):
    """Which projections have biases: of attention's inputs, of its output, of the MLP."""

    qkv: bool = False
    out: bool = False
    mlp: bool = False


class Family(NamedTuple):
    """What a family has.

    Attributes:
        defaults: fields that a configuration may leave out.
        kinds: how far each layer sees, where the configuration does not list it.
        gated: whether an MLP has three matrices, and not two.
        biased: for attention's inputs, its output and the MLP: the field that says so, or the answer.
        norms: norms of width `hidden` in a layer.
        vectors: of each norm: a scale is one, a scale and a shift two.
        qk_norm: norms of queries and keys: "head", shared by the heads, "row", a scale for each head, or "" for none.
        qk_norm_if: the field that turns them on.
        dense: the field with the intermediate size of dense MLPs.
        router_bias, shared_gate: what a mixture of experts has beside its router: a bias, a gate for the shared expert.
        learned: whether positions are learned, one vector each.
        head_bias: whether the head has a bias.
        exact: whether this is all there is.
    """

    defaults: Mapping[str, Any] = {}
    kinds: Kinds = everything
    gated: bool = True
    biased: tuple[str | bool, str | bool, str | bool] = ("attention_bias", "attention_bias", "mlp_bias")
    norms: int = 2
    vectors: int = 1
    qk_norm: str = ""
    qk_norm_if: str = ""
    dense: str = "intermediate_size"
    router_bias: bool = False
    shared_gate: bool = False
    learned: bool = False
    head_bias: bool = False
    exact: bool = True

    def biases(self, config: Config) -> Biases:
        """Which projections of this configuration have biases."""
        return Biases(*(one if isinstance(one, bool) else bool(config.get(one)) for one in self.biased))


_NONE = (False, False, False)
_ATTENTION = ("attention_bias", "attention_bias", False)
_INPUTS = ("attention_bias", False, False)
_ALL = (True, True, True)
_WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_TIED = {"tie_word_embeddings": True}
_GEMMA = {**_TIED, "head_dim": 256}
_GEMMA3 = {
    **{**_GEMMA, "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window": 4096},
}

FAMILIES: dict[str, Family] = {
    "cohere": Family(_TIED, biased=_ATTENTION, norms=1, qk_norm="row", qk_norm_if="use_qk_norm"),
    "cohere2": Family({**_TIED, "sliding_window": 4096}, all_but_every(4), biased=_ATTENTION, norms=1),
    "deepseek_v2": Family(biased=_ATTENTION),
    "deepseek_v3": Family({"first_k_dense_replace": 3, "n_shared_experts": 1}, biased=_ATTENTION),
    "ernie4_5": Family({**_TIED, "head_dim": 128}, biased=("use_bias", "use_bias", "use_bias")),
    "exaone4": Family({"sliding_window": 4096}, all_but_every(4), biased=_NONE, qk_norm="head"),
    "gemma": Family(_GEMMA, biased=_ATTENTION),
    "gemma2": Family({**_GEMMA, "sliding_window": 4096}, all_but_every(2), biased=_ATTENTION, norms=4),
    "gemma3_text": Family(_GEMMA3, all_but_every(6), biased=_ATTENTION, norms=4, qk_norm="head"),
    "glm": Family({"head_dim": 128, "attention_bias": True}, biased=_INPUTS),
    "glm4": Family({"head_dim": 128, "attention_bias": True}, biased=_INPUTS, norms=4),
    "glm4_moe": Family(
        {"first_k_dense_replace": 1, "n_shared_experts": 1}, biased=_INPUTS, qk_norm="head", qk_norm_if="use_qk_norm"
    ),
    "gpt2": Family({**_TIED, "n_positions": 1024}, gated=False, biased=_ALL, vectors=2, learned=True),
    "gpt_neox": Family(
        {"attention_bias": True}, gated=False, biased=("attention_bias", "attention_bias", True), vectors=2
    ),
    "gpt_oss": Family(
        {"head_dim": 64, "sliding_window": 128, "attention_bias": True, "num_experts_per_tok": 4},
        all_but_every(2),
        biased=("attention_bias", "attention_bias", True),
        router_bias=True,
    ),
    "granite": Family(),
    "llama": Family(),
    "llama4_text": Family(
        {
            **{"head_dim": 128, "attention_chunk_size": 8192, "intermediate_size_mlp": 16384},
            **{"num_local_experts": 16, "num_experts_per_tok": 1, "n_shared_experts": 1},
        },
        unrotated(CHUNKED, rotated=True),
        biased=_ATTENTION,
        dense="intermediate_size_mlp",
    ),
    "mistral": Family({"sliding_window": 4096}, windowed, biased=_NONE),
    "mixtral": Family(kinds=windowed, biased=_NONE),
    "nemotron": Family(gated=False, vectors=2),
    "olmo": Family(biased=_ATTENTION, vectors=0),
    "olmo2": Family(biased=_ATTENTION, qk_norm="row"),
    "olmo3": Family({"sliding_window": 4096}, all_but_every(4), biased=_ATTENTION, qk_norm="row"),
    "phi": Family(gated=False, biased=_ALL, norms=1, vectors=2, head_bias=True),
    "phi3": Family(kinds=windowed, biased=_NONE),
    "qwen2": Family(_WINDOW, late, biased=(True, False, False)),
    "qwen2_moe": Family({**_WINDOW, "qkv_bias": True}, early, biased=("qkv_bias", False, False), shared_gate=True),
    "qwen3": Family({**_WINDOW, "head_dim": 128}, late, biased=_ATTENTION, qk_norm="head"),
    "qwen3_moe": Family(_WINDOW, windowed, biased=_ATTENTION, qk_norm="head"),
    "seed_oss": Family(
        {"attention_bias": True, "head_dim": 128}, biased=("attention_bias", "attention_out_bias", "mlp_bias")
    ),
    "smollm3": Family({**_TIED, "use_sliding_window": False}, unrotated(SLIDING, rotated=False)),
    "stablelm": Family(biased=("use_qkv_bias", False, False), vectors=2, qk_norm="row", qk_norm_if="qk_layernorm"),
    "starcoder2": Family(
        {**_TIED, "use_bias": True}, windowed, gated=False, biased=("use_bias", "use_bias", "use_bias"), vectors=2
    ),
    # Known to have two matrices in an MLP, and else only roughly.
    **{name: Family(gated=False, biased=_ALL, vectors=2, exact=False) for name in ("bloom", "gptj", "gpt_neo", "opt")},
    **{name: Family(gated=False, vectors=2, exact=False) for name in ("falcon", "gpt_bigcode")},
}
"""By `model_type`."""

LLAMA_LIKE = Family(exact=False)
"""What any other family is taken for."""


def family(model_type: str) -> Family:
    """The family of this `model_type`."""
    return FAMILIES.get(model_type, LLAMA_LIKE)
