"""What a Trainer must be, and be given, to train exactly over sequence groups.

Each check returns, or raises an error which names the values and the fix; nothing here communicates.
"""

from __future__ import annotations

import os
from collections import UserDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from seqpar_ring.batch import IGNORED
from seqpar_ring.config import Settings
from seqpar_ring.errors import ConfigError, UnsupportedError

from .deepspeed_auto import undecided

REFUSED = {
    "model_init": "makes models that nobody could parallelize. Give the model itself.",
    "compute_loss_func": "would see the logits of a rank's tokens only. Leave it out: the loss is the token mean.",
    "label_smoother": "needs logits that no rank holds whole. Leave label_smoothing_factor at 0.",
    "compute_metrics": "needs the logits of whole sequences, which no rank holds. Leave it out: there is the loss.",
    "preprocess_logits_for_metrics": "needs the logits of whole sequences, which no rank holds. Leave it out.",
}
"""Arguments of a Trainer that could not be exact, and why."""

LOSSES = {
    "compute_loss": "loss",
    "prediction_step": "evaluation",
    "_get_num_items_in_batch": "number of targets",
}
"""Methods that are replaced here without being called, and what is computed there."""

KNOWN = (("transformers.trainer", "Trainer"), ("trl.trainer.sft_trainer", "SFTTrainer"))
"""Module and name of the classes whose methods of that kind are known to compute the mean over targets."""

ARGUMENTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": ((0.0, None), "label smoothing needs logits that no rank holds whole"),
    "loss_type": (("nll", "chunked_nll"), "this loss of SFTTrainer needs more than the mean over the targets"),
    "neftune_noise_alpha": (
        (None,),
        "NEFTune's noise is drawn by each rank, and scaled by the length of its shard instead of the sequence's",
    ),
}
"""Of TrainingArguments and SFTConfig: values that are exact, and why others are not."""


def block_of(args: Any) -> Settings | None:
    """The settings in the DeepSpeed config of a TrainingArguments, if it has any.

    Leaves the block there as a mapping that is no dict: accelerate fills in each "auto" of the config's dicts, and
    raises at those that it does not know (seen in 1.15).

    Raises:
        ConfigError: a wrong setting, or a size that is left open.
    """
    config = getattr(getattr(args, "hf_deepspeed_config", None), "config", None)
    if not isinstance(config, dict) or "seqpar_ring" not in config:
        return None
    block, where = config["seqpar_ring"], 'the "seqpar_ring" block of the DeepSpeed config'
    if undecided(block):
        raise ConfigError(
            f'{where} leaves "size" open, and Trainer needs the groups before there is an engine',
            fix='Give a size ("seqpar-ring plan" says which), or call deepspeed.initialize yourself.',
            size=block["size"],
        )
    settings = Settings.parse(block, where)
    config["seqpar_ring"] = UserDict(block)
    return settings


def check_engine(args: Any, enabled: bool) -> None:
    """Refuse a DeepSpeed config that is not used: accelerate 1.15 trains by DDP where ACCELERATE_USE_CPU is set.

    Raises:
        UnsupportedError: there is one, and accelerate does not use DeepSpeed.
    """
    if getattr(args, "deepspeed", None) and not enabled:
        raise UnsupportedError(
            "the training arguments have a DeepSpeed config, and accelerate does not use DeepSpeed here",
            fix="Without a GPU start it with torchrun and use_cpu=True: accelerate launch sets ACCELERATE_USE_CPU.",
            ACCELERATE_USE_CPU=os.environ.get("ACCELERATE_USE_CPU"),
        )


def check_class(trainer: type) -> None:
    """Refuse a Trainer class with a loss of its own, which would not be called.

    Raises:
        UnsupportedError: it is neither Trainer nor SFTTrainer that has the method.
    """
    for method, what in LOSSES.items():
        owner = next(kind for kind in trainer.__mro__ if method in vars(kind))
        if (owner.__module__, owner.__name__) not in KNOWN:
            raise UnsupportedError(
                f"the class has a {method} of its own, and over sequence groups the {what} is that of the mean loss",
                fix="Use transformers' Trainer or TRL's SFTTrainer, or a class that leaves this method alone; for a "
                "loss of your own write the loop, with sp.shard_batch(batch) and sp.loss(logits, labels, plan).",
                owner=owner.__name__,
            )


def is_ddp(model: nn.Module) -> bool:
    """Wrapped by torch's DistributedDataParallel, perhaps under a compiled module."""
    return isinstance(getattr(model, "_orig_mod", model), nn.parallel.DistributedDataParallel)


def not_averaged(model: nn.Module, world: int) -> UnsupportedError:
    """The error of a model that nothing is around which averages its gradients."""
    return UnsupportedError(
        "nothing averages the gradients over the ranks: the model is not wrapped",
        fix="Train with DDP (Trainer's default under torchrun), FSDP or DeepSpeed.",
        model=type(model).__name__,
        world=world,
    )


def check_trained(known: frozenset[str], now: frozenset[str]) -> None:
    """Refuse parameters that are trained since DDP has wrapped the model: it does not average their gradients.

    Raises:
        UnsupportedError: with some of their names.
    """
    since = sorted(now - known)
    if since:
        raise UnsupportedError(
            "parameters are trained that DDP wrapped the model without, and it does not average their gradients",
            fix="Let them require gradients before the first train(), or use DeepSpeed or FSDP.",
            parameters=since[:5],
            number=len(since),
        )


def check_even_batches(args: Any, data_size: int) -> None:
    """Refuse data ranks with unequal numbers of batches: the one without would keep the others waiting.

    Raises:
        UnsupportedError: even_batches is off, and there are several data ranks.
    """
    config = getattr(args, "accelerator_config", None)
    if data_size > 1 and not getattr(config, "even_batches", True):
        raise UnsupportedError(
            "without even_batches some data ranks may have one batch fewer, and the others would wait for them",
            fix="Leave even_batches out of the accelerator_config; evaluation does not count the rows that fill up.",
            data_ranks=data_size,
        )


def check_given(given: Mapping[str, Any]) -> None:
    """Refuse what a Trainer is given beside its arguments and could not be exact.

    Raises:
        UnsupportedError: with the name and what to do.
    """
    for name, why in REFUSED.items():
        if given.get(name) is not None:
            raise UnsupportedError(f"{name} {why.split('. ')[0]}", fix=why.split(". ", 1)[1], **{name: given[name]})


def check_arguments(args: Any) -> None:
    """Refuse TrainingArguments that could not be exact; turns off the dealing out of batches by one rank.

    Raises:
        UnsupportedError: with the argument's name and what to do.
    """
    parallelism = getattr(args, "parallelism_config", None)
    sizes = {name: getattr(parallelism, name, 1) for name in ("cp_size", "sp_size", "tp_size")}
    if max(sizes.values()) > 1:
        raise UnsupportedError(
            "sequences would be split twice, by ring(..) and by accelerate",
            fix="Leave cp_size, sp_size and tp_size of the ParallelismConfig out.",
            **sizes,
        )
    sampling = str(getattr(args, "train_sampling_strategy", "random"))
    if "batch_rebalance" in sampling:
        raise UnsupportedError(
            "this sampling strategy deals batches to ranks by itself, others to each rank of a sequence group",
            fix='Use "random", "sequential" or "group_by_length"; layout="packed" balances documents over ranks.',
            train_sampling_strategy=sampling,
        )
    for name, (exact, why) in ARGUMENTS.items():
        value = getattr(args, name, exact[0])
        if value not in exact:
            raise UnsupportedError(why, fix=f"Leave {name} at its default, {exact[0]!r}.", **{name: value})
    check_liger(args)
    config = getattr(args, "accelerator_config", None)
    if config is None:
        return
    if config.dispatch_batches:
        raise UnsupportedError(
            "with dispatch_batches one rank reads all batches and deals them out, not to sequence groups",
            fix="Leave dispatch_batches out of the accelerator_config: every rank reads.",
            dispatch_batches=config.dispatch_batches,
        )
    config.dispatch_batches = False  # the default deals out those of a stream


def check_liger(args: Any, tiled_mlps: bool = False) -> None:
    """Refuse those of Liger's kernels that take the place of what is ours; the others see one token at a time.

    Trainer applies them as it starts to train, when all else is looked at. Their names are those of liger-kernel 0.8.

    Raises:
        UnsupportedError: its loss, or its MLPs where these run in tiles.
    """
    if not getattr(args, "use_liger_kernel", False):
        return
    given: Mapping[str, Any] = getattr(args, "liger_kernel_config", None) or {}
    if given.get("fused_linear_cross_entropy", True):
        raise UnsupportedError(
            "Liger's fused cross entropy would take the mean over this rank's tokens",
            fix='Give liger_kernel_config={"fused_linear_cross_entropy": False}: large heads run in tiles here anyway.',
            liger_kernel_config=dict(given),
        )
    if tiled_mlps and (given.get("swiglu", True) or given.get("geglu", True)):
        raise UnsupportedError(
            "Liger's MLPs would take the place of those that run in tiles",
            fix='Leave "mlp" out of the settings, or give "swiglu": False and "geglu": False there.',
            liger_kernel_config=dict(given),
        )


def labels_of_first(own: int, samples: int, inputs: Mapping[str, Any]) -> tuple[Tensor, UnsupportedError | None]:
    """The labels of a batch without those of its samples from number `own` on; the second is why they cannot be told
    apart, if so.

    Args:
        own: samples that count, the first ones.
        samples: samples of the batch: its rows, or documents of a single row, whose positions restart.
        inputs: the batch, with labels (B, S).
    """
    labels: Tensor = inputs["labels"].clone()
    if own >= samples:
        return labels, None
    if labels.shape[0] == samples:
        labels[own:] = IGNORED
        return labels, None
    positions = inputs.get("position_ids")
    starts = (positions[0] == 0).nonzero().flatten().tolist() if labels.shape[0] == 1 and positions is not None else []
    if len(starts) == samples:
        labels[:, starts[own] :] = IGNORED
        return labels, None
    return labels, UnsupportedError(
        "the last batch of this evaluation is filled up with samples of before, which cannot be told from its own",
        fix="Set per_device_eval_batch_size=1, or leave out samples so that data ranks times batch size divides them.",
        samples_of_a_batch=samples,
        rows=labels.shape[0],
        documents=len(starts) or None,
    )
