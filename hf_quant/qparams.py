"""The arithmetic of integers: from ranges to scales and zero points, from values to integers and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

INT8_MIN, INT8_MAX = -128, 127
_CHUNK = 2**19  # elements


def integer_range(bits: int) -> tuple[int, int]:
    """The smallest and the largest signed integer of so many bits: -128 and 127, -8 and 7 ..."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def calculate_qparams(min_val: Tensor, max_val: Tensor, *, symmetric: bool, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Scale and zero point of b-bit integers for a range, as the compressed-tensors layout computes them.

    With `n = 2^b - 1` steps. Symmetric: `s = max(|min|, |max|) / (n / 2)`, `z = 0`. Asymmetric:
    `s = (max - min) / n`, `z = round(-2^(b-1) - min / s)`, after Jacob et al. (2018), eq. 1, with the range widened
    to hold 0. A reload by plain transformers is bit-equal only because formula, order of operations and dtype are
    the same here.

    Args:
        min_val (`torch.Tensor`): smallest values, any shape, float.
        max_val (`torch.Tensor`): largest values, the same shape and dtype.
        symmetric (`bool`): whether the zero point is 0.
        bits (`int`, *optional*, defaults to 8): of the integers, 2 to 8.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the scale (dtype of the range; machine epsilon where the range is
        empty) and the zero point (int8), each of the range's shape.
    """
    min_val = torch.clamp(min_val, max=0.0)
    max_val = torch.clamp(max_val, min=0.0)
    low, high = integer_range(bits)
    if symmetric:
        scale = torch.maximum(-min_val, max_val) / ((high - low) / 2)
        zero_point = torch.zeros_like(scale, dtype=torch.int8)
    else:
        scale = (max_val - min_val) / float(high - low)
        zero_point = low - (min_val / scale)
        # An empty range gives 0/0; any zero point serves it.
        zero_point = torch.nan_to_num(zero_point, nan=0.0).clamp(low, high).round().to(torch.int8)
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    return scale, zero_point


def symmetric_scale(values: Tensor, dims: Sequence[int], bits: int = 8) -> Tensor:
    """The symmetric scale of values that share it along `dims`.

    Args:
        values (`torch.Tensor`): float values, any shape.
        dims (sequence of `int`): dimensions that share one scale: `(-1,)` for each output channel of a
            `(out, in)` weight, each row of an embedding and each token of `(batch, length, hidden)`.
        bits (`int`, *optional*, defaults to 8): of the integers, 2 to 8.

    Returns:
        `torch.Tensor`: scales of `values`' dtype, with `dims` kept as 1.
    """
    dims = tuple(dims)
    low, high = values.amin(dims, keepdim=True), values.amax(dims, keepdim=True)
    return calculate_qparams(low, high, symmetric=True, bits=bits)[0]


def token_dims(values: Tensor) -> tuple[int, ...]:
    """The dimensions over which a dynamically quantized activation shares one scale.

    One scale per token of `(batch, length, hidden)`. For other ranks this follows the reader of the
    compressed-tensors layout, so that a plain reload gives the same logits: all dimensions after the second
    share a scale, and a 2-D input has a single one.
    """
    return tuple(range(2, values.ndim)) or tuple(range(values.ndim))


def token_qparams(values: Tensor, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of a dynamically quantized activation, one for all that share a range.

    Args:
        values (`torch.Tensor`): any float dtype; ranges are found in float32.
        symmetric (`bool`): whether the zero point is 0.

    Returns:
        `tuple`: float32 scales, with the dimensions of [`token_dims`] kept as 1, and int8 zero points of their shape;
        `None` if symmetric.
    """
    values, dims = values.float(), token_dims(values)
    low, high = values.amin(dims, keepdim=True), values.amax(dims, keepdim=True)
    scale, zero_point = calculate_qparams(low, high, symmetric=symmetric)
    return scale, None if symmetric else zero_point


def quanta(values: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """`x / s + z` in float32, neither rounded nor clipped; always a new tensor, so callers may go on in place."""
    result = values / scale.float() if values.dtype == torch.float32 else values.float().div_(scale)
    if zero_point is not None:
        result += zero_point.float()
    return result


def quantize(values: Tensor, scale: Tensor, zero_point: Tensor | None = None, bits: int = 8) -> Tensor:
    """`clamp(round(x / s + z), -2^(b-1), 2^(b-1) - 1)` as int8, whatever the bits.

    Args:
        values (`torch.Tensor`): float values.
        scale (`torch.Tensor`): broadcasts against `values`.
        zero_point (`torch.Tensor`, *optional*): int8, of `scale`'s shape; 0 if absent.
        bits (`int`, *optional*, defaults to 8): of the integers, 2 to 8.
    """
    return quanta(values, scale, zero_point).clamp_(*integer_range(bits)).round_().to(torch.int8)


def dequantize(quantized: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """`(q - z) * s` in `scale`'s dtype."""
    values = quantized.to(scale.dtype)
    if zero_point is not None:
        values = values - zero_point.to(scale.dtype)
    return values * scale


def quantize_weight(
    weight: Tensor, bits: int = 8, group_size: int | None = None, search: bool = False
) -> tuple[Tensor, Tensor]:
    """A weight in symmetric integers, one scale a row or a group, found a few rows at a time.

    Args:
        weight (`torch.Tensor`): (rows, columns), float; rows are output channels or the words of an embedding.
        bits (`int`, *optional*, defaults to 8): of the integers, 2 to 8.
        group_size (`int`, *optional*): columns that share a scale, a divisor of `columns`; all of them by default.
        search (`bool`, *optional*, defaults to `False`): whether to look for the scale with the least squared error
            (see [`search_scale`]) rather than take the one that holds the largest weight.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: int8 (rows, columns), contiguous, whatever the bits, and scales
        (rows, groups) of `weight`'s dtype; one group without `group_size`.
    """
    rows, columns = weight.shape
    size = group_size or columns
    quantized = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(rows, columns // size, dtype=weight.dtype, device=weight.device)
    for chunk in row_chunks(weight):
        values = weight[chunk].reshape(-1, columns // size, size)
        found = search_scale(values, bits) if search else symmetric_scale(values, (-1,), bits)
        scale[chunk] = found.squeeze(-1)
        quantized[chunk] = quantize(values, found, bits=bits).reshape(-1, columns)
    return quantized, scale


def dequantize_weight(quantized: Tensor, scale: Tensor) -> Tensor:
    """The float weight (rows, columns) of what [`quantize_weight`] returned, in `scale`'s dtype."""
    rows, columns = quantized.shape
    groups = scale.shape[1]
    if groups == 1:
        return dequantize(quantized, scale)
    return dequantize(quantized.view(rows, groups, columns // groups), scale.unsqueeze(-1)).view(rows, columns)


def search_scale(values: Tensor, bits: int, steps: int = 40, least: float = 0.4) -> Tensor:
    """The symmetric scale, along the last dimension, with the least squared rounding error.

    Tries `s = p * s_max` for `steps` values of p from 1 down to `least`, where `s_max` is the scale that holds the
    largest value: clipping a few outliers buys finer steps for all others (Banner et al., 2019, section 3; a search
    as in Choukroun et al., 2019, "Low-bit quantization of neural networks for efficient inference").

    Args:
        values (`torch.Tensor`): float, any shape.
        bits (`int`): of the integers, 2 to 8.
        steps (`int`, *optional*, defaults to 40): candidates.
        least (`float`, *optional*, defaults to 0.4): the smallest share of `s_max` that is tried.

    Returns:
        `torch.Tensor`: scales of `values`' dtype, the last dimension kept as 1.
    """
    largest = symmetric_scale(values, (-1,), bits)
    best, least_error = largest, torch.full_like(largest, torch.inf, dtype=torch.float32)
    low, high = integer_range(bits)
    exact = values.float()
    for share in torch.linspace(1.0, least, steps).tolist():
        scale = (largest * share).clamp(min=torch.finfo(largest.dtype).tiny)
        rounded = quanta(values, scale).clamp_(low, high).round_().mul_(scale)
        error = rounded.sub_(exact).square_().sum(-1, keepdim=True)
        better = error < least_error
        best, least_error = torch.where(better, scale, best), torch.where(better, error, least_error)
    return best


def row_chunks(weight: Tensor) -> Iterator[slice]:
    """Slices of rows small enough that temporaries stay in the CPU's cache and never add to peak memory."""
    step = max(1, _CHUNK // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)
