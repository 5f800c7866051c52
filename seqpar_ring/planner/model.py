"""Model: what the planner must know of a transformer, read from its `config.json` or from a preset of that form.

Names are those of HuggingFace configurations, so that any model's own file will do. Parameters are counted matrix by
matrix; windows are told layer by layer. It knows shapes only: no time, no bytes of activations, no torch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from seqpar_ring.errors import ConfigError, did_you_mean
from seqpar_ring.planner.data import named, names
from seqpar_ring.schedule import Row

ALIASES = {
    "hidden_size": ("n_embd", "d_model", "dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
}
"""Older names of the same things."""

PLAIN_MLP = ("gpt2", "gpt_neox", "gptj", "opt", "bloom", "starcoder2", "phi", "falcon", "nemotron", "gpt_bigcode")
"""Families whose MLP has two matrices; all others gate, with three."""

NORMS = {"gemma2": 4, "gemma3": 4, "gemma3_text": 4, "glm4": 4, "olmo2": 2, "cohere": 1, "cohere2": 1}
"""Norms of width `hidden` in a layer, where they are not two."""

QK_NORM = ("qwen3", "qwen3_moe", "gemma3", "gemma3_text", "smollm3_qk")
"""Families with a norm of width `head_dim` for queries and one for keys."""

BIASED = {"qwen2": "qkv", "qwen2_moe": "qkv", "gpt_oss": "all", "gpt2": "all"}
"""Families whose attention projections have biases although their configuration does not say so."""


class Span(NamedTuple):
    """Layers that see the same: how many, and how far back; None: everything before them."""

    layers: int
    window: int | None = None
    chunk: int | None = None


class Experts(NamedTuple):
    """The mixture of experts of a layer.

    Attributes:
        layers: layers that have one; the others have a dense MLP.
        number: experts of a layer.
        active: experts that each token goes through.
        width: intermediate size of one.
        shared: intermediate size of what every token goes through beside them.
    """

    layers: int
    number: int
    active: int
    width: int
    shared: int = 0


class Latent(NamedTuple):
    """Compressed queries and keys (multi-head latent attention, arXiv 2405.04434): the ranks, and the rotary width."""

    q_rank: int | None
    kv_rank: int
    rotary: int


class Model(NamedTuple):
    """A decoder.

    Attributes:
        name: what it is called, for messages.
        family: `model_type` of its configuration.
        layers, hidden, intermediate: their numbers; `intermediate` of the dense MLPs.
        heads, kv_heads, head_dim, value_dim: of attention, as attention sees them.
        vocabulary: words.
        tied: whether the head is the embedding.
        gated: whether an MLP has three matrices.
        spans: which layers see how far.
        biased: which projections have biases: "", "qkv" or "all".
        experts: the mixture of experts, if any.
        latent: the compression of queries and keys, if any.
        positions: the most positions it was made for, if it says so.
    """

    name: str
    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    vocabulary: int
    tied: bool = False
    gated: bool = True
    spans: tuple[Span, ...] = ()
    biased: str = ""
    experts: Experts | None = None
    latent: Latent | None = None
    positions: int | None = None

    def row(self, itemsize: int) -> Row:
        """The heads as attention gets them."""
        return Row(self.heads, self.kv_heads, self.head_dim, self.value_dim, itemsize)

    @property
    def attention_parameters(self) -> int:
        """Parameters of one layer's projections."""
        q, out = self.heads * self.head_dim, self.heads * self.value_dim
        if self.latent is not None:
            rank, kv_rank, rotary = self.latent
            queries = self.hidden * q if rank is None else rank * (self.hidden + q + 1)
            unrotated = self.heads * (self.head_dim - rotary + self.value_dim)
            return queries + self.hidden * (kv_rank + rotary) + kv_rank * (1 + unrotated) + out * self.hidden
        kv = self.kv_heads * (self.head_dim + self.value_dim)
        biases = {"": 0, "qkv": q + kv, "all": q + kv + self.hidden}[self.biased]
        norms = 2 * self.head_dim if self.family in QK_NORM else 0
        sinks = self.heads if self.family == "gpt_oss" else 0
        return self.hidden * (q + kv + out) + biases + norms + sinks

    def mlp_parameters(self, width: int) -> int:
        """Parameters of an MLP of this intermediate size."""
        matrices = 3 if self.gated else 2
        biases = {"all": (matrices - 1) * width + self.hidden}.get(self.biased, 0)
        return matrices * self.hidden * width + biases

    @property
    def dense_layers(self) -> int:
        """Layers with a dense MLP."""
        return self.layers - (self.experts.layers if self.experts else 0)

    @property
    def layer_parameters(self) -> float:
        """Parameters of a layer, on average."""
        return (self.parameters - self.embeddings - self.hidden) / self.layers

    @property
    def embeddings(self) -> int:
        """Parameters of the embedding and, where it is not the same, of the head."""
        positions = (self.positions or 0) * self.hidden if self.family in ("gpt2", "gpt_bigcode") else 0
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + positions

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self._parameters(active=False)

    @property
    def active_parameters(self) -> int:
        """Parameters that a token goes through: those of its experts only. The embedding is looked up, not counted."""
        looked_up = 0 if self.tied else self.vocabulary * self.hidden
        return self._parameters(active=True) - looked_up

    def _parameters(self, active: bool) -> int:
        norm = self.hidden * (2 if self.family in ("gpt2", "gpt_bigcode", "starcoder2", "nemotron") else 1)
        layer = self.attention_parameters + NORMS.get(self.family, 2) * norm
        total = self.embeddings + norm + self.layers * layer + self.dense_layers * self.mlp_parameters(self.intermediate)
        if self.experts is not None:
            met = self.experts.active if active else self.experts.number
            router = self.hidden * self.experts.number
            router += self.experts.number if self.biased == "all" or self.latent is not None else 0
            shared = self.mlp_parameters(self.experts.shared) if self.experts.shared else 0
            each = router + shared + met * self.mlp_parameters(self.experts.width)
            total += self.experts.layers * each
        return total


def load_model(name: str) -> Model:
    """A model from a preset's name, a configuration file, or a folder that holds one.

    Raises:
        ConfigError: no such preset and no such file, or a configuration that lacks what is needed.
    """
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix in (".json", ".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise ConfigError("there is no such model configuration", fix="Give a config.json.", path=str(path))
        try:
            config = yaml.safe_load(path.read_text()) if path.suffix != ".json" else json.loads(path.read_text())
        except (ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} cannot be read", fix="Give a HuggingFace config.json.", says=str(error)) from None
        return of_config(config, path.parent.name if path.name == "config.json" else path.stem)
    if name.lower() not in names("models"):
        raise ConfigError(
            "there is no preset of this name, nor such a file",
            fix=did_you_mean(name.lower(), names("models")) + " Or give the path of a config.json.",
            model=name,
        )
    return of_config(named("models", name.lower()), name.lower())


def of_config(config: Mapping[str, Any], name: str) -> Model:
    """A model from the fields of a HuggingFace configuration.

    Raises:
        ConfigError: a field is missing, or is no positive number.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"the configuration of {name} is no mapping", fix="Give a HuggingFace config.json.")
    config = {**config, **config.get("text_config", {})}
    read = _Reader(config, name)
    family, heads, hidden = str(config.get("model_type", "llama")), read("num_attention_heads"), read("hidden_size")
    layers = read("num_hidden_layers")
    head_dim = read("head_dim", hidden // heads)
    value_dim, kv_heads, latent = head_dim, read("num_key_value_heads", heads), None
    if config.get("kv_lora_rank"):
        rotary = read("qk_rope_head_dim")
        latent = Latent(config.get("q_lora_rank"), read("kv_lora_rank"), rotary)
        head_dim, value_dim, kv_heads = rotary + read("qk_nope_head_dim"), read("v_head_dim"), heads
    biased = "qkv" if config.get("attention_bias") and family not in BIASED else BIASED.get(family, "")
    if config.get("mlp_bias"):
        biased = "all"
    return Model(
        name,
        family,
        layers,
        hidden,
        read("intermediate_size", 4 * hidden if family in PLAIN_MLP else None),
        heads,
        kv_heads,
        head_dim,
        value_dim,
        read("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", family in ("gpt2", "gemma", "gemma2", "gemma3", "gemma3_text"))),
        gated=family not in PLAIN_MLP,
        spans=_spans(config, layers, family),
        biased=biased,
        experts=_experts(config, read, layers),
        latent=latent,
        positions=config.get("max_position_embeddings") or config.get("n_positions"),
    )


class _Reader:
    """Reads positive whole numbers under their name or an older one."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self._config, self._name = config, name

    def __call__(self, key: str, otherwise: int | None = None) -> int:
        found = [self._config[k] for k in (key, *ALIASES.get(key, ())) if self._config.get(k) is not None]
        value = found[0] if found else otherwise
        if value is None:
            raise ConfigError(
                f"the configuration of {self._name} lacks a field",
                fix=f"Give {key}: the planner needs it.",
                missing=key,
                has=sorted(self._config)[:12],
            )
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(
                f"the configuration of {self._name} has a wrong {key}",
                fix="Give a positive whole number.",
                **{key: value},
            )
        return value


def _spans(config: Mapping[str, Any], layers: int, family: str) -> tuple[Span, ...]:
    """How far each layer sees, layers that see the same together."""
    window, chunk = config.get("sliding_window"), config.get("attention_chunk_size")
    kinds = config.get("layer_types")
    if kinds is None and window and family in ("gemma2", "gemma3", "gemma3_text", "gpt_oss"):
        every = config.get("sliding_window_pattern", 2 if family != "gemma3" else 6)
        kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    if kinds is None and window and config.get("use_sliding_window", family in ("mistral", "mixtral", "phi3")):
        first = config.get("max_window_layers", 0) if "use_sliding_window" in config else 0
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    if kinds is None:
        return (Span(layers),)
    seen = {"sliding_attention": (window, None), "chunked_attention": (None, chunk)}
    return tuple(Span(n, *sees) for sees, n in Counter(seen.get(kind, (None, None)) for kind in kinds).items())


def _experts(config: Mapping[str, Any], read: _Reader, layers: int) -> Experts | None:
    number = next((config[k] for k in ("n_routed_experts", "num_experts", "num_local_experts") if config.get(k)), None)
    if number is None:
        return None
    width = read("moe_intermediate_size", read("intermediate_size"))
    dense = set(config.get("mlp_only_layers") or range(config.get("first_k_dense_replace") or 0))
    every = config.get("decoder_sparse_step") or 1
    sparse = [i for i in range(layers) if i not in dense and (i + 1) % every == 0]
    shared = config.get("shared_expert_intermediate_size") or width * (config.get("n_shared_experts") or 0)
    return Experts(len(sparse), number, read("num_experts_per_tok"), width, shared)
