"""Models of whose code some is not transformers': refused where it looks at several tokens, exact where at one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hf_cases import GRAD, LOSS, SHAPE, assert_refused, assert_same_step, build, errors, one_process, packed, step
from saying import said_of
from seqpar_ring.integrations import transformers_tokens as tokens
from seqpar_ring.integrations.transformers import parallelize
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, TokenClassifierOutput
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from seqpar_ring import SequenceParallel
from seqpar_ring.errors import BatchError, UnsupportedError
from seqpar_ring.testing import run_lockstep


class Beside(nn.Module):
    """A module, and another that is added to it."""

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x: Tensor) -> Tensor:
        found = self.other(x)
        return self.one(x) + (found[0] if isinstance(found, tuple) else found)


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class CountsByItself(LlamaRotaryEmbedding):  # type: ignore[misc]
    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        return super().forward(x, torch.arange(x.shape[1])[None])


def shift(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


def running_mean(x: Tensor) -> Tensor:
    return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[None, :, None]


def with_beside(other: nn.Module) -> Any:
    model = build("Llama")
    layer = model.model.layers[1]
    layer.mlp = Beside(layer.mlp, other)
    return model


BF16 = 0.05
"""Relative error of loss and gradients where both sides compute in bf16."""

WIDTH = SHAPE["hidden_size"]
OF_TORCH: dict[str, Callable[[], nn.Module]] = {
    "Conv1d": lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1),
    "GRU": lambda: nn.GRU(WIDTH, WIDTH, batch_first=True),
    "MultiheadAttention": lambda: nn.MultiheadAttention(WIDTH, 4, batch_first=True),
    "BatchNorm1d": lambda: nn.BatchNorm1d(WIDTH),
}


@pytest.mark.parametrize("name", OF_TORCH)
def test_modules_that_look_at_several_tokens_are_refused_by_name(name: str) -> None:
    """A convolution left the loss right to 2e-5, and a gradient wrong by 35 %."""
    model = with_beside(OF_TORCH[name]())
    found = errors(lambda sp: parallelize(copy.deepcopy(model), sp))
    assert_refused(found, UnsupportedError, "look at several tokens", name, "layers.1.mlp.other")


@pytest.mark.parametrize(
    "function", [shift, running_mean, lambda x: x - x.mean(1, keepdim=True), lambda x: nn.functional.dropout(x, 0.3)],
    ids=["shift", "running mean", "mean of all", "dropout as a function"],
)  # fmt: skip
def test_code_that_is_not_known_and_looks_at_several_tokens_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    model = with_beside(Function(function))
    found = errors(lambda sp: parallelize(copy.deepcopy(model), sp))
    assert_refused(found, UnsupportedError, "depends on the other tokens", "'Beside', 'Function'")


def test_a_rotary_embedding_that_counts_by_itself_is_refused() -> None:
    model = build("Llama")
    model.model.rotary_emb = CountsByItself(model.config)
    found = errors(lambda sp: parallelize(copy.deepcopy(model), sp))
    assert_refused(found, UnsupportedError, "depends on the other tokens", "CountsByItself", "position_ids")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_code_that_is_not_known_and_looks_at_one_token_is_exact(dtype: torch.dtype) -> None:
    model, batch = with_beside(nn.Sequential(nn.Linear(WIDTH, WIDTH), Function(torch.tanh))).to(dtype), packed([13, 30])
    before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert tokens.strangers(model) == ("Beside", "Function")
    want = one_process(model, batch)
    for got in run_lockstep(lambda sp: step(sp, parallelize(copy.deepcopy(model), sp), batch), 2):
        assert_same_step(got, want, *((GRAD, LOSS) if dtype is torch.float32 else (BF16, BF16)))
    assert all(torch.equal(x, before[0][name]) for name, x in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_model_of_transformers_alone_is_not_run() -> None:
    model = build("Llama")
    model.forward = lambda *_, **__: pytest.fail("it was run")
    assert tokens.strangers(model) == ()
    assert tokens.check(model) is None


def test_what_cannot_be_run_here_is_said() -> None:
    def warned(model: Any) -> str:
        with pytest.warns(UserWarning, match="It was not shown that Beside, Function look at one token") as caught:
            assert tokens.check(model) is None
        return str(caught[0].message)

    with torch.device("meta"):
        assert "on the meta device" in warned(with_beside(Function(torch.tanh)))
    model = with_beside(Function(torch.tanh))
    model.model.embed_tokens.weight.ds_id = 3  # as DeepSpeed's ZeRO-3 marks what it has taken
    assert "spread over ranks" in warned(model)

    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("no kernel for this device")

    model = with_beside(Function(fails))
    model.set_attn_implementation("sdpa")
    assert "RuntimeError: no kernel for this device" in warned(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_weights_of_which_nothing_can_be_seen_are_no_reason_to_refuse(value: float) -> None:
    """Memory that is filled later, for instance."""
    model = with_beside(Function(torch.tanh))
    model.set_attn_implementation("seqpar_ring")
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(value)
    with pytest.warns(UserWarning, match="not finite, or all zero"):
        assert tokens.check(model) is None


@pytest.mark.parametrize("family", ["Nemotron", "StableLm"])
def test_own_code_in_a_family_that_hands_attention_no_keywords_is_exact(family: str) -> None:
    model, batch = build(family), packed([13, 30])
    model.model.layers[1].mlp = Beside(model.model.layers[1].mlp, Function(torch.tanh))
    want = one_process(model, batch)
    for got in run_lockstep(lambda sp: step(sp, parallelize(copy.deepcopy(model), sp), batch), 2):
        assert_same_step(got, want, GRAD, LOSS)


def test_in_16_bits_a_token_that_goes_to_another_expert_is_none_that_sees_others() -> None:
    one = torch.randn(8, 5, dtype=torch.float64)
    other = one.clone()
    other[2] += 1
    assert tokens._apart(one.bfloat16(), other.bfloat16()) < 1e-2 < tokens._apart(one, other)
    assert tokens._apart(one.bfloat16(), (one + 0.2).bfloat16()) > 1e-2


def test_own_code_on_one_rank_only_leaves_none_waiting_and_a_refused_model_as_it_was() -> None:
    def run(sp: SequenceParallel) -> tuple[str, str]:
        model = with_beside(Function(shift)) if sp.groups.global_rank == 0 else build("Llama")
        return said_of(lambda: parallelize(model, sp)), model.config._attn_implementation

    for said, attention in run_lockstep(run, 4, size=2, timeout=20.0):
        assert "depends on the other tokens" in said
        assert attention == "sdpa"


def test_towers_that_text_does_not_go_through_and_products_of_one_token_are_let_be() -> None:
    class AudioEncoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 3)

    model = build("Llama")
    model.model.audio, model.model.point = AudioEncoder(), nn.Conv1d(WIDTH, WIDTH, 1)
    tokens.refuse_mixing(model)
    model.model.other = nn.Sequential(nn.Conv1d(4, 4, 3))
    with pytest.raises(UnsupportedError, match=r"model\.other\.0"):
        tokens.refuse_mixing(model)


def noisy(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + torch.zeros_like(output).uniform_(-0.1, 0.1)


def test_noise_of_a_hook_is_refused_in_training_only() -> None:
    """As NEFTune's, on the embeddings; a hook is no module, and may come later."""

    def run(sp: SequenceParallel) -> str:
        model = parallelize(build("Llama"), sp)
        batch = packed([43])
        model(**batch).loss.backward()
        model.model.embed_tokens.register_forward_hook(noisy)
        with torch.no_grad():
            model(**batch)
        with pytest.raises(UnsupportedError) as caught:
            model(**batch)
        return str(caught.value)

    for said in run_lockstep(run, 2):
        assert "has drawn random numbers" in said
        assert "NEFTune" in said


class Tagger(transformers.LlamaPreTrainedModel):  # type: ignore[misc]
    """Its decoder is not where the family has it, and its loss is its own."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.backbone, self.tag = transformers.LlamaModel(config), nn.Linear(config.hidden_size, 7)
        self.post_init()

    def forward(self, input_ids: Any = None, position_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        hidden = self.backbone(input_ids=input_ids, position_ids=position_ids, **kwargs)[0]
        logits = self.tag(hidden)
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten() % 7)
        return TokenClassifierOutput(loss=loss, logits=logits)


class Scorer(transformers.LlamaPreTrainedModel):  # type: ignore[misc]
    """A reward model, of the last token."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model, self.score = transformers.LlamaModel(config), nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        hidden = self.model(input_ids=input_ids, position_ids=position_ids, **kwargs)[0]
        return BaseModelOutput(last_hidden_state=self.score(hidden)[:, -1])


def test_a_loss_of_its_own_is_refused_wherever_the_decoder_is() -> None:
    model = Tagger(transformers.LlamaConfig(**SHAPE)).train()

    def act(sp: SequenceParallel) -> None:
        parallelize(copy.deepcopy(model), sp)(**packed([43]))

    assert_refused(errors(act), UnsupportedError, "a loss of its own", "Tagger")


@pytest.mark.parametrize("kind", [Scorer, transformers.LlamaModel])
def test_a_model_without_labels_is_not_trained_on_a_whole_batch(kind: Any) -> None:
    """What it returns is of a rank's tokens: a score of "the last" is that of another token on each rank."""
    model, ids = kind(transformers.LlamaConfig(**SHAPE)).train(), {"input_ids": packed([43])["input_ids"]}

    def act(sp: SequenceParallel) -> None:
        parallelize(copy.deepcopy(model), sp)(**ids)

    assert_refused(errors(act), BatchError, "has no labels", "sp.shard_batch")


def test_an_evaluation_without_labels_is_told_what_comes_back() -> None:
    ids = {"input_ids": packed([43])["input_ids"]}

    def run(sp: SequenceParallel) -> Tensor:
        model = parallelize(build("Llama"), sp).eval()
        part = sp.shard_batch(ids)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            out = part["seqpar_plan"].gather(model(**part).logits)
            with pytest.raises(UserWarning, match=r"this rank's tokens.*plan\.gather"):
                model(**ids)
        return out

    with torch.no_grad():
        want = build("Llama").eval()(**ids).logits
    for got in run_lockstep(run, 2):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_labels_of_a_sharded_batch_come_from_shard_batch() -> None:
    """Those that somebody sharded himself are not shifted, as transformers has them: loss and gradients were others."""
    batch = packed([43])

    def act(sp: SequenceParallel) -> None:
        part = sp.shard_batch({"input_ids": batch["input_ids"]})
        part["labels"] = part["seqpar_plan"].shard(batch["labels"])
        parallelize(build("Llama"), sp)(**part)

    assert_refused(errors(act), BatchError, "labels and no shift_labels", "use what it returned as it is")
