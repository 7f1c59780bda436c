"""Quantize and dequantize in one, with the straight-through gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..qparams import (
    INT8_MAX,
    INT8_MIN,
    dequantize,
    integer_range,
    quanta,
    quantize,
    symmetric_scale,
    token_qparams,
)
from ..schemes import Scheme

# A value is clipped when its rounded quantum leaves [-128, 127]. Rounding is half to even, so -128.5 still
# rounds to -128 while 127.5 rounds to 128; the gradient kernel below cuts at both its bounds inclusively.
_GRAD_LOW = float(torch.nextafter(torch.tensor(INT8_MIN - 0.5), torch.tensor(-math.inf)))
_GRAD_HIGH = INT8_MAX + 0.5


def fake_quantize(values: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Quantize and dequantize with ranges that may clip; the gradient stops where a value was clipped.

    Bengio et al. (2013), section 3.1, with the saturation of Jacob et al. (2018), eq. 12: for
    `q = round(x / s + z)`, the gradient passes unchanged where `-128 <= q <= 127` and is 0 elsewhere. Scale and
    zero point get no gradient.

    Args:
        values (`torch.Tensor`): float values, any shape. Half-precision values are quantized in float32: in
            bfloat16 `x / s` would already be off by half a quantum.
        scale (`torch.Tensor`): float, broadcasts against `values`.
        zero_point (`torch.Tensor`, *optional*): int8, of `scale`'s shape; 0 if absent.

    Returns:
        `torch.Tensor`: of `values`' shape and dtype.
    """
    return _ClippingFakeQuantize.apply(values, scale, zero_point)


def fake_quantize_symmetric(values: Tensor, dims: Sequence[int], bits: int = 8) -> Tensor:
    """Quantize and dequantize with scales taken from the values themselves; the gradient passes everywhere.

    Nothing lies outside a range that is read off the values, so there is nothing to clip. (The one largest
    value may round to 128 and be held at 127: cutting its gradient would freeze just the weight that sets the
    scale.)

    Args:
        values (`torch.Tensor`): float values, any shape.
        dims (sequence of `int`): dimensions that share a scale; see [`symmetric_scale`].
        bits (`int`, *optional*, defaults to 8): of the integers, 2 to 8.

    Returns:
        `torch.Tensor`: of `values`' shape and dtype.
    """
    return _PassingFakeQuantize.apply(values, tuple(dims), bits)


def fake_quantize_tokens(values: Tensor, symmetric: bool) -> Tensor:
    """Quantize and dequantize an activation with dynamic ranges; the gradient passes everywhere.

    Args:
        values (`torch.Tensor`): an activation, any float dtype; see [`token_qparams`].
        symmetric (`bool`): whether ranges are symmetric around 0.
    """
    return _TokenFakeQuantize.apply(values, symmetric)


def fake_quantize_weight(weight: Tensor, scheme: Scheme) -> Tensor:
    """A weight (out, in) as the scheme's integers would have it; the gradient passes everywhere."""
    if scheme.group_size is None:
        return fake_quantize_symmetric(weight, (-1,), scheme.bits)
    groups = weight.reshape(weight.shape[0], -1, scheme.group_size)
    return fake_quantize_symmetric(groups, (-1,), scheme.bits).reshape(weight.shape)


def stop_clipped(grad: Tensor, unrounded: Tensor) -> Tensor:
    """`grad`, in float32, where `unrounded` quanta round into -128..127, and 0 where they were clipped."""
    return torch.ops.aten.hardtanh_backward(grad.float(), unrounded, _GRAD_LOW, _GRAD_HIGH)


class _ClippingFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        unrounded = quanta(values, scale, zero_point)
        ctx.save_for_backward(unrounded)
        rounded = unrounded.clamp(INT8_MIN, INT8_MAX).round_()
        if zero_point is not None:
            rounded -= zero_point.float()
        return rounded.mul_(scale).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (unrounded,) = ctx.saved_tensors
        return stop_clipped(grads[0], unrounded).to(grads[0].dtype), None, None


class _TokenFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, symmetric: bool) -> Tensor:
        scale, zeros = token_qparams(values, symmetric)
        return dequantize(quantize(values, scale, zeros), scale, zeros).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _PassingFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, dims: tuple[int, ...], bits: int) -> Tensor:
        scale = symmetric_scale(values, dims, bits)
        return quanta(values, scale).clamp_(*integer_range(bits)).round_().mul_(scale).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None
