"""What DeepSpeed's universal checkpoints leave out, so that a run goes on at another number of ranks as it was.

A universal checkpoint holds the parameters that are trained and the states of their optimizer. Buffers and frozen
parameters would stay those of the fresh model; ZeRO 3 gives all groups of the optimizer the numbers of the first, and
all its parts one count of steps, which each of them then counts up. Here they come from the checkpoint that was
converted, and from the record beside it. And whether the parameters are those that were saved is looked at by name and
shape before DeepSpeed touches any: it fills in zeros for others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqpar_ring.errors import ConfigError

MODULE_FILE, SHARD_FILE = "mp_rank_00_model_states.pt", "zero_pp_rank_{}_mp_rank_00_model_states.pt"
"""Where DeepSpeed keeps a model's state: in one file in ZeRO 0 to 2, in one for each rank in ZeRO 3."""


def parameters_of(module: torch.nn.Module) -> dict[str, list[int]]:
    """The shape of each parameter by name, whole also where ZeRO 3 has spread it."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters()}


def expect_same_parameters(saved: Mapping[str, list[int]] | None, module: torch.nn.Module, file: Path) -> None:
    """Refuse a model whose parameters are not those that were saved; older records do not say.

    Raises:
        ConfigError: with the first that differs.
    """
    if saved is None:
        return
    mine = parameters_of(module)
    for name in [*mine, *saved]:
        if saved.get(name) != mine.get(name):
            raise ConfigError(
                "the checkpoint is of a model with other parameters",
                fix="Make the model as it was, or load its weights alone and begin anew.",
                parameter=name,
                checkpoint=saved.get(name, "none of this name"),
                model=mine.get(name, "none of this name"),
                file=file,
            )


def groups_of(engine: Any) -> list[dict[str, Any]]:
    """The numbers of each group of the optimizer: its learning rate, weight decay and so on."""
    groups = getattr(engine.optimizer, "param_groups", None) or []
    return [{key: value for key, value in group.items() if _is_plain(value)} for group in groups]


def expect_known_groups(saved: list[dict[str, Any]] | None, engine: Any) -> None:
    """Refuse several groups in ZeRO 3 of which the record says nothing, or another number of them.

    Raises:
        ConfigError: DeepSpeed would give all of them the numbers of the first.
    """
    mine = groups_of(engine)
    if engine.zero_optimization_stage() == 3 and len(mine) > 1 and len(saved or []) != len(mine):
        raise ConfigError(
            "the groups of the optimizer are not those that were saved, or the checkpoint does not say them",
            fix="Load it with as many ranks as saved it, and save it anew with seqpar_ring's save.",
            groups=len(mine),
            saved=None if saved is None else len(saved),
        )


@torch.no_grad()
def restore(engine: Any, source: Path, ranks: int, groups: list[dict[str, Any]] | None) -> None:
    """After a universal checkpoint was loaded: buffers, frozen parameters, counts of steps, and groups' numbers.

    Args:
        engine: that has loaded it.
        source: the checkpoint that it was converted from.
        ranks: that saved it.
        groups: of the record.

    Raises:
        ConfigError: the checkpoint lacks something that the model has.
    """
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for state in (getattr(inner, "state", None) or {}).values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()
    for mine, saved in zip(getattr(engine.optimizer, "param_groups", None) or [], groups or [], strict=False):
        mine.update({key: tuple(v) if isinstance(v, list) else v for key, v in saved.items() if key in mine})
    module: torch.nn.Module = engine.module
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    kept = module.state_dict().keys()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in kept}
    if not frozen and not buffers:
        return
    stage = engine.zero_optimization_stage()
    names = [SHARD_FILE.format(r) for r in range(ranks)] if stage == 3 else [MODULE_FILE]
    states = [_read(source / name) for name in names]
    for name, buffer in buffers.items():
        buffer.copy_(_found(states[0]["module"], name, source))
    for name, parameter in frozen.items():
        if stage == 3:
            _into_parts(parameter, _whole(states, name, source))
        else:
            parameter.copy_(_found(states[0]["module"], name, source))


def _read(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=False)
    except OSError as error:
        fix = "See whether it was saved to its end."
        raise ConfigError("the checkpoint lacks a file", fix=fix, file=file) from error


def _found(states: Mapping[str, Any], name: str, source: Path) -> Any:
    if name not in states:
        raise ConfigError(
            "the checkpoint lacks a buffer or a frozen parameter of the model",
            fix="Load it with as many ranks as saved it, or save it without exclude_frozen_parameters.",
            name=name,
            checkpoint=source,
        )
    return states[name]


def _whole(states: list[Any], name: str, source: Path) -> Tensor:
    """A frozen parameter, of its parts in the files of all ranks; the last has padding."""
    shape = _found(states[0].get("frozen_param_shapes") or {}, name, source)
    parts = [_found(state.get("frozen_param_fragments") or {}, name, source) for state in states]
    return torch.cat([part.flatten() for part in parts])[: shape.numel()].view(shape)


def _into_parts(parameter: Any, whole: Tensor) -> None:
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if torch.distributed.get_rank() == 0:
            parameter.copy_(whole)


def _is_plain(value: Any) -> bool:
    values: Iterator[Any] = iter(value) if isinstance(value, list | tuple) else iter((value,))
    return all(one is None or isinstance(one, bool | int | float) for one in values)
