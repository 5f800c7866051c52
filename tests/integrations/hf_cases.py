"""Tiny HuggingFace models, and training steps of them: in shards, and by plain transformers in one process.

The one-process side knows nothing of this package: sdpa attention, documents one after the other, labels shifted by
hand, targets counted by hand. Functions that other processes run stand here too, as those import them by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import transformers
from seqpar_ring.integrations.transformers import parallelize
from torch import Tensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from seqpar_ring import SequenceParallel, remat
from seqpar_ring.errors import SeqparError
from seqpar_ring.testing import run_lockstep
from seqpar_ring.testing.compare import relative_error

VOCAB = 97
SHAPE: dict[str, Any] = {
    **{"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3},
    **{"num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 256, "attention_dropout": 0.0},
    **{"bos_token_id": 1, "eos_token_id": 2},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {"head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2},
    "Mistral": {"sliding_window": 7, "num_hidden_layers": 2},
}

ZERO = 1e-6
"""Below this part of all gradients together a gradient is nothing but rounding."""

Batch = dict[str, Tensor]
Step = tuple[float, dict[str, Tensor]]
GRAD, LOSS = 1e-5, 1e-6
"""Largest relative L2 error of a parameter's gradient, and relative error of the loss, in fp32."""

Act = Callable[[SequenceParallel], object]


def build(family: str, dtype: torch.dtype = torch.float32, suffix: str = "ForCausalLM", **changes: Any) -> Any:
    """A tiny model of a family in training mode, the same weights every time."""
    shape = {**SHAPE, **FAMILIES.get(family, {}), **changes}
    config = getattr(transformers, shape.pop("config", f"{family}Config"))(**shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = getattr(transformers, f"{family}{suffix}")(config)
        for p in model.parameters():  # as initialised, attention would be all but uniform, and hide a wrong mask
            p.data.add_(torch.randn_like(p), alpha=0.15)
    return model.to(dtype).train()


def packed(lengths: Sequence[int], rows: int = 1, seed: int = 5) -> Batch:
    """A whole batch of packed documents: position_ids restart, some tokens have no label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, sum(lengths)), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, -100)
    batch = {"input_ids": ids, "labels": labels}
    if len(lengths) > 1:
        batch["position_ids"] = torch.cat([torch.arange(n) for n in lengths]).expand(rows, -1)
    return batch


def padded(real: Sequence[int], tokens: int) -> Batch:
    """A whole batch of rows padded at the right: of row i the first real[i] tokens count."""
    batch = packed([tokens], rows=len(real), seed=9)
    mask = torch.arange(tokens)[None] < torch.tensor(real)[:, None]
    return {
        "input_ids": batch["input_ids"] * mask,
        "labels": batch["labels"].masked_fill(~mask, -100),
        "attention_mask": mask.long(),
    }


def one_process(model: Any, *batches: Mapping[str, Tensor]) -> Step:
    """Loss and gradients of one optimizer step by plain transformers: the mean over all targets of all batches."""
    model = copy.deepcopy(model)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        for piece in documents(batch):
            labels = piece.pop("labels")[:, 1:]
            logits = model(**piece, use_cache=False).logits[:, :-1].double()
            total = total + functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            count += int((labels != -100).sum())
    loss = total / count
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def documents(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The batch cut into its documents, each a batch of its own."""
    if "position_ids" not in batch:
        return [dict(batch)]
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    ends = [*starts[1:], batch["input_ids"].shape[1]]
    return [
        {key: value[:, a:b] for key, value in batch.items() if key != "position_ids"}
        for a, b in zip(starts, ends, strict=True)
    ]


def step(sp: SequenceParallel, model: Any, batch: Mapping[str, Any]) -> Step:
    """One step of a parallelized model: its loss, and its gradients averaged over all ranks of the world, as by DDP."""
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), averaged(sp, model)


def averaged(sp: SequenceParallel, model: Any) -> dict[str, Tensor]:
    """Gradients by name, averaged over the world."""
    world = sp.groups.everyone
    return {name: world.all_reduce(p.grad) / world.world for name, p in model.named_parameters() if p.requires_grad}


def sharded_step(
    sp: SequenceParallel,
    family: str,
    batch: Batch,
    dtype: torch.dtype = torch.float32,
    checkpointing: str = "",
    changes: Mapping[str, Any] | None = None,
) -> tuple[float, dict[str, Tensor], int]:
    """Build, parallelize, one step. Returns loss, averaged gradients, and bytes sent as keys and values."""
    model = parallelize(build(family, dtype, **(changes or {})), sp)
    turn_on(model, checkpointing)
    sp.reset_report()
    loss, grads = step(sp, model, batch)
    return loss, grads, sp.report().bytes_sent.get("kv", 0)


def ddp_step(sp: SequenceParallel, family: str, batch: Batch) -> Step:
    """One step of a model that torch's DistributedDataParallel wraps: its loss, and the gradients that DDP leaves."""
    model = parallelize(build(family), sp)
    wrapped = DistributedDataParallel(model)
    loss = wrapped(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def compiled_steps(sp: SequenceParallel, what: str, batches: Sequence[Batch]) -> tuple[list[Step], list[int]]:
    """A step on each batch of a parallelized model that torch.compile has seen: the "model", or its "layers" alone; and
    how many operators ran compiled in each."""
    import torch._dynamo
    from torch._dynamo.backends.debugging import aot_eager

    ran = [0]

    def counting(graph: Any, inputs: Any, **options: Any) -> Any:
        made, operators = aot_eager(graph, inputs, **options), sum(n.op == "call_function" for n in graph.graph.nodes)

        def run(*args: Any) -> Any:
            ran[0] += operators
            return made(*args)

        return run

    torch._dynamo.reset()
    model = parallelize(build("Llama", num_hidden_layers=2), sp)
    for part in [model] if what == "model" else model.model.layers:
        part.compile(backend=counting)
    steps, counts = [], []
    with torch._dynamo.config.patch(recompile_limit=64):  # docs/huggingface.md says why
        for batch in batches:
            model.zero_grad()
            before = ran[0]
            steps.append(step(sp, model, batch))
            counts.append(ran[0] - before)
    return steps, counts


def turn_on(model: Any, checkpointing: str) -> None:
    """transformers' activation checkpointing: "" none, "reentrant", "plain", "context" with our `context_fn`."""
    if checkpointing:
        keep = {"context_fn": remat.context_fn} if checkpointing == "context" else {}
        name = "activation_checkpointing_enable"  # before transformers 5.20 or so:
        enable = getattr(model, name, model.gradient_checkpointing_enable)
        enable({"use_reentrant": checkpointing == "reentrant", **keep})


def worst(found: Step, expected: Step) -> tuple[float, float, str]:
    """Relative error of the loss, the largest relative L2 error of a parameter's gradient, and that one's name.

    A gradient that is zero but for rounding (below a millionth of all gradients together: a key's bias without rotary
    embedding moves all scores of a query alike) is compared with all gradients together.
    """
    assert found[1].keys() == expected[1].keys()
    whole = torch.stack([grad.double().norm() for grad in expected[1].values()]).norm()

    def error(name: str, grad: Tensor) -> float:
        if grad.norm() > ZERO * whole:
            return relative_error(found[1][name], grad)
        return float((found[1][name].double() - grad.double()).norm() / whole)

    errors = {name: error(name, grad) for name, grad in expected[1].items()}
    name = max(errors, key=lambda n: float("inf") if errors[n] != errors[n] else errors[n])
    return abs(found[0] - expected[0]) / abs(expected[0]), errors[name], name


def assert_same_step(found: Step, expected: Step, tolerance: float, loss_tolerance: float) -> None:
    """Assert that loss and every gradient are equal."""
    loss_error, grad_error, name = worst(found, expected)
    assert loss_error <= loss_tolerance, f"loss {found[0]} for {expected[0]}: relative error {loss_error:.2e}"
    assert grad_error <= tolerance, f"relative L2 error {grad_error:.2e} of the gradient of {name}"


def errors(act: Act, world: int = 2, **settings: Any) -> list[SeqparError]:
    """What each rank raises."""

    def run(sp: SequenceParallel) -> SeqparError:
        with pytest.raises(SeqparError) as caught:
            act(sp)
        return caught.value

    return run_lockstep(run, world, timeout=100.0, **settings)


def assert_refused(found: list[SeqparError], kind: type[SeqparError], *texts: str) -> None:
    """On every rank an error of this class that says these texts and a fix."""
    assert [type(error) for error in found] == [kind] * len(found), found
    for text in (*texts, "Fix: "):
        assert all(text in str(error) for error in found), (text, str(found[0]))


BATCHES: dict[str, Callable[[], Batch]] = {
    "one odd document": lambda: packed([43]),
    "packed documents": lambda: packed([13, 1, 20, 7]),
    "rows padded at the right": lambda: padded([31, 18], 31),
    "packed rows": lambda: packed([11, 16], rows=2),
}
