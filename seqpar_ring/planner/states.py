"""States: weights, gradients and the optimizer's, as DeepSpeed holds them in each stage of ZeRO, in bytes of a rank.

The stages are those of the ZeRO paper (arXiv 1910.02054, section 5): 1 shards the optimizer's states, 2 gradients too,
3 weights too. What DeepSpeed 0.19 holds beside them was read in its source and seen by tracking allocations: buffers in
which gradients wait to be reduced, weights that stay gathered because they are needed again soon, copies that an update
works on. One micro-batch a step, so that gradients are freed after it. No activations here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from seqpar_ring.planner.job import Choice, Workload
from seqpar_ring.planner.model import Model

END, LOSS, FINAL = "end of forward", "loss", "backward of the last norm"
MLP, NORM, ATTENTION = "backward of an MLP", "backward of a layer's norm", "backward of attention"
FIRST, AVERAGE, UPDATE = "backward of the first layer", "gradients averaged", "optimizer step"

MOMENTS = (END, LOSS, FINAL, MLP, NORM, ATTENTION, FIRST, AVERAGE, UPDATE)
"""When a step may be fullest, in order. MLP, NORM and ATTENTION are the last layer's: those before still hold all."""

FLAT = 500_000_000
"""Gradients that DeepSpeed without ZeRO copies into one buffer to average them (`numel_per_bucket`)."""

SUB_GROUP = 1_000_000_000
"""Parameters of a rank that ZeRO 3 updates at a time (`sub_group_size`)."""


class Buckets(NamedTuple):
    """DeepSpeed's buffers, in numbers of elements; the defaults are DeepSpeed's.

    Attributes:
        reduce: `reduce_bucket_size`.
        prefetch: `stage3_prefetch_bucket_size`.
        reuse: `stage3_max_reuse_distance`: what is needed again within so many parameters stays gathered.
    """

    reduce: int = 500_000_000
    prefetch: int = 50_000_000
    reuse: int = 1_000_000_000

    @staticmethod
    def auto(model: Model) -> Buckets:
        """What transformers makes of "auto" in a DeepSpeed configuration."""
        square = model.hidden**2
        return Buckets(square, int(0.9 * square))


class Held(NamedTuple):
    """Bytes of one kind.

    Attributes:
        name: what they are.
        at: on the device, by moment; none where it is not named.
        host: in the host's memory, at all times.
    """

    name: str
    at: dict[str, float]
    host: float = 0.0

    @staticmethod
    def always(name: str, size: float, host: bool = False) -> Held:
        """The same at all moments, on the device or in the host's memory."""
        return Held(name, {}, size) if host else Held(name, dict.fromkeys(MOMENTS, size))


class Update(NamedTuple):
    """What an optimizer's arithmetic makes: so many tensors of fp32, as large as all that it updates at a time.

    torch's AdamW takes parameters one by one on a CPU, all at once (`foreach`) on a GPU.
    """

    tensors: int
    foreach: bool


def states(workload: Workload, choice: Choice, buckets: Buckets, update: Update, matrix: int) -> Iterator[Held]:
    """What a rank holds of a model's states.

    Args:
        workload, choice: what is trained, and how.
        buckets: DeepSpeed's.
        update: what the optimizer's arithmetic makes.
        matrix: parameters of an MLP's largest matrix.
    """
    model, b, zero, host = workload.model, workload.itemsize, choice.zero, choice.offload_optimizer
    trained = workload.parameters_trained
    share = trained / (choice.gpus if zero else 1)
    yield Held.always("weights", b * model.parameters / (choice.gpus if zero == 3 else 1), choice.offload_parameters)
    if b < 4 or zero:  # ZeRO has fp32 weights of its own even where the model's are fp32
        yield Held.always("fp32 weights", 4 * share, host)
    if workload.optimizer == "adamw":
        yield Held.always("moments of the optimizer", 8 * share, host)
    if zero < 2:
        yield from _whole_gradients(workload, choice, matrix)
    else:
        yield _shard_of_gradients(workload, choice)
        yield _one_gradient(workload, matrix)
    if zero and choice.gpus > 1:
        yield Held.always("gradients on their way", b * buckets.reduce)
    if zero == 3 and choice.gpus > 1:
        yield _gathered(model, b, buckets)
    if host:
        yield Held("fp32 gradients", {}, 4 * share)
        return
    at_once = min(share, SUB_GROUP) if zero == 3 else share
    made = update.tensors * at_once
    if not zero and not update.foreach:  # one by one: what the parameter before needed is still there
        made = (update.tensors + 1.0) * min(max(matrix, model.vocabulary * model.hidden), trained)
    yield Held("fp32 gradients", {UPDATE: 4 * at_once if zero or b < 4 else 0.0})
    yield Held("what the update makes", {UPDATE: 4 * made})


def _shard_of_gradients(workload: Workload, choice: Choice) -> Held:
    """A rank's part: a buffer that stage 3 keeps, and stage 2 makes in backward and frees with the update."""
    size = workload.itemsize * workload.parameters_trained / choice.gpus
    if choice.offload_optimizer or choice.zero == 3:
        return Held.always("gradients", size, choice.offload_optimizer)
    return Held("gradients", dict.fromkeys((MLP, NORM, ATTENTION, FIRST, AVERAGE, UPDATE), size))


def _one_gradient(workload: Workload, matrix: int) -> Held:
    """The gradient of one whole matrix, before it is reduced: of the head, of the MLP, of attention's last
    projection; or, where few parameters are trained, at most those of all of them."""
    model, b, most = workload.model, workload.itemsize, workload.parameters_trained
    head, out = model.vocabulary * model.hidden, model.heads * model.value_dim * model.hidden
    at = {FINAL: head, MLP: matrix, NORM: matrix, ATTENTION: min(out, matrix), FIRST: matrix}
    return Held("gradient of one matrix", {moment: float(b * min(size, most)) for moment, size in at.items()})


def _whole_gradients(workload: Workload, choice: Choice, matrix: int) -> Iterator[Held]:
    """Gradients that are not sharded: they come into being as backward goes, from the head to the first layer. Where
    not all is trained, what is may be what comes first."""
    model, b, whole = workload.model, workload.itemsize, workload.parameters_trained
    head, layer = model.vocabulary * model.hidden, model.layer_parameters
    mlp, behind = head + matrix, head + layer - model.attention_parameters
    first = mlp + (model.layers - 1) * layer  # gradients of what was looked up come behind the first layer
    at = {FINAL: head, MLP: mlp, NORM: behind, ATTENTION: behind, FIRST: first, AVERAGE: whole, UPDATE: whole}
    yield Held("gradients", {moment: float(b * min(size, whole)) for moment, size in at.items()})
    if not choice.zero:
        yield Held("gradients in one piece, to be averaged", {AVERAGE: float(b * min(whole, FLAT))})


def _gathered(model: Model, b: int, buckets: Buckets) -> Held:
    """Weights that ZeRO 3 has gathered: at the end of forward those that backward needs within the reuse distance,
    which counts both ways; then they are given back as backward goes, down to a layer and what is fetched ahead of
    it."""
    layer = min(model.parameters, model.layer_parameters + buckets.prefetch)
    late = min(model.parameters, max(layer, buckets.reuse / 2))
    head = model.vocabulary * model.hidden * (not model.tied)
    last = max(layer, late - head)
    rest = max(layer, last - model.layer_parameters + model.attention_parameters)
    at = {END: late, LOSS: late, FINAL: last, MLP: last, NORM: rest, ATTENTION: rest, FIRST: layer}
    return Held("gathered weights", {moment: b * size for moment, size in at.items()})
