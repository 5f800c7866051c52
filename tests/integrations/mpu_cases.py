"""A model in parts (tensor parallelism) and its mpu, trained by DeepSpeed with the sequence shared out in each part.

The parts are Megatron's: heads and the MLP's hidden width split over a model-parallel group, whose ranks see the same
tokens and sum their outputs. Worker processes import these functions by name, and only they import DeepSpeed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ds_cases import SMALL, VOCAB, model, optimizer_of, quietly_import_deepspeed, row
from torch import Tensor, nn
from torch.nn import functional

from seqpar_ring import SequenceParallel, ring_attention
from seqpar_ring.errors import SeqparError

HEADS, WIDTH = 4, 6


class Mpu:
    """Parts of a model on consecutive ranks, data parallel otherwise; what an mpu must have, and nothing else."""

    def __init__(self, parts: int) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        models = [list(range(first, first + parts)) for first in range(0, world, parts)]
        data = [list(range(first, world, parts)) for first in range(parts)]
        groups = {tuple(line): dist.new_group(line) for line in models + data}
        self._model = next(groups[tuple(line)] for line in models if rank in line)
        self._data = next(groups[tuple(line)] for line in data if rank in line)

    def get_model_parallel_group(self) -> Any:
        return self._model

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._model)

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self._model)

    def get_data_parallel_group(self) -> Any:
        return self._data

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._data)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._data)


class Summed(torch.autograd.Function):
    """Sums over the parts, in forward or else in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, now: bool) -> Tensor:
        ctx.group, ctx.now = group, now
        if now:
            x = x.clone()
            dist.all_reduce(x, group=group)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if not ctx.now:
            grad = grad.contiguous().clone()
            dist.all_reduce(grad, group=ctx.group)
        return grad, None, None


class Split(nn.Module):
    """One layer of attention whose heads are split over the parts; whole where there is no group."""

    def __init__(self, group: Any = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.words = nn.Embedding(VOCAB, HEADS * WIDTH)
            self.qkv = nn.ModuleList(nn.Linear(HEADS * WIDTH, HEADS * WIDTH, bias=False) for _ in range(3))
            self.out = nn.Linear(HEADS * WIDTH, HEADS * WIDTH, bias=False)
            self.head = nn.Linear(HEADS * WIDTH, VOCAB)
        self.group = group
        if group is not None:
            for linear in self.qkv:
                linear.weight = part_of(linear.weight, group, 0)
            self.out.weight = part_of(self.out.weight, group, 1)

    def forward(self, ids_BS: Tensor, plan: Any = None) -> Tensor:
        x = self.words(ids_BS)
        inner = x if self.group is None else Summed.apply(x, self.group, False)
        q, k, v = (linear(inner).unflatten(-1, (-1, WIDTH)) for linear in self.qkv)
        if plan is not None:
            mixed = ring_attention(q, k, v, plan)
        else:
            whole = (one.transpose(1, 2) for one in (q, k, v))
            mixed = functional.scaled_dot_product_attention(*whole, is_causal=True).transpose(1, 2)
        out = self.out(mixed.flatten(2))
        logits_BSV: Tensor = self.head(x + (out if self.group is None else Summed.apply(out, self.group, True)))
        return logits_BSV


def part_of(weight: Tensor, group: Any, dim: int) -> nn.Parameter:
    """This rank's part of a weight, marked as one, as Megatron does it."""
    mine = weight.detach().chunk(dist.get_world_size(group), dim)[dist.get_rank(group)]
    made = nn.Parameter(mine.clone())
    made.tensor_model_parallel = True  # type: ignore[attr-defined]
    return made


def batch_of(index: int) -> dict[str, Tensor]:
    return {key: x for key, x in row(0, 0, index).items() if key != "position_ids"}


def alone(rows: int) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, gradient norm and gradients of the whole model in one process: the mean over the targets of all rows."""
    made, total, count = Split(), torch.zeros(()), 0
    for batch in map(batch_of, range(rows)):
        labels = batch["labels"][:, 1:].flatten()
        logits = made(batch["input_ids"])[:, :-1].flatten(0, 1)
        total = total + functional.cross_entropy(logits, labels, reduction="sum")
        count += int((labels >= 0).sum())
    loss = total / count
    loss.backward()
    norm = nn.utils.clip_grad_norm_(made.parameters(), 1e9)
    return loss.item(), norm.item(), {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


def both(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows as one batch."""
    return {key: torch.cat([one[key] for one in rows]) for key in rows[0]}


def config_of(stage: int, size: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 100.0,
        "zero_optimization": {"stage": stage, **SMALL},
        "zero_allow_untested_optimizer": True,
        "seqpar_ring": {"size": size},
    }


def train(_: SequenceParallel, stage: int, parts: int, size: int) -> tuple[float, float | None, dict[str, Tensor]]:
    """The same by DeepSpeed, with an mpu of `parts` and `size` ranks a sequence; parts of weights put together."""
    quietly_import_deepspeed(_)
    from deepspeed.utils import safe_get_full_grad
    from seqpar_ring.integrations.deepspeed import initialize

    mpu = Mpu(parts)
    made = Split(mpu.get_model_parallel_group() if parts > 1 else None)
    optimizer = optimizer_of("sgd", made.parameters())
    engine = initialize(model=made, optimizer=optimizer, mpu=mpu, config=config_of(stage, size))[0]
    ring: SequenceParallel = engine.seqpar_ring
    assert (ring.size, ring.data_size) == (size, dist.get_world_size() // parts // size)
    assert engine.train_batch_size() == ring.data_size
    part = ring.shard_batch(batch_of(ring.data_rank))
    loss = ring.loss(engine(part["input_ids"], part["seqpar_plan"]), part["labels"], part["seqpar_plan"])
    engine.backward(loss)
    grads = {}
    for name, p in engine.module.named_parameters():
        grad = (safe_get_full_grad(p) if stage else p.grad).float().clone()
        if hasattr(p, "tensor_model_parallel") and parts > 1:
            pieces = [torch.empty_like(grad) for _ in range(parts)]
            dist.all_gather(pieces, grad, group=mpu.get_model_parallel_group())
            grad = torch.cat(pieces, 1 if name.startswith("out") else 0)
        grads[name] = grad
    engine.step()
    norm = engine.get_global_grad_norm()
    engine.destroy()
    return loss.item(), None if norm is None else float(norm), grads


def refused(sp: SequenceParallel, what: str) -> str:
    """The message with which an mpu is refused."""
    quietly_import_deepspeed(sp)
    from seqpar_ring.integrations.deepspeed import initialize
    from seqpar_ring.integrations.transformers import parallelize

    mpu: Any = Mpu(2)
    made: Any = Split()
    size = 2
    if what == "methods":
        mpu = "mine"
    elif what == "sequence":
        mpu.get_sequence_parallel_world_size = lambda: 2
    elif what == "pipeline":
        mpu.get_pipe_parallel_world_size = lambda: 2
    elif what == "context":
        mpu.get_context_parallel_world_size = lambda: 2
    elif what == "others in between":  # as context parallelism by another name: ranks that are averaged with nobody
        alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        mpu.get_model_parallel_group = lambda: alone[dist.get_rank()]
    elif what == "size":
        size = 4
    elif what == "crossed":
        mpu.get_model_parallel_group = mpu.get_data_parallel_group
    elif what == "other ranks":
        made = parallelize(model(), SequenceParallel(2))
    try:
        initialize(model=made, optimizer=optimizer_of("sgd", made.parameters()), mpu=mpu, config=config_of(1, size))
    except SeqparError as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def stopped_and_gone_on(sp: SequenceParallel, folder: str, size: int, then: int) -> tuple[list[float], str]:
    """Losses of six steps over two parts: four, a save, and two in another engine; and what a third is told, for which
    files are missing."""
    quietly_import_deepspeed(sp)
    from seqpar_ring.integrations import deepspeed_checkpoints as checkpoints
    from seqpar_ring.integrations.deepspeed import initialize

    losses = []
    for steps, share in ((4, size), (2, then), (0, then)):
        mpu = Mpu(2)
        made = Split(mpu.get_model_parallel_group())
        optimizer = optimizer_of("adamw", made.parameters())
        engine = initialize(model=made, optimizer=optimizer, mpu=mpu, config=config_of(2, share))[0]
        ring: SequenceParallel = engine.seqpar_ring
        if losses and steps:
            checkpoints.load(engine, folder)
        for _ in range(steps):
            rows = [batch_of(index) for index in range(2)]
            part = ring.shard_batch(rows[ring.data_rank] if ring.data_size == 2 else both(rows))
            loss = ring.loss(engine(part["input_ids"], part["seqpar_plan"]), part["labels"], part["seqpar_plan"])
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        if steps == 4:
            checkpoints.save(engine, folder)
        if not steps:
            told = lost(ring, engine, folder)
        engine.destroy()
    return losses, told


def lost(ring: SequenceParallel, engine: Any, folder: str) -> str:
    """The message where the checkpoint's files are those of fewer ranks."""
    from seqpar_ring.integrations import deepspeed_checkpoints as checkpoints

    if ring.groups.global_rank == 0:
        for file in Path(folder).glob("*/*zero_pp_rank_1_*"):
            file.unlink()
    dist.barrier()
    try:
        checkpoints.load(engine, folder)
    except SeqparError as error:
        return str(error)
    return "not refused"


def alone_in_steps(steps: int) -> list[float]:
    """Losses of the whole model in one process, two rows a step."""
    made = Split()
    optimizer, losses = optimizer_of("adamw", made.parameters()), []
    batch = both([batch_of(index) for index in range(2)])
    for _ in range(steps):
        logits = made(batch["input_ids"])[:, :-1].flatten(0, 1)
        loss = functional.cross_entropy(logits, batch["labels"][:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
