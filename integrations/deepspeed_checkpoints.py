"""DeepSpeed checkpoints that go on at another size: `save(engine, folder)`, then `load(engine, folder)` elsewhere.

DeepSpeed loads a checkpoint of ZeRO 1 to 3 only with as many ranks as saved it, else it must be converted to a
universal one first: `load` sees to that, once, beside the checkpoint. It compares what was saved with the model before
DeepSpeed touches either. Sequence groups leave no trace in weights or optimizer states, so size, layout and schedule
may differ. Files of checkpoints are DeepSpeed's; only a small record is added. Every rank must see the same folder.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from seqpar_ring.errors import ConfigError, SeqparError, VersionError
from seqpar_ring.parallel import SequenceParallel

from . import deepspeed_resume as resume

RECORD = "seqpar_ring.json"
"""A file in each checkpoint that `save` made: what it was saved from."""

MUST_AGREE = ("model", "vocabulary", "hidden_size", "layers")
"""Of the record, what a model that goes on must have in common with the one that was saved."""

SHARDED = {0: "nothing", 1: "optimizer states", 2: "optimizer states", 3: "parameters too"}
"""What ranks hold parts of, by ZeRO stage; DeepSpeed's files differ by it."""

STATES = "*_states.pt"
"""Files of a checkpoint that DeepSpeed writes: some for each rank, so fewer ranks leave those of more behind."""

CONVERTED = {"exp_avg", "exp_avg_sq"}
"""States of an optimizer, beside the step, that a universal checkpoint holds."""

UNIVERSAL = "_universal"
"""Added to a checkpoint's tag for its universal conversion."""

HEARTBEAT = 2.0
"""Seconds between looks of the waiting ranks at the conversion."""

LOG = logging.getLogger(__name__)


def save(engine: Any, folder: str | Path, tag: str | None = None, client_state: Mapping[str, Any] | None = None) -> str:
    """Save a checkpoint. Collective over the world.

    DeepSpeed names the newest checkpoint in the file `latest` after all of it is written, so a save that is cut off
    leaves the one before to be loaded.

    Args:
        engine: of `seqpar_ring.integrations.deepspeed.initialize`.
        folder: for all checkpoints of a run.
        tag: this one's name; DeepSpeed's default is global_step and its number.
        client_state: what else to save; `load` returns it.

    Returns:
        The tag.

    Raises:
        ConfigError: the tag is that of the newest checkpoint, which would be lost if this save were cut off.
    """
    sp = _group(engine)
    tag = f"global_step{engine.global_steps}" if tag is None else tag
    problem = None
    if (Path(folder) / tag).exists() and _latest(folder) == tag:
        problem = ConfigError(
            "a checkpoint would be overwritten, and lost if that were cut off",
            fix="Give another tag, or another folder.",
            folder=folder,
            tag=tag,
        )
    sp.groups.everyone.agree("save", {"tag": tag, "folder": str(folder)}, problem)
    if sp.groups.global_rank == 0:
        problem = _prepared(Path(folder), tag, _record(engine))
    sp.groups.everyone.agree("saving the checkpoint", {}, problem)  # nobody writes before the first rank has cleared
    engine.save_checkpoint(str(folder), tag=tag, client_state=dict(client_state or {}))
    return tag


def load(engine: Any, folder: str | Path, tag: str | None = None) -> dict[str, Any]:
    """Load a checkpoint into an engine of any number of ranks, sequence size and layout. Collective over the world.

    Args:
        engine: of `seqpar_ring.integrations.deepspeed.initialize`, not trained yet.
        folder: that it was saved in.
        tag: its name; the newest if not given.

    Returns:
        The client_state that it was saved with.

    Raises:
        ConfigError: no such checkpoint, one of another model, one of as many ranks in a ZeRO stage with other files,
            one of other ranks whose optimizer has states that cannot be converted (amsgrad, momentum of SGD), or whose
            conversion failed; on every rank.
        VersionError: a DeepSpeed that lacks what is needed here.
    """
    sp = _group(engine)
    problem: SeqparError | None = None
    found, parts, record = "", 0, dict[str, Any]()
    try:
        found = _tag(folder, tag)
        record = _expect_same_model(Path(folder) / found / RECORD, engine)
        part = f"*zero_pp_rank_*_mp_rank_{engine.mpu.get_model_parallel_rank():02d}_optim_states.pt"
        parts = len(list((Path(folder) / found).glob(part)))
        if parts not in (0, sp.world_size):
            _expect_convertible(record, parts, sp.world_size)
            resume.expect_known_groups(record.get("groups"), engine)
    except SeqparError as error:
        problem = error
    sp.groups.everyone.agree("load", {"tag": found, "parts": parts}, problem)
    fitting = parts in (0, sp.world_size)
    if fitting:
        _expect_same_files(record, engine, Path(folder) / found / RECORD)
    in_parts = engine.mpu.get_model_parallel_world_size() > 1
    if in_parts and not fitting:
        raise ConfigError(
            "a checkpoint of a model in parts was saved by another number of ranks",
            fix=f'Convert it, then load it with "checkpoint": {{"load_universal": true}}: '
            f"{' '.join(conversion(folder, found))}",
            saved_by=parts,
            ranks=sp.world_size,
        )
    if fitting:
        path, state = engine.load_checkpoint(str(folder), tag=found)
    else:
        _convert(sp, Path(folder), found, parts)
        with _universal(engine):
            path, state = engine.load_checkpoint(str(folder), tag=found + UNIVERSAL)
        if path is not None:
            resume.restore(engine, Path(folder) / found, parts, record.get("groups"))
    missing = ConfigError("DeepSpeed found nothing to load", fix="See its log.", folder=folder, tag=found)
    sp.groups.everyone.agree("loading the checkpoint", {}, None if path is not None else missing)
    return dict(state or {})


def conversion(folder: str | Path, tag: str) -> list[str]:
    """The command that converts a checkpoint to a universal one."""
    source, target = Path(folder) / tag, Path(folder) / (tag + UNIVERSAL)
    program = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    return [*program, "--input_folder", str(source), "--output_folder", str(target)]


def _convert(sp: SequenceParallel, folder: Path, tag: str, parts: int) -> None:
    """Convert on the first rank, into a folder that gets its name when it is whole; the others wait and see."""
    done, everyone = folder / (tag + UNIVERSAL), sp.groups.everyone
    command, partial = conversion(folder, tag), Path(f"{done}.partial")
    run: subprocess.Popen[bytes] | None = None
    problem = None
    with tempfile.TemporaryFile() as errors:  # of a pipe, which nobody reads meanwhile, bars of progress fill the room
        if sp.groups.global_rank == 0 and _outdated(done, folder / tag):
            _clear(folder, tag, states=False)
            LOG.info("checkpoint %s was saved by %d ranks: converting it for %d", tag, parts, sp.world_size)
            run = subprocess.Popen([*command[:-1], str(partial)], stdout=subprocess.DEVNULL, stderr=errors)
        while int(everyone.all_reduce(torch.tensor([int(run is not None and run.poll() is None)]))):
            time.sleep(HEARTBEAT)
        if run is not None and run.returncode:
            errors.seek(0)
            problem = ConfigError(
                "the checkpoint could not be converted for another number of ranks",
                fix=f"Run this, and look at what it says: {' '.join(command)}",
                saved_by=parts,
                ranks=sp.world_size,
                error=errors.read().decode(errors="replace").strip().splitlines()[-1:],
            )
        elif run is not None:
            partial.rename(done)
            (folder / "latest_universal").write_text(done.name)  # it named the folder as it was called until now
    everyone.agree("converting the checkpoint", {}, problem)


def _prepared(folder: Path, tag: str, record: Mapping[str, Any]) -> ConfigError | None:
    """A folder with the record and nothing else of ours, or why there is none."""
    try:
        _clear(folder, tag)
        (folder / tag).mkdir(parents=True, exist_ok=True)
        (folder / tag / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    except OSError as error:
        return ConfigError("the checkpoint's folder cannot be written", fix=str(error), folder=folder, tag=tag)
    return None


def _clear(folder: Path, tag: str, states: bool = True) -> None:
    """Remove what earlier saves under this tag have left: conversions, and the states themselves."""
    for name in (tag + UNIVERSAL, tag + UNIVERSAL + ".partial"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for file in (folder / tag).glob(STATES) if states else ():
        file.unlink()


def _outdated(done: Path, source: Path) -> bool:
    """Whether there is no conversion, or states that are newer: `engine.save_checkpoint` may have written them."""
    return not done.exists() or any(x.stat().st_mtime > done.stat().st_mtime for x in source.glob(STATES))


@contextmanager
def _universal(engine: Any) -> Iterator[None]:
    """The engine takes universal checkpoints, as with "checkpoint": {"load_universal": true} in its config."""
    config: Any = getattr(engine, "_config", None)
    if not hasattr(config, "load_universal_checkpoint"):
        raise VersionError(
            "DeepSpeed's engine cannot be told to load a universal checkpoint",
            fix='Use DeepSpeed 0.19, or set "checkpoint": {"load_universal": true} and use engine.load_checkpoint.',
        )
    before = config.load_universal_checkpoint
    config.load_universal_checkpoint = True
    try:
        yield
    finally:
        config.load_universal_checkpoint = before


def _group(engine: Any) -> SequenceParallel:
    sp = getattr(engine, "seqpar_ring", None)
    if not isinstance(sp, SequenceParallel):
        raise ConfigError(
            "the engine has no sequence group",
            fix="Make it with seqpar_ring.integrations.deepspeed.initialize and a block in its config.",
            engine=type(engine).__name__,
        )
    return sp


def _record(engine: Any) -> dict[str, Any]:
    """What a checkpoint is saved from."""
    config: Any = getattr(engine.module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    shape = {"vocabulary": "vocab_size", "hidden_size": "hidden_size", "layers": "num_hidden_layers"}
    sp = _group(engine)
    return {
        "model": type(engine.module).__name__,
        **{name: getattr(text, key, None) for name, key in shape.items()},
        "stage": engine.zero_optimization_stage(),
        "ranks": sp.world_size,
        "settings": sp.settings.model_dump(),
        "optimizer_states": _states(engine),
        "groups": resume.groups_of(engine),
        "parameters": resume.parameters_of(engine.module),
    }


def _expect_same_model(file: Path, engine: Any) -> dict[str, Any]:
    """A checkpoint's record, if `save` made it, compared with the model that is to go on."""
    if not file.exists():
        return {}
    saved, mine = json.loads(file.read_text()), _record(engine)
    for name in MUST_AGREE:
        if saved.get(name) != mine[name]:
            raise ConfigError(
                f"the checkpoint is of a model with another {name.replace('_', ' ')}",
                fix="Make the model as it was, or load its weights alone and begin anew.",
                checkpoint=saved.get(name),
                model=mine[name],
                file=file,
            )
    resume.expect_same_parameters(saved.get("parameters"), engine.module, file)
    found: dict[str, Any] = saved
    return found


def _expect_convertible(record: Mapping[str, Any], parts: int, ranks: int) -> None:
    """DeepSpeed's conversion knows Adam's states, drops others, and fails without these."""
    saved = record.get("optimizer_states")
    if saved and set(saved) - {"step"} != CONVERTED:
        raise ConfigError(
            "the optimizer has states that DeepSpeed cannot convert for another number of ranks",
            fix=f"Load it with {parts} ranks, or train with an optimizer whose states are those of Adam.",
            states=sorted(saved),
            converted=sorted(CONVERTED),
            saved_by=parts,
            ranks=ranks,
        )


def _states(engine: Any) -> list[str]:
    """Names of what the optimizer keeps of a parameter; none where it has not stepped."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    states = getattr(optimizer, "state", {}) or {}
    return sorted({str(name) for state in states.values() if isinstance(state, Mapping) for name in state})


def _expect_same_files(record: Mapping[str, Any], engine: Any, file: Path) -> None:
    """DeepSpeed stops within itself at a checkpoint whose files are those of another kind of ZeRO stage."""
    saved = record.get("stage")
    stage = engine.zero_optimization_stage()
    if saved is not None and SHARDED.get(saved) != SHARDED.get(stage):
        raise ConfigError(
            "the checkpoint was saved in a ZeRO stage whose files this one cannot load",
            fix=f'Go on with "zero_optimization": {{"stage": {saved}}}.',
            saved_in_stage=saved,
            stage=stage,
            file=file,
        )


def _latest(folder: str | Path) -> str | None:
    file = Path(folder) / "latest"
    return file.read_text().strip() if file.exists() else None


def _tag(folder: str | Path, tag: str | None) -> str:
    found = _latest(folder) if tag is None else tag
    if found is None or not (Path(folder) / found).is_dir():
        there = sorted(one.name for one in Path(folder).glob("*") if one.is_dir()) if Path(folder).is_dir() else []
        fix = "Give the folder of the checkpoints, and a tag that is in it."
        raise ConfigError("no such checkpoint", fix=fix, folder=folder, tag=tag, found=there)
    return found
