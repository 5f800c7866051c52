"""Megatron-core over a ring: attention for its layer specs, in Megatron's own layout and groups.

    from seqpar_ring.integrations.megatron import with_ring
    spec = with_ring(get_gpt_layer_with_transformer_engine_spec())   # or RingCoreAttention as core_attention in a spec

Nothing else of a Megatron job changes: it cuts batches, slices rotary embeddings, averages gradients and saves as ever.
`RingCoreAttention` attends over the context-parallel group that Megatron gives it, or the one that a micro-batch
brings. It is no layer and owns no weights (but the logits of learnable sinks), and it takes tokens where the batch says
they are: in Megatron's layout, or in one of ours (`megatron_batch`). What Megatron may ask and this does not compute is
refused by `megatron_rules`, when a layer is built or, where only a call shows it, then.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seqpar_ring import remat
from seqpar_ring.attention import ring_attention
from seqpar_ring.compat import Ring
from seqpar_ring.compat.rings import ring_of
from seqpar_ring.config import Settings
from seqpar_ring.errors import GroupError, SeqparError, UnsupportedError, VersionError
from seqpar_ring.geometry import Mask
from seqpar_ring.groups import own_device
from seqpar_ring.plan import Plan
from seqpar_ring.transport import LockstepWorld

from . import megatron_rules as rules
from .megatron_layout import Packed, batch_on_this_rank, packed, whole
from .megatron_recompute import around_attention, keep_attention
from .megatron_specs import exchanged

try:
    import megatron.core
    from megatron.core import tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    from .megatron_batch import LayoutParams, laid_out, shard_batch, unprepared
    from .megatron_bias import watch
    from .megatron_rotary import with_layouts
except ImportError as error:
    raise VersionError(
        "megatron-core is missing, or older than this integration knows",
        fix='Install it: pip install "seqpar-ring[megatron]".',
        error=str(error),
    ) from error

VERSION: str = megatron.core.__version__

__all__ = ["RingCoreAttention", "batch_on_this_rank", "shard_batch", "with_layouts", "with_ring"]

MEAN_OF_MEANS = (
    "Megatron averages the loss of each context-parallel rank over that rank's own tokens, and then the ranks, which "
    "is not the mean over all tokens as soon as some are masked. Set calculate_per_token_loss=True for the exact one."
)
"""Said once where it is so."""


def with_ring(spec: Any, **settings: Any) -> Any:
    """A copy of a Megatron spec in which attention runs over a ring.

    Args:
        spec: of a layer or a block, local or Transformer Engine's; every plain `core_attention` in it is replaced.
        **settings: of the ring, as in `seqpar_ring.Settings`: schedule, node, block_tokens, cut, backward, kv_dtype,
            dkv_dtype, kernel, remat.

    Raises:
        ConfigError: no attention in the spec, or a wrong setting.
        UnsupportedError: attention that is not plain.
        VersionError: a megatron-core that is too old.
    """
    rules.check_version(VERSION)
    rules.settings_of(1, None, settings, None)  # a wrong name is known now, before a model is built
    attention = ModuleSpec(module=RingCoreAttention, params={"settings": settings}) if settings else RingCoreAttention
    return exchanged(spec, attention, RingCoreAttention)


class RingCoreAttention(nn.Module):
    """`core_attention` of a Megatron layer: exact attention over the context-parallel group.

    Built and called by Megatron with its own keywords; as a class, in a `ModuleSpec` or a `functools.partial`.

    Args:
        config: the TransformerConfig: dropout, window, sinks, soft cap, groups and recompute are read from it.
        layer_number: from 1.
        attn_mask_type: causal ones, or full ones.
        attention_type: "self".
        attention_dropout: overrides the config's; must be 0.
        softmax_scale: factor of the logits; None: 1 / sqrt(head width).
        k_channels, v_channels: head widths of keys and values (MLA); the tensors themselves say the same.
        cp_comm_type: "seqpar_ring", "seqpar_ring:double", ":all_gather", ":direct"; Megatron's "p2p" means the ring.
        pg_collection: its `cp` are the ranks that share a sequence, its `hcp` those of a node and between nodes.
        settings: of the ring; see `with_ring`.

    Raises:
        UnsupportedError, ConfigError: what `megatron_rules` refuses.
        VersionError: a megatron-core that is too old, or recomputes in an unknown way.
        GroupError: hierarchical groups that are not nodes of consecutive ranks; a group whose size is not the config's.
    """

    def __init__(  # noqa: PLR0913 - Megatron's keywords
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        rules.check_version(VERSION)
        watch(RingCoreAttention)
        rules.check(config, attention_type, attn_mask_type.name, attention_dropout)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "hcp"])
        shared = _shares(config, groups)
        self.config, self.layer_number, self.attn_mask_type = config, max(1, layer_number), attn_mask_type
        self.takes_layouts = False  # `with_layouts` says so of a model in which nothing else needs Megatron's
        self._group: dist.ProcessGroup | None = groups.cp if shared else None
        self._tp_group = groups.tp
        node = _node(getattr(groups, "hcp", None), groups.cp) if shared else None
        self._comm_type, self._given, self._node = cp_comm_type, settings, node
        self.settings = self._settings(dist.get_world_size(groups.cp) if shared else 1)
        self._alone = Ring(LockstepWorld(1).transport(0))
        self._scale, self._window = softmax_scale, rules.window_of(config, self.layer_number)
        self._softcap: float | None = getattr(config, "attn_logit_softcapping", None) or None
        self._add_sinks(getattr(config, "softmax_type", "vanilla"))
        if getattr(config, "recompute_granularity", None) and self.settings.remat != "none":
            keep_attention(tensor_parallel, VERSION)
        if shared and not config.calculate_per_token_loss and self.layer_number == 1 and dist.get_rank() == 0:
            warnings.warn(MEAN_OF_MEANS, stacklevel=2)

    def forward(  # noqa: PLR0913 - Megatron's call
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **others: Any,
    ) -> Tensor:
        """Attention of this rank's queries over the keys of all context-parallel ranks. Collective over these.

        Args:
            query: (S_local, B, H, D), or (T_local, H, D) of packed sequences: H heads of this tensor-parallel rank.
            key: the same with G heads; G divides H.
            value: the same, E wide.
            attention_mask: None, or True where a query does not see a key, as the mask type says anyhow.
            attn_mask_type: overrides the one the layer was built with.
            attention_bias: None.
            packed_seq_params: lengths of packed sequences (`qkv_format` "thd"), and the group of this micro-batch; or
                what `shard_batch` returned.
            **others: what newer versions hand over to other kinds of attention; None.

        Returns:
            (S_local, B, H * E), or (T_local, H * E) of the format "thd"; with zeros for padding.

        Raises:
            UnsupportedError: a bias, a mask of its own, keys from a cache, or what no kernel can do exactly.
            PlanError: lengths or shapes that do not fit Megatron's layout.
            DisagreementError, TransportError: as `seqpar_ring.ring_attention`.
        """
        kind = (self.attn_mask_type if attn_mask_type is None else attn_mask_type).name
        thd = getattr(packed_seq_params, "qkv_format", None) == "thd"
        by_lengths = thd or isinstance(packed_seq_params, LayoutParams)
        ring = self._ring(packed_seq_params)
        try:
            rules.expect_nothing_else(attention_bias, others, VERSION)
            if not by_lengths:
                rules.expect_one_document(packed_seq_params)
            qkv = [x.unsqueeze(0) if x.dim() == 3 else x.transpose(0, 1) for x in (query, key, value)]
            held = self._held(ring, packed_seq_params if by_lengths else None, qkv[0], qkv[1])
            plan = held.documents.plan(self._mask(kind, by_lengths, max(held.documents.lengths)))
            rules.expect_plain(attention_mask, kind, None if by_lengths else plan)
        except SeqparError as problem:
            # The other ranks are told here what they meet in ring_attention, where all agree before anything travels.
            ring.transport.agree("ring_attention", {}, problem)
            raise
        out = self._attend(qkv, plan, held.rows)
        return out.squeeze(0).flatten(1) if thd else out.transpose(0, 1).flatten(2)

    def _attend(self, qkv: list[Tensor], plan: Plan, rows: Tensor | None) -> Tensor:
        """out_BSHE of all of this rank's rows: those of padding are left out of the ring, and zero."""
        tokens = qkv[0].shape[1]
        q, k, v = qkv if rows is None else (x.index_select(1, rows) for x in qkv)
        kept = remat.choose(self.settings.remat, plan.keys_per_query).value == "attention"
        with around_attention() if kept else nullcontext():
            out = ring_attention(q, k, v, plan, scale=self._scale, softcap=self._softcap, sinks=self.softmax_offset)
        assert isinstance(out, Tensor)
        return out if rows is None else out.new_zeros(len(out), tokens, *out.shape[2:]).index_copy(1, rows, out)

    def _ring(self, params: Any) -> Ring:
        """The ranks that share this micro-batch: the layer's, or those that the micro-batch names."""
        group, size = getattr(params, "cp_group", None), getattr(params, "local_cp_size", None)
        if group is None and size is not None and size > 1:
            raise GroupError(
                "a micro-batch names the size of its context-parallel group, and not the group",
                fix="Give PackedSeqParams its cp_group.",
                local_cp_size=size,
            )
        group = self._group if group is None and size is None else group
        return self._alone if group is None else ring_of(group)

    def _held(self, ring: Ring, params: Any, q_BSHD: Tensor, k_BSGD: Tensor) -> Packed:
        """The documents of this micro-batch, and which rows of this rank are theirs."""
        tokens = q_BSHD.shape[1]
        if k_BSGD.shape[1] != tokens:
            raise UnsupportedError(
                "keys from a cache (inference) are not supported",
                fix="Generate with the model's own attention: weights are the same.",
                queries=tokens,
                keys=k_BSGD.shape[1],
            )
        world = ring.transport.world
        settings = self.settings if world == self.settings.size else self._settings(world)
        if isinstance(params, LayoutParams):
            if not self.takes_layouts:
                raise unprepared(params)
            return laid_out(ring, settings, params, q_BSHD)
        if params is None:
            return whole(ring, settings, tokens)
        held = packed(ring, settings, params, tokens, q_BSHD.device)
        if held.rows is not None:
            rules.check_padding(self.config)
        return held

    def _settings(self, size: int) -> Settings:
        """Those of the layer for a group of this size."""
        return rules.settings_of(size, self._comm_type, self._given, self._node)

    def _mask(self, kind: str, packed: bool, longest: int) -> Mask:
        if kind not in rules.CAUSAL and (kind != "no_mask" and not (packed and kind in rules.FULL)):
            raise UnsupportedError(
                "a padding mask is not supported: it says which keys are padding by a tensor of its own",
                fix='Pack the sequences (qkv_format "thd" with cu_seqlens), or use a causal mask and pad at the end.',
                attn_mask_type=kind,
            )
        before, after = self._window or (-1, -1)
        if kind in rules.CAUSAL:
            return Mask.make(True, None if before < 0 else before + 1)
        if before < 0 and after < 0:
            return Mask.make(False)
        return Mask.make(False, (longest if before < 0 else before, longest if after < 0 else after))

    def _add_sinks(self, kind: str) -> None:
        """One more logit for each head: zero ("off-by-one"), or learned, under the name that Megatron saves it by."""
        self.softmax_offset: Tensor | None
        if kind == "vanilla":
            self.softmax_offset = None
            return
        config, parts = self.config, dist.get_world_size(self._tp_group) if self._tp_group is not None else 1
        device = own_device(torch.cuda.is_available() and not config.use_cpu_initialization)
        zeros = torch.zeros(config.num_attention_heads // parts, device=device, dtype=config.params_dtype)
        if kind == "off-by-one":
            self.register_buffer("softmax_offset", zeros, persistent=False)
            return
        self.softmax_offset = nn.Parameter(zeros)
        # Counted once a head in gradient norms; Megatron's own attention leaves out those of all ranks but the first.
        tensor_parallel.set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)
        if config.perform_initialization:
            config.init_method(self.softmax_offset)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        """For Megatron's distributed checkpoints: learnable sinks, as its own attention saves them."""
        state = {} if self.config.softmax_type != "learnable" else self.state_dict(prefix="", keep_vars=True)
        groups = {"tp_group": self._tp_group, "dp_cp_group": (metadata or {}).get("dp_cp_group")}
        known = inspect.signature(make_sharded_tensors_for_checkpoint).parameters
        options = {name: group for name, group in groups.items() if name in known}
        return make_sharded_tensors_for_checkpoint(state, prefix, {"softmax_offset": 0}, sharded_offsets, **options)


def _shares(config: Any, groups: Any) -> bool:
    """Whether ranks share the sequence: the config says so, and that the group is there is no accident."""
    size = config.context_parallel_size
    ranks = dist.get_world_size(groups.cp) if getattr(groups, "cp", None) is not None else 1
    if size != ranks:  # of one, attention would see this rank's tokens only, without a word
        raise GroupError(
            "the config has another context_parallel_size than the context-parallel group",
            fix=f"Set context_parallel_size={ranks} in the TransformerConfig; a layer that sees whole sequences keeps "
            "its own core_attention.",
            context_parallel_size=size,
            ranks=ranks,
        )
    return ranks > 1


def _node(levels: Any, cp_group: dist.ProcessGroup) -> int | None:
    """How many ranks share a node, by hierarchical groups: those of the innermost, which are neighbours."""
    if not levels or len(levels) < 2:
        return None
    inner, ranks = dist.get_process_group_ranks(levels[0]), dist.get_process_group_ranks(cp_group)
    first = ranks.index(inner[0])
    if len(levels) > 2 or first % len(inner) or ranks[first : first + len(inner)] != list(inner):
        raise GroupError(
            "hierarchical context-parallel groups are not nodes of consecutive ranks",
            fix="Give hierarchical_context_parallel_sizes=[ranks of a node, nodes], or none.",
            innermost=list(inner),
            context_parallel=list(ranks),
            levels=len(levels),
        )
    return len(inner) if 1 < len(inner) < len(ranks) else None
