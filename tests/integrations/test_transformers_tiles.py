"""Head and MLPs of a HuggingFace model in tiles: the same step, and no logits of a whole shard anywhere."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import TABLE
from hf_cases import (
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
from seqpar_ring.integrations.transformers import parallelize
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from seqpar_ring import SequenceParallel
from seqpar_ring.errors import UnsupportedError
from seqpar_ring.testing import run_lockstep

GRAD, LOSS = 1e-5, 1e-6
VOCAB = 97
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Gemma2": {"final_logit_softcapping": 0.9, "attn_logit_softcapping": None, "head_dim": 8},
    "Granite": {"logits_scaling": 8.0},
    "Cohere2": {"logit_scale": 0.3, "sliding_window": 64},
    "Llama4": {**TABLE["Llama 4"].changes},
    "Qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "Gemma4": {
        **{"config": "Gemma4TextConfig", "head_dim": 8, "global_head_dim": 16, "sliding_window": 7},
        **{"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
        **{"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": VOCAB},
    },
}


class Widest(TorchDispatchMode):
    """The most rows of any tensor as wide as the vocabulary."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and x.dim() >= 2 and x.shape[-1] == VOCAB:
                self.rows = max(self.rows, x.numel() // VOCAB)
        return out


@pytest.mark.parametrize("family", MODELS)
def test_the_step_is_the_same_with_the_head_in_tiles(family: str) -> None:
    base, batch = build(family, **MODELS[family]).double(), packed([13, 1, 20, 7])

    def run(sp: SequenceParallel) -> tuple[Step, object]:
        model = parallelize(copy.deepcopy(base), sp)
        out = model(**batch)
        out.loss.backward()
        return (out.loss.item(), averaged(sp, model)), out.logits

    for found, logits in run_lockstep(run, 2, logits=5):
        assert_same_step(found, one_process(base, batch), GRAD, LOSS)
        assert logits is None


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 4, 1000])
def test_any_size_of_tile_will_do(world: int, tokens: int) -> None:
    base, batch = build("Llama"), padded([17, 23], 23)
    run = lambda sp: step(sp, parallelize(copy.deepcopy(base), sp), batch)  # noqa: E731
    for found in run_lockstep(run, world, logits=tokens):
        assert_same_step(found, one_process(base, batch), GRAD, LOSS)


def test_the_head_and_mlps_in_tiles_go_with_checkpointing_and_data_ranks_of_other_lengths() -> None:
    base, batches = build("Llama"), [packed([9, 14], seed=1), packed([51], seed=2)]

    def run(sp: SequenceParallel) -> Step:
        model = parallelize(copy.deepcopy(base), sp)
        turn_on(model, "plain")
        return step(sp, model, batches[sp.data_rank])

    for found in run_lockstep(run, 4, size=2, logits=4, mlp=3, remat="attention"):
        assert_same_step(found, one_process(base, *batches), GRAD, LOSS)


def test_ranks_of_unequal_batches_make_as_many_tiles_each() -> None:
    """As ZeRO-3 needs it: the head's weight is gathered once for each tile, by all ranks together."""
    base, batches = build("Llama"), [packed([9]), packed([51])]

    def run(sp: SequenceParallel) -> int:
        model = parallelize(copy.deepcopy(base), sp)
        calls: list[int] = []
        model.lm_head.register_forward_hook(lambda *_: calls.append(1))
        step(sp, model, batches[sp.data_rank])
        return len(calls)

    found = run_lockstep(run, 2, size=1, logits=10)
    assert found[0] == found[1] == 1 + 1 + 2 * 6  # the model's one token, the comparison, and each tile twice


def test_the_same_modules_run_whether_the_host_compares_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ZeRO-3 records it; on a GPU the host compares in each hundredth forward."""
    from seqpar_ring.integrations import transformers_head as head

    monkeypatch.setattr(head, "is_read", lambda _, before: before % 3 == 0)
    base, batch = build("Llama"), packed([51])

    def run(sp: SequenceParallel) -> list[int]:
        model = parallelize(copy.deepcopy(base), sp)
        calls: list[int] = []
        model.lm_head.register_forward_hook(lambda *_: calls.append(1))
        forwards = []
        for _ in range(4):
            model(**batch)
            forwards.append(len(calls))
            calls.clear()
        return forwards

    assert run_lockstep(run, 2, logits=10)[0] == [1 + 1 + 3] * 4


def test_no_tensor_holds_the_logits_of_more_than_a_tile() -> None:
    base, batch = build("Llama"), packed([64])

    def run(sp: SequenceParallel) -> int:
        model = parallelize(copy.deepcopy(base), sp)
        with Widest() as widest:
            model(**batch).loss.backward()
        return widest.rows

    weights = 48  # the head's own weight, (97, 48), seen from the other side
    assert run_lockstep(run, 2, logits=7)[0] <= weights
    assert run_lockstep(run, 1, logits=7)[0] <= weights
    assert run_lockstep(run, 1, logits="whole")[0] == 64


def test_evaluation_runs_in_tiles_too() -> None:
    base, batch = build("Llama").eval(), packed([13, 20])

    def run(sp: SequenceParallel) -> float:
        with torch.no_grad():
            return float(parallelize(copy.deepcopy(base), sp)(**batch).loss)

    assert run_lockstep(run, 2, logits=4)[0] == pytest.approx(one_process(base, batch)[0], rel=LOSS)


def test_a_tuple_has_no_logits_of_a_single_token_either() -> None:
    base, batch = build("Llama"), packed([33])

    def run(sp: SequenceParallel) -> tuple[float, object]:
        loss, logits, *_ = parallelize(copy.deepcopy(base), sp)(**batch, return_dict=False)
        return loss.item(), logits

    for loss, logits in run_lockstep(run, 2, logits=4):
        assert loss == pytest.approx(one_process(base, batch)[0], rel=LOSS)
        assert logits is None


@pytest.mark.filterwarnings("ignore:What the model returns for this whole batch")
def test_without_labels_the_logits_are_there() -> None:
    base, batch = build("Llama").eval(), packed([33])
    del batch["labels"]

    def run(sp: SequenceParallel) -> torch.Size:
        with torch.no_grad():
            return parallelize(copy.deepcopy(base), sp)(**batch).logits.shape

    assert sum(shape[1] for shape in run_lockstep(run, 2, logits=4)) == 33


def test_a_model_that_does_something_unknown_to_its_logits_is_refused() -> None:
    """A seeded fault: the head's output is changed where tiles do not see it."""
    base = build("Granite", logits_scaling=8.0)

    def act(sp: SequenceParallel) -> object:
        model = parallelize(copy.deepcopy(base), sp)
        model.config.logits_scaling = 4.0
        cut = copy.deepcopy(model.config)
        cut.logits_scaling = 8.0
        model.config.get_text_config = lambda *_, **__: cut
        return model(**packed([21]))

    assert_refused(errors(act, logits=4), UnsupportedError, "after its head", "GraniteForCausalLM", '"logits": "whole"')


def test_mlps_in_tiles_keep_names_and_copies_of_the_model_are_right() -> None:
    base, batch = build("Llama"), packed([13, 20])

    def run(sp: SequenceParallel) -> tuple[set[str], list[str], Step]:
        model = parallelize(copy.deepcopy(base), sp)
        kinds = [type(one).__name__ for one in model.modules() if type(one).__name__.startswith("Tiled")]
        return set(model.state_dict()), kinds, step(sp, model, batch)

    for names, kinds, found in run_lockstep(run, 2, mlp=5):
        assert names == set(base.state_dict())
        assert kinds == ["TiledLlamaMLP"] * 3
        assert_same_step(found, one_process(base, batch), GRAD, LOSS)


def test_a_model_without_dense_mlps_has_none_to_tile() -> None:
    base = build("Mixtral", num_local_experts=2)
    found = errors(lambda sp: parallelize(copy.deepcopy(base), sp), mlp=5)
    assert_refused(found, UnsupportedError, "no dense MLP", "MixtralForCausalLM")


def test_auto_makes_tiles_only_of_large_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    base, batch = build("Llama"), packed([40])
    monkeypatch.setattr("seqpar_ring.tiling.TILE_BYTES", 4 * VOCAB * 10)
    run = lambda sp: parallelize(copy.deepcopy(base), sp)(**batch).logits is None  # noqa: E731
    assert run_lockstep(run, 2) == [True, True]
    assert run_lockstep(run, 4) == [False] * 4  # 10 tokens a rank fit


def test_a_head_of_its_own_is_needed() -> None:
    class Odd(nn.Module):
        """Nothing of a head."""

    from seqpar_ring.integrations import transformers_head as head

    model = Odd()
    model.base_model = model  # type: ignore[assignment]
    assert head.lacks(model) == "no head of its own"
