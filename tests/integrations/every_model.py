"""Every language model class of the installed transformers, over two ranks: exact, or refused by name.

    python tests/integrations/every_model.py [CLASS ...]

For a new release of transformers, whose new classes no table knows (`make test-transformers`). A model of each class is
made small by the arguments that its config has a name for, and takes a step of one document and one of packed ones, in
one process and over two ranks in lockstep. Exit code 1: a class was accepted and is not exact, or failed without being
refused. What cannot be made small like this is listed; `families.py` has the ones that need more thought.
"""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from hf_cases import LOSS, SHAPE, Step, build, one_process, packed, step, worst
from seqpar_ring.integrations.transformers import parallelize
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from seqpar_ring import SequenceParallel
from seqpar_ring.errors import UnsupportedError
from seqpar_ring.testing import run_lockstep

LENGTHS = [43], [13, 1, 20, 7]
GRAD = 1e-4
"""Largest relative L2 error of a parameter's gradient: ten times that of the families, as nothing is known of rounding
here, and a thousandth of what a document or a window that is missed makes."""

LARGE = 30_000_000
"""Parameters of a model that was not made small."""

FEW = {
    **dict.fromkeys(("n_layer", "num_layers", "decoder_layers"), 3),
    **dict.fromkeys(("n_head", "num_heads", "decoder_attention_heads"), 6),
    **dict.fromkeys(("n_embd", "d_model"), 48),
    **dict.fromkeys(("ffn_dim", "decoder_ffn_dim", "n_inner"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "n_group"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("n_shared_experts", "topk_group", "first_k_dense_replace"), 1),
    **{"head_dim": 8, "rotary_dim": 4, "sliding_window": 7, "pad_token_id": 0, "is_decoder": True},
    **{"q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6},
    **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout", "hidden_dropout", "layerdrop"), 0.0),
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout_prob"), 0.0),
    **dict.fromkeys(("activation_dropout", "embedding_dropout", "residual_dropout"), 0.0),
    **dict.fromkeys(("router_jitter_noise", "input_jitter_noise"), 0.0),
}
"""What makes a model small and leaves nothing to chance, by the names that configs have for it."""

TRIED: tuple[dict[str, Any], ...] = ({}, {"num_key_value_heads": 6})
"""Beside those: what latent attention asks for."""


class Outcome(NamedTuple):
    """What became of a class: "exact", "refused", "not made", and what must not be: "WRONG", "failed"."""

    kind: str
    words: str = ""


def main(names: Sequence[str]) -> int:
    """Print a line for each class, and how many there are of each kind. Returns the exit code."""
    print(f"transformers {transformers.__version__}")
    kinds: Counter[str] = Counter()
    for name in names or sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())):
        outcome = tried(name)
        kinds[outcome.kind] += 1
        print(f"{outcome.kind:9} {name:40} {outcome.words}", flush=True)
    print(", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
    return 1 if kinds["WRONG"] or kinds["failed"] else 0


def tried(name: str) -> Outcome:
    """Make a model of this class, in the first way that works, and compare."""
    words = ""
    for changes in TRIED:
        try:
            model = _small(name, changes)
        except Exception as error:  # of a class that is not meant to be made like this
            words = words or _said(error)
        else:
            return compared(model)
    return Outcome("not made", words)


def compared(model: Any) -> Outcome:
    """One process against two ranks."""
    errors = []
    for lengths in LENGTHS:
        batch = packed(lengths)
        alone = one_process(model, batch)

        def run(sp: SequenceParallel, batch: Any = batch) -> Step:
            return step(sp, parallelize(copy.deepcopy(model), sp), batch)

        try:
            errors += [worst(found, alone) for found in run_lockstep(run, 2)]
        except UnsupportedError as error:
            return Outcome("refused", str(error).partition(" [")[0])
        except Exception as error:  # whatever it is, it is to be told of this class, and the next one looked at
            return Outcome("failed", _said(error))
    loss, gradient = max(error[0] for error in errors), max(error[1] for error in errors)
    words = f"loss {loss:.1e}, gradients {gradient:.1e}"
    return Outcome("exact" if loss <= LOSS and gradient <= GRAD else "WRONG", words)


def _small(name: str, changes: Mapping[str, Any]) -> Any:
    """A model of this class that takes a step in one process."""
    kind = getattr(transformers, name)
    arguments = {**_known(kind.config_class), **changes}
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(kind.config_class(**{**SHAPE, **arguments})).parameters())
    if size > LARGE:
        raise ValueError(f"{size:,} parameters")
    model = build(name, suffix="", config=kind.config_class.__name__, **arguments)
    _, gradients = one_process(model, packed(LENGTHS[0]))
    for parameter, found in model.named_parameters():
        found.requires_grad_(gradients.get(parameter) is not None)  # else it is of another modality
    return model


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"


def _known(config: type) -> dict[str, Any]:
    """The arguments that a config has a name for."""
    names: set[str] = set()
    for base in config.__mro__:
        names |= {*getattr(base, "__annotations__", {}), *inspect.signature(base).parameters}
    return {name: value for name, value in FEW.items() if name in names}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    sys.exit(main(sys.argv[1:]))
