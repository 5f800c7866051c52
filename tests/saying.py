"""What a call says when it is refused, as text: errors of ranks that are processes are compared so."""

from __future__ import annotations

from collections.abc import Callable

from seqpar_ring.errors import SeqparError


def said_of(act: Callable[[], object]) -> str:
    """The kind and the text of our error; what no test asks for, where there is none."""
    try:
        act()
    except SeqparError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"
