"""From ranges to scales and zero points, and the observer that keeps a running range."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

INT8_MIN, INT8_MAX = -128, 127
_STEPS = INT8_MAX - INT8_MIN  # 255


def calculate_qparams(min_val: Tensor, max_val: Tensor, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point of int8 for a range, as the compressed-tensors layout computes them.

    Symmetric: `s = max(|min|, |max|) / 127.5`, `z = 0`. Asymmetric: `s = (max - min) / 255`,
    `z = round(-128 - min / s)`, after Jacob et al. (2018), eq. 1, with the range widened to hold 0. A reload by
    plain transformers is bit-equal only because formula, order of operations and dtype are the same here.

    Args:
        min_val (`torch.Tensor`): smallest values, any shape, float.
        max_val (`torch.Tensor`): largest values, the same shape and dtype.
        symmetric (`bool`): whether the zero point is 0.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the scale (dtype of the range; machine epsilon where the range is
        empty) and the zero point (int8), each of the range's shape.
    """
    min_val = torch.clamp(min_val, max=0.0)
    max_val = torch.clamp(max_val, min=0.0)
    if symmetric:
        scale = torch.maximum(-min_val, max_val) / (_STEPS / 2)
        zero_point = torch.zeros_like(scale, dtype=torch.int8)
    else:
        scale = (max_val - min_val) / float(_STEPS)
        zero_point = INT8_MIN - (min_val / scale)
        # An empty range gives 0/0; any zero point serves it.
        zero_point = torch.nan_to_num(zero_point, nan=0.0).clamp(INT8_MIN, INT8_MAX).round().to(torch.int8)
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    return scale, zero_point


def symmetric_scale(values: Tensor, dims: Sequence[int]) -> Tensor:
    """The symmetric int8 scale of values that share it along `dims`.

    Args:
        values (`torch.Tensor`): float values, any shape.
        dims (sequence of `int`): dimensions that share one scale: `(-1,)` for each output channel of a
            `(out, in)` weight, each row of an embedding and each token of `(batch, length, hidden)`.

    Returns:
        `torch.Tensor`: scales of `values`' dtype, with `dims` kept as 1.
    """
    dims = tuple(dims)
    return calculate_qparams(values.amin(dims, keepdim=True), values.amax(dims, keepdim=True), symmetric=True)[0]


def token_dims(values: Tensor) -> tuple[int, ...]:
    """The dimensions over which a dynamically quantized activation shares one scale.

    One scale per token of `(batch, length, hidden)`. For other ranks this follows the reader of the
    compressed-tensors layout, so that a plain reload gives the same logits: all dimensions after the second
    share a scale, and a 2-D input has a single one.
    """
    return tuple(range(2, values.ndim)) or tuple(range(values.ndim))


class MovingAverageMinMax(nn.Module):
    """Running minimum and maximum of an activation, per tensor, in float32.

    The n-th batch moves the range by `max(1/n, averaging_constant)` of its distance: a plain mean of the
    batches' ranges at first, then the exponential moving average of Jacob et al. (2018), section 3.1. So the
    range does not hang on the first batch, and a run has no step at which it would have to be initialized.

    All that it knows lies in buffers, so a checkpoint holds it and a resumed run goes on where it was.

    Args:
        averaging_constant (`float`, *optional*, defaults to 0.01): weight of a new batch once 1/n is smaller.
        device (`torch.device`, *optional*): where the buffers live.
    """

    min_val: Tensor
    max_val: Tensor
    num_batches: Tensor

    def __init__(self, averaging_constant: float = 0.01, device: torch.device | None = None) -> None:
        super().__init__()
        self.averaging_constant = averaging_constant
        self.register_buffer("min_val", torch.zeros((), dtype=torch.float32, device=device))
        self.register_buffer("max_val", torch.zeros((), dtype=torch.float32, device=device))
        # float32, not int64: counts are exact to 2^24, and one dtype lets processes average all buffers at once.
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.float32, device=device))

    def reset(self) -> None:
        """Forget everything seen."""
        self.min_val.zero_()
        self.max_val.zero_()
        self.num_batches.zero_()

    @torch.no_grad()
    def observe(self, values: Tensor, mask: Tensor | None = None) -> None:
        """Take one batch into account.

        Args:
            values (`torch.Tensor`): the activation, any shape, any float dtype.
            mask (`torch.Tensor`, *optional*): boolean, of `values`' shape without the last dimension; `False`
                marks padding, which is not counted.
        """
        low, high = values.amin(-1).float(), values.amax(-1).float()
        if mask is not None:
            # Ranges always hold 0, so 0 is the neutral element for both ends.
            low, high = low * mask, high * mask
        self.num_batches += 1
        weight = torch.clamp(1.0 / self.num_batches, min=self.averaging_constant)
        self.min_val.lerp_(low.min().clamp(max=0.0), weight)
        self.max_val.lerp_(high.max().clamp(min=0.0), weight)

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point (int8) of the present range, each of shape `()`."""
        return calculate_qparams(self.min_val, self.max_val, symmetric=False)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"range=[{self.min_val.item():.4g}, {self.max_val.item():.4g}], batches={int(self.num_batches)}"
