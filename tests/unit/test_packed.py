"""PackedLinear: weights of 2 to 8 bits, packed, that compute what the layout's reader computes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from hf_quant.qparams import dequantize_weight, quantize_weight, search_scale, symmetric_scale
from hf_quant.quantization.sensitivity import sqnr
from hf_quant.runtime import packed as packed_module
from hf_quant.runtime.packed import PackedLinear, pack, unpack
from hf_quant.schemes import get_scheme

SCHEMES = (
    "int4_weight_only",
    "int4_dynamic",
    "int4_dynamic_symmetric",
    "int3_weight_only_g64",
    "int6_weight_only",
    "int8_weight_only_g32",
)
schemes = pytest.mark.parametrize("scheme", SCHEMES)


def _weight(rows: int = 12, columns: int = 128, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _peer(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Scale and dequantized weight as compressed-tensors computes them."""
    arguments = QuantizationArgs(num_bits=bits, symmetric=True, strategy="group", group_size=group_size)
    groups = weight.reshape(weight.shape[0], -1, group_size)
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    return scale, fake_quantize(weight, scale, zero_point, arguments)


@given(
    bits=st.integers(2, 8),
    rows=st.integers(1, 5),
    columns=st.integers(1, 100),
    seed=st.integers(0, 2**16),
)
def test_packing_is_the_peers_and_unpacking_its_inverse(bits: int, rows: int, columns: int, seed: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(low, high, (rows, columns), dtype=torch.int8, generator=generator)
    words = pack(integers, bits)
    assert torch.equal(words, pack_to_int32(integers, bits))
    assert words.shape == (rows, math.ceil(columns * bits / 32)), "no bit is wasted but at the end of a row"
    assert torch.equal(unpack(words, bits, columns), integers)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [32, 64])
def test_scales_and_rounding_are_the_peers_bit_for_bit(bits: int, group_size: int) -> None:
    weight = _weight()
    integers, scale = quantize_weight(weight, bits, group_size)
    expected_scale, expected = _peer(weight, bits, group_size)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(dequantize_weight(integers, scale), expected)


@schemes
def test_forward_is_the_float_product_of_what_is_stored(scheme: str) -> None:
    weight, bias, chosen = _weight(), torch.randn(12), get_scheme(scheme)
    layer = PackedLinear.from_float(weight, bias, chosen)
    values = torch.randn(2, 3, 128)
    inputs = values
    if chosen.activations == "dynamic":
        per_token = QuantizationArgs(num_bits=8, symmetric=chosen.symmetric, strategy="token", dynamic=True)
        scale, zero_point = calculate_qparams(values.amin(-1, True), values.amax(-1, True), per_token)
        inputs = fake_quantize(values, scale, zero_point, per_token)
    _, expected = _peer(weight, chosen.bits, chosen.group_size or 0)
    assert torch.equal(layer.weight, expected)
    assert torch.equal(layer(values), F.linear(inputs, expected, bias))


@schemes
def test_more_bits_are_more_exact_and_what_is_stored_has_that_many(scheme: str) -> None:
    weight, chosen = _weight(64, 256), get_scheme(scheme)
    layer = PackedLinear.from_float(weight, None, chosen)
    assert layer.weight_packed.numel() * 32 == weight.numel() * chosen.bits
    assert layer.weight_scale.shape == (64, 256 // (chosen.group_size or 256))
    assert layer.weight_shape.tolist() == [64, 256]
    # About 6 dB a bit, less what a normal distribution leaves unused of its range.
    assert 6 * chosen.bits - 12 < sqnr(weight, layer.weight) < 6 * chosen.bits + 3


def test_conv1d_is_stored_transposed() -> None:
    conv = Conv1D(12, 64)
    layer = PackedLinear.from_float(conv.weight, conv.bias, get_scheme("int4_weight_only"), transposed=True)
    linear = PackedLinear.from_float(conv.weight.t(), conv.bias, get_scheme("int4_weight_only"))
    values = torch.randn(3, 64)
    assert layer.weight.shape == conv.weight.shape
    assert torch.equal(layer(values), linear(values))
    assert sqnr(conv(values), layer(values)) > 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    layer = PackedLinear.from_float(_weight().to(dtype), torch.randn(12).to(dtype), get_scheme("int4_dynamic"))
    assert layer.weight_scale.dtype == layer.weight.dtype == dtype
    assert layer(torch.randn(4, 128, dtype=dtype)).dtype == dtype


def test_training_and_float_weights_are_refused() -> None:
    layer = PackedLinear.from_float(_weight(), None, get_scheme("int4_weight_only"))
    with pytest.raises(RuntimeError, match="int8 modules cannot be trained"):
        layer.train()(torch.randn(2, 128, requires_grad=True))
    before = layer.weight_packed.clone()
    with pytest.raises(
        RuntimeError, match=r"weight is torch\.float32 in what is loaded, but this PackedLinear is int4"
    ):
        layer.load_state_dict({"weight": _weight()}, strict=False)
    assert torch.equal(layer.weight_packed, before)


def test_copies_and_empty_batches() -> None:
    layer = PackedLinear.from_float(_weight(), torch.randn(12), get_scheme("int4_weight_only"))
    values = torch.randn(2, 128)
    assert torch.equal(copy.deepcopy(layer)(values), layer(values))
    assert layer(values[:0]).shape == (0, 12)
    twin = PackedLinear(128, 12, get_scheme("int4_weight_only"))
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(values), layer(values))
    assert "scheme='int4_weight_only'" in repr(layer)


def test_wasteful_packing_of_an_old_reader_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_module, "_packs_densely", lambda bits: bits in (2, 4, 8))
    with pytest.raises(ImportError, match=r"int6 weights need compressed-tensors 0\.20 or newer; .* packs 5 of them"):
        pack(torch.zeros(1, 32, dtype=torch.int8), 6)
    assert pack(torch.zeros(1, 32, dtype=torch.int8), 4).shape == (1, 4)


@given(bits=st.integers(2, 8), seed=st.integers(0, 2**16), outlier=st.floats(1, 50))
def test_searched_scale_is_never_worse(bits: int, seed: int, outlier: float) -> None:
    weight = _weight(4, 32, seed)
    weight[:, 0] *= outlier
    errors = []
    for scale in (symmetric_scale(weight, (-1,), bits), search_scale(weight, bits)):
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        rounded = (weight / scale).round().clamp(low, high) * scale
        errors.append((rounded - weight).square().sum(-1))
    assert bool((errors[1] <= errors[0] * (1 + 1e-6)).all())


def test_searched_scale_gains_much_where_weights_are_few_bits() -> None:
    weight = _weight(64, 256)
    nearest, searched = (dequantize_weight(*quantize_weight(weight, 3, 64, search)) for search in (False, True))
    assert sqnr(weight, searched) > sqnr(weight, nearest) + 1
