"""Freight: the bytes of one token's row on its way, and which side travels in backward for the fewer bytes.

Keys and values go out in the inputs' dtype, and their gradients return in fp32 (fp64 for fp64). Queries, where they
travel in backward, go out with dout, lse and delta, and dq returns: for widths D = E in bf16, 8 H D + 8 H bytes a token
against 12 G D. Where the user asks for it, keys and values go out as one byte a number with a scale for each token and
head, and their gradients return in bf16. Attention decides by these numbers and the planner prices by them.
"""

from __future__ import annotations

from typing import NamedTuple

SCALE = 4
"""Bytes of the scale of a coded key or value."""

NARROW = 2
"""Bytes of a number of a narrow gradient."""


class Row(NamedTuple):
    """The heads of one layer's attention as one rank sees them.

    Attributes:
        heads: query heads (H).
        kv_heads: key and value heads (G).
        head_dim: width of a query and a key (D).
        value_dim: width of a value (E).
        itemsize: bytes of a number of q, k and v.
        coded: whether keys and values travel as int8.
        narrow: whether their gradients travel as bf16.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    itemsize: int
    coded: bool = False
    narrow: bool = False

    @property
    def wide(self) -> int:
        """Bytes of a number of a gradient, a partial result or a log-sum-exp."""
        return max(4, self.itemsize)

    def out(self, travels: str) -> int:
        """Bytes of a token that travels in a pass: in forward "kv", in backward "kv" or "q"."""
        if travels == "kv":
            width = self.head_dim + self.value_dim
            return self.kv_heads * (width + 2 * SCALE if self.coded else width * self.itemsize)
        return self.heads * (self.itemsize * (self.head_dim + self.value_dim) + 2 * self.wide)

    def home(self, travels: str) -> int:
        """Bytes of its gradient where it is summed up."""
        if travels == "kv":
            return self.kv_heads * self.wide * (self.head_dim + self.value_dim)
        return self.heads * self.wide * self.head_dim

    def back(self, travels: str) -> int:
        """Bytes of its gradient on its way back."""
        home = self.home(travels)
        return home // self.wide * NARROW if self.narrow and travels == "kv" else home

    def both(self, travels: str) -> int:
        """Bytes of a token in a backward pass, there and back."""
        return self.out(travels) + self.back(travels)

    def sent(self, kv_dtype: str, dkv_dtype: str) -> Row:
        """The row as it travels under these settings."""
        return self._replace(coded=kv_dtype == "int8", narrow=dkv_dtype == "bf16")

    def cheaper(self, queries: int, keys: int) -> str:
        """What travels in backward for the fewer bytes, for so many queries and keys: "kv" or "q".

        Keys that were coded travel again: gradients are those of what the queries met.
        """
        return "q" if not self.coded and queries * self.both("q") < keys * self.both("kv") else "kv"

    def shared(self, heads: int) -> Row:
        """The row as one of so many ranks sees it that share out the heads; fewer key heads than that are repeated."""
        return self._replace(heads=-(-self.heads // heads), kv_heads=max(1, -(-self.kv_heads // heads)))
