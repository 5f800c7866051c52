"""Engines for the DeepSpeed tests, beside training a transformers model: one's own model, loaders, refusals, install.

Worker processes import these functions by name, and only they import DeepSpeed.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ds_cases import SMALL, VOCAB, model, optimizer_of, quietly_import_deepspeed, row
from hf_cases import turn_on
from torch import Tensor, nn
from torch.nn import functional

from seqpar_ring import SequenceParallel, ring_attention
from seqpar_ring import groups as process_groups
from seqpar_ring.errors import SeqparError
from seqpar_ring.places import Place


class OwnModel(torch.nn.Module):
    """No transformers model: one layer that calls the ring itself, or torch's attention where there is no plan."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.words = torch.nn.Embedding(VOCAB, 24)
            self.qkv = torch.nn.Linear(24, 72)
            self.head = torch.nn.Linear(24, VOCAB)

    def forward(self, ids_BS: Tensor, plan: Any = None) -> Tensor:
        q, k, v = (x.unflatten(-1, (3, 8)) for x in self.qkv(self.words(ids_BS)).chunk(3, -1))
        if plan is not None:
            out_BSHD = ring_attention(q, k, v, plan)
        else:
            whole = (x.transpose(1, 2) for x in (q, k, v))
            out_BSHD = functional.scaled_dot_product_attention(*whole, is_causal=True).transpose(1, 2)
        logits_BSV: Tensor = self.head(out_BSHD.flatten(2))
        return logits_BSV


def train_own_model(sp: SequenceParallel, stage: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a model that `initialize` leaves as it is."""
    quietly_import_deepspeed(sp)
    from deepspeed.utils import safe_get_full_grad
    from seqpar_ring.integrations.deepspeed import initialize

    made = OwnModel()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, **SMALL},
        "zero_allow_untested_optimizer": True,
        "seqpar_ring": {"size": sp.world_size, "layout": "striped"},
    }
    engine = initialize(model=made, optimizer=optimizer_of("sgd", made.parameters()), config=config)[0]
    ring: SequenceParallel = engine.seqpar_ring
    part = ring.shard_batch({key: x for key, x in row(0, 0, 0).items() if key != "position_ids"})
    loss = ring.loss(engine(part["input_ids"], part["seqpar_plan"]), part["labels"], part["seqpar_plan"])
    engine.backward(loss)
    grads = {name: safe_get_full_grad(p).float().clone() for name, p in engine.module.named_parameters()}
    engine.destroy()
    return loss.item(), grads


def dealt_samples(sp: SequenceParallel, size: int) -> list[int]:
    """What DeepSpeed's own loader, made from training_data=, gives this rank."""
    quietly_import_deepspeed(sp)
    from seqpar_ring.integrations.deepspeed import initialize

    made = model()
    config = {
        "train_batch_size": 2 * sp.world_size // size,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "seqpar_ring": {"size": size},
    }
    data = [torch.tensor(i) for i in range(8)]
    engine, _, loader, _ = initialize(
        model=made, optimizer=optimizer_of("sgd", made.parameters()), training_data=data, config=config
    )
    loader.num_local_io_workers = 0  # the ranks of a pool may not have processes of their own
    found = [int(i) for batch in loader for i in batch]
    assert engine.train_batch_size() == 2 * engine.seqpar_ring.data_size
    engine.destroy()
    return found


def refusal(sp: SequenceParallel, configs: list[Any], kwargs: dict[str, Any]) -> tuple[str, str]:
    """Name and text of the error that this rank's config, or the one all share, ends in."""
    quietly_import_deepspeed(sp)
    from seqpar_ring.integrations.deepspeed import initialize

    config = configs[sp.groups.global_rank % len(configs)]
    try:
        initialize(model=model(), config=copy.deepcopy(config), **kwargs)
    except SeqparError as error:
        return type(error).__name__, str(error)
    return "none", ""


def split_by_deepspeed(sp: SequenceParallel) -> tuple[str, str]:
    """The same of a model that DeepSpeed was told to split, without a word in the config."""
    deepspeed = quietly_import_deepspeed(sp)
    from deepspeed.runtime.tensor_parallel import init_utils
    from seqpar_ring.integrations.deepspeed import initialize

    made = deepspeed.tp_model_init(model(), tp_size=2, dtype=torch.float32)
    try:
        initialize(model=made, config={"seqpar_ring": {"size": 2}, "train_micro_batch_size_per_gpu": 1})
    except SeqparError as error:
        return type(error).__name__, str(error)
    finally:
        init_utils._TP_MODEL_INIT_ARGS = None  # DeepSpeed keeps them for the process
    return "none", ""


def of_deepspeed(sp: SequenceParallel, what: str) -> tuple[str, str]:
    """The same of a model with DeepSpeed's experts in it, or of one for its pipelines."""
    quietly_import_deepspeed(sp)
    from deepspeed.moe.experts import Experts
    from deepspeed.pipe import PipelineModule
    from seqpar_ring.integrations.deepspeed import initialize

    made: Any = nn.Sequential(nn.Linear(2, 2), Experts(nn.Linear(2, 2)))
    if what == "pipeline":
        made = PipelineModule.__new__(PipelineModule)  # made, it would ask for a topology of the ranks
        nn.Module.__init__(made)
    try:
        initialize(model=made, config={"seqpar_ring": {"size": 2}, "train_micro_batch_size_per_gpu": 1})
    except SeqparError as error:
        return type(error).__name__, str(error)
    return "none", ""


def decided_block(sp: SequenceParallel, hardware: str, tokens: int) -> dict[str, Any]:
    """The settings of an engine whose block leaves the size to the planner, and a step with it."""
    quietly_import_deepspeed(sp)
    from seqpar_ring.integrations.deepspeed import initialize

    made, block = model(), {"size": "auto", "tokens": tokens, "hardware": hardware, "fabric": "loopback"}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 1, **SMALL},
        "seqpar_ring": block,
    }
    turn_on(made, "plain")  # the search takes it as it is
    engine = initialize(model=made, optimizer=optimizer_of("sgd", made.parameters()), config=config)[0]
    ids = torch.arange(64)[None] % 97
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    found: dict[str, Any] = engine.seqpar_ring.settings.model_dump()
    engine.destroy()
    return found


def said_twice(sp: SequenceParallel, size: int | str) -> tuple[str, tuple[str, ...]]:
    """Of a model that was parallelized on GPUs of a known kind, and then given to DeepSpeed with a block of this size:
    the error, and what the first batch decides."""
    quietly_import_deepspeed(sp)
    from seqpar_ring.integrations.deepspeed import initialize
    from seqpar_ring.integrations.transformers import parallelize

    with pytest.MonkeyPatch.context() as patch:
        place = Place("here", "NVIDIA H100 80GB HBM3", str(sp.groups.global_rank))
        patch.setattr(process_groups, "place_of", lambda _: place)
        mine = SequenceParallel(sp.world_size)
    made = parallelize(model(), mine)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "seqpar_ring": {"size": size}}
    try:
        initialize(model=made, optimizer=optimizer_of("sgd", made.parameters()), config=config)[0].destroy()
    except SeqparError as error:
        return str(error), mine.undecided
    return "", mine.undecided


def device_set_first(sp: SequenceParallel, args: Any = None) -> list[str]:
    """In which order an engine's device is set and its groups are made, which are of the device that is set then."""
    quietly_import_deepspeed(sp)
    from deepspeed.accelerator import get_accelerator
    from seqpar_ring.integrations.deepspeed import initialize

    found: list[str] = []
    place, accelerator = process_groups.place_of, get_accelerator()

    def placed(device: Any) -> Any:
        found.append("groups")
        return place(device)

    made = OwnModel()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "seqpar_ring": {"size": sp.world_size},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process_groups, "place_of", placed)
        patch.setattr(accelerator, "set_device", lambda index: found.append(f"device {index}"))
        optimizer = optimizer_of("sgd", made.parameters())
        initialize(args, made, optimizer, config=config)[0].destroy()
    return found


def installed(sp: SequenceParallel) -> list[str]:
    """What `install` and `uninstall` make of deepspeed.initialize, called by its own name."""
    deepspeed = quietly_import_deepspeed(sp)
    from seqpar_ring.integrations.deepspeed import install, uninstall

    plain = deepspeed.initialize
    install()
    install()
    hooked = deepspeed.initialize
    config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
    made = model()
    optimizer = optimizer_of("sgd", made.parameters())
    engine = deepspeed.initialize(None, made, optimizer, config={**config, "seqpar_ring": {"size": sp.world_size}})[0]
    found = [type(engine.seqpar_ring).__name__, engine.module.config._attn_implementation]
    engine.destroy()
    without = model()
    engine = deepspeed.initialize(None, without, optimizer_of("sgd", without.parameters()), config=config)[0]
    found.append(str(hasattr(engine, "seqpar_ring")))
    engine.destroy()
    uninstall()
    uninstall()
    return [*found, str(hooked is not plain), str(deepspeed.initialize is plain)]


def unknown_version(sp: SequenceParallel) -> tuple[str, str]:
    """The error of a DeepSpeed whose initialize takes no mpu."""
    deepspeed = quietly_import_deepspeed(sp)
    real = deepspeed.initialize
    deepspeed.initialize = lambda model, config: None
    try:
        return refusal(sp, [{"seqpar_ring": {"size": 2}}], {})
    finally:
        deepspeed.initialize = real
