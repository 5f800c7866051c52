"""What happens between two calls of a parallelized model: changes to it, other calls, and data ranks that differ."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hf_cases import (
    Batch,
    Step,
    assert_refused,
    assert_same_step,
    averaged,
    build,
    errors,
    one_process,
    packed,
    padded,
    step,
    turn_on,
)
from saying import said_of
from seqpar_ring.integrations import transformers_replicas as replicas
from seqpar_ring.integrations.transformers import parallelize
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from seqpar_ring import SequenceParallel
from seqpar_ring.errors import BatchError, DisagreementError, UnsupportedError
from seqpar_ring.testing import run_lockstep

GRAD, LOSS = 1e-5, 1e-6
DYNAMIC: dict[str, Any] = {
    "max_position_embeddings": 16,
    "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0},
}


def plain_step(model: Any, batch: Batch) -> Step:
    """Loss and gradients of plain transformers on the very same batch."""
    model = copy.deepcopy(model)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("positions", ["none", "small on padding", "counting on"])
def test_rotary_embeddings_that_follow_the_length_follow_the_positions_that_are_given(positions: str) -> None:
    """Padding counted as tokens of the last document, and a short row in a long batch got the angles of a long one."""
    base, batch = build("Llama", **DYNAMIC), padded([10, 12], 24)
    mask = batch["attention_mask"]
    if positions == "small on padding":
        batch["position_ids"] = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    if positions == "counting on":
        batch["position_ids"] = torch.arange(24).expand(2, -1)
    expected = plain_step(base, batch)
    for found in run_lockstep(lambda sp: step(sp, parallelize(copy.deepcopy(base), sp), batch), 2):
        assert_same_step(found, expected, GRAD, LOSS)


def test_batches_whose_padding_has_other_positions_do_not_share_a_plan() -> None:
    base = build("Llama", **DYNAMIC)
    batches = [padded([10, 12], 24), padded([10, 12], 24)]
    mask = batches[1]["attention_mask"]
    batches[1]["position_ids"] = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)

    def losses(sp: SequenceParallel) -> list[float]:
        model = parallelize(copy.deepcopy(base), sp)
        with torch.no_grad():
            return [model(**batches[i]).loss.item() for i in (0, 1, 0, 1)]

    expected = [plain_step(base, batch)[0] for batch in batches] * 2
    for found in run_lockstep(losses, 2):
        assert found == pytest.approx(expected, rel=LOSS)


def asks_for_router_logits(model: Any) -> None:
    model.config.output_router_logits = True


def has_another_loss(model: Any) -> None:
    model.loss_function = ForCausalLMLoss


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("Qwen3Moe", asks_for_router_logits, "output_router_logits adds a balance loss"),
        ("Llama", has_another_loss, "computes a loss of its own"),
    ],
)
def test_what_a_model_was_refused_for_at_first_is_refused_later(family: str, change: Any, words: str) -> None:
    """After a first right step; each rank went on with the mean of its own tokens."""
    shape = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24} if family == "Qwen3Moe" else {}
    base, batch = build(family, **shape), packed([13, 1, 20, 7])

    def later(sp: SequenceParallel) -> str:
        model = parallelize(copy.deepcopy(base), sp)
        model(**batch).loss.backward()
        change(model)
        with pytest.raises(UnsupportedError) as found:
            model(**batch)
        return str(found.value)

    for said in run_lockstep(later, 2):
        assert words in said


def test_dropout_whose_rate_is_set_after_a_first_forward_is_refused() -> None:
    base, batch = build("Llama"), packed([21])
    base.model.layers[1].mlp.down_proj = torch.nn.Sequential(base.model.layers[1].mlp.down_proj, torch.nn.Dropout(0.0))

    def act(sp: SequenceParallel) -> object:
        model = parallelize(copy.deepcopy(base), sp)
        with torch.no_grad():
            model(**batch)
        model.model.layers[1].mlp.down_proj[1].p = 0.5
        return model(**batch)

    assert_refused(errors(act), UnsupportedError, "dropout above 0", "down_proj.1=0.5")


class WithTerm(LlamaForCausalLM):
    """Adds a term to its loss, at once or once it is told to."""

    weight = 1e-2

    def forward(self, input_ids: Any = None, position_ids: Any = None, labels: Any = None, **others: Any) -> Any:
        found = super().forward(input_ids=input_ids, position_ids=position_ids, labels=labels, **others)
        if labels is not None and self.weight:
            found.loss = found.loss + self.weight * found.logits.float().logsumexp(-1).square().mean()
        return found


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_term_that_a_model_adds_to_its_loss_is_refused(when: str) -> None:
    """It is a mean over this rank's tokens: padded rows gave gradients that were off by 5 %."""
    base, batch = build("Llama"), packed([21])

    def act(sp: SequenceParallel) -> object:
        model = copy.deepcopy(base)
        model.__class__ = WithTerm
        model = parallelize(model, sp)
        if when == "later":
            model.weight = 0.0
            model(**batch)
            model.weight = 1e-2
        return model(**batch)

    assert_refused(errors(act), UnsupportedError, "changes the loss after its loss function", "WithTerm", "sp.loss")


class Capped(torch.nn.Module):
    """A head that caps its logits, where a head in tiles does not know of it."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.head(hidden)
        return 1000.0 * torch.tanh(found / 1000.0)


def test_a_cap_that_shows_only_when_logits_have_grown_is_refused_then() -> None:
    """It was compared in the first forward alone; after that tiles gave twice the loss."""
    base, batch = build("Llama"), packed([21])

    def act(sp: SequenceParallel) -> object:
        model = parallelize(copy.deepcopy(base), sp)
        whole, model.lm_head = model.lm_head, Capped(model.lm_head)
        model.get_output_embeddings = lambda: whole
        model(**batch)
        whole.weight.data.mul_(1000.0)
        return model(**batch)

    assert_refused(errors(act, logits=4), UnsupportedError, "after its head", '"logits": "whole"')


def test_a_keyword_overrides_the_config_of_a_model_that_asks_for_router_logits() -> None:
    shape = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    base, batch = build("Qwen3Moe", **shape), packed([13, 8])

    def asked(sp: SequenceParallel) -> Step:
        model = parallelize(copy.deepcopy(base), sp)
        asks_for_router_logits(model)
        return step(sp, model, {**batch, "output_router_logits": False})

    for found in run_lockstep(asked, 2):
        assert_same_step(found, one_process(base, batch), GRAD, LOSS)


@pytest.mark.parametrize("checkpointing", ["", "plain", "reentrant"])
def test_mlps_are_recomputed_in_the_tiles_of_their_own_call(checkpointing: str) -> None:
    """Of the last call, of another length, they were: torch refuses a recompute that saves other tensors."""
    base, batches = build("Llama"), (packed([13, 1, 20, 7]), packed([9]))
    expected = one_process(base, batches[0])

    def run(sp: SequenceParallel) -> tuple[Step, list[int]]:
        model = parallelize(copy.deepcopy(base), sp)
        turn_on(model, checkpointing)
        loss = model(**batches[0]).loss
        with torch.no_grad():
            model(**batches[1])
        seen: list[int] = []
        for layer in model.model.layers:
            layer.mlp.gate_proj.register_forward_hook(lambda *_: seen.append(1))
        loss.backward()
        return (loss.item(), averaged(sp, model)), seen

    for found, seen in run_lockstep(run, 2, mlp=3):
        assert_same_step(found, expected, GRAD, LOSS)
        assert len(seen) >= 3 * 7  # of 21 tokens, or 20, in tiles of 3


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("logits", ["auto", "whole", 5])
@pytest.mark.filterwarnings("ignore:What the model returns for this whole batch")
def test_data_ranks_that_differ_in_labels_are_told_so(logits: Any, sharded: bool) -> None:
    """One group waited in a sum over the world, another in an agreement, and they took each other's numbers."""
    base, whole = build("Llama").eval(), packed([13, 8])

    def differ(sp: SequenceParallel) -> str:
        model, batch = parallelize(copy.deepcopy(base), sp), dict(whole)
        if sp.data_rank:
            batch.pop("labels")
        with torch.no_grad(), pytest.raises(DisagreementError) as found:
            model(**(sp.shard_batch(batch) if sharded else batch))
        return str(found.value)

    for said in run_lockstep(differ, 4, size=2, logits=logits):
        assert "rank 0, 1=the call of the model with labels, rank 2, 3=the call of the model without labels" in said


@pytest.mark.parametrize("logits", ["whole", 3])
def test_a_label_beyond_the_vocabulary_is_said_on_every_rank(logits: Any) -> None:
    """In tiles it was one rank's IndexError, for which the others waited."""
    base, batch = build("Llama"), packed([40])
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, 30] = 200

    def beyond(sp: SequenceParallel) -> str:
        with pytest.raises(BatchError) as found:
            parallelize(copy.deepcopy(base), sp)(**batch)
        return str(found.value)

    for said in run_lockstep(beyond, 2, layout="contiguous", logits=logits):
        assert "a label is beyond the vocabulary [label=200, vocabulary=97]" in said


def test_the_positions_of_a_shard_are_those_of_its_documents() -> None:
    """What follows the length looks at what was given; the rest at places in the document, as attention does."""

    def positions(sp: SequenceParallel) -> Tensor:
        batch = padded([10, 12], 24)
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        out = sp.shard_batch(batch)
        assert out["seqpar_plan"].documents.longest == 12
        return out["seqpar_plan"].gather(out["position_ids"])

    for found in run_lockstep(positions, 2):
        assert found.tolist() == [list(range(24))] * 2


def test_ranks_with_other_weights_are_told_so() -> None:
    """Random ones that were not seeded alike; the loss was the mean over two models."""

    def run(sp: SequenceParallel) -> str:
        model = build("Llama")
        if sp.rank == 1:
            with torch.no_grad():
                model.lm_head.weight[3, 5] += 1e-3
        return said_of(lambda: parallelize(model, sp)(**packed([43])))

    for said in run_lockstep(run, 2):
        assert said.startswith("DisagreementError: the ranks hold different weights")
        assert "seed alike" in said


def test_a_loop_in_which_nothing_averages_the_gradients_is_told_so() -> None:
    def steps(sp: SequenceParallel, averages: bool) -> str:
        model = parallelize(build("Llama"), sp)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def train() -> None:
            for _ in range(4):
                model(**packed([43])).loss.backward()
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    if averages:
                        parameter.grad.copy_(sp.groups.everyone.all_reduce(parameter.grad) / sp.world_size)
                optimizer.step()
                optimizer.zero_grad()

        return said_of(train)

    assert set(run_lockstep(lambda sp: steps(sp, averages=True), 2)) == {"nothing was raised"}
    for said in run_lockstep(lambda sp: steps(sp, averages=False), 2):
        assert "the ranks hold different weights" in said
        assert "forward=2" in said


def test_parameters_of_which_a_rank_holds_a_part_are_not_compared() -> None:
    model = build("Llama")
    assert replicas.summary(model) is not None
    exchanged = copy.deepcopy(model)
    one, other = exchanged.model.layers[0].self_attn, exchanged.model.layers[1].self_attn
    one.q_proj, other.q_proj = other.q_proj, one.q_proj
    assert replicas.summary(exchanged) != replicas.summary(model)
    model.lm_head.weight.ds_id = 3  # as ZeRO-3 marks its own
    assert replicas.summary(model) is None


def test_weights_that_cannot_be_summed_are_left_out_and_nan_on_one_rank_is_found() -> None:
    def run(sp: SequenceParallel) -> str:
        model = build("Llama")
        model.quantized = nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn), requires_grad=False)
        sp.groups.everyone.agree("before", {})
        replicas.check(model, sp.groups.everyone, forward=1)
        if sp.rank == 1:
            with torch.no_grad():
                model.lm_head.weight[0, 0] = torch.nan
        return said_of(lambda: replicas.check(model, sp.groups.everyone, forward=2))

    for said in run_lockstep(run, 2):
        assert "the ranks hold different weights" in said
