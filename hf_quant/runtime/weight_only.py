"""Products of float activations and an integer weight, for `hf_quant.optimize`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..qparams import dequantize_weight
from . import choice, half

_GROUPS = (256, 128, 64, 32)  # that torch's int4 product knows, the largest first
_ALIGNED = 64  # bytes


class PreparedWeightOnly:
    """One layer's integer weight, ready for products with activations that stay float.

    float32 activations are multiplied by the weight dequantized to float32, made at the first product and held beside
    the integers: torch's products of float32 and integers are ten times slower on x86. With one scale a row, the
    integers themselves are multiplied in float16 (`"float16"`), which holds them exactly at half of the bytes, with
    sums in float32. For bfloat16 activations torch
    has products that read the integers (`"int8pack"`: 8 bits, one scale a row; `"int4pack"`: 4 bits, groups of
    multiples of 32), which are taken for the numbers of tokens where they are the fastest here; elsewhere the weight
    is dequantized to bfloat16. They round scales and results to bfloat16, and nothing else, where dequantization
    rounds each weight; the error was the same on random weights (0.2 % of the result's norm).

    Args:
        integers (`torch.Tensor`): int8 (out_features, in_features), within `bits`, on the CPU.
        scale (`torch.Tensor`): float (out_features, groups).
        bias (`torch.Tensor`, *optional*): float (out_features,).
        bits (`int`): 2 to 8.
        kernels (`Callable`, *optional*): from a number of tokens and the activations' dtype to the name of a kernel,
            asked once a dtype and bucket of tokens; by default the fastest one.

    Raises:
        `ValueError`: if the weight is not int8, or the shapes do not fit each other.
    """

    def __init__(
        self,
        integers: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        bits: int,
        kernels: Callable[[int, torch.dtype], str] | None = None,
    ) -> None:
        if integers.dtype != torch.int8 or integers.ndim != 2:
            raise ValueError(
                f"the weight is {integers.dtype} {tuple(integers.shape)}; pass int8 (out_features, in_features)"
            )
        self.out_features, self.in_features = integers.shape
        if scale.ndim != 2 or scale.shape[0] != self.out_features or self.in_features % scale.shape[1]:
            raise ValueError(
                f"the scale has shape {tuple(scale.shape)}; a weight of {tuple(integers.shape)} needs "
                f"({self.out_features}, groups) with groups that divide {self.in_features}"
            )
        self.integers, self.scale, self.bits = integers, scale.detach(), bits
        self.bias = None if bias is None else bias.detach()
        self._forms: dict[str, tuple[Any, ...]] = {}
        self._choose = kernels
        self._names: dict[tuple[torch.dtype, int], str] = {}

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.in_features // self.scale.shape[1]

    def kernels(self, dtype: torch.dtype) -> tuple[str, ...]:
        """The kernels that take this weight and activations of float32 or bfloat16."""
        return kernels_for(self.in_features, self.out_features, self.group, self.bits, dtype)

    def names(self) -> dict[tuple[torch.dtype, int], str]:
        """The kernel of each dtype and bucket of tokens that was asked for so far."""
        return dict(self._names)

    def matmul(self, x: Tensor) -> Tensor:
        """`x (w s)^T + b`.

        Args:
            x (`torch.Tensor`): float32 or bfloat16 (tokens, in_features).

        Returns:
            `torch.Tensor`: (tokens, out_features) in `x`'s dtype.

        Raises:
            `ValueError`: for another dtype.
        """
        if x.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"the activations are {x.dtype}; pass float32 or bfloat16")
        if x.shape[0] == 0:
            return x.new_empty(0, self.out_features)
        kernel = self._kernel(x.shape[0], x.dtype)
        output = multiply(kernel, x, self._form(kernel))
        return output if self.bias is None else output.add_(self.bias)

    def _kernel(self, tokens: int, dtype: torch.dtype) -> str:
        key = dtype, choice.bucket(tokens)
        name = self._names.get(key)
        if name is None:
            if self._choose is not None:
                name = self._choose(tokens, dtype)
            else:
                found = times(self.in_features, self.out_features, self.group, self.bits, tokens, dtype)
                name = choice.fastest(found, self.kernels(dtype)[0])
            if name not in self.kernels(dtype):
                raise ValueError(
                    f"kernel {name!r} does not take this weight and {dtype}: choose one of "
                    f"{', '.join(self.kernels(dtype))}"
                )
            self._names[key] = name
        return name

    def _form(self, kernel: str) -> tuple[Any, ...]:
        form = self._forms.get(kernel)
        if form is None:
            form = self._forms[kernel] = prepare(kernel, self.integers, self.scale)
        return form


def kernels_for(in_features: int, out_features: int, group: int, bits: int, dtype: torch.dtype) -> tuple[str, ...]:
    """The kernels for a weight and a dtype of activations; the one that holds the fewest bytes first.

    Args:
        in_features (`int`): columns of the weight.
        out_features (`int`): rows of the weight.
        group (`int`): inputs that share a scale.
        bits (`int`): of the weight.
        dtype (`torch.dtype`): float32 or bfloat16.
    """
    if dtype == torch.float32:
        return ("float16", "float32") if group == in_features and half.available() else ("float32",)
    # torch's int8 product reads 16 inputs at a time, beyond the end of a row where they are no multiple.
    if bits == 8 and group == in_features and in_features % 16 == 0 and _is_right("int8pack"):
        return "int8pack", "bfloat16"
    if bits == 4 and group % _GROUPS[-1] == 0 and out_features % 16 == 0 and _is_right("int4pack"):
        return "int4pack", "bfloat16"
    return ("bfloat16",)


def prepare(kernel: str, integers: Tensor, scale: Tensor) -> tuple[Any, ...]:
    """What a kernel wants of int8 integers (out, in) and scales (out, groups)."""
    if kernel == "int8pack":
        return _aligned(integers), scale.flatten().to(torch.bfloat16)
    if kernel == "int4pack":
        group = integers.shape[1] // scale.shape[1]
        known = next(size for size in _GROUPS if group % size == 0)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((integers + 8).to(torch.int32), 1)
        scales = scale.repeat_interleave(group // known, dim=1).t()
        beside = torch.stack((scales, torch.zeros_like(scales)), dim=-1).to(torch.bfloat16).contiguous()
        return packed, beside
    if kernel == "float16":
        return half.pack(integers, None), scale.flatten().float()
    return (dequantize_weight(integers, scale).to(getattr(torch, kernel)),)


def multiply(kernel: str, x: Tensor, form: tuple[Any, ...]) -> Tensor:
    """`x` (tokens, in) times the weight that [`prepare`] made for a kernel."""
    if kernel == "int8pack":
        return torch.ops.aten._weight_int8pack_mm(_aligned(x), *form)
    if kernel == "int4pack":
        packed, beside = form
        return torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), packed, x.shape[1] // beside.shape[0], beside
        )
    if kernel == "float16":
        return half.multiply(x, form[0]).mul_(form[1])
    return torch.mm(x, form[0].t())


def times(
    in_features: int, out_features: int, group: int, bits: int, tokens: int, dtype: torch.dtype
) -> dict[str, float]:
    """Microseconds of each kernel, as [`choice.times`] for int8 activations; not measured where there is only one."""
    names, limit = kernels_for(in_features, out_features, group, bits, dtype), choice.bucket(tokens)
    if len(names) == 1:
        return {names[0]: 0.0}
    rows = -(-choice.measured_rows(in_features, out_features) // 16) * 16
    rows = min(rows, out_features)

    def calls(tokens: int) -> dict[str, Callable[[int], object]]:
        x = torch.ones(tokens, in_features, dtype=dtype)

        def call(name: str, turn: int) -> Tensor:
            return multiply(name, x, forms[name][turn % len(forms[name])])

        return {name: functools.partial(call, name) for name in names}

    def measure() -> dict[str, float]:
        integers = torch.full((rows, in_features), 3, dtype=torch.int8)
        scale = torch.full((rows, in_features // group), 1e-3)
        for name in names:
            forms[name] = [prepare(name, integers.clone(), scale) for _ in range(choice.copies(in_features, rows))]
        return choice.measure(calls, limit)

    forms: dict[str, list[tuple[Any, ...]]] = {}
    what = f"int{bits} by {group}, {str(dtype).removeprefix('torch.')} {out_features}x{in_features} {limit}"
    return {name: value * out_features / rows for name, value in choice.remembered(what, names, measure).items()}


def _aligned(tensor: Tensor) -> Tensor:
    # torch's int8 product loads aligned vectors; weights mapped from a file, and views, may lie anywhere.
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % _ALIGNED else tensor


@functools.cache
def _is_right(kernel: str) -> bool:
    """Whether torch has a kernel here, and it gives the dequantized product."""
    bits = 8 if kernel == "int8pack" else 4
    most = 2 ** (bits - 1)
    integers = (torch.arange(32 * 64, dtype=torch.int32) % (2 * most) - most).to(torch.int8).view(32, 64)
    scale = torch.full((32, 1 if bits == 8 else 2), 2.0**-6)
    x = (torch.arange(5 * 64).view(5, 64) % 7 - 3).to(torch.bfloat16)
    try:
        got = multiply(kernel, x, prepare(kernel, integers, scale))
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return torch.allclose(got.float(), x.float() @ dequantize_weight(integers, scale).t(), rtol=2**-7, atol=2**-7)
