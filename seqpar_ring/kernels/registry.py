"""Kernels by name, and the choice among them with its reason.

A backend is one file that implements `Kernel` and one call of `register`. Selection compares what a plan needs with
what each kernel declares, before any tensor exists, and says why it chose; what no kernel can do is refused here and
not answered wrongly later. On a GPU a declaration is not enough: kernels are tried there (`trial`), those that err are
passed over, and the fastest is taken. This registry holds kernels only, and never imports a backend by itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from seqpar_ring.errors import ConfigError, UnsupportedError, did_you_mean
from seqpar_ring.kernels.base import Capabilities, Kernel, Request, lacks
from seqpar_ring.kernels.gapless import Gapless
from seqpar_ring.kernels.squares import Squares
from seqpar_ring.kernels.trial import Entry, tried

AUTO = "auto"
"""The name that lets `select` choose."""

NEAR = 0.97
"""A kernel stays the preferred one if it is as fast as this share of the fastest, for timings are noisy."""

FALLBACK = 0
"""Priority below which a kernel is a fallback, which is neither tried nor timed."""


class Choice(NamedTuple):
    """A kernel and why it was chosen, in a sentence that can be shown to the user."""

    kernel: Kernel
    reason: str


_KERNELS: dict[str, Kernel] = {}
_CHOICES: dict[tuple[Request, str], Choice] = {}
"""What was chosen from these kernels: every layer asks again, with the same few requests."""


def register(kernel: Kernel) -> None:
    """Makes a kernel selectable by its name.

    Raises:
        ConfigError: the name is taken, or is "auto"; its capabilities hold something that is no tuple.
    """
    if kernel.name in _KERNELS or kernel.name == AUTO:
        raise ConfigError(
            "a kernel of this name is registered already", fix="Give the kernel another name.", name=kernel.name
        )
    try:
        hash(_declared(kernel))  # every call looks up what was found for them
    except TypeError as error:
        raise ConfigError(
            "a kernel's capabilities cannot be hashed",
            fix="Give dtypes, devices, architectures and more_widths as tuples.",
            name=kernel.name,
            found=str(error),
        ) from None
    _KERNELS[kernel.name] = kernel
    _CHOICES.clear()


def unregister(name: str) -> Kernel:
    """Takes a kernel out of the registry and returns it.

    Raises:
        ConfigError: no kernel has this name.
    """
    _CHOICES.clear()
    return _KERNELS.pop(_named(name).name)


def names() -> tuple[str, ...]:
    """The names of all registered kernels, in the order "auto" prefers them."""
    return tuple(kernel.name for kernel in _preferred())


def registered() -> tuple[Kernel, ...]:
    """All registered kernels, in the order "auto" prefers them."""
    return tuple(_preferred())


def select(request: Request, name: str = AUTO) -> Choice:
    """The kernel for a request: the named one, or with "auto" the preferred one of those that lack nothing.

    Raises:
        ConfigError: no kernel has this name.
        UnsupportedError: the named kernel, or every kernel, lacks something; the message says what.
    """
    found = _CHOICES.get((request, name))
    if found is None:
        found = _CHOICES[request, name] = _select(request, name)
    return found


def _select(request: Request, name: str) -> Choice:
    if name != AUTO:
        kernel = _named(name)
        words = lacks(kernel.capabilities, request)
        words += () if words else _erring(kernel, request)
        if words:
            others = [other for other in _preferred() if other is not kernel]
            raise _cannot(name, words, [other for other in others if not lacks(other.capabilities, request)])
        return _fitted(kernel, request, f'"{name}": asked for by name')
    missing = {kernel.name: lacks(kernel.capabilities, request) for kernel in _preferred()}
    able = [kernel for kernel in _preferred() if not missing[kernel.name]]
    rates: dict[str, float] = {}
    for kernel in able:
        missing[kernel.name] += _erring(kernel, request)
        if (found := _tried(kernel, request)) is not None:
            rates[kernel.name] = found.rate
    able = [kernel for kernel in able if not missing[kernel.name]]
    if not able:
        each = "; ".join(f"{kernel} lacks {', '.join(words)}" for kernel, words in missing.items())
        raise UnsupportedError(
            f"no kernel can compute this attention: {each or 'none is registered'}",
            fix="Change what the first of them lacks, or register a kernel that has it.",
            **request._asdict(),
        )
    best = max((rates[kernel.name] for kernel in able if kernel.name in rates), default=0.0)
    if request.deterministic:
        best = 0.0  # the preferred one: a clock may choose otherwise on another rank, and in the next run
    chosen = next(kernel for kernel in able if rates.get(kernel.name, 0.0) >= NEAR * best)
    # Nobody expects a kernel that is made for other devices here.
    near = {name: words for name, words in missing.items() if _KERNELS[name].capabilities.made_for(request.device)}
    return _fitted(chosen, request, _why(chosen, near, rates))


def _tried(kernel: Kernel, request: Request) -> Entry | None:
    """What a trial on the GPU found; None where there is none, and for kernels that are fallbacks."""
    if (
        not request.device.startswith("cuda")
        or not torch.cuda.is_available()
        or kernel.capabilities.priority < FALLBACK
    ):
        return None
    return tried(kernel, request._replace(documents=1))


def _erring(kernel: Kernel, request: Request) -> tuple[str, ...]:
    """What a trial on the GPU says the kernel lacks, its declaration notwithstanding; nothing elsewhere."""
    found = _tried(kernel, request)
    return (found.wrong,) if found is not None and found.wrong else ()


def _fitted(kernel: Kernel, request: Request, reason: str) -> Choice:
    """The choice, with calls cut or rows gathered around what the kernel cannot take."""
    can = kernel.capabilities
    if can.square:
        return Choice(Squares(kernel), f"{reason}; calls are cut into full and square causal blocks")
    if not can.empty_segments:
        return Choice(Gapless(kernel), f"{reason}; rows are gathered, as it takes no empty segments")
    found = _tried(kernel, request)
    if found is not None and found.gaps:
        return Choice(Gapless(kernel), f"{reason}; rows are gathered, as it lacks {found.gaps}")
    return Choice(kernel, reason)


def refuse_impossible(window: bool, name: str = AUTO) -> None:
    """Refuses a mask that no kernel can compute, whatever the tensors: for when a plan is made, before there are any.

    Raises:
        ConfigError: no kernel has this name.
        UnsupportedError: the named kernel, or every kernel, lacks windows or cannot run here; the message says which.
    """
    kernels = _preferred() if name == AUTO else [_named(name)]
    missing = {
        kernel.name: [can.absent] if can.absent else ["sliding window"] if window and not can.window else []
        for kernel in kernels
        for can in (kernel.capabilities,)
    }
    if all(missing.values()):
        each = "; ".join(f'"{kernel}" lacks {", ".join(words)}' for kernel, words in missing.items())
        raise UnsupportedError(
            f"no kernel can compute this plan: {each or 'none is registered'}",
            fix='Use kernel "auto", or plan without what is lacking.',
            kernel=name,
            window=window,
        )


def _why(chosen: Kernel, missing: dict[str, tuple[str, ...]], rates: dict[str, float]) -> str:
    """The kernels that were passed over, each with what it lacks or how fast it is, or that there was none."""
    order = list(missing)
    passed = [
        f'"{other}" lacks {", ".join(missing[other])}' for other in order[: order.index(chosen.name)] if missing[other]
    ]
    timed = [f'"{other}" {rates[other] / 1e12:.0f}' for other in rates if other != chosen.name and not missing[other]]
    if rates.get(chosen.name):
        passed.insert(0, f"{rates[chosen.name] / 1e12:.0f} TFLOP/s here" + (f", {', '.join(timed)}" if timed else ""))
    return f'"{chosen.name}": ' + ("; ".join(passed) if passed else "preferred of all that can")


def _cannot(name: str, words: tuple[str, ...], able: list[Kernel]) -> UnsupportedError:
    others = " or ".join(f'"{kernel.name}"' for kernel in able)
    return UnsupportedError(
        f'kernel "{name}" lacks {", ".join(words)}',
        fix=f'Use kernel {others}, or "auto".' if able else "No registered kernel can compute this.",
    )


def _named(name: str) -> Kernel:
    if name not in _KERNELS:
        raise ConfigError("unknown kernel", fix=did_you_mean(name, [AUTO, *_KERNELS]), kernel=name)
    return _KERNELS[name]


def _declared(kernel: Kernel) -> Capabilities:
    """What it could do if its library is there: whether it is, is asked of it when somebody wants to attend, for that
    imports the library, and starts CUDA."""
    found = getattr(kernel, "can", None)
    return found if isinstance(found, Capabilities) else kernel.capabilities


def _preferred() -> list[Kernel]:
    return sorted(_KERNELS.values(), key=lambda kernel: -_declared(kernel).priority)  # stable: then by registration
