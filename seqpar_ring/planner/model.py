"""Model: what the planner must know of a transformer, read from its `config.json` or from a preset of that form.

Names are those of HuggingFace configurations, so that any model's own file will do. Parameters are counted matrix by
matrix; windows are told layer by layer. It knows shapes only: no time, no bytes of activations, no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from seqpar_ring.errors import ConfigError, UnsupportedError, did_you_mean
from seqpar_ring.planner.data import named, names, read
from seqpar_ring.planner.families import CHUNKED, FAMILIES, FULL, SLIDING, Biases, Family, family
from seqpar_ring.schedule import Row

ALIASES = {
    "hidden_size": ("n_embd", "d_model", "dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "max_position_embeddings": ("n_positions", "n_ctx"),
    "num_experts": ("n_routed_experts", "num_local_experts"),
    "moe_intermediate_size": ("intermediate_size",),
}
"""Other names of the same things."""

NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Fields without which nothing can be planned."""


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
    """A decoder: the shapes that say what it computes and holds.

    Attributes:
        name: what it is called, for messages.
        family: `model_type` of its configuration.
        layers: number of layers.
        hidden: width of hidden states.
        intermediate: width inside a dense MLP.
        heads: query heads, as attention sees them.
        kv_heads: key heads, as attention sees them.
        head_dim: width of queries and keys.
        value_dim: width of values.
        vocabulary: words.
        tied: whether the head is the embedding.
        gated: whether an MLP has three matrices.
        spans: which layers see how far.
        biases: which projections have some.
        qk_norm: norms of queries and keys: "head", "row" or none, as a family says.
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
    biases: Biases = Biases()
    qk_norm: str = ""
    experts: Experts | None = None
    latent: Latent | None = None
    positions: int | None = None

    @property
    def exact(self) -> bool:
        """Whether its parameters are counted exactly, and not as those of a model like Llama."""
        return self.family in FAMILIES and family(self.family).exact

    @staticmethod
    def of_attention(heads: int, kv_heads: int, head_dim: int, value_dim: int | None = None) -> Model:
        """One layer of attention, where nothing else of a model is known or asked."""
        value = head_dim if value_dim is None else value_dim
        width = heads * head_dim
        return Model("attention", "", 1, width, width, heads, kv_heads, head_dim, value, 1, spans=(Span(1),))

    def row(self, itemsize: int) -> Row:
        """The heads as attention gets them."""
        return Row(self.heads, self.kv_heads, self.head_dim, self.value_dim, itemsize)

    @property
    def attention_parameters(self) -> int:
        """Parameters of one layer's projections, with norms and sinks within attention."""
        q, out, has = self.heads * self.head_dim, self.heads * self.value_dim, self.biases
        closing = out * self.hidden + has.out * self.hidden
        if self.latent is not None:
            rank, kv_rank, rotary = self.latent
            queries = self.hidden * q if rank is None else rank * (self.hidden + q + 1 + has.qkv)
            unrotated = self.heads * (self.head_dim - rotary + self.value_dim)
            compressed = (self.hidden + has.qkv) * (kv_rank + rotary)
            return queries + compressed + kv_rank * (1 + unrotated) + closing
        kv = self.kv_heads * (self.head_dim + self.value_dim)
        norms = {"head": 2 * self.head_dim, "row": q + self.kv_heads * self.head_dim}.get(self.qk_norm, 0)
        sinks = self.heads if self.family == "gpt_oss" else 0
        return (self.hidden + has.qkv) * (q + kv) + norms + sinks + closing

    def mlp_parameters(self, width: int) -> int:
        """Parameters of an MLP of this intermediate size."""
        matrices = 3 if self.gated else 2
        return matrices * self.hidden * width + self.biases.mlp * ((matrices - 1) * width + self.hidden)

    @property
    def dense_layers(self) -> int:
        """Layers with a dense MLP."""
        return self.layers - (self.experts.layers if self.experts else 0)

    @property
    def layer_parameters(self) -> float:
        """Parameters of a layer, on average."""
        return (self.parameters - self.embeddings - self.norm_parameters) / self.layers

    @property
    def norm_parameters(self) -> int:
        """Parameters of one norm of the hidden width."""
        return self.hidden * family(self.family).vectors

    @property
    def embeddings(self) -> int:
        """Parameters of the embedding, of learned positions and, where it is not the same, of the head."""
        has = family(self.family)
        positions = (self.positions or 0) * self.hidden if has.learned else 0
        biases = self.vocabulary if has.head_bias else 0
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + positions + biases

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
        has, norm = family(self.family), self.norm_parameters
        layer = self.attention_parameters + has.norms * norm
        dense = self.dense_layers * self.mlp_parameters(self.intermediate)
        total = self.embeddings + norm + self.layers * layer + dense
        if self.experts is not None:
            met = self.experts.active if active else self.experts.number
            router = (self.hidden + has.router_bias) * self.experts.number + has.shared_gate * self.hidden
            shared = self.mlp_parameters(self.experts.shared) if self.experts.shared else 0
            total += self.experts.layers * (router + shared + met * self.mlp_parameters(self.experts.width))
        return total


def load_model(name: str) -> Model:
    """A model from a preset's name, a configuration file, or a folder that holds one. A file of this name goes first.

    Raises:
        ConfigError: no such preset and no such file, or a configuration that lacks what is needed.
        UnsupportedError: its layers do something that is not attention to all keys, a window or chunks.
    """
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix.lower() in (".json", ".yaml", ".yml") or path.is_file():
        return of_config(read(path, "model"), path.parent.name if path.stem == "config" else path.stem)
    if name.lower() not in names("models"):
        fix = did_you_mean(name, names("models")) + " Or give the path of a config.json."
        raise ConfigError("there is no model of this name", fix=fix, model=name)
    return of_config(named("models", name.lower()), name.lower())


def of_config(config: Mapping[str, Any], name: str) -> Model:
    """A model from the fields of a HuggingFace configuration; of one with several parts, from its `text_config`.

    Raises:
        ConfigError: a field is missing, or is no positive number.
        UnsupportedError: its layers do something that is not attention to all keys, a window or chunks.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"the configuration of {name} is no mapping", fix="Give a HuggingFace config.json.")
    given = {**config, **(config.get("text_config") or {})}
    model_type = str(given.get("model_type", "llama"))
    has = family(model_type)
    fields = _Fields({**has.defaults, **given}, name)
    fields.require(*NEEDED)
    heads, hidden, layers = fields("num_attention_heads"), fields("hidden_size"), fields("num_hidden_layers")
    head_dim = fields("head_dim", max(1, hidden // heads))
    value_dim, kv_heads, latent = head_dim, _kv_heads(fields, heads, model_type), None
    if fields.get("kv_lora_rank"):
        latent = Latent(fields.get("q_lora_rank"), fields("kv_lora_rank"), fields("qk_rope_head_dim"))
        head_dim, value_dim, kv_heads = latent.rotary + fields("qk_nope_head_dim"), fields("v_head_dim"), heads
    if heads % kv_heads:
        fix = "Query heads share key heads in groups of one size."
        raise ConfigError(f"the heads of {name} cannot be shared out", fix=fix, heads=heads, kv_heads=kv_heads)
    return Model(
        name,
        model_type,
        layers,
        hidden,
        fields(has.dense, None if has.gated else 4 * hidden),
        heads,
        kv_heads,
        head_dim,
        value_dim,
        fields("vocab_size"),
        tied=bool(fields.get("tie_word_embeddings")),
        gated=has.gated,
        spans=_spans(fields, layers, has),
        biases=has.biases(fields.config),
        qk_norm=has.qk_norm if not has.qk_norm_if or fields.get(has.qk_norm_if) else "",
        experts=_experts(fields, layers),
        latent=latent,
        positions=fields.get("max_position_embeddings"),
    )


def _kv_heads(fields: _Fields, heads: int, model_type: str) -> int:
    """Falcon and GPT-BigCode say with a switch that all query heads share one key head."""
    if fields.get("new_decoder_architecture"):
        return fields("num_kv_heads", heads)
    of_all = fields.config.get("multi_query", model_type == "gpt_bigcode")
    return fields("num_key_value_heads", 1 if of_all else heads)


class _Fields:
    """The fields of a configuration, under their names or others of the same meaning."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self.config, self.name = config, name

    def get(self, key: str) -> Any:
        """What stands there, or None."""
        found = (self.config.get(k) for k in (key, *ALIASES.get(key, ())))
        return next((value for value in found if value is not None), None)

    def __call__(self, key: str, otherwise: int | None = None) -> int:
        """A positive whole number."""
        value = self.get(key)
        value = otherwise if value is None else value
        if value is None:
            self.require(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            fix = "Give a positive whole number."
            raise ConfigError(f"the configuration of {self.name} has a wrong {key}", fix=fix, **{key: value})
        return value

    def require(self, *keys: str) -> None:
        """Name all fields that are missing."""
        missing = [key for key in keys if self.get(key) is None]
        if missing:
            fix = f"Give {', '.join(missing)}: the planner needs {'it' if len(missing) == 1 else 'them'}."
            what = f"the configuration of {self.name} lacks {', '.join(missing)}"
            raise ConfigError(what, fix=fix, has=sorted(self.config)[:12])


def _spans(fields: _Fields, layers: int, has: Family) -> tuple[Span, ...]:
    """How far each layer sees, layers that see the same together."""
    asked = fields.get("use_sliding_window") is not False
    window = fields("sliding_window") if asked and fields.get("sliding_window") else None
    chunk = fields("attention_chunk_size") if fields.get("attention_chunk_size") else None
    kinds = fields.get("layer_types") or has.kinds(fields.config, layers)
    if len(kinds) != layers:
        fix = "Give one kind for each layer."
        raise ConfigError(f"layer_types of {fields.name} are not one a layer", fix=fix, types=len(kinds), layers=layers)
    seen = {FULL: (None, None), SLIDING: (window, None), CHUNKED: (None, chunk)}
    if unknown := sorted({str(kind) for kind in kinds if kind not in seen}):
        fix = f"Plan for a model whose layers are {', '.join(seen)}."
        raise UnsupportedError(f"not all layers of {fields.name} are attention of a known kind", fix=fix, kinds=unknown)
    return tuple(Span(n, *sees) for sees, n in Counter(seen[kind] for kind in kinds).items())


def _experts(fields: _Fields, layers: int) -> Experts | None:
    """The mixture of experts, if there is one."""
    if not fields.get("num_experts"):
        return None
    width, every = fields("moe_intermediate_size"), fields.get("decoder_sparse_step") or 1
    dense = {*(fields.get("mlp_only_layers") or ()), *range(fields.get("first_k_dense_replace") or 0)}
    step = fields.get("interleave_moe_layer_step") or 1
    sparse = fields.get("moe_layers") or range(step - 1, layers, step)
    sparse = [i for i in sparse if i not in dense and (i + 1) % every == 0]
    shared = fields.get("shared_expert_intermediate_size") or width * (fields.get("n_shared_experts") or 0)
    return Experts(len(sparse), fields("num_experts"), fields("num_experts_per_tok"), width, shared)
