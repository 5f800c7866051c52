"""transformers' Trainer and TRL's SFTTrainer over sequence groups: `ring(Trainer, size=4)` is a Trainer class.

What is overridden, and why: the data loaders, so that the ranks of a group get the same batch; the count of targets, so
that it is theirs and not the world's; the loss, since the model's is the mean over the world already; the gathering of
evaluation losses, once for each group; and the size of the batch as Trainer reports it. The model is parallelized after
Trainer has taken it (and PEFT has wrapped it). Private names are few, stand in `NEEDED`, and are looked for when the
class is made. No training loop of its own; no metrics that need the logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from seqpar_ring.config import Settings
from seqpar_ring.errors import BatchError, ConfigError, UnsupportedError, VersionError
from seqpar_ring.parallel import SequenceParallel

from . import trainer_rules as rules
from .transformers import parallelize

try:
    import transformers
    from accelerate.data_loader import prepare_data_loader
except ImportError as error:
    raise VersionError(
        "accelerate is missing, or too old", fix='Install it: pip install "seqpar-ring[trainer]".', error=str(error)
    ) from error

NEEDED = (
    *("__init__", "create_accelerator_and_postprocess", "compute_loss", "prediction_step", "get_cp_size"),
    *("get_train_dataloader", "get_eval_dataloader", "get_test_dataloader", "_get_num_items_in_batch"),
    *("train", "training_step", "evaluation_loop", "compute_loss_context_manager"),
    *("_prepare_inputs", "_track_num_input_tokens"),
)
"""Methods of a Trainer that are overridden or called here."""

PREPARED = "_is_accelerate_prepared"
"""accelerate's mark of a model that it has wrapped, or evaluated."""

T = TypeVar("T", bound=type)


def ring(trainer: T, size: int | None = None, **settings: Any) -> T:
    """A Trainer class that trains over sequence groups: use it as the one it is made of.

    Args:
        trainer: transformers' Trainer, TRL's SFTTrainer, or a class derived from them.
        size: ranks that share a sequence; if not given, the "seqpar_ring" block of the DeepSpeed config says it.
        **settings: as for `seqpar_ring.Settings`.

    Returns:
        A class derived from `trainer`. Its instances have `seqpar`, the SequenceParallel.

    Raises:
        ConfigError: an unknown or wrong setting.
        VersionError: a transformers without what is overridden here.
        UnsupportedError: the class computes a loss of its own; and later, when an instance is made, for arguments that
            cannot be exact.
    """
    missing = [name for name in NEEDED if not hasattr(trainer, name)]
    if missing or not isinstance(trainer, type):
        raise VersionError(
            "the class lacks methods of transformers' Trainer that are needed here",
            fix="Give Trainer or SFTTrainer; this was tested with transformers 5.24 and TRL 1.16.",
            given=getattr(trainer, "__name__", trainer),
            missing=missing,
            transformers=transformers.__version__,
        )
    rules.check_class(trainer)
    if size is None and settings:
        raise ConfigError("settings without a size", fix="Give size: the ranks that share a sequence.", **settings)
    asked = None if size is None else Settings.parse({"size": size, **settings})
    body = {"_seqpar_settings": asked, "__doc__": trainer.__doc__}
    made: Any = type(f"Ring{trainer.__name__}", (_Ring, trainer), body)
    return made  # type: ignore[no-any-return]


def data_loader(loader: DataLoader[Any], sp: SequenceParallel, device: torch.device | str | None = None) -> Any:
    """A data loader for a plain loop with accelerate: the ranks of a group get the same batches, data ranks others.

    Use it in place of `accelerator.prepare(loader)`. Collective over the world: torch's samplers that draw do it on
    every rank as on rank 0. A sampler of your own that draws has to draw the same on all ranks.
    """
    where = torch.device(device) if device is not None else None
    put = where is not None
    batches = loader.batch_sampler
    for sampler in (loader.sampler, batches, getattr(batches, "sampler", None)):
        _share_generator(sampler, sp)
    return prepare_data_loader(loader, where, sp.data_size, sp.data_rank, put_on_device=put, dispatch_batches=False)


def _share_generator(sampler: Any, sp: SequenceParallel) -> None:
    """Let a sampler that shuffles draw as rank 0's, on every rank; accelerate does so among several data ranks only."""
    if not hasattr(sampler, "generator"):  # those of torch that draw have one; what else draws is its maker's care
        return
    if sampler.generator is None:
        sampler.generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    state = sampler.generator.get_state().to(torch.int64)
    shared = sp.groups.everyone.all_reduce(state * (sp.groups.global_rank == 0))
    sampler.generator.set_state(shared.to(torch.uint8))


@dataclass(frozen=True)
class _DataRanks:
    """What accelerate reads of a device mesh to deal out batches: `size` ranks of a group get the same ones.

    For that it knows the names "tp" and "dp_replicate", whatever is parallel there.
    """

    sizes: Mapping[str, int]

    @property
    def mesh_dim_names(self) -> tuple[str, ...]:
        return tuple(self.sizes)

    def __getitem__(self, name: str) -> _DataRanks:
        return _DataRanks({name: self.sizes[name]})

    def size(self) -> int:
        (number,) = self.sizes.values()
        return number


class _Ring:
    """Mixed into a Trainer class by `ring`."""

    _seqpar_settings: Settings | None = None
    _seqpar_trained: frozenset[str] = frozenset()
    seqpar: SequenceParallel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        own: Any = super().__init__
        given = {**inspect.signature(own).bind_partial(*args, **kwargs).arguments, **kwargs}
        rules.check_given(given)
        rules.check_arguments(given.get("args"))  # before SFTTrainer has tokenized anything
        own(*args, **kwargs)
        me: Any = self
        rules.check_given(vars(self))  # what a subclass gave
        if self.seqpar.world_size != me.args.world_size:
            raise ConfigError(
                "Trainer and torch.distributed count different numbers of processes",
                fix="Start it with torchrun or accelerate launch; without a GPU set use_cpu=True in TrainingArguments.",
                trainer=me.args.world_size,
                world=self.seqpar.world_size,
            )
        parallelize(me.model, self.seqpar)
        me.model_accepts_loss_kwargs = me.loss_is_scaled_for_ga = True  # a class may say otherwise

    def create_accelerator_and_postprocess(self) -> None:
        """As Trainer does; then the sequence groups, on the ranks that accelerate has set up."""
        me: Any = self
        block = rules.block_of(me.args)
        asked = self._seqpar_settings or block
        if asked is None:
            raise ConfigError(
                "nobody says how many ranks share a sequence",
                fix='Give ring(Trainer, size=..), or a "seqpar_ring" block in the DeepSpeed config.',
            )
        if block is not None and block != asked:
            raise ConfigError(
                'ring(..) and the "seqpar_ring" block of the DeepSpeed config differ',
                fix="Say it in one place.",
                arguments=asked,
                block=block,
            )
        rules.check_arguments(me.args)  # a subclass may have made others
        rules.check_liger(me.args, asked.mlp != "whole")
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        rules.check_engine(me.args, me.is_deepspeed_enabled)
        self.seqpar = SequenceParallel(**asked.model_dump())
        rules.check_even_batches(me.args, self.seqpar.data_size)
        if me.is_deepspeed_enabled:
            from .deepspeed import install

            install()  # the engine is made by accelerate, through deepspeed.initialize

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, also after an evaluation.

        An evaluation before training marks the model as prepared, and accelerate then leaves out what averages the
        gradients (seen in accelerate 1.15): every rank would train a model of its own, and no loss would show it.
        """
        me: Any = self
        rules.check_given(vars(self))  # what was set since
        rules.check_arguments(me.args)
        if me.model_wrapped is me.model:
            vars(me.model).pop(PREPARED, None)
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, if something averages the gradients over all ranks.

        Raises:
            UnsupportedError: the model is not wrapped, or has parameters to train that it was wrapped without.
        """
        me: Any = self
        if not (self.seqpar.world_size == 1 or me.is_deepspeed_enabled or me.is_fsdp_enabled or rules.is_ddp(model)):
            raise rules.not_averaged(model, self.seqpar.world_size)
        if rules.is_ddp(model):
            trained = frozenset(name for name, p in me.model.named_parameters() if p.requires_grad)
            self._seqpar_trained = self._seqpar_trained or trained
            rules.check_trained(self._seqpar_trained, trained)
        return super().training_step(model, *args, **kwargs)  # type: ignore[misc]

    def get_cp_size(self) -> int:
        """Ranks that share a batch, as Trainer counts them for the size of the whole batch."""
        return self.seqpar.size

    def get_train_dataloader(self) -> Any:
        """As Trainer's; the ranks of a group get the same batches."""
        with self._dealt_to_groups():
            return super().get_train_dataloader()  # type: ignore[misc]

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; the ranks of a group get the same batches."""
        with self._dealt_to_groups():
            return super().get_eval_dataloader(*args, **kwargs)  # type: ignore[misc]

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; the ranks of a group get the same batches."""
        with self._dealt_to_groups():
            return super().get_test_dataloader(*args, **kwargs)  # type: ignore[misc]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> int | None:
        """Targets of the whole optimizer step over all data ranks, none of them across the border of two documents.

        Raises:
            DisagreementError: a data rank has fewer micro-batches than another; on every rank.
        """
        everyone = self.seqpar.groups.everyone
        labelled = all("labels" in batch for batch in batch_samples)
        record = {"micro-batches of this step": len(batch_samples), "labels": labelled}
        everyone.agree("the data loaders", record)
        return self.seqpar.count_targets(batch_samples) if batch_samples and labelled else None

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own loss, which is the token mean over the world already: nothing is scaled again."""
        weigh = {} if num_items_in_batch is None else {"num_items_in_batch": int(num_items_in_batch)}
        outputs = model(**inputs, **weigh)
        if outputs.loss is None:
            raise BatchError("a batch has no labels to compute a loss of", fix="Give labels.", keys=sorted(inputs))
        # Another tensor than the engine returned: DeepSpeed 0.19.8 divides the gradient of that one by the number of
        # micro-batches in ZeRO 0, where Trainer asks it not to.
        loss = outputs.loss.clone()
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, which gathers in its own way again after each evaluation.

        Raises:
            DisagreementError: a data rank has fewer batches than another; on every rank.
        """
        me: Any = self
        me.gather_function = self._gather_of_data_ranks
        found = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        self.seqpar.groups.agree("the end of an evaluation", {})
        return found

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss of an evaluation batch.

        Raises:
            UnsupportedError: logits are wanted.
        """
        if not prediction_loss_only:
            raise UnsupportedError(
                "predictions need the logits of whole sequences, which no rank holds",
                fix="Use evaluate() for the loss, or save the model and predict in one process.",
            )
        me: Any = self
        with torch.no_grad(), me.compute_loss_context_manager():
            loss = self.compute_loss(model, self._without_fillers(me._prepare_inputs(inputs)))
        return loss.detach(), None, None

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """As Trainer's, which sums over all ranks; the tokens of a group count once."""
        state: Any = vars(self)["state"]
        before = state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)  # type: ignore[misc]
        state.num_input_tokens_seen = before + (state.num_input_tokens_seen - before) // self.seqpar.size

    def store_flos(self) -> None:
        """As Trainer's, which sums over all ranks; each rank of a group counts the whole sequence."""
        state: Any = vars(self)["state"]
        before = state.total_flos
        super().store_flos()  # type: ignore[misc]
        state.total_flos = before + (state.total_flos - before) / self.seqpar.size

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's, which takes every rank for one with batches of its own where it counts steps of evaluation."""
        for name in [name for name in logs if name.endswith("_steps_per_second") and not name.startswith("train_")]:
            logs[name] = round(logs[name] * self.seqpar.size, 3)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _without_fillers(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """An evaluation batch without the targets of the rows with which accelerate fills the last one up.

        They are rows of before, and the loss is the mean over the targets of all data ranks.
        """
        me: Any = self
        found, alone = me.accelerator.gradient_state, self.seqpar.data_size == 1
        if alone or inputs.get("labels") is None or not found.end_of_dataloader or found.remainder <= 0:
            return inputs
        samples = me.args.eval_batch_size // self._parts_of_a_batch()
        own = max(0, found.remainder - self.seqpar.data_rank * samples)
        labels, problem = rules.labels_of_first(own, samples, inputs)
        self.seqpar.groups.agree("the last batch of an evaluation", {}, problem)
        return {**inputs, "labels": labels}

    def _parts_of_a_batch(self) -> int:
        """Data ranks that share what a data loader calls a batch."""
        me: Any = self
        return self.seqpar.data_size if me.accelerator.split_batches else 1

    @contextmanager
    def _dealt_to_groups(self) -> Iterator[None]:
        """While a data loader is made, accelerate takes the ranks of a group for one."""
        me: Any = self
        state = me.accelerator.state
        before = getattr(state, "device_mesh", None)
        state.device_mesh = _DataRanks({"dp_replicate": self.seqpar.data_size, "tp": self.seqpar.size})
        try:
            yield
        finally:
            state.device_mesh = before

    def _gather_of_data_ranks(self, losses: Tensor, *_: Any, **__: Any) -> Tensor:
        """Evaluation losses of all data ranks, once each; without the samples that fill up the last batch."""
        me: Any = self
        every = me.accelerator.gather(losses).reshape(self.seqpar.world_size, -1)
        once = every.shape[1] // self._parts_of_a_batch()  # Trainer repeats a loss as for a batch that is not split
        found: Tensor = every[:: self.seqpar.size, :once].flatten()
        left = me.accelerator.gradient_state.remainder
        last = me.accelerator.gradient_state.end_of_dataloader
        return found[:left] if last and left > 0 else found
