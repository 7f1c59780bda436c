"""Products of uint8 activations and an int8 weight, by one kernel or another, on the CPU.

All give the same numbers up to the rounding of float32 sums. There is none by bfloat16: torch returns such a product
rounded to bfloat16, even where the sums are float32.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels, vnni

KERNELS = ("vnni", "onednn", "int_mm", "float32")
_VALUES = 2**15  # of a weight, summed at a time
DTYPES = (torch.float32, torch.bfloat16, torch.uint8)  # of results

# What may follow a product: oneDNN's name of the operation and of its variant.
POSTS = {"none": ("none", ""), "relu": ("relu", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}


def exact_kernels() -> tuple[str, ...]:
    """The kernels that this machine runs without saturation; the preferred one first."""
    exact = {
        "vnni": vnni.available(),
        "onednn": kernels.onednn_is_exact(),
        "int_mm": kernels.int_mm_is_exact(torch.device("cpu"), torch.uint8),
        "float32": True,
    }
    return tuple(name for name in KERNELS if exact[name])


class Rows:
    """What products need of a weight's rows beside its integers.

    Args:
        integers (`torch.Tensor`): int8 (out, in).
        weight_scale (`torch.Tensor`): (out,) or (out, 1).
        bias (`torch.Tensor`, *optional*): (out,).
    """

    def __init__(self, integers: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
        self.scale = weight_scale.detach().float().flatten().contiguous()
        self.bias = None if bias is None else bias.detach().float().contiguous()
        # Some rows at a time: torch turns all that it sums into int32 first, four times a weight.
        parts = integers.split(max(1, _VALUES // integers.shape[1]))
        self.sums = torch.cat([part.sum(-1, dtype=torch.int32) for part in parts])

    @functools.cached_property
    def zeros(self) -> Tensor:
        """The zero points of the rows, which oneDNN wants: int64 (out,)."""
        return torch.zeros(self.sums.numel(), dtype=torch.int64)


def prepare(kernel: str, integers: Tensor, rows: Rows) -> Tensor | vnni.Weight:
    """An int8 weight (out, in) as a kernel wants it; the tensor itself for `"int_mm"`."""
    if kernel == "vnni":
        return vnni.Weight(vnni.pack(integers), rows.scale, rows.sums, rows.bias, integers.shape[1])
    if kernel == "onednn":
        return kernels.onednn_prepack(integers)
    return integers if kernel == "int_mm" else integers.float()


def product(
    kernel: str,
    quantized: Tensor,
    scale: float,
    zero_point: int,
    weight: Tensor | vnni.Weight,
    rows: Rows,
    dtype: torch.dtype,
    post: str = "none",
    out_scale: float = 1.0,
    out_zero_point: int = 0,
) -> Tensor:
    """One product; see [`PreparedLinear.product`].

    Args:
        kernel (`str`): one of `KERNELS`.
        quantized (`torch.Tensor`): uint8 (..., in), at least one token.
        scale (`float`): the activations' scale.
        zero_point (`int`): the activations' zero point, 0 to 255.
        weight (`torch.Tensor` or [`vnni.Weight`]): from [`prepare`], for this kernel.
        rows ([`Rows`]): of the same weight.
        dtype (`torch.dtype`): one of `DTYPES`.
        post (`str`, *optional*, defaults to `"none"`): one of `POSTS`.
        out_scale (`float`, *optional*, defaults to 1): of a uint8 result.
        out_zero_point (`int`, *optional*, defaults to 0): of a uint8 result, 0 to 255.
    """
    if isinstance(weight, vnni.Weight):
        return weight.product(quantized, scale, zero_point, dtype, post, out_scale, out_zero_point)
    flat = quantized.reshape(-1, quantized.shape[-1])
    output = _flat_product(kernel, flat, scale, zero_point, weight, rows, dtype, post, out_scale, out_zero_point)
    return output.view(*quantized.shape[:-1], -1)


def _flat_product(
    kernel: str,
    quantized: Tensor,
    scale: float,
    zero_point: int,
    weight: Tensor,
    rows: Rows,
    dtype: torch.dtype,
    post: str,
    out_scale: float,
    out_zero_point: int,
) -> Tensor:
    if kernel == "onednn":
        operation, variant = POSTS[post]
        return torch.ops.onednn.qlinear_pointwise.default(
            quantized, scale, zero_point, weight, rows.scale, rows.zeros, rows.bias,
            out_scale, out_zero_point, dtype, operation, [], variant,
        )  # fmt: skip
    if kernel == "int_mm":
        sums = kernels.int_mm_linear(quantized, weight)
        if zero_point:  # (q - z) w^T = q w^T - z sum(w)
            sums.sub_(rows.sums, alpha=zero_point)
        output = sums.float()
    else:
        output = torch.mm(quantized.float().sub_(zero_point), weight.t())
    scales = rows.scale * scale
    output = output.mul_(scales) if rows.bias is None else torch.addcmul(rows.bias, output, scales, out=output)
    if post == "relu":
        output.relu_()
    elif post != "none":
        output = F.gelu(output, approximate="tanh" if post == "gelu_tanh" else "none")
    if dtype == torch.uint8:
        output = output.div_(out_scale).round_().add_(out_zero_point).clamp_(0, 255)
    return output.to(dtype)
