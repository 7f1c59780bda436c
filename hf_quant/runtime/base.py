"""What all quantized modules share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class QuantizedModule(nn.Module):
    """A module that stores its weight as integers; nothing of it can be trained.

    Subclasses have a buffer `weight_scale`, and `weight` for the outside: the dequantized weight. Some models read a
    layer's weight without calling the layer (DeBERTa's relative embeddings, DETR's queries, Mamba's `dt_proj`), or
    cast to its dtype; they get what a plain reload has there.
    """

    weight_scale: Tensor
    transposed = False

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(refuse_float_weights)

    @property
    def integers(self) -> Tensor:
        """The weight as int8 (rows, columns), whatever the bits; rows are output channels or words."""
        raise NotImplementedError

    @property
    def stored_bits(self) -> int:
        """Bits of one stored weight."""
        raise NotImplementedError

    def stored_shapes(self) -> list[tuple[str, torch.Size, torch.Size]]:
        """Name, present shape and right shape of what holds the weight."""
        raise NotImplementedError


def quantized_modules(model: nn.Module) -> dict[str, QuantizedModule]:
    """The quantized modules of a model by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedModule)}


def refuse_float_weights(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load-state-dict hook: float weights would be cast to int8, or passed over, without a word.

    Raises:
        `RuntimeError`: if `state_dict` holds a float weight for a quantized module; nothing is loaded then.
    """
    for name, module in quantized_modules(model).items():
        key = ".".join(part for part in (prefix.rstrip("."), name, "weight") if part)
        value = state_dict.get(key)
        if isinstance(value, Tensor) and value.is_floating_point():
            raise RuntimeError(
                f"{key} is {value.dtype} in what is loaded, but this {type(module).__name__} is "
                f"int{module.stored_bits} and would be destroyed by it. To train on, make a new Trainer from the "
                "float checkpoint; to use it, call from_pretrained."
            )


def refuse_training(module: nn.Module, input: Tensor, grad_enabled: bool) -> None:
    """Refuse a forward that somebody wants gradients of.

    Raises:
        `RuntimeError`: when trained.
    """
    if module.training and grad_enabled and input.requires_grad:
        raise RuntimeError(
            "int8 modules cannot be trained: their weights have no gradient. Train the float checkpoint "
            "(a checkpoint-* folder of the Trainer, or the model before conversion) and quantize again."
        )
