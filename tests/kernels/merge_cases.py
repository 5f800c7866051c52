"""Run with TRITON_INTERPRET=1: `merge_triton` on the CPU against `merge_` in fp64, with empty rows and overlaps."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from seqpar_ring.kernels import merge_triton
from seqpar_ring.kernels.merge import Part, merge_


def random_case(seed: int) -> tuple[Tensor, Tensor, list[Part]]:
    """An accumulator and one to six parts of any rows, each with rows that saw nothing."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    B, S, H, E = rng.choice([1, 2]), rng.choice([1, 15, 16, 33]), rng.choice([1, 3]), rng.choice([8, 20, 64])

    def some(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        out = torch.randn(B, rows, H, E, generator=generator).to(dtype)
        lse = 30 * torch.randn(B, H, rows, generator=generator)
        hidden = torch.rand(B, H, rows, generator=generator) < 0.3
        out[hidden.transpose(1, 2)] = 0.0
        return out, lse.masked_fill(hidden, -torch.inf)

    parts = []
    for _ in range(rng.randint(1, 6)):
        q0 = rng.randrange(S)
        parts.append(Part(q0, *some(rng.randint(0, S - q0), rng.choice([torch.float32, torch.bfloat16]))))
    return *some(S, torch.float32), parts


def difference(case: tuple[Tensor, Tensor, list[Part]]) -> float:
    """The largest difference of out, and of lse where it is finite; nan if other rows saw nothing."""
    out, lse, parts = case
    want_out, want_lse = out.double(), lse.double()
    for q0, part_out, part_lse in parts:
        rows = slice(q0, q0 + part_lse.shape[2])
        merge_(want_out[:, rows], want_lse[:, :, rows], part_out.double(), part_lse.double())
    merge_triton.merge_parts_(out, lse, parts)
    hidden = want_lse == -torch.inf
    if not torch.equal(lse == -torch.inf, hidden):
        return float("nan")
    off = (lse.double() - want_lse).masked_fill(hidden, 0.0).abs().max()
    return float(torch.maximum((out.double() - want_out).abs().max(), off))


def main() -> None:
    """Compare, then open the ways to go wrong and see that the comparison notices."""
    for seed in range(60):
        assert difference(random_case(seed)) < 2e-5, seed
    out, lse, parts = next(case for case in map(random_case, range(60)) if case[0].shape[1] > 2)
    parts = [Part(0, *(x.clone() for x in (out, lse)))] * 2
    for fault in ("rows", "dropped", "lse"):
        wrong = {
            "rows": [parts[0]._replace(out=parts[0].out.flip(1)), parts[1]],
            "dropped": parts[:1],
            "lse": [parts[0]._replace(lse=parts[0].lse + 0.01), parts[1]],
        }[fault]
        mine, theirs = (out.clone(), lse.clone()), (out.clone(), lse.clone())
        merge_triton.merge_parts_(*mine, wrong)
        merge_triton.merge_parts_(*theirs, parts)
        same = all(torch.allclose(a, b, atol=1e-4, equal_nan=True) for a, b in zip(mine, theirs, strict=True))
        assert not same, fault
    nan = out.clone().fill_(torch.nan)
    for said in (1.0, -torch.inf):  # flash-attention says of a row of nan that it saw nothing
        mine = out.clone()
        merge_triton.merge_parts_(mine, lse.clone().fill_(1.0), [Part(0, nan, torch.full_like(lse, said))])
        assert mine.isnan().all(), f"nan is hidden where the lse is {said}"
    print("all right")


if __name__ == "__main__":
    main()
