"""The head of a transformers model in tiles: the loss without the logits of a whole shard.

With labels the model is asked for the logits of one token only (`logits_to_keep`, which transformers' models have for
generation); the hidden states are taken from its base model by a hook, and the loss calls the head tile by tile. Some
families change their logits after the head, so the token that the model did compute is compared with ours in each
forward, on a GPU in each hundredth: a family that does something unknown is refused, not answered wrongly. Dense MLPs
in tiles are found here too.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from seqpar_ring.errors import UnsupportedError
from seqpar_ring.tiling import Tiles, is_tiled, set_tiles, tile_module, tiles

AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
"""Largest difference between a logit of the model and ours, relative to it: the same products, of the same row, so that
two units in the last place are much. A logit below `SMALL` of the largest is taken for as large as that."""

SMALL = 1 / 16

EVERY = 100
"""Steps after which a GPU compares them again."""

AFTERWARDS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""What configs say of logits after the head: Gemma 2 and 3 cap them, Granite divides them, Cohere multiplies them."""

BESIDE = "_seqpar_mlps"
"""Attribute of an attention module: the MLPs of its layer that can run in tiles."""

WHOLE = 'Set "logits": "whole" in the settings.'


def base_of(model: Any) -> Any:
    """The part of a model below its head; the model itself where it has none.

    transformers' `base_model`, but for a family whose prefix is that of a larger one (Llama 4's text models): there the
    only model inside.
    """
    if model.base_model is not model:
        return model.base_model
    inside = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    return inside[0] if len(inside) == 1 else model


def lacks(model: Any) -> str | None:
    """What a model lacks for its head to run in tiles; None if nothing."""
    if base_of(model) is model or model.get_output_embeddings() is None:
        return "no head of its own"
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return "no logits_to_keep"
    return None


def choose(model: Any, most_tokens: int, asked: int | str) -> Tiles:
    """Into how many tiles the head's work is cut; one where the model cannot.

    Raises:
        UnsupportedError: a number of tokens is asked for, and the model's head cannot run in tiles.
    """
    missing = lacks(model)
    if missing is None:
        return tiles(most_tokens, model.config.get_text_config().vocab_size, asked)
    if isinstance(asked, int):
        raise UnsupportedError(
            f"the model has {missing}, so its head cannot run in tiles",
            fix=WHOLE,
            model=type(model).__name__,
            logits=asked,
        )
    return Tiles(1, f"the model has {missing}")


def is_read(logits: Tensor, before: int) -> bool:
    """Whether the host looks at a comparison after so many: on a GPU it has to wait for it."""
    return not logits.is_cuda or before % EVERY == 0


class Cut:
    """A model's head to be run in tiles, in one forward: what it is given, and how logits come of it.

    Attributes:
        hidden_BSC: the base model's last hidden states; None until a hook has seen them.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        self.hidden_BSC: Tensor | None = None
        self._model, self._head = type(model).__name__, model.get_output_embeddings()
        self._cap, self._divisor, self._factor = (getattr(config, name, None) for name in AFTERWARDS)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (B, n, V) of hidden states (B, n, C), as the model would return them."""
        out: Tensor = self._head(hidden)
        out = out if self._divisor is None else out / self._divisor
        out = out if self._factor is None else out * self._factor
        return out if self._cap is None else torch.tanh(out / self._cap) * self._cap

    def difference(self, found_BSV: Tensor, read: bool = True) -> UnsupportedError | None:
        """What is wrong if the last token's logits, as the model computed them, are not those that tiles would give.

        Ours are computed also where nobody reads them: ZeRO-3 expects the same modules to run in every forward, and
        would gather ahead of none for two of them where they change.
        """
        if self.hidden_BSC is None:
            what = "the model's last hidden states were not seen, so its head cannot run in tiles"
            return UnsupportedError(what, fix=WHOLE, model=self._model)
        with torch.no_grad():
            ours = self.logits(self.hidden_BSC[:, -1:])
            if not read:
                return None
            theirs = found_BSV[:, -1:].double()
            least = max(float(theirs.abs().max()) * SMALL, torch.finfo(torch.float32).tiny)
            error = float(((ours - theirs).abs() / theirs.abs().clamp(min=least)).max())
        if error <= AGREEMENT.get(ours.dtype, AGREEMENT[torch.bfloat16]):
            return None
        return UnsupportedError(
            "the model does something to its logits after its head that is not known here",
            fix=WHOLE,
            model=self._model,
            relative_difference=f"{error:.1e}",
        )


def tile_mlps(model: nn.Module) -> list[nn.Module]:
    """Change the dense MLPs of a model so that they can run in tiles; returns them.

    Those are modules whose class is called ..MLP and that hold linear layers and activations only; a mixture of experts
    looks at all tokens of a shard at once and is left alone.

    Raises:
        UnsupportedError: there are none.
    """
    found = [module for module in model.modules() if type(module).__name__.endswith("MLP") and _is_dense(module)]
    if not found:
        raise UnsupportedError(
            "no dense MLP was found to run in tiles", fix='Leave "mlp" out.', model=type(model).__name__
        )
    for module in found:
        tile_module(module)
    for layer in (one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)):
        mlps = tuple(one for one in layer.modules() if is_tiled(one))
        for one in layer.modules():
            if "Attention" in type(one).__name__:
                vars(one)[BESIDE] = mlps  # a tuple of modules is no child
    return found


def tile_as_its_call(attention: nn.Module, count: int) -> None:
    """Called in a layer's attention: the layer's MLPs, which come next, have the tiles of the call that it belongs to,
    also where it is recomputed after other calls."""
    for mlp in vars(attention).get(BESIDE, ()):
        set_tiles(mlp, count)


def _is_dense(module: nn.Module) -> bool:
    inside = [one for one in module.modules() if one is not module]
    own = [name for name, _ in module.named_parameters(recurse=False)]
    linear = [one for one in inside if isinstance(one, nn.Linear) or type(one).__name__ == "Conv1D"]
    return len(linear) >= 2 and not own and not any(isinstance(one, nn.ModuleList | nn.Dropout) for one in inside)
