"""HuggingFace models over a sequence group: `parallelize(model, sp)`, then call the model as before.

Through transformers' public registries a model gets our attention and mask function, through two hooks its batches are
sharded and its calls checked, and its loss becomes the token mean over all ranks. No method is replaced and nothing
private imported; the plan travels with the batch, in the keyword arguments that models hand down to attention. What
cannot be computed exactly is refused by name: the rules stand in `transformers_rules`. No training loop, no Trainer,
and no generation: a sharded model has no KV cache.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from seqpar_ring.attention import ring_attention
from seqpar_ring.batch import PLAN_KEY
from seqpar_ring.errors import SeqparError, UnsupportedError, VersionError
from seqpar_ring.parallel import SequenceParallel
from seqpar_ring.plan import Plan
from seqpar_ring.remat import Kept, choose
from seqpar_ring.tiling import set_tiles, tiles

try:
    from transformers import AttentionInterface, AttentionMaskInterface
except ImportError as error:
    raise VersionError(
        "transformers is missing, or too old to register attention functions",
        fix='Install it: pip install "seqpar-ring[transformers]".',
        error=str(error),
    ) from error

from . import transformers_calls as allowed
from . import transformers_edges as edges
from . import transformers_head as head
from . import transformers_masks as masks
from . import transformers_peft as peft
from . import transformers_positions as positions
from . import transformers_replicas as replicas
from . import transformers_rules as rules
from . import transformers_tokens as tokens
from .transformers_calls import CALLS_KEY, Calls

NAME = rules.RING

ADAPTER = "_seqpar_adapter"
"""Attribute of a parallelized model: what it holds of us."""

LOG = logging.getLogger(__name__)
"""Says at INFO, once for each model, what was chosen and why."""

Model = TypeVar("Model", bound=nn.Module)
Function = TypeVar("Function", bound=Callable[..., Any])


def parallelize(model: Model, sp: SequenceParallel) -> Model:
    """Make a transformers model compute over the sequence group. Collective over the world; changes the model in place.

    Afterwards `model(**batch)` takes a whole batch (the same on every rank of the sequence group: input_ids (B, S),
    optionally labels (B, S) not shifted, a right-padding attention_mask (B, S), position_ids that restart for packed
    documents), or one that `sp.shard_batch` made. `outputs.loss` is the mean over the targets of the whole world, and
    averaging gradients over all ranks (DDP, ZeRO) gives the gradient of one device; `outputs.logits` are this rank's
    tokens. Call it on the bare model, before DDP or DeepSpeed wrap it.

    Args:
        model: a decoder of transformers, with or without its language-model head.
        sp: the sequence group.

    Returns:
        The same model.

    Raises:
        UnsupportedError: a model that cannot be computed exactly (docs/huggingface.md lists them); on every rank.
        ConfigError: a model that is parallelized already; on every rank.
        DisagreementError: the ranks hold different models.
    """
    problem: SeqparError | None = None
    hf: Any = peft.bare(model)
    try:
        rules.check_model(hf, already=ADAPTER in vars(hf))
        edges.describe(sp, hf)
    except SeqparError as found:
        problem = found
    sp.groups.everyone.agree("parallelize", edges.record(hf), problem)
    register()
    before = hf.config._attn_implementation
    try:
        hf.set_attn_implementation(NAME)
    except (ValueError, KeyError) as found:
        raise UnsupportedError(
            "the model does not take another attention implementation",
            fix="Use a family whose attention goes through transformers' AttentionInterface.",
            model=type(hf).__name__,
            error=str(found),
        ) from found
    try:
        sp.groups.everyone.agree("the model's own code", {}, tokens.check(hf))
    except SeqparError:
        hf.set_attn_implementation(before)
        raise
    adapter = _Adapter(sp, hf)
    vars(hf)[ADAPTER], hf.loss_function = adapter, adapter.loss
    hf.register_forward_pre_hook(adapter.before, with_kwargs=True)
    hf.register_forward_hook(adapter.after, with_kwargs=True)
    head.base_of(hf).register_forward_hook(adapter.see, with_kwargs=True)
    positions.follow(hf, CALLS_KEY)
    return model


def group_of(model: Any) -> SequenceParallel | None:
    """The sequence group that a model, or one inside it, was parallelized with; None if it was not."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return next((vars(one)[ADAPTER].sp for one in modules if ADAPTER in vars(one)), None)


def register() -> None:
    """Register the ring as attn_implementation "seqpar_ring" of transformers. Idempotent; `parallelize` does it too."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)


def _not_compiled(function: Function) -> Function:
    """Runs as it is where `torch.compile` compiles the model around it: plans and lengths differ between batches."""
    plain: Function = torch.compiler.disable(function)
    return plain


class _Adapter:
    """What one parallelized model holds: the sequence group, the two hooks and the loss."""

    def __init__(self, sp: SequenceParallel, model: nn.Module) -> None:
        self.sp = sp
        self._checked: set[object] = set()
        self._dropouts: dict[str, Any] = {}
        self._tiled = self._forwards = 0
        self._mlps = [] if sp.settings.mlp == "whole" else head.tile_mlps(model)

    @_not_compiled
    def before(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        """Forward pre-hook: check the call, shard the batch, let the plan and an empty tally go with it."""
        batch = edges.named(model, args, kwargs)
        allowed.refuse_decoding(batch)
        problem: SeqparError | None = None
        try:
            allowed.check_call(model, batch, self.sp)
            allowed.expect_labels(model, batch)
            rules.check_ignored(batch)
            rules.check_ids(model, batch)
            peft.check(model)
            self._dropouts = self._dropouts if self._checked else rules.dropouts_of(model)
            rules.draws_nothing_at_random(self._dropouts)
        except SeqparError as found:
            problem = found
        # Data ranks must know of labels, too: the loss is a sum over all of them.
        trains = "in training " if model.training and torch.is_grad_enabled() else ""
        what = f"the call of the model {trains}{'without' if batch.get('labels') is None else 'with'} labels"
        self.sp.groups.agree(what, {"keys of the batch": sorted(batch)}, problem)
        if trains:
            self._forwards += 1
            replicas.check(model, self.sp.groups.everyone, self._forwards)
        if PLAN_KEY not in batch:
            batch = self.sp.shard_batch(batch)
        allowed.check_shares(batch[PLAN_KEY], self.sp)
        # Whether a layer is checkpointed is not asked: a result that its graph holds anyway costs nothing to keep.
        kept = Kept(self.sp.settings.offload) if torch.is_grad_enabled() else None
        calls = Calls(kept=kept, chance=tokens.chance_of(model))
        batch = {**self._cut(model, batch, calls), "use_cache": False}
        batch["position_ids"] = positions.carrying(batch["position_ids"], batch[PLAN_KEY], calls)
        return (), {**batch, CALLS_KEY: calls}

    def _cut(self, model: nn.Module, batch: dict[str, Any], calls: Calls) -> dict[str, Any]:
        """Settle in how many tiles MLPs and head compute: as many on every rank, as tiles may gather parameters."""
        settings, tokens = self.sp.settings, max(batch[PLAN_KEY].documents.sizes) * batch["position_ids"].shape[0]
        if not self._mlps and (batch.get("labels") is None or settings.logits == "whole"):
            return batch
        most = self.sp.most(tokens)
        for module in self._mlps:
            calls.mlp_tiles = tiles(most, 0, settings.mlp).number
            set_tiles(module, calls.mlp_tiles)
        if batch.get("labels") is not None:
            calls.tiles, calls.why_tiles = head.choose(model, most, settings.logits)
        if calls.tiles == 1:
            return batch
        calls.head = head.Cut(model)
        # By its place: counted from the end, Gemma 4 would leave out the other tokens before layers that share keys.
        last = batch[PLAN_KEY].local_tokens - 1
        return {**batch, "logits_to_keep": batch["position_ids"].new_full((1,), last)}

    @_not_compiled
    def see(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook of the base model: where the head runs in tiles, what it is given."""
        calls = kwargs.get(CALLS_KEY)
        if calls is not None and calls.head is not None:
            calls.head.hidden_BSC = output[0]

    @_not_compiled
    def after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook: at the first forward, and the first with labels, see that attention and loss were ours."""
        labelled, calls = kwargs.get("labels") is not None, kwargs[CALLS_KEY]
        made, calls.made = calls.made, None  # whose graph holds the calls
        if calls.kept is not None:
            calls.kept.close()
        if calls.tiles > 1:
            output = edges.without_logits(output)
        if labelled in self._checked:
            allowed.check_what_went_through_us(model, calls, labelled)
            rules.check_outcome(model, calls.chance, made, output)
            return output
        if not self._checked and self.sp.groups.global_rank == 0:
            LOG.info("%s", edges.explanation(kwargs[PLAN_KEY], calls, self.sp.decided))
        problem: SeqparError | None = None
        try:
            allowed.check_calls(model, calls, labelled)
            rules.check_outcome(model, calls.chance, made, output)
        except SeqparError as found:
            problem = found
        self.sp.groups.agree("the first forward", calls.tally(), problem)
        self._checked.add(labelled)
        return output

    @_not_compiled
    def loss(self, logits: Tensor, labels: Tensor | None = None, *_: Any, **kwargs: Any) -> Tensor:
        """In place of transformers' ForCausalLMLoss: labels are shifted already, and the mean is over the world."""
        plan, calls, shifted = (kwargs.get(key) for key in (PLAN_KEY, CALLS_KEY, "shift_labels"))
        shifted = labels if shifted is None else shifted
        if plan is None or calls is None or shifted is None:
            raise UnsupportedError(
                "the model does not hand its keyword arguments to its loss, which needs the plan",
                fix=allowed.OWN_LOSS,
                keywords=sorted(kwargs),
            )
        calls.loss += 1
        items = kwargs.get("num_items_in_batch")
        num_items, shifted = None if items is None else int(items), shifted.to(logits.device)
        if calls.tiles == 1:
            calls.made = mean = self.sp.loss(logits, shifted, plan, num_items=num_items)
            return mean
        cut, calls.head = calls.head, None
        # What is done to logits may show only when they have grown.
        read = head.is_read(logits, self._tiled)
        problem = cut.difference(logits, read)
        if read:
            self.sp.groups.agree("the head in tiles", {}, problem)
        self._tiled += 1
        tiled: dict[str, Any] = {"tiles": calls.tiles, "num_items": num_items, "vocabulary": logits.shape[-1]}
        calls.made = mean = self.sp.tiled_loss(cut.hidden_BSC, cut.logits, shifted, **tiled)
        return mean


@_not_compiled
def _attend(  # noqa: PLR0913 - the signature that transformers calls
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: query (B, H, S, D), key (B, G, S, D), value (B, G, S, E) -> out (B, S, H, E), None."""
    plan, calls = kwargs.pop(PLAN_KEY, None), kwargs.pop(CALLS_KEY, None)
    if isinstance(plan, str) and plan == tokens.PROBE:
        return tokens.attend(query, key, value), None
    if not isinstance(plan, Plan) or not isinstance(calls, Calls):
        raise UnsupportedError(
            'attention was called as "seqpar_ring" without a plan',
            fix="Call the model that parallelize(model, sp) returned: not its inner model, not its forward method, "
            "and not through a wrapper or a family that drops keyword arguments on their way to attention.",
            module=type(module).__name__,
            keywords=sorted(kwargs),
        )
    window, softcap, sinks = (kwargs.pop(name, None) for name in ("sliding_window", "softcap", "s_aux"))
    try:
        allowed.check_attention(module, attention_mask, dropout, kwargs)
    except SeqparError as problem:
        plan.sequence.agree("attention", {}, problem)
    calls.attention += 1
    calls.windowed += window is not None
    head.tile_as_its_call(module, calls.mlp_tiles)
    factor = positions.query_factor(module, plan, query.device)
    query = query if factor is None else (query * factor).to(query.dtype)
    # transformers' window counts the query's own key, as ours does. One that nothing reaches past is none.
    longest, chunk = max(plan.lengths), positions.chunk_of(module)
    window, chunk = (None if size is None or size >= longest else size for size in (window, chunk))
    plan = plan.masked(causal=True, window=window, chunk=chunk)
    if torch.is_autocast_enabled(query.device.type):  # which torch's own attention honours: rotated queries are fp32
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    q_BSHD, k_BSGD, v_BSGE = (x.transpose(1, 2) for x in (query, key, value))
    with _kept_for_recompute(calls, module, plan):
        out_BSHE = ring_attention(q_BSHD, k_BSGD, v_BSGE, plan, scale=scaling, softcap=softcap, sinks=sinks)
    assert isinstance(out_BSHE, Tensor)  # with return_lse it would be a pair
    return out_BSHE, None


def _kept_for_recompute(calls: Calls, module: nn.Module, plan: Plan) -> AbstractContextManager[object]:
    """Around a layer's attention: kept if the settings say so, or by its own plan, which has the layer's window."""
    if calls.kept is None:
        return nullcontext()
    wanted = choose(plan.documents.settings.remat, plan.keys_per_query).value == "attention"
    return calls.kept.around(module) if wanted else nullcontext()


@_not_compiled
def _mask(
    *_: Any, attention_mask: Tensor | None = None, mask_function: Any = None, use_vmap: bool = False, **__: Any
) -> None:
    """The mask function: no mask tensor, since the plan says who sees whom; what would need one is refused.

    Without a mask function transformers drops a padding mask silently; with its own it takes the positions of a shard
    for packed documents.
    """
    masks.check_mask(mask_function, attention_mask, use_vmap)
