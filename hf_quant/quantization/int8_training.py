"""The forward product of QAT in real int8: what inference will compute, and faster than the float product.

Fake-quant multiplies dequantized numbers in float. On a CPU with fast int8 products the same numbers can be
multiplied as integers: the output is the int8 model's own, the gradients are fake-quant's (they never read the
forward product), and in float32 a training step costs no more than one of plain fine-tuning.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..qparams import INT8_MAX, INT8_MIN, dequantize, quanta, quantize, symmetric_scale, token_qparams
from ..runtime import kernels
from .fake_quantize import stop_clipped


@dataclass(eq=False)
class QuantizedInput:
    """One activation in int8.

    Args:
        source (weak reference): the float activation.
        version (`int` or `None`): of its contents; see [`version_of`].
        numbers (`tuple`): static scale and zero point, or `None` for one scale a token.
        quantized (`torch.Tensor`): int8 (tokens, features).
        scale (`torch.Tensor`): float32 (tokens, 1), or () if static.
        zeros (`torch.Tensor` or `None`): int8 (tokens, 1); `None` if static or symmetric.
        unrounded (`torch.Tensor` or `None`): float32 quanta before clipping, for the gradient of static ranges.
    """

    source: weakref.ref[Tensor]
    version: int | None
    numbers: tuple[float, int] | None
    quantized: Tensor
    scale: Tensor
    zeros: Tensor | None
    unrounded: Tensor | None


def version_of(values: Tensor) -> int | None:
    """A count that changes with a tensor's contents; inference tensors have none, so nothing is known of them."""
    return None if values.is_inference() else values._version


def runs_in_int8(values: Tensor) -> bool:
    """Whether this machine multiplies these activations as integers in training."""
    device = values.device
    # Training multiplies with _int_mm, whose weight needs no packing: here it changes at every step.
    return kernels.choose_kernel(device) == "onednn" and kernels.int_mm_is_exact(device)


@torch.no_grad()
def quantize_input(
    values: Tensor, qparams: tuple[Tensor, Tensor] | None, last: QuantizedInput | None, symmetric: bool = False
) -> QuantizedInput:
    """Quantize an activation, or take it from `last`: query, key and value read the same one.

    Args:
        values (`torch.Tensor`): (..., features), float.
        qparams (`tuple`, *optional*): static scale and zero point, shape (); by default one scale a token.
        last ([`QuantizedInput`], *optional*): the one before.
        symmetric (`bool`, *optional*, defaults to `False`): whether ranges of tokens are symmetric around 0.
    """
    numbers = None if qparams is None else (float(qparams[0]), int(qparams[1]))
    version = version_of(values)
    known = last is not None and last.source() is values and last.version == version is not None
    same = last is not None and last.numbers == numbers and (numbers is not None or (last.zeros is None) is symmetric)
    if last is not None and known and same:
        return last
    flat = values.reshape(-1, values.shape[-1])
    source = weakref.ref(values)
    if qparams is not None:
        unrounded = quanta(flat, *qparams)
        quantized = unrounded.clamp(INT8_MIN, INT8_MAX).round_().to(torch.int8)
        return QuantizedInput(source, version, numbers, quantized, qparams[0], None, unrounded)
    by_token, zeros = token_qparams(values, symmetric)
    scale = by_token.expand(*values.shape[:-1], 1).reshape(-1, 1)
    zeros = None if zeros is None else zeros.expand(*values.shape[:-1], 1).reshape(-1, 1)
    return QuantizedInput(source, version, None, quantize(flat, scale, zeros), scale, zeros, None)


def int8_linear(values: Tensor, weight: Tensor, bias: Tensor | None, input: QuantizedInput) -> Tensor:
    """`F.linear` of quantized activations and weights with the straight-through gradient.

    Args:
        values (`torch.Tensor`): (..., in), float; only its gradient is of interest.
        weight (`torch.Tensor`): (out, in), float; quantized per output channel.
        bias (`torch.Tensor`, *optional*): (out,).
        input ([`QuantizedInput`]): `values` in int8.

    Returns:
        `torch.Tensor`: (..., out), in `values`' dtype, or the one of autocast.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else values.dtype
    flat = _Int8Linear.apply(values.reshape(-1, values.shape[-1]), weight, bias, input, dtype)
    # Reshaped out here: a view made inside could not be changed in place, which some models do to a layer's output.
    return flat.reshape(*values.shape[:-1], -1)


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, weight: Tensor, bias: Tensor | None, input: QuantizedInput, dtype: torch.dtype
    ) -> Tensor:
        weight_scale = symmetric_scale(weight, (-1,))
        weight8 = quantize(weight, weight_scale)
        column_scale = weight_scale.float().t()
        output = kernels.int_mm_linear(input.quantized, weight8).float()
        if input.zeros is not None:  # (q - z) w^T = q w^T - z sum(w)
            output.addcmul_(input.zeros.float(), weight8.sum(-1, dtype=torch.int32).float(), value=-1)
        if input.numbers is None:
            output.mul_(column_scale).mul_(input.scale)
            if bias is not None:
                output += bias
        else:
            # (q - z) w^T s + b = q w^T s + (b - z sum(w) s)
            column_scale = column_scale * input.scale
            offset = weight8.sum(-1, dtype=torch.int32) * column_scale * -input.numbers[1]
            output.mul_(column_scale).add_(offset if bias is None else offset + bias)
        ctx.save_for_backward(input.quantized, input.scale, input.zeros, input.unrounded, weight8, weight_scale)
        ctx.zero_point = 0 if input.numbers is None else input.numbers[1]
        ctx.dtypes = values.dtype, weight.dtype, None if bias is None else bias.dtype
        return output.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        quantized, scale, zeros, unrounded, weight8, weight_scale = ctx.saved_tensors
        values_dtype, weight_dtype, bias_dtype = ctx.dtypes
        grad = grads[0]
        grad_values = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_values = grad @ dequantize(weight8, weight_scale).to(grad.dtype)
            if unrounded is not None:
                grad_values = stop_clipped(grad_values, unrounded)
            grad_values = grad_values.to(values_dtype)
        if ctx.needs_input_grad[1]:
            # Integers up to 255 are exact in bfloat16 too, so a static scale can wait for the smaller product.
            steps = quantized.to(grad.dtype)
            if ctx.zero_point:
                steps -= ctx.zero_point
            if zeros is not None:
                steps -= zeros
            if scale.ndim == 0:
                grad_weight = (grad.t() @ steps).to(weight_dtype).mul_(scale)
            else:
                grad_weight = (grad.t() @ steps.mul_(scale)).to(weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0).to(bias_dtype)
        return grad_values, grad_weight, grad_bias, None, None
