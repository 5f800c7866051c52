"""Does this model compute the same over a ring? One training step in one process, and over some: loss and gradients.

The one-process side is plain transformers with sdpa attention, each document alone; the other side is the model that
`parallelize` makes, on processes that are started here. Any difference beyond rounding is named by its parameter. Runs
on the CPU over gloo, whatever the machine has, so that it says something about the model and not about the network.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from seqpar_ring.config import Settings
from seqpar_ring.errors import ConfigError, VersionError
from seqpar_ring.parallel import SequenceParallel
from seqpar_ring.testing import RankPool, relative_error

try:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar
except ImportError as error:
    raise VersionError(
        "transformers is missing", fix='Install it: pip install "seqpar-ring[transformers]".', error=str(error)
    ) from error

LOSS, GRADIENT = 1e-5, 1e-4
"""In fp32: largest relative error of the loss, and relative L2 error of a parameter's gradient."""

AS_GOOD_AS = 1.2
"""In bf16: the error of all gradients together against fp32, as a multiple of one bf16 process's."""

TIMEOUT = 900.0


@dataclass(frozen=True)
class Case:
    """What is compared.

    Attributes:
        path: a model's folder, as `from_pretrained` takes it; with only a config.json its weights are random.
        lengths: tokens of each packed document.
        ranks: ranks that share the sequence.
        layers: so many of the model's first layers; None: all.
        dtype: "float32" or "bfloat16".
        settings: of the ring, beside the size.
    """

    path: str
    lengths: tuple[int, ...]
    ranks: int = 2
    layers: int | None = None
    dtype: str = "float32"
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> bool:
        """Whether the folder holds weights."""
        return any(any(Path(self.path).glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin"))


class Row(NamedTuple):
    """A parameter and the relative L2 error of its gradient."""

    parameter: str
    error: float


@dataclass(frozen=True)
class Parity:
    """What was found.

    Attributes:
        alone, over: the loss in one process and over the ring.
        worst: the parameters whose gradients differ most, the worst first.
        together, allowed: in bf16, the relative error of all gradients against fp32, and what it may be; None in fp32.
        seconds: how long it took.
    """

    alone: float
    over: float
    worst: tuple[Row, ...]
    together: float | None
    allowed: float | None
    seconds: float

    @property
    def loss_error(self) -> float:
        """Relative difference of the losses."""
        return abs(self.over - self.alone) / max(abs(self.alone), 1e-12)

    @property
    def good(self) -> bool:
        """Whether all is within the bounds. What is not a number is not."""
        if self.together is not None and self.allowed is not None:
            return self.together <= self.allowed
        return self.loss_error <= LOSS and all(row.error <= GRADIENT for row in self.worst)


def check(case: Case) -> None:
    """Refuse what cannot be compared, before any model is loaded.

    Raises:
        ConfigError: no such model, more ranks than tokens, an unknown dtype, wrong settings.
    """
    if not (Path(case.path) / "config.json").exists():
        raise ConfigError("no model there", fix="Give the folder of a model: it holds a config.json.", path=case.path)
    if case.dtype not in ("float32", "bfloat16"):
        raise ConfigError("unknown dtype", fix="Give float32 or bfloat16.", dtype=case.dtype)
    if min(case.lengths, default=0) < 1 or sum(case.lengths) < 2 * case.ranks:
        fix = "Give documents of at least one token each, and two tokens a rank or more."
        raise ConfigError("too few tokens", fix=fix, documents=case.lengths, ranks=case.ranks)
    Settings.parse({"size": case.ranks, **case.settings})


def parity(case: Case, say: Callable[[str], None] = lambda _: None) -> Parity:
    """Compare one training step. Starts `case.ranks` processes, and ends them.

    Args:
        case: what to compare; `check` it first.
        say: told what is under way.

    Raises:
        ConfigError: the folder holds no model that can be loaded.
        SeqparError: the model cannot be exact over a ring; what `parallelize` or its first forward says.
    """
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        say("one process, fp32")
        truth = _alone(case, torch.float32)
        reference = truth
        if case.dtype == "bfloat16":
            say("one process, bf16")
            reference = _alone(case, torch.bfloat16)
        torch.save({"truth": truth, "reference": reference}, Path(folder) / "alone.pt")
        say(f"{case.ranks} ranks")
        with RankPool(case.ranks, timeout=TIMEOUT) as pool:
            over, rows, together, allowed = pool.run(_over, case, folder, **case.settings)[0]
    worst = tuple(sorted(rows, key=lambda row: -row.error if row.error == row.error else float("-inf")))
    seconds = time.perf_counter() - begin
    if case.dtype == "float32":
        return Parity(reference[0], over, worst, None, None, seconds)
    return Parity(reference[0], over, worst, together, allowed, seconds)


def _load(case: Case, dtype: torch.dtype) -> Any:
    """The model, cut to its first layers if so asked, in training mode."""
    disable_progress_bar()  # one for each process, into each other
    try:
        config = AutoConfig.from_pretrained(case.path)
        text = config.get_text_config()
        if case.layers is not None and case.layers < text.num_hidden_layers:
            text.num_hidden_layers = case.layers
            if getattr(text, "layer_types", None):
                text.layer_types = text.layer_types[: case.layers]
        if case.weights:
            return AutoModelForCausalLM.from_pretrained(case.path, config=config, dtype=dtype).train()
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).to(dtype).train()
    except (ValueError, OSError, KeyError) as found:
        fix = "See whether transformers loads it: AutoModelForCausalLM.from_pretrained(path)."
        raise ConfigError("the model cannot be loaded", fix=fix, path=case.path, error=str(found)) from found


def _tokens(case: Case, model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.get_text_config().vocab_size, (1, sum(case.lengths)), generator=generator)


def _alone(case: Case, dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients in one process of plain transformers, each document alone."""
    model = _load(case, dtype)
    ids, targets = _tokens(case, model), sum(case.lengths) - len(case.lengths)
    total = 0.0
    for part in ids.split(list(case.lengths), dim=1):
        logits = model(input_ids=part, use_cache=False).logits[0, :-1].float()
        loss = functional.cross_entropy(logits, part[0, 1:], reduction="sum") / targets
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _over(sp: SequenceParallel, case: Case, folder: str) -> tuple[float, list[Row], float, float]:
    """On every rank: the loss; each gradient's error; all gradients' error, and that of one process in this dtype."""
    from .transformers import parallelize

    model = parallelize(_load(case, getattr(torch, case.dtype)), sp)
    ids = _tokens(case, model)
    batch = {"input_ids": ids, "labels": copy.copy(ids)}
    if len(case.lengths) > 1:
        batch["position_ids"] = torch.cat([torch.arange(n) for n in case.lengths])[None]
    loss = model(**batch).loss
    loss.backward()
    alone = torch.load(Path(folder) / "alone.pt")
    (_, truth), (_, reference) = alone["truth"], alone["reference"]
    rows, wrong, one, whole = [], 0.0, 0.0, 0.0
    for name, p in model.named_parameters():
        if p.grad is None:
            continue
        found = sp.groups.everyone.all_reduce(p.grad.float()) / sp.world_size
        rows.append(Row(name, relative_error(found, reference[name].float())))
        true = truth[name].double()
        wrong += float((found - true).square().sum())
        one += float((reference[name].double() - true).square().sum())
        whole += float(true.square().sum())
    scale = max(whole, 1e-300) ** 0.5
    return loss.item(), rows, wrong**0.5 / scale, AS_GOOD_AS * one**0.5 / scale
