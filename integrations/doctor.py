"""Does this model compute the same over a ring? One training step in one process, and over some: loss and gradients.

The one-process side is plain transformers with sdpa attention, each document alone; the other side is the model that
`parallelize` makes, on processes that are started here. Any difference beyond rounding is named by its parameter. Runs
on the CPU over gloo, whatever the machine has, so that it says something about the model and not about the network.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from seqpar_ring import layout as layouts
from seqpar_ring.config import Settings
from seqpar_ring.errors import ConfigError, VersionError
from seqpar_ring.parallel import SequenceParallel
from seqpar_ring.testing import RankPool, relative_error

try:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar
except ImportError as error:
    raise VersionError(
        "transformers is missing", fix='Install it: pip install "seqpar-ring[transformers]".', error=str(error)
    ) from error

LOSS, GRADIENT = 1e-5, 1e-4
"""In fp32: largest relative error of the loss, and relative L2 error of a parameter's gradient."""

AS_GOOD_AS = 1.2
"""Where rounding rules: the error of all gradients together against a wider dtype, as a multiple of one process's."""

TIMEOUT = 900.0
STEP = "step.pt"
Step = tuple[float, dict[str, Tensor]]
"""A loss, and gradients by parameter."""


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
        together, allowed: the relative error of all gradients against a wider dtype, and what it may be, by that of
            one process; None where fp32 bounds hold without.
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
        ConfigError: no such model, more ranks than tokens, an unknown dtype, wrong settings, an unknown layout.
    """
    if not (Path(case.path) / "config.json").exists():
        raise ConfigError("no model there", fix="Give the folder of a model: it holds a config.json.", path=case.path)
    if case.dtype not in ("float32", "bfloat16"):
        raise ConfigError("unknown dtype", fix="Give fp32 or bf16.", dtype=case.dtype)
    if min(case.lengths, default=0) < 1 or sum(case.lengths) < 2 * case.ranks:
        fix = "Give documents of at least one token each, and two tokens a rank or more."
        raise ConfigError("too few tokens", fix=fix, documents=case.lengths, ranks=case.ranks)
    if "size" in case.settings:
        size = case.settings["size"]
        raise ConfigError("the size is the number of ranks here", fix="Give --ranks.", size=size, ranks=case.ranks)
    settings = Settings.parse({"size": case.ranks, **case.settings}, "the settings")
    layouts.make(settings.layout, case.lengths, case.ranks)


def parity(case: Case, say: Callable[[str], None] = lambda _: None) -> Parity:
    """Compare one training step. Starts `case.ranks` processes, and ends them.

    In fp32 the gradients of one process are the measure. Where a model amplifies rounding so much that these bounds
    cannot hold, and in bf16 always, both are measured against a wider dtype, and the ring may be little worse.

    Args:
        case: what to compare; `check` it first.
        say: told what is under way.

    Raises:
        ConfigError: the folder holds no model that can be loaded.
        SeqparError: the model cannot be exact over a ring; what `parallelize` or its first forward says.
    """
    begin, dtype = time.perf_counter(), getattr(torch, case.dtype)
    say(f"one process, {case.dtype}")
    alone = _alone(case, dtype)
    say(f"{case.ranks} ranks")
    with tempfile.TemporaryDirectory() as folder, RankPool(case.ranks, timeout=TIMEOUT) as pool:
        pool.run(_over, case, folder, **case.settings)
        over: Step = torch.load(Path(folder) / STEP)
    none = torch.zeros(())  # where one process has no gradient, the ring's must be zero
    rows = [
        Row(name, relative_error(grad.float(), alone[1].get(name, none).float().expand_as(grad)))
        for name, grad in over[1].items()
    ]
    rows.sort(key=lambda row: row.error if row.error == row.error else float("inf"), reverse=True)
    found = Parity(alone[0], over[0], tuple(rows), None, None, time.perf_counter() - begin)
    if found.good and case.dtype == "float32":
        return found
    wider = torch.float64 if case.dtype == "float32" else torch.float32
    say(f"one process, {str(wider).removeprefix('torch.')}, to see what rounding alone does")
    truth = _alone(case, wider)[1]
    together, by_rounding = (_together(step[1], truth) for step in (over, alone))
    seconds = time.perf_counter() - begin
    return Parity(alone[0], over[0], tuple(rows), together, AS_GOOD_AS * by_rounding, seconds)


def _together(grads: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Relative L2 error of all gradients as one vector; one that is not there is zero."""
    none = torch.zeros(())
    pairs = [(grads.get(name, none).double(), truth.get(name, none).double()) for name in {**truth, **grads}]
    wrong = sum(float((one - true).square().sum()) for one, true in pairs)
    whole = sum(float(true.double().square().sum()) for true in truth.values())
    return float((wrong / max(whole, 1e-300)) ** 0.5)


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
    """Text of Python's help where the folder has a tokenizer, else random words, (1, T) int64."""
    count, words = sum(case.lengths), model.config.get_text_config().vocab_size
    try:
        tokenizer = AutoTokenizer.from_pretrained(case.path)
        text = tokenizer("\n".join(topics[name] for name in sorted(topics)))["input_ids"]
    except Exception:  # there are many ways to have no tokenizer, and each has an error of its own
        text = []
    if len(text) >= count and max(text[:count]) < words:
        return torch.tensor([text[:count]])
    return torch.randint(0, words, (1, count), generator=torch.Generator().manual_seed(1))


def _alone(case: Case, dtype: torch.dtype) -> Step:
    """Loss and gradients in one process of plain transformers, each document alone."""
    model = _load(case, dtype)
    ids, targets = _tokens(case, model), sum(case.lengths) - len(case.lengths)
    total = 0.0
    for part in ids.split(list(case.lengths), dim=1):
        logits = model(input_ids=part, use_cache=False).logits[0, :-1]
        wide = logits if dtype is torch.float64 else logits.float()
        loss = functional.cross_entropy(wide, part[0, 1:], reduction="sum") / targets
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _over(sp: SequenceParallel, case: Case, folder: str) -> None:
    """On every rank: the step over the ring; the first one writes its loss, and the gradients' average."""
    from .transformers import parallelize

    model = parallelize(_load(case, getattr(torch, case.dtype)), sp)
    ids = _tokens(case, model)
    batch = {"input_ids": ids, "labels": ids}
    if len(case.lengths) > 1:
        batch["position_ids"] = torch.cat([torch.arange(n) for n in case.lengths])[None]
    loss = model(**batch).loss
    loss.backward()
    everyone, grads = sp.groups.everyone, {}
    for name, p in model.named_parameters():
        if p.requires_grad:  # also of those without a gradient here: another rank may have one
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            grads[name] = everyone.all_reduce(grad.float()) / everyone.world
    if sp.rank == 0:
        torch.save((loss.item(), grads), Path(folder) / STEP)
