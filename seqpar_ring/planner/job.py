"""Job: what is asked of the planner, and what may be chosen for it. Plain data that everything else here takes."""

from __future__ import annotations

from typing import NamedTuple

from seqpar_ring.config import Settings
from seqpar_ring.planner.model import Model

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of a number by dtype."""


class Workload(NamedTuple):
    """What is to be trained.

    Attributes:
        model: its shapes.
        lengths: tokens of the documents of one sequence; mostly one.
        dtype: of weights and activations: "bf16", "fp16" or "fp32".
        batch: sequences that a rank group holds at a time.
        causal: whether a query sees only what is before it.
        optimizer: "adamw" (two moments of 4 bytes) or "sgd" (none).
        trained: parameters that have gradients and optimizer states; None: all. LoRA has few.
    """

    model: Model
    lengths: tuple[int, ...]
    dtype: str = "bf16"
    batch: int = 1
    causal: bool = True
    optimizer: str = "adamw"
    trained: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of one sequence."""
        return sum(self.lengths)

    @property
    def parameters_trained(self) -> int:
        """Parameters that have gradients and optimizer states."""
        return self.model.parameters if self.trained is None else self.trained

    @property
    def share_trained(self) -> float:
        """The same as a share of all."""
        return self.parameters_trained / self.model.parameters

    @property
    def itemsize(self) -> int:
        """Bytes of a number of weights and activations."""
        return ITEMSIZE[self.dtype]


class Choice(NamedTuple):
    """What is chosen for it.

    Attributes:
        gpus: ranks of the world.
        settings: of the ring: size, layout, schedule, heads, node, block_tokens, remat, offload, logits, mlp.
        checkpointing: whether layers are recomputed in backward.
        zero: ZeRO stage, 0 to 3, over the whole world.
        offload_optimizer: whether optimizer states (and fp32 weights) live in the host's memory.
        offload_parameters: whether weights do too; with ZeRO 3.
    """

    gpus: int
    settings: Settings
    checkpointing: bool = True
    zero: int = 3
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @property
    def data(self) -> int:
        """Sequence groups, each with data of its own."""
        return self.gpus // self.settings.size
