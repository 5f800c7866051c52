"""SequenceParallel: settings and groups as one ready object, the only thing of ours that an integration holds.

It makes plans, shards batches, computes the loss and reports what was sent. It owns no model and no optimizer, keeps no
current plan, and decides nothing about attention: that is the plan's and the executor's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import repeat, zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seqpar_ring import batch as edge
from seqpar_ring import groups as process_groups
from seqpar_ring import kernels
from seqpar_ring.config import Settings
from seqpar_ring.errors import BatchError, ConfigError, PlanError, SeqparError, did_you_mean
from seqpar_ring.geometry import Mask
from seqpar_ring.groups import Groups
from seqpar_ring.handles import OfThisProcess
from seqpar_ring.layout import LAYOUTS
from seqpar_ring.lengths import of_each
from seqpar_ring.loss import mean_of_sums, misfit, token_mean
from seqpar_ring.plan import Documents, Plan
from seqpar_ring.planner.model import Model
from seqpar_ring.planner.settle import Decision
from seqpar_ring.schedule import BUILDERS
from seqpar_ring.tiling import summed_cross_entropy
from seqpar_ring.transport.stats import Report

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

LOG = logging.getLogger(__name__)
"""Says at INFO, once, what was decided where the settings said "auto"."""

PLANS_KEPT = 64
"""Sets of document lengths that are remembered. Packed data brings new ones each step; evaluation repeats them."""


class SequenceParallel(OfThisProcess):
    """One sequence over `size` ranks; the rest of the world is data parallel.

    Making one is collective over the whole world, and needs torch.distributed to be initialised unless the world is one
    process; on GPUs each process has its device set before. Arguments beside `mesh` are those of `Settings`.

    Args:
        size: ranks that share a sequence; divides the world.
        mesh: a DeviceMesh with a dimension named "ring" of that size; made from consecutive ranks if not given.
        **settings: layout, schedule, heads, block_tokens, hardware, kernel, timeout and others.

    Attributes:
        size: ranks that share a sequence (W).
        rank: this one among them.
        data_size: number of sequence groups, each with data of its own.
        data_rank: which of them this is.
        world_size: all ranks.
        settings: what was asked for.
        groups: its process groups; `groups.mesh` is the device mesh, for what else needs one.

    Raises:
        ConfigError: an unknown or wrong setting.
        GroupError: `size` does not divide the world, the mesh does not fit, or ranks use the same GPU.
    """

    def __init__(self, size: int, *, mesh: DeviceMesh | None = None, **settings: Any) -> None:
        problem, asked = None, Settings(size=1)
        try:
            asked = Settings.parse({"size": size, **settings})
            _check(asked)
        except ConfigError as error:
            problem = error
        lanes = process_groups.lanes_of(asked)
        self._set_up(process_groups.make(asked.size, mesh, asked.timeout, lanes, problem), asked)

    @classmethod
    def over(cls, groups: Groups, settings: Settings) -> SequenceParallel:
        """On groups that exist already, for instance ranks that are threads of one process."""
        _check(settings)
        made = cls.__new__(cls)
        made._set_up(groups, settings)
        return made

    def _set_up(self, groups: Groups, settings: Settings) -> None:
        self.groups, self.settings, self._decision = groups, settings, Decision(settings, groups.device)
        self.size, self.rank = groups.size, groups.rank
        self.data_size, self.data_rank, self.world_size = groups.data_size, groups.data_rank, groups.world_size
        self._documents = lru_cache(maxsize=PLANS_KEPT)(
            lambda lengths, keys, kind, longest=None: kind(
                lengths, self.settle(lengths), groups.ring, keys, longest=longest
            )
        )

    def describe(self, model: Model, dtype: str = "bf16") -> None:
        """Say what is computed, for settings that are "auto". `parallelize` and `initialize` do it for their models.

        Args:
            model: its shapes; `Model.of_attention(heads, kv_heads, head_dim)` where only attention is known.
            dtype: "bf16", "fp16" or "fp32".
        """
        self._decision.describe(model, dtype)

    @property
    def undecided(self) -> tuple[str, ...]:
        """Settings that the model and the first batch decide: what is "auto", and block_tokens on a GPU that is known.

        The second needs no `describe`: without it blocks are whole.
        """
        return self._decision.undecided

    def settle(self, lengths: Sequence[int]) -> Settings:
        """The settings in which nothing is open: decided once, for `tokens` or the first batch. No communication.

        Raises:
            ConfigError: something is "auto", and neither `describe` nor `hardware` says what to decide it by.
        """
        before, settings = self.decided, self._decision.settle(lengths)
        if self.decided != before and self.groups.global_rank == 0:
            LOG.info("decided %s", self.decided)
        return settings

    @property
    def decided(self) -> str:
        """What "auto" came to and why; "" where nothing was open, or nothing was planned yet."""
        return self._decision.reason

    def plan(
        self,
        lengths: int | Sequence[int],
        causal: bool = True,
        window: int | Sequence[int | None] | None = None,
        *,
        chunk: int | None = None,
        prefix: int | Sequence[int] | None = None,
        kv_lengths: int | Sequence[int] | None = None,
    ) -> Plan:
        """The plan for documents of these lengths, packed one after the other. Cached; no communication.

        Args:
            lengths: tokens of each document, or of the one document.
            causal: whether a query sees only keys up to its own position.
            window: of those, only so many of the last (the query's own included); one number, or one for each document.
                With `causal=False` a pair: how many keys before and after the query.
            chunk: only keys of the query's own chunk of so many positions (Llama 4).
            prefix: tokens at the beginning of a document that every query of it sees (prefix-LM); one number, or one
                for each document.
            kv_lengths: keys of each document in cross-attention (with `causal=False`); 0 where a document has none.

        Raises:
            PlanError: lengths below 1, or a mask that does not exist.
            UnsupportedError: no kernel can compute the mask.
        """
        keys = None if kv_lengths is None else of_each(kv_lengths, "kv_lengths", PlanError)
        mask = Mask.make(causal, window, chunk, prefix)
        plan: Plan = self._documents(of_each(lengths, "lengths", PlanError), keys, Documents).plan(mask)
        return plan

    def shard_batch(self, batch: Mapping[str, Any], lengths: Sequence[int] | None = None) -> dict[str, Any]:
        """This rank's part of a whole batch, ready for `model(**batch)`. Collective over the world.

        Args:
            batch: the same on every rank of the group: input_ids (B, S); optionally labels (B, S), not shifted,
                attention_mask (B, S) with padding at the right only, and position_ids that restart at 0 for each
                packed document. Other tensors with an entry for each token are sharded too, and not shifted: what
                belongs to a target (its weight, say) is given one place to the left. What is no tensor passes through.
            lengths: tokens of each packed document, where position_ids do not say.

        Returns:
            input_ids (B, S_local); labels and shift_labels (B, S_local), the same tensor, shifted within each
            document before sharding; position_ids (B, S_local) within each document; the plan under "seqpar_plan"; no
            attention_mask.

        Raises:
            BatchError: a batch that cannot be sharded exactly; raised on every rank.
            PlanError: from `plan.masked(causal=False)` later, of a batch with padding.
            DisagreementError: the ranks of a group were given different batches; raised on every rank.
        """
        problem: Exception | None = None
        reading: edge.Reading | None = None
        keys: tuple[str, ...] = ()
        shared: dict[str, object] = {}
        try:
            reading = edge.read(batch, lengths)
            keys = edge.token_keys(batch, reading.shape)
            edge.refuse_trained(batch, keys)
            self._expect_enough(reading)
            self.settle(reading.lengths)
            shared = edge.record(batch, reading)
        except Exception as error:  # whatever it is, the others must not wait for this rank
            problem = error
        self.groups.agree("shard_batch", {**shared, "decided": self.decided}, problem)
        assert reading is not None  # agree raised otherwise
        kind = (edge.Padded, reading.longest) if reading.padded else (Documents,)
        plan = self._documents(reading.lengths, None, *kind).plan(Mask())
        out = {key: value for key, value in batch.items() if not isinstance(value, Tensor) or not value.dim()}
        out.update({key: plan.shard(batch[key]) for key in keys})
        out["position_ids"] = plan.shard(reading.position_ids).expand(reading.shape[0], -1)
        if reading.labels is not None:
            out["labels"] = out["shift_labels"] = plan.shard(reading.labels)
        out.pop("attention_mask", None)
        for name in edge.DESCRIPTIVE:
            out.pop(name, None)
        out[edge.PLAN_KEY] = plan
        return out

    def loss(
        self,
        logits_BSV: Tensor,
        labels_BS: Tensor,
        plan: Plan | None = None,
        *,
        num_items: int | None = None,
        accumulation: int = 1,
    ) -> Tensor:
        """The mean cross entropy over the targets of all ranks; backward averages right under DDP and ZeRO.

        `labels_BS` are shifted already (`shard_batch` does it). For a token mean over a whole optimizer step of
        several micro-batches give `num_items` (from `count_targets`) and `accumulation`, their number. Collective
        over the world. See `seqpar_ring.loss.token_mean`.

        Args:
            logits_BSV: of this rank's tokens, any float dtype; S may be 0.
            labels_BS: a target for each, -100 for none.
            plan: the shapes are compared with it, if given.
            num_items: targets of the whole optimizer step over all ranks; None: those of this call.
            accumulation: micro-batches of the step, by whose number the loop or its engine divides.

        Raises:
            BatchError, PlanError: shapes that do not fit, a label beyond the vocabulary, no target; on every rank.
            DisagreementError: ranks give different `num_items` or `accumulation`.
        """
        problem: SeqparError | None = None
        if plan is not None and isinstance(labels_BS, Tensor) and labels_BS.shape[-1] != plan.local_tokens:
            problem = BatchError(
                "labels do not hold this rank's tokens of the plan",
                fix="Use the labels that shard_batch returned with this plan.",
                labels=tuple(labels_BS.shape),
                expected_tokens=plan.local_tokens,
            )
        more: dict[str, Any] = {"num_items": num_items, "accumulation": accumulation, "problem": problem}
        return token_mean(logits_BSV, labels_BS, self.groups.everyone, **more)

    def tiled_loss(  # noqa: PLR0913 - what a loss needs, and what tiles do
        self,
        hidden_BSC: Tensor,
        head: Callable[[Tensor], Tensor],
        labels_BS: Tensor,
        *,
        tiles: int,
        num_items: int | None = None,
        accumulation: int = 1,
        vocabulary: int | None = None,
    ) -> Tensor:
        """The same loss without the logits of all of a rank's tokens: they are made tile by tile, again in backward.

        Args:
            hidden_BSC: what the head is given, this rank's tokens.
            head: from hidden states (1, n, C) to logits (1, n, V); a module, say. n may be 0.
            labels_BS, num_items, accumulation: as for `loss`.
            tiles: number of tiles, the same on all ranks: `seqpar_ring.tiling.tiles(self.most(tokens), V).number`.
            vocabulary: V, if a label beyond it is to be raised on every rank before anything is computed; not on a GPU.

        Raises: as `loss`.
        """
        problem = misfit(hidden_BSC, labels_BS, "hidden states", vocabulary)
        if tiles < 1:
            problem = PlanError("there is no tile", fix="Give tiles >= 1; 1 is the whole.", tiles=tiles)
        more: dict[str, Any] = {"num_items": num_items, "accumulation": accumulation, "problem": problem}
        summed = partial(summed_cross_entropy, hidden_BSC, labels_BS, head, tiles, edge.IGNORED)
        return mean_of_sums(summed, labels_BS, self.groups.everyone, tiles=tiles, **more)

    def most(self, tokens: int) -> int:
        """The largest of a number over all ranks, where that is the same within a sequence group. Collective."""
        if self.data_size == 1:
            return tokens
        everyone = self.groups.everyone
        mine = torch.zeros(everyone.world, dtype=torch.int64)
        mine[everyone.rank] = tokens
        return int(everyone.all_reduce(mine).max())

    def count_targets(
        self, batches: Iterable[Mapping[str, Any]], lengths: Iterable[Sequence[int]] | None = None
    ) -> int:
        """Targets in these whole micro-batches over all data ranks: `num_items` of their optimizer step. Collective.

        Args:
            batches: as `shard_batch` gets them.
            lengths: those that it gets with each, if it does: no document's first token is a target.

        Raises:
            BatchError: as `shard_batch`, and for a batch without labels, and other numbers of `batches` and `lengths`.
        """
        problem: Exception | None = None
        counts: list[Tensor] = []
        try:
            for one, its in zip(batches, repeat(None)) if lengths is None else zip_longest(batches, lengths):
                if one is None or (its is None and lengths is not None):
                    raise BatchError("there are not as many lengths as batches", fix="Give those of each micro-batch.")
                labels = edge.read(one, its).labels
                if labels is None:
                    raise BatchError("a batch has no labels to count", fix="Give labels.", keys=sorted(one))
                counts.append((labels != edge.IGNORED).sum())
            if not counts:
                raise BatchError("no batch to count targets in", fix="Give the micro-batches of one optimizer step.")
        except Exception as error:  # a loader's, too
            problem = error
        self.groups.everyone.agree("count_targets", {"micro-batches": len(counts)}, problem)
        return int(self.groups.everyone.all_reduce(torch.stack(counts).sum())) // self.size

    def report(self) -> Report:
        """What this rank sent and waited for since the last `reset_report`."""
        stats = self.groups.ring.stats
        return Report(dict(stats.bytes_sent), stats.messages, stats.seconds_waited)

    def reset_report(self) -> None:
        """Start counting anew."""
        self.groups.ring.stats.reset()

    def close(self) -> None:
        """Give back the process groups that were made for it, with their threads and memory. Collective over the world.

        Not those of a mesh that was given. What attends over them afterwards gets a TransportError.
        """
        self.groups.close()

    def __repr__(self) -> str:
        return f"SequenceParallel({self.settings}, rank {self.rank} of {self.size}, data rank {self.data_rank})"

    def _expect_enough(self, reading: edge.Reading) -> None:
        if reading.labels is not None and reading.shape[1] < self.size:
            few = "a training batch has fewer tokens than the sequence group has ranks"
            fix = "Use longer sequences or a smaller size."
            raise BatchError(few, fix=fix, tokens=reading.shape[1], size=self.size)


def _check(settings: Settings) -> None:
    """What `Settings` cannot know: which names exist, and what this version can do."""
    for key, known in (("layout", LAYOUTS), ("schedule", BUILDERS), ("kernel", kernels.names())):
        name = getattr(settings, key)
        if name not in known and name != "auto":
            raise ConfigError(f"unknown {key}", fix=did_you_mean(name, known), **{key: name})
