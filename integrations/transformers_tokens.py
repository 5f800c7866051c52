"""Does a model look at one token at a time, but for its attention? Shown, where its code is not transformers' own.

A shard is some of the tokens, in another order. What a model computes of them beside attention (norms, MLPs, experts,
rotary embeddings by position_ids) must not depend on which others are there, nor on where they stand. The families of
transformers were compared one by one; a subclass, remote code or a module that was put in is not known, and a
convolution or a shift of tokens leaves the loss almost right and the gradients wrong. So such a model runs twice on 16
tokens when it is parallelized, with attention that stays within a token, and must give the tokens that it has both
times the same. Nothing here communicates.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from seqpar_ring.batch import PLAN_KEY
from seqpar_ring.errors import SeqparError, UnsupportedError

from .transformers_positions import DROP_KEYWORDS
from .transformers_replicas import is_spread

PROBE = "each token by itself"
"""In place of a plan: attention is to stay within a token."""

KNOWN_CODE = (
    *("torch", "transformers", "peft", "trl", "accelerate", "seqpar_ring", "liger_kernel", "kernels"),
    *("bitsandbytes", "torchao", "deepspeed", "torch_npu", "transformer_engine", "unsloth"),
)
"""Packages whose modules look at one token at a time, or are known to the rules."""

MIXING = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase, nn.MultiheadAttention, nn.GroupNorm),
    *(nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm),
)
"""Modules of torch that look at several tokens at once."""

DRAWN_IN_VAIN = ("phimoe", "LOHA", "LOKR")
"""Model types, and methods of PEFT, that draw random numbers without effect where their jitter and dropout are 0, as
the rules see to: a router that samples among the one expert that is left, a number that is compared with 0."""

OF_TOWERS = ("Vision", "Image", "Audio", "Speech")
"""Words in the names of modules that text does not go through."""

TOKENS = 16
KEPT = (3, 9, 1, 14, 6, 11, 4, 8)
"""Tokens that are there both times: the second time they come first, in this order, and others follow."""

AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference between the two, relative to the largest number: other rows of the same products."""


def strangers(model: nn.Module) -> tuple[str, ...]:
    """Names of the classes in a model whose code is nobody's that is known, sorted."""
    return tuple(sorted({type(m).__name__ for m in model.modules() if _package(type(m)) not in KNOWN_CODE}))


def refuse_mixing(model: nn.Module) -> None:
    """Refuse modules of torch that look at several tokens at once, outside of what the rules know.

    Raises:
        UnsupportedError: with their names.
    """
    towers = [name for name, m in model.named_modules() if any(word in type(m).__name__ for word in OF_TOWERS)]
    found = {
        name: type(m).__name__
        for name, m in model.named_modules()
        if isinstance(m, MIXING)
        and set(getattr(m, "kernel_size", (0,))) != {1}
        and not any(name.startswith(f"{tower}.") for tower in towers)
    }
    if found:
        raise UnsupportedError(
            "the model has modules beside its attention that look at several tokens, of which a rank has some only",
            fix="Use a model without them.",
            model=type(model).__name__,
            modules=dict(list(found.items())[:5]),
        )


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """In place of attention: of each token's own query, key and value, (B, S, H, E) of (B, H, S, D), (B, G, S, ..)."""
    times = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(times, 1) for x in (key, value))
    weight = 1 + query.mean(-1).tanh() + key.mean(-1).tanh()
    return (value * weight.unsqueeze(-1).to(value.dtype)).transpose(1, 2)


def check(model: Any) -> SeqparError | None:
    """Run a model of which some code is not known on tokens in two orders; what is wrong with it, if anything.

    The model has our attention already, and none of our hooks.
    """
    unknown = strangers(model)
    if not unknown:
        return None
    why_not, difference = _not_whole(model), 0.0
    if not why_not:
        try:
            difference = _difference(model)
            why_not = "" if math.isfinite(difference) else "what they compute is not finite, or all zero"
        except SeqparError as error:
            return error
        except Exception as error:  # whatever it is, of code that nobody knows
            why_not = f"{type(error).__name__}: {error}"
    if why_not:
        warnings.warn(
            f"It was not shown that {', '.join(unknown)} look at one token at a time, as they must under the ring: "
            f"{why_not}. Compare a step with one process before you rely on it.",
            stacklevel=3,
        )
        return None
    if difference <= AGREEMENT.get(model.dtype, AGREEMENT[torch.bfloat16]):
        return None
    return UnsupportedError(
        "what the model computes of a token beside attention depends on the other tokens, on their order or on chance, "
        "and a rank has some of them only",
        fix="Leave out what looks at several tokens (a convolution, a shift, a mean over them), counts them (positions "
        "must come from position_ids), or draws at random.",
        model=type(model).__name__,
        classes_of_unknown_code=unknown,
        relative_difference=f"{difference:.1e}",
    )


def chance_of(model: Any) -> Tensor | None:
    """The state of the random numbers that a model in training would draw; None where it may not be asked."""
    device: torch.device = model.device
    if not model.training or not torch.is_grad_enabled() or device.type not in ("cpu", "cuda"):
        return None
    adapters = getattr(model, "peft_config", None)
    methods = [str(getattr(one.peft_type, "value", one.peft_type)) for one in (adapters or {}).values()]
    if any(name in DRAWN_IN_VAIN for name in (model.config.get_text_config().model_type, *methods)):
        return None
    if device.type == "cpu":
        return torch.get_rng_state()
    return None if torch.cuda.is_current_stream_capturing() else torch.cuda.get_rng_state(device)


def check_chance(model: Any, before: Tensor | None) -> None:
    """Refuse a forward in training that has drawn random numbers: dropout as a function, noise of a hook (NEFTune).

    Raises:
        UnsupportedError: the state is not that of before.
    """
    now = None if before is None else chance_of(model)
    if before is not None and now is not None and before.shape == now.shape and not torch.equal(before, now):
        raise UnsupportedError(
            "the model has drawn random numbers in its forward, and each rank draws its own for its tokens",
            fix="Turn off what draws: dropout that is a function, noise on embeddings (NEFTune), stochastic depth.",
            model=type(model).__name__,
        )


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _not_whole(model: nn.Module) -> str:
    """Why the model cannot be run here by itself; "" if it can."""
    for parameter in model.parameters():
        if parameter.is_meta:
            return "its parameters are on the meta device"
        if is_spread(parameter):
            return "its parameters are spread over ranks"
    return ""


@torch.no_grad()
def _difference(model: Any) -> float:
    """Between what the model computes of the tokens that are there both times, relative to the largest number."""
    device, words = model.device, model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, words, (TOKENS + len(KEPT),), generator=generator)
    kept, others = torch.tensor(KEPT), torch.arange(TOKENS, TOKENS + len(KEPT))
    second = torch.cat([kept, others])
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gpus = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        found = [_computed(model, ids, order, device) for order in (torch.arange(TOKENS), second)]
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    pairs = [(one[0, kept.to(one.device)], other[0, : len(KEPT)]) for one, other in zip(*found, strict=True)]
    apart = [_apart(one, other) for one, other in pairs if bool(one.any())]
    return max(apart) if apart and all(map(math.isfinite, apart)) else math.nan


def _computed(model: Any, ids: Tensor, order: Tensor, device: torch.device) -> list[Tensor]:
    """What the model and the part below its head compute of these tokens, each at its own position: (1, TOKENS, ..)."""
    given = {"input_ids": ids[order][None].to(device), "position_ids": order[None].to(device), PLAN_KEY: PROBE}
    below: list[Any] = []
    hooks = [model.base_model.register_forward_hook(lambda module, args, output: below.append(output))]
    for module in (m for m in model.modules() if type(m).__name__ in DROP_KEYWORDS):
        hooks.append(module.register_forward_pre_hook(_hand, with_kwargs=True))
    try:
        outputs = [model(**given, use_cache=False), *below]
    finally:
        for hook in hooks:
            hook.remove()
    found = [x for x in (output[0] for output in outputs) if x.shape[:2] == (1, TOKENS)]
    if not found:
        raise ValueError("it returns nothing that has an entry for each token")
    return found


def _hand(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `positions.follow` does later for attention that is handed no keywords."""
    return args, {**kwargs, PLAN_KEY: PROBE}


def _apart(one: Tensor, other: Tensor) -> float:
    """Relative to the largest number: by how much the worst token differs. In 16 bits, by how much half of them do:
    there one may go to another expert, because its row was rounded otherwise."""
    worst = (one.double() - other.double()).abs().flatten(1).max(1).values.sort().values
    difference = worst[-1] if one.dtype.itemsize > 2 else worst[len(worst) // 2]
    return float(difference / one.double().abs().max())
