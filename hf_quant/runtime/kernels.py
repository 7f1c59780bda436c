"""int8 matrix products, one function a kernel, and the choice among those that this machine runs exactly."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Literal["onednn", "int_mm", "reference"]
KERNELS: tuple[Kernel, ...] = ("onednn", "int_mm", "reference")

# u8 = s8 + 128: oneDNN's int8 products are fast for unsigned activations; for signed ones CPUs without AMX fall
# into a scalar reference, thousands of times slower.
_SHIFT = 128

_forced: ContextVar[Kernel | None] = ContextVar("hf_quant_kernel", default=None)


@contextmanager
def use_kernel(kernel: Kernel | None) -> Iterator[None]:
    """Run every int8 module on one kernel inside this context, in this thread.

    Args:
        kernel (`str`): `"onednn"` and `"int_mm"` multiply integers; `"reference"` multiplies dequantized values,
            with the very operations of a plain reload, on any device. `None` leaves the choice to the machine
            again, inside another such context.

    Raises:
        `ValueError`: if there is no such kernel.
    """
    if kernel is not None and kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}. Choose one of: {', '.join(KERNELS)}.")
    token = _forced.set(kernel)
    try:
        yield
    finally:
        _forced.reset(token)


def choose_kernel(device: torch.device) -> Kernel:
    """The kernel for int8 products on a device: forced by [`use_kernel`], or the fastest exact one there."""
    if torch.compiler.is_compiling():
        return _compiled_kernel(device.type)
    forced = _forced.get()
    if forced is not None:
        return forced
    if device.type == "cpu" and onednn_is_exact():
        return "onednn"
    if device.type == "cuda" and int_mm_is_exact(device):
        return "int_mm"
    return "reference"


@torch.compiler.assume_constant_result
def _compiled_kernel(device: str) -> Kernel:
    """What a compiler can fuse with its surroundings: products of integers on CUDA, elsewhere plain tensor maths."""
    return "int_mm" if device == "cuda" and int_mm_is_exact(torch.device(device)) else "reference"


@functools.cache
def onednn_is_exact() -> bool:
    """Whether oneDNN's u8 x s8 product is there and does not saturate.

    CPUs without VNNI add pairs of products in 16 bits, where 2 x 255 x 127 does not fit. Asked of the kernel
    itself, with the largest values, rather than of the CPU's flags.
    """
    if not (hasattr(torch.ops, "onednn") and hasattr(torch.ops.onednn, "qlinear_pointwise")):
        return False
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    try:
        weight = torch.full((16, 64), 127, dtype=torch.int8)
        packed = onednn_prepack(weight)
        values = torch.full((4, 64), 127, dtype=torch.int8)
        got = onednn_linear(values, packed, torch.ones(16), None, 1.0, 0)
        low = onednn_linear(-values - 1, packed, torch.ones(16), None, 1.0, 0)
    except (RuntimeError, NotImplementedError):
        return False
    return bool((got == 64 * 127 * 127).all() and (low == -64 * 128 * 127).all())


@functools.cache
def int_mm_is_exact(device: torch.device, dtype: torch.dtype = torch.int8) -> bool:
    """Whether `torch._int_mm` runs on that device and gives exact sums, for int8 or uint8 activations."""
    extreme = -128 if dtype == torch.int8 else 255
    try:
        values = torch.full((32, 64), extreme, dtype=dtype, device=device)
        weight = torch.full((16, 64), 127, dtype=torch.int8, device=device)
        return bool((torch._int_mm(values, weight.t()) == 64 * extreme * 127).all())
    except (RuntimeError, AttributeError):
        return False


def onednn_prepack(weight: Tensor) -> Tensor:
    """An int8 weight (out, in) in oneDNN's blocked layout."""
    return torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)


def onednn_unpack(packed: Tensor) -> Tensor:
    """The int8 weight (out, in) of what [`onednn_prepack`] made."""
    return packed.to_dense().t().contiguous()


def onednn_linear(
    quantized: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: float,
    input_zero_point: int,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`((q - z) s_x) (w s_w)^T + b` with the product in integers.

    Args:
        quantized (`torch.Tensor`): int8 activations (tokens, in); shifted to unsigned here.
        packed (`torch.Tensor`): the weight from [`onednn_prepack`].
        weight_scale (`torch.Tensor`): float32 (out,).
        bias (`torch.Tensor`, *optional*): float32 (out,).
        input_scale (`float`): the activations' scale.
        input_zero_point (`int`): the activations' zero point, in -128..127.
        out_dtype (`torch.dtype`, *optional*, defaults to float32): float32 or bfloat16.
    """
    unsigned = quantized.view(torch.uint8).bitwise_xor(_SHIFT)  # flips the sign bit, which adds 128
    zero_points = torch.zeros(weight_scale.numel(), dtype=torch.int64)
    return torch.ops.onednn.qlinear_pointwise(
        unsigned, input_scale, input_zero_point + _SHIFT, packed, weight_scale, zero_points, bias,
        1.0, 0, out_dtype, "none", [], "",
    )  # fmt: skip


def int_mm_linear(quantized: Tensor, weight: Tensor) -> Tensor:
    """The integer product `q w^T` (tokens, out) as int32, through `torch._int_mm`.

    CUDA's kernel wants more than 16 rows and multiples of 8: rows are padded; other sizes are a `ValueError`
    that names them, for the caller to use the reference.
    """
    tokens, out_features = quantized.shape[0], weight.shape[0]
    if quantized.is_cuda and (quantized.shape[1] % 8 or out_features % 8):
        raise ValueError(f"torch._int_mm on CUDA takes multiples of 8, not a weight of {tuple(weight.shape)}")
    if quantized.is_cuda and tokens <= 16:
        quantized = F.pad(quantized, (0, 0, 0, 17 - tokens))
    if quantized.shape[1] == 1:  # on CPU torch 2.13 leaves the result of a single column uninitialized
        quantized, weight = F.pad(quantized, (0, 1)), F.pad(weight, (0, 1))
    return torch._int_mm(quantized, weight.t())[:tokens]
