"""Which positions of an activation are padding: they say nothing of what a layer sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def batch_masks(batch: Mapping[str, Any]) -> list[Tensor]:
    """The attention masks among the keyword arguments of a forward: boolean, (batch, length), `False` for padding."""
    return [
        value.bool()
        for name, value in batch.items()
        if name.endswith("attention_mask") and isinstance(value, Tensor) and value.ndim == 2
    ]


def mask_for(values: Tensor, masks: Sequence[Tensor]) -> Tensor | None:
    """The attention mask that belongs to an activation: the only one of its (batch, length); `None`: all count."""
    fitting = [mask for mask in masks if values.ndim == 3 and mask.shape == values.shape[:-1]]
    # An encoder's and a decoder's masks of the same shape cannot be told apart here: count all positions then.
    return fitting[0] if len(fitting) == 1 else None


def tokens(values: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """An activation (..., features) as rows (tokens, features), without those of padding."""
    mask = mask_for(values, masks)
    return values.reshape(-1, values.shape[-1]) if mask is None else values[mask.to(values.device)]


def holds_only_padding(batch: Mapping[str, Any]) -> bool:
    """Whether a batch has attention masks, and one of them lets nothing through."""
    return any(not bool(torch.any(mask)) for mask in batch_masks(batch))
