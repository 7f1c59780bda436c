"""The arithmetic of int8: from ranges to scales and zero points, from values to integers and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

INT8_MIN, INT8_MAX = -128, 127
_STEPS = INT8_MAX - INT8_MIN  # 255
_CHUNK = 2**19  # elements


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


def quanta(values: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """`x / s + z` in float32, neither rounded nor clipped; always a new tensor, so callers may go on in place."""
    result = values / scale.float() if values.dtype == torch.float32 else values.float().div_(scale)
    if zero_point is not None:
        result += zero_point.float()
    return result


def quantize(values: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """`clamp(round(x / s + z), -128, 127)` as int8.

    Args:
        values (`torch.Tensor`): float values.
        scale (`torch.Tensor`): broadcasts against `values`.
        zero_point (`torch.Tensor`, *optional*): int8, of `scale`'s shape; 0 if absent.
    """
    return quanta(values, scale, zero_point).clamp_(INT8_MIN, INT8_MAX).round_().to(torch.int8)


def dequantize(quantized: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """`(q - z) * s` in `scale`'s dtype."""
    values = quantized.to(scale.dtype)
    if zero_point is not None:
        values = values - zero_point.to(scale.dtype)
    return values * scale


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight in symmetric int8, one scale a row, found a few rows at a time.

    Args:
        weight (`torch.Tensor`): (rows, columns), float; rows are output channels or the words of an embedding.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: int8 (rows, columns), contiguous, and scales (rows, 1) of `weight`'s
        dtype.
    """
    quantized = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], 1, dtype=weight.dtype, device=weight.device)
    for rows in row_chunks(weight):
        scale[rows] = symmetric_scale(weight[rows], (-1,))
        quantized[rows] = quantize(weight[rows], scale[rows])
    return quantized, scale


def row_chunks(weight: Tensor) -> Iterator[slice]:
    """Slices of rows small enough that temporaries stay in the CPU's cache and never add to peak memory."""
    step = max(1, _CHUNK // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)
