"""Step: the seconds of a training step: attention as simulated, everything else by its FLOP and bytes.

Products of matrices take FLOP / attained rate, norms and activations the bytes that they touch, the optimizer the
bytes of its states, ZeRO's collectives the bytes that each rank sends, as far as computation does not hide them.
Attention is priced by `cost.Ring`, once for all layers that see the same. Rates are the machine's.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

from seqpar_ring.config import Settings
from seqpar_ring.geometry import Mask
from seqpar_ring.planner.cost import Ring
from seqpar_ring.planner.hardware import BACKWARD, Machine
from seqpar_ring.planner.job import Choice, Workload
from seqpar_ring.planner.model import Model, Span
from seqpar_ring.schedule import Row

TOUCHED_HIDDEN, TOUCHED_MLP = 14, 3
"""Numbers of hidden and of intermediate width that norms, residuals, rotation and activation of a layer read or write
for each token, forward; twice that backward. Estimated from the operations of a Llama layer, each reading its inputs
and writing its outputs once; fused kernels touch less."""

ADAM_BYTES = 30
"""Bytes that an AdamW step touches for each parameter: gradient 4, fp32 weight and two moments 24, weight 2."""


class Step(NamedTuple):
    """A training step, in seconds of the slowest rank.

    Attributes:
        forward, backward: attention of all layers.
        exposed: of those, in which the ring computes nothing.
        again: attention that a recomputed layer runs again.
        dense: everything else in the layers, forward and backward.
        recomputed: the same, run again.
        head: logits and loss.
        optimizer: the update, with what is offloaded.
        collectives: of ZeRO, gathers and reductions, as far as computation does not hide them.
        flop: of the model, of all ranks, without what is run again.
        tokens: that all ranks together trained on.
        mfu: flop / (ranks x peak x seconds).
    """

    forward: float
    backward: float
    exposed: float
    again: float
    dense: float
    recomputed: float
    head: float
    optimizer: float
    collectives: float
    flop: float
    tokens: int
    mfu: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return (
            self.forward + self.backward + self.again + self.dense + self.recomputed + self.head + self.optimizer
            + self.collectives
        )  # fmt: skip

    @property
    def tokens_a_second(self) -> float:
        """Of all ranks together."""
        return self.tokens / self.seconds


class Attention(NamedTuple):
    """Attention of all layers, in seconds: both passes, what of them is exposed, and what a rank sends in them.

    `sending` is told apart by links: within nodes, between nodes.
    """

    forward: float
    backward: float
    exposed: float
    sending: tuple[float, float]


class Prices:
    """Rings of one workload on one machine, each priced once."""

    def __init__(self, workload: Workload, machine: Machine) -> None:
        self.workload, self.machine = workload, machine
        self.row: Row = workload.model.row(workload.itemsize)
        self._rings: dict[object, Ring] = {}
        self._attention: dict[object, Attention] = {}

    @cached_property
    def flop(self) -> float:
        """Of a step of one sequence group."""
        return model_flop(self.workload)

    def attention(self, choice: Choice) -> Attention:
        """The attention of all layers and sequences that a rank group holds at a time."""
        key = _key(choice.settings)
        if key not in self._attention:
            spans = self.workload.model.spans
            rings = [(span.layers * self.workload.batch, self.ring(choice, span)) for span in spans]
            self._attention[key] = Attention(
                sum(n * ring.forward.seconds for n, ring in rings),
                sum(n * ring.backward.seconds for n, ring in rings),
                sum(n * (ring.forward.exposed + ring.backward.exposed) for n, ring in rings),
                (sum(n * ring.sending[0] for n, ring in rings), sum(n * ring.sending[1] for n, ring in rings)),
            )
        return self._attention[key]

    def ring(self, choice: Choice, span: Span) -> Ring:
        """The attention of the layers of a span."""
        s, asked = choice.settings, self.workload
        key = (*_key(s), span[1:])
        if key not in self._rings:
            mask = mask_of(span, asked)
            self._rings[key] = Ring(asked.lengths, mask, s, self.row, (self.machine, asked.dtype))
        return self._rings[key]


def _key(s: Settings) -> tuple[object, ...]:
    """What of the settings a ring's price depends on."""
    return (s.size, s.layout, s.schedule, s.heads, s.node, s.block_tokens, s.backward)


def mask_of(span: Span, workload: Workload) -> Mask:
    """What the queries of these layers see; a window longer than every document is none."""
    longest = max(workload.lengths)
    window = span.window if span.window is not None and span.window < longest else None
    chunk = span.chunk if span.chunk is not None and span.chunk < longest else None
    return Mask.make(workload.causal, window if workload.causal else None, chunk)


def step(prices: Prices, choice: Choice) -> Step:
    """The seconds of a step of this workload with this choice."""
    workload, machine = prices.workload, prices.machine
    model, batch = workload.model, workload.batch
    forward, backward, exposed, sending = prices.attention(choice)
    far = choice.gpus > machine.node  # then the collectives of all ranks cross nodes
    again = forward if choice.checkpointing and choice.settings.remat == "none" else 0.0
    tokens = workload.tokens * batch / choice.settings.size
    layers_once, layers_backward, head = _dense(workload, machine, tokens)
    recomputed = layers_once if choice.checkpointing else 0.0
    if choice.settings.mlp != "whole":
        recomputed += layers_once * _share_of_mlps(model)  # a tile is run again in its own backward
    if choice.settings.logits != "whole":
        head *= (3 + workload.share_trained) / (2 + workload.share_trained)  # the same for a tile of logits
    offloaded = _offloaded(workload, choice, machine, tokens)
    dense = layers_once + layers_backward
    # Collectives hide under computation, not under waiting, and have the link when the ring does not.
    hiding = max(0.0, forward + backward - exposed + dense + recomputed + head - sending[far])
    flop = prices.flop * choice.data
    found = Step(
        forward,
        backward,
        exposed,
        again,
        dense,
        recomputed,
        head,
        _optimizer(workload, choice, machine),
        max(0.0, _collectives(workload, choice, machine) + offloaded - hiding),
        flop,
        workload.tokens * batch * choice.data,
        0.0,
    )
    return found._replace(mfu=flop / (choice.gpus * machine.device.peak * found.seconds))


def model_flop(workload: Workload) -> float:
    """FLOP of a step of one sequence group: 6 for each parameter that a token goes through (4 where it is frozen, for
    which no gradient is computed), and attention's pairs.

    The count of PaLM (arXiv 2204.02311, appendix B), but for causal attention, whose masked half is not counted.
    """
    model = workload.model
    pairs = sum(s.layers * float(mask_of(s, workload).regions(workload.lengths).pairs()) for s in model.spans)
    attention = (1 + BACKWARD) * 2 * model.heads * (model.head_dim + model.value_dim) * pairs
    each = 4.0 + 2.0 * workload.share_trained
    return workload.batch * (each * model.active_parameters * workload.tokens + attention)


def _dense(workload: Workload, machine: Machine, tokens: float) -> tuple[float, float, float]:
    """Seconds of all layers but for attention, forward and backward; and of the head, both.

    Backward is a product for the gradient of what came in, and one for that of the weights that are trained.
    """
    model, itemsize, rate = workload.model, workload.itemsize, machine.device.products(workload.dtype)
    head = model.vocabulary * model.hidden
    flop = 2.0 * tokens * (model.active_parameters - head)
    experts = model.experts
    width = model.intermediate if experts is None else experts.active * experts.width + experts.shared
    matrices = 3 if model.gated else 2
    touched = model.layers * tokens * itemsize * (TOUCHED_HIDDEN * model.hidden + TOUCHED_MLP * matrices * width / 2)
    products, passing, share = flop / rate, touched / machine.device.bandwidth, workload.share_trained
    logits = (2 + share) * 2.0 * tokens * head / rate + 4 * tokens * model.vocabulary * 4 / machine.device.bandwidth
    return products + passing, (1 + share) * products + 2 * passing, logits


def _share_of_mlps(model: Model) -> float:
    """What part of the layers' parameters, those of a token, are in MLPs."""
    layers = model.active_parameters - model.vocabulary * model.hidden
    return max(0.0, 1 - model.layers * model.attention_parameters / layers)


def _optimizer(workload: Workload, choice: Choice, machine: Machine) -> float:
    share = workload.parameters_trained / (choice.gpus if choice.zero else 1)
    touched = ADAM_BYTES if workload.optimizer == "adamw" else 10
    if not choice.offload_optimizer:
        return share * touched / machine.device.bandwidth
    # The host's cores update at about the rate at which the states cross its memory; gradients go there, weights back.
    return share * (touched + 4 + workload.itemsize) / machine.device.host_bandwidth


def _collectives(workload: Workload, choice: Choice, machine: Machine) -> float:
    """Seconds of ZeRO's traffic: each byte is gathered or reduced over all ranks, by all links of a node together.

    Rings through all ranks, one for each link between nodes, as NCCL lays them: each rank sends each byte once within
    its node, and each node once to the next.
    """
    gpus, model = choice.gpus, workload.model
    if gpus == 1:
        return 0.0
    bandwidth = machine.inner.bandwidth / min(machine.inner.shared_by, machine.node)
    if gpus > machine.node:
        outer = machine.outer
        bandwidth = min(bandwidth, machine.node * outer.bandwidth / min(outer.shared_by, machine.node))
    weights, gradients = model.parameters * workload.itemsize, workload.parameters_trained * workload.itemsize
    # All-reduce is a reduction and a gather; stage 3 gathers weights for forward and for backward instead.
    sent = 2 * weights + gradients if choice.zero == 3 else 2 * gradients
    return sent * (gpus - 1) / gpus / bandwidth


def _offloaded(workload: Workload, choice: Choice, machine: Machine, tokens: float) -> float:
    """Seconds between device and host, there and back."""
    model, moved = workload.model, 0.0
    if choice.offload_parameters:
        moved += 2 * model.parameters * workload.itemsize / choice.gpus
    if choice.settings.offload and choice.checkpointing and choice.settings.remat != "none":
        moved += 2 * model.layers * tokens * model.heads * (model.value_dim * workload.itemsize + 4)
    return moved / machine.device.host_bandwidth
