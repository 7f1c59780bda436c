"""Layers that hand their input on: what pruning a whole layer means while the layer is still there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .probing import first_tensor


def skip_layer(model: nn.Module, name: str) -> None:
    """Make a layer return its first input, in place; its Parameters stay, under their names.

    Zero weights alone do not remove a layer whose norm comes after its residual sum. The layer still runs, without
    gradients, for what it returns besides its hidden states (a position bias, attention weights) and for its entry
    in a cache of keys and values; its time is saved when it is shrunk away.

    Args:
        model (`torch.nn.Module`): changed in place.
        name (`str`): qualified name of the layer, such as `"bert.encoder.layer.3"`.
    """
    layer = model.get_submodule(name)
    if not is_skipped(layer):
        kind = type(layer)
        layer.__class__ = _SKIPPING.setdefault(kind, _skipping(kind))


def is_skipped(layer: nn.Module) -> bool:
    """Whether [`skip_layer`] was called on this layer."""
    return hasattr(type(layer), "_skipped_kind")


def kind_of(layer: nn.Module) -> type[nn.Module]:
    """The class of a layer, be it skipped or not."""
    return getattr(type(layer), "_skipped_kind", type(layer))


# One class for each class: layers that are skipped stay alike.
_SKIPPING: dict[type[nn.Module], type[nn.Module]] = {}


def _skipping(kind: type[nn.Module]) -> type[nn.Module]:
    class Skipped(kind):  # type: ignore[misc, valid-type]
        """A layer that hands its input on."""

        _skipped_kind = kind

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            """The first input, in place of the first output."""
            hidden = first_tensor((*args, *kwargs.values()))
            with torch.no_grad():
                output = super().forward(*args, **kwargs)
            return hidden if isinstance(output, Tensor) else type(output)((hidden, *output[1:]))

    # Libraries read a class's name: which modules not to split over devices, for one.
    Skipped.__name__, Skipped.__qualname__, Skipped.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Skipped
