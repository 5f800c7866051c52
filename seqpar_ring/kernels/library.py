"""A kernel library that may not be there: found without importing it, imported when a GPU asks for it.

flash-attn and its kin are built for one version of torch, and a build that does not fit fails when it is imported, in
many ways. So nothing of them is imported with this package; whoever needs a kernel asks `absent` first, which says in a
few words what is wrong, and that is what selection shows to the user.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

Function = Callable[..., Any]
"""A function of a library: its signature is the library's own."""

NO_GPU = "a GPU with CUDA"


class Library:
    """Functions of an optional package.

    Args:
        package: its name on the index, for its version and for messages.
        module: where the functions are.
        functions: their names.
        oldest: the first version whose functions have the signatures that are used; () if any has.
    """

    def __init__(self, package: str, module: str, functions: tuple[str, ...], oldest: tuple[int, ...] = ()) -> None:
        self._package, self._module, self._functions, self._oldest = package, module, functions, oldest

    @property
    def version(self) -> str:
        """Of the package, as it is installed; "" if it is not, or says none."""
        try:
            return version(self._package)
        except PackageNotFoundError:
            return ""

    @property
    def absent(self) -> str:
        """Why the functions cannot be used here, in a few words; empty if they can."""
        found = self.version
        if not found and not _top_level(self._module):
            return f"{self._package} (not installed)"
        if found and _numbers(found) < self._oldest:
            return f"{self._package} {'.'.join(map(str, self._oldest))} or newer (has {found})"
        if not torch.cuda.is_available():
            return NO_GPU  # nothing is imported in vain
        try:
            module = import_module(self._module)
        except Exception as error:
            return f"{self._package} that imports ({type(error).__name__}: {_first_line(error)})"
        missing = [name for name in self._functions if not hasattr(module, name)]
        if missing:
            return f"{', '.join(missing)} of {self._module} ({self._package} {found or 'of an unknown version'})"
        return ""

    def function(self, name: str) -> Function:
        """One of the functions; only where nothing is `absent`."""
        found: Function = getattr(import_module(self._module), name)
        return found


class Aten(Library):
    """Operators of torch itself."""

    def __init__(self, *functions: str) -> None:
        super().__init__("torch", "torch", functions)

    @property
    def absent(self) -> str:
        """See `Library.absent`."""
        missing = [name for name in self._functions if not hasattr(torch.ops.aten, name)]
        if missing:
            return f"aten.{' and '.join(missing)} (torch is {torch.__version__})"
        return "" if torch.cuda.is_available() else NO_GPU

    def function(self, name: str) -> Function:
        """See `Library.function`."""
        found: Function = getattr(torch.ops.aten, name).default
        return found


def _top_level(module: str) -> bool:
    return "." not in module and find_spec(module) is not None


def _numbers(found: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 8) of "2.8.0b1+cu12" is enough to compare."""
    numbers: list[int] = []
    for part in found.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:160]
