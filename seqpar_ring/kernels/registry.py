"""Kernels by name, and the choice among them with its reason.

A backend is one file that implements `Kernel` and one call of `register`. Selection compares what a plan needs with
what each kernel declares, before any tensor exists, and says why it chose; what no kernel can do is refused here and
not answered wrongly later. This registry holds kernels only, and never imports a backend by itself.
"""

from __future__ import annotations

from typing import NamedTuple

from seqpar_ring.errors import ConfigError, UnsupportedError, did_you_mean
from seqpar_ring.kernels.base import Kernel, Request, lacks
from seqpar_ring.kernels.gapless import Gapless

AUTO = "auto"
"""The name that lets `select` choose."""

_KERNELS: dict[str, Kernel] = {}


class Choice(NamedTuple):
    """A kernel and why it was chosen, in a sentence that can be shown to the user."""

    kernel: Kernel
    reason: str


def register(kernel: Kernel) -> None:
    """Makes a kernel selectable by its name.

    Raises:
        ConfigError: the name is taken, or is "auto".
    """
    if kernel.name in _KERNELS or kernel.name == AUTO:
        raise ConfigError(
            "a kernel of this name is registered already", fix="Give the kernel another name.", name=kernel.name
        )
    _KERNELS[kernel.name] = kernel


def unregister(name: str) -> Kernel:
    """Takes a kernel out of the registry and returns it.

    Raises:
        ConfigError: no kernel has this name.
    """
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
    missing = {kernel.name: lacks(kernel.capabilities, request) for kernel in _preferred()}
    able = [kernel for kernel in _preferred() if not missing[kernel.name]]
    if name != AUTO:
        kernel = _named(name)
        if missing[name]:
            raise _cannot(name, missing[name], able)
        return _fitted(kernel, f'"{name}": asked for by name')
    if not able:
        each = "; ".join(f"{kernel} lacks {', '.join(words)}" for kernel, words in missing.items())
        raise UnsupportedError(
            f"no kernel can compute this attention: {each or 'none is registered'}",
            fix="Change what the first of them lacks, or register a kernel that has it.",
            **request._asdict(),
        )
    return _fitted(able[0], _why(able[0], missing))


def _fitted(kernel: Kernel, reason: str) -> Choice:
    """The choice, with rows gathered around what the kernel cannot take."""
    if kernel.capabilities.empty_segments:
        return Choice(kernel, reason)
    return Choice(Gapless(kernel), f"{reason}; rows are gathered, as it takes no empty segments")


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


def _why(chosen: Kernel, missing: dict[str, tuple[str, ...]]) -> str:
    """The preferred kernels that were passed over, each with what it lacks, or that there was none."""
    order = list(missing)
    passed = [f'"{other}" lacks {", ".join(missing[other])}' for other in order[: order.index(chosen.name)]]
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


def _preferred() -> list[Kernel]:
    return sorted(_KERNELS.values(), key=lambda kernel: -kernel.capabilities.priority)  # stable: then by registration
