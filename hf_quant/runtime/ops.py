"""The operations of an optimized model: visible to graph rewriting, opaque to Inductor."""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor

from ..qparams import INT8_MAX, INT8_MIN, dequantize_weight, token_qparams
from ..schemes import Scheme
from . import vnni
from .prepared import PreparedLinear
from .weight_only import PreparedWeightOnly

# Graphs name a layer by a number, so that they hold no tensor that only one kernel can read. Whoever optimized a
# model owns its layers; a graph that outlives them fails with a KeyError.
_LAYERS: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()
_numbers = itertools.count()

# uint8 = int8 + 128: integer products are fast for unsigned activations.
SHIFT = 128

# What `linear` takes beside its input: the layer's number, and what is added after the scales of a dynamic input.
Operands = tuple[int, Tensor | None, Tensor | None]

# Where a masked score goes: exp of it is 0, and a row of nothing else stays finite.
MASKED = -1e30


class Layer:
    """One quantized Linear layer, as graphs see it.

    Args:
        scheme ([`Scheme`]): what happens to its input.
        weight ([`PreparedLinear`] or [`PreparedWeightOnly`]): the weight, with the bias where the product adds it.
        weight_scale (`torch.Tensor`): as the module has it.
        bias (`torch.Tensor`, *optional*): float32 (out_features,).
        scale (`float`): of a static input.
        zero_point (`int`): of a static input, 0 to 255.
    """

    def __init__(
        self,
        scheme: Scheme,
        weight: PreparedLinear | PreparedWeightOnly,
        weight_scale: Tensor,
        bias: Tensor | None,
        scale: float = 1.0,
        zero_point: int = 0,
    ) -> None:
        self.scheme, self.weight_scale, self.bias = scheme, weight_scale, bias
        self.scale, self.zero_point = scale, zero_point
        self.out_features, self.in_features = weight.out_features, weight.in_features
        self._weight: PreparedLinear | PreparedWeightOnly | None = weight
        self._place: tuple[Layer, int] | None = None
        self.number = next(_numbers)
        _LAYERS[self.number] = self

    @property
    def weight(self) -> PreparedLinear | PreparedWeightOnly:
        """The weight; prepared anew where it was given away and is wanted alone again."""
        if self._weight is None:
            self._weight = _prepare_weight(self.scheme, self.integers, self.weight_scale, self.bias)
        return self._weight

    @property
    def integers(self) -> Tensor:
        """int8 (out_features, in_features); made anew where only a kernel's form is held."""
        if self._place is not None:
            whole, start = self._place
            return whole.integers[start : start + self.out_features]
        return self.weight.integers

    def weight_form(self) -> tuple[int, int]:
        """Bits of the weight, and scales to a row."""
        return self.scheme.bits, self.weight_scale.numel() // self.out_features

    def give_to(self, whole: Layer, start: int) -> None:
        """Holds the weight no more: it is in the rows of another layer's from `start` on."""
        self._place, self._weight = (whole, start), None

    def whole(self) -> vnni.Weight | None:
        """What kernels that do all of the layer's work want, beyond the product, for a graph to call them directly.

        `None` where there are none, where others are faster, and for weights alone.
        """
        if not isinstance(self.weight, PreparedLinear):
            return None
        return self.weight.whole() if self.scheme.activations == "static" else self.weight.whole_by_token(self.bias)

    def operands(self) -> Operands:
        """What [`linear`] takes beside its input: the number, the bias, and the sums that a zero point is times."""
        if self.scheme.activations != "dynamic":
            return self.number, None, None
        assert isinstance(self.weight, PreparedLinear)
        return self.number, self.bias, None if self.scheme.symmetric else self.weight.row_sums


def prepare(
    scheme: Scheme,
    integers: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scale: float = 1.0,
    zero_point: int = 0,
) -> Layer:
    """A layer of integers (out_features, in_features); the other arguments are [`Layer`]'s."""
    weight = _prepare_weight(scheme, integers, weight_scale, bias)
    return Layer(scheme, weight, weight_scale, bias, scale, zero_point)


def _prepare_weight(
    scheme: Scheme, integers: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> PreparedLinear | PreparedWeightOnly:
    if scheme.activations is None:
        return PreparedWeightOnly(integers, weight_scale, bias, scheme.bits)
    # A dynamic layer's bias is added after the scales of its tokens.
    return PreparedLinear(integers, weight_scale, bias if scheme.activations == "static" else None)


def layer(number: int) -> Layer:
    """The layer of that number."""
    return _LAYERS[number]


def quantize_static(input: Tensor, scale: float, zero_point: int) -> Tensor:
    """[`quantize`]'s integers, operation by operation, shifted by 128 to uint8; `zero_point` is shifted too."""
    values = input.float() / scale
    return values.add_(zero_point - SHIFT).clamp_(INT8_MIN, INT8_MAX).round_().add_(SHIFT).to(torch.uint8)


def quantize_by_token(input: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """uint8 values, float32 scales and float32 zero points in -128..127 (`None`: all are 0) of a dynamic input.

    The values are those of [`quantize`], shifted by 128.
    """
    scale, zeros = token_qparams(input, symmetric)
    values = input.float() / scale
    zeros = None if zeros is None else zeros.float()
    if zeros is not None:
        values = values + zeros
    return values.clamp_(INT8_MIN, INT8_MAX).round_().add_(SHIFT).to(torch.uint8), scale, zeros


def rescale_by_token(
    product: Tensor,
    scale: Tensor,
    zeros: Tensor | None,
    row_sums: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`s (q w^T - z sum(w)) + b` of a product of [`quantize_by_token`]'s values, in `dtype`."""
    output = product
    if zeros is not None:
        assert row_sums is not None
        output = output - zeros * row_sums
    output = output * scale
    return (output if bias is None else output + bias).to(dtype)


def _linear(input: Tensor, layer: int, bias: Tensor | None, row_sums: Tensor | None) -> Tensor:
    here = _LAYERS[layer]
    if input.numel() == 0:  # which has no range
        return input.new_empty(*input.shape[:-1], here.out_features)
    if here.scheme.activations is None:
        return _weight_only(input, layer)
    if here.scheme.activations == "static":
        quantized = quantize_static(input, here.scale, here.zero_point)
        return _product(quantized, layer, here.scale, here.zero_point, _out_dtype(input)).to(input.dtype)
    whole = here.whole()
    if whole is not None:
        return whole.product_by_token(input.float(), here.scheme.symmetric, _out_dtype(input)).to(input.dtype)
    quantized, scale, zeros = quantize_by_token(input, here.scheme.symmetric)
    output = _product(quantized, layer, 1.0, SHIFT, torch.float32)
    return rescale_by_token(output, scale, zeros, row_sums, bias, input.dtype)


def _product(
    quantized: Tensor,
    layer: int,
    scale: float,
    zero_point: int,
    dtype: torch.dtype,
    post: str = "none",
    out_scale: float = 1.0,
    out_zero_point: int = 0,
) -> Tensor:
    weight = _LAYERS[layer].weight
    assert isinstance(weight, PreparedLinear)
    return weight.product(quantized, scale, zero_point, dtype, post, out_scale, out_zero_point)


def _weight_only(input: Tensor, layer: int) -> Tensor:
    weight = _LAYERS[layer].weight
    assert isinstance(weight, PreparedWeightOnly)
    return weight.matmul(input.reshape(-1, input.shape[-1])).view(*input.shape[:-1], weight.out_features)


def _weight(scale: Tensor, layer: int) -> Tensor:
    return dequantize_weight(_LAYERS[layer].integers, scale)


def _fake_weight(scale: Tensor, layer: int) -> Tensor:
    return scale.new_empty(_LAYERS[layer].out_features, _LAYERS[layer].in_features)


# Masks are operations of their own: inlined, one that is made of positions is made anew for each attention.


def _bool_mask(mask: Tensor) -> Tensor:
    return mask.clone(memory_format=torch.contiguous_format)


def _additive_mask(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=mask.device).masked_fill_(mask.logical_not(), MASKED)
    return mask.to(torch.float32, copy=True).clamp_(min=MASKED).contiguous()


def _out_dtype(input: Tensor) -> torch.dtype:
    return torch.bfloat16 if input.dtype == torch.bfloat16 else torch.float32


def _fake_linear(input: Tensor, layer: int, *_: object) -> Tensor:
    return input.new_empty(*input.shape[:-1], _LAYERS[layer].out_features)


def _fake_product(
    quantized: Tensor, layer: int, scale: float, zero_point: int, dtype: torch.dtype, *_: object
) -> Tensor:
    return quantized.new_empty(*quantized.shape[:-1], _LAYERS[layer].out_features, dtype=dtype)


def _fake_bool_mask(mask: Tensor) -> Tensor:
    return torch.empty(mask.shape, dtype=torch.bool, device=mask.device)


def _fake_additive_mask(mask: Tensor) -> Tensor:
    return torch.empty(mask.shape, dtype=torch.float32, device=mask.device)


_LIBRARY = torch.library.Library("hf_quant", "DEF")
for _signature, _run, _fake in (
    ("linear(Tensor input, int layer, Tensor? bias, Tensor? row_sums) -> Tensor", _linear, _fake_linear),
    (
        "product(Tensor quantized, int layer, float scale, int zero_point, ScalarType dtype, str post, "
        "float out_scale, int out_zero_point) -> Tensor",
        _product,
        _fake_product,
    ),
    ("weight(Tensor scale, int layer) -> Tensor", _weight, _fake_weight),
    ("bool_mask(Tensor mask) -> Tensor", _bool_mask, _fake_bool_mask),
    ("additive_mask(Tensor mask) -> Tensor", _additive_mask, _fake_additive_mask),
):
    _LIBRARY.define(_signature)
    _name = _signature.partition("(")[0]
    _LIBRARY.impl(_name, _run, "CPU")
    torch.library.register_fake(f"hf_quant::{_name}", _fake, lib=_LIBRARY)

linear = torch.ops.hf_quant.linear.default
product = torch.ops.hf_quant.product.default
weight = torch.ops.hf_quant.weight.default
bool_mask = torch.ops.hf_quant.bool_mask.default
additive_mask = torch.ops.hf_quant.additive_mask.default
