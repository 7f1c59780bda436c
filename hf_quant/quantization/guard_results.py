"""What the accuracy guard measured, as plain values. Importing this module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerSensitivity:
    """What quantizing one layer alone costs, while all others are in float.

    Args:
        name (`str`): of the module; modules that share one weight are one layer, named `"a + b"`.
        sqnr (`float`): of the model's output against the float model's, decibels; less is more sensitive. Where the
            guard had no batches, of the weight.
        change (`float`, *optional*): of the metric, quantized minus float, in its own unit; `None` where it was not
            measured.
        bytes_saved (`int`): bytes that the layer takes less of when it is quantized.
    """

    name: str
    sqnr: float
    change: float | None
    bytes_saved: int


@dataclass(frozen=True)
class TradeOff:
    """One model that was evaluated between fully quantized and fully float.

    Args:
        float_layers (`int`): how many of the layers that can be quantized are in float.
        value (`float`): of the metric, in its own unit.
        size (`int`): bytes of the model's state.
    """

    float_layers: int
    value: float
    size: int


def signed(change: float) -> str:
    """A change with its sign, to four digits: `+0.0123`, `-2.5`, `0`."""
    return f"{change:+.4g}" if change else "0"
