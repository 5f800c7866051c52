"""Write docs/models.md: compare every model family with one process, and tabulate what was found.

Run from the repository's root, with the development tools installed: `python docs/make_models.py`. The table of
families and the comparison are those of the tests (tests/integrations/families.py and test_model_families.py).
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "integrations"))

families = import_module("families")  # of the tests
matrix = import_module("test_model_families")

INTRODUCTION = """# Model families

Made by `python docs/make_models.py`, with transformers {transformers} and torch {torch}; the same comparison runs in
the tests (`tests/integrations/test_model_families.py`).

Beside these, `tests/integrations/every_model.py` looks at every language model class of transformers with as small a
model as its config can be asked for: of the 185 of 5.24, 94 are exact over 2 ranks, 60 are refused by name, none is
accepted and wrong, and 31 cannot be made small without knowing more of them (11 of those would be too large).

A tiny model of each family, with random weights, takes one training step in one process of plain transformers and over
2 and 3 ranks: once with one document of {one} tokens, once with four packed documents of {packed} tokens. The figure is
the largest relative L2 error of any parameter's gradient; the bound is 1e-5 in fp32 and 1e-12 in fp64. A gradient that
is nothing but rounding, below a millionth of all gradients together, is compared with all of them.

Windows are 7 or 9 tokens and chunks 8, shorter than the documents; rotary embeddings that follow the length change at
16. Faults that are put in on purpose, which the comparison must see:

{faults}

| Family | Class | What is special | dtype | 2 ranks | 3 ranks |
|---|---|---|---|---|---|
"""

REST = """
With `dynamic` and `longrope` rotary embeddings angles follow the length. In one process transformers takes a packed row
for as long as its longest document, and so does this library; each document alone might get other angles. With
attention in chunks and queries scaled by position (Llama 4) each document is as if alone; plain transformers counts
positions through a packed row there.

## Refused

By name, when the model is parallelized or at its first forward, on every rank:

| Model | Why |
|---|---|
"""

LAST = """
Methods of PEFT are listed in [huggingface.md](huggingface.md#peft).
"""


def main() -> None:
    """Run the matrix and write the page."""
    lengths = {name: matrix.BATCHES[name] for name in matrix.BATCHES}
    packed = ", ".join(str(n) for n in lengths["packed"])
    page = INTRODUCTION.format(
        transformers=transformers.__version__,
        torch=torch.__version__.split("+")[0],
        one=lengths["one document"][0],
        packed=packed,
        faults="\n".join(f"- {fault} ({case[0]})" for fault, case in matrix.FAULTS.items()),
    )
    for name, family in families.TABLE.items():
        errors = [max(matrix.compare(name, batch, world)[1] for batch in lengths.values()) for world in (2, 3)]
        dtype = str(matrix.dtype_of(family)).removeprefix("torch.")
        figures = " | ".join(f"{error:.1e}" for error in errors)
        page += f"| {name} | `{family.name}{family.suffix}` | {family.special} | {dtype} | {figures} |\n"
        print(f"{name}: {figures}", flush=True)
    page += REST + "".join(f"| {what} | {refused.why} |\n" for what, refused in families.REFUSED.items()) + LAST
    (ROOT / "docs" / "models.md").write_text(page)


if __name__ == "__main__":
    main()
