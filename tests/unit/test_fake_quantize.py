"""Fake-quant against torch's own operators and compressed-tensors, its gradients, and what must hold for any value."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as peer_fake_quantize
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_quant.qparams import calculate_qparams, dequantize, quantize, symmetric_scale
from hf_quant.quantization.fake_quantize import fake_quantize, fake_quantize_symmetric

ASYMMETRIC = QuantizationArgs(num_bits=8, type="int", symmetric=False, strategy="tensor")
CHANNEL = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")

seeds = st.integers(0, 2**16)
scales = st.floats(2**-20, 2**10, width=32)
zero_points = st.integers(-128, 127)
# Exponents of powers of two: x * (1 / s) and x / s are then the same number.
exponents = st.integers(-8, 4)


def _values(seed: int, spread: float, shape: tuple[int, ...] = (7, 33)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread


def _ours(values: Tensor, scale: float, zero_point: int) -> Tensor:
    return fake_quantize(values, torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int8))


@given(seeds, scales, zero_points)
def test_values_are_torchs_per_tensor(seed: int, scale: float, zero_point: int) -> None:
    """torch multiplies by 1/s where we divide by s: at ties of the rounding they may be one quantum apart."""
    values = _values(seed, 100 * scale)
    expected = torch.fake_quantize_per_tensor_affine(values, scale, zero_point, -128, 127)
    difference = (_ours(values, scale, zero_point) - expected).abs() / scale
    fraction = (values.double() / scale) % 1
    tie = (fraction - 0.5).abs() < 1e-3
    assert difference[~tie].max() < 1e-3
    assert difference.max() < 1 + 1e-3


@given(seeds, exponents, st.integers(-64, 63).map(lambda half: 2 * half))
def test_values_and_gradients_are_torchs_exactly_where_the_inverse_scale_is_exact(
    seed: int, exponent: int, zero_point: int
) -> None:
    scale = 2.0**exponent
    # Quarters of a quantum over more than the range: every tie and both ends of the range are among them.
    values = (torch.arange(-1200, 1200) / 4 * scale)[
        torch.randperm(2400, generator=torch.Generator().manual_seed(seed))[:400]
    ]
    upstream = _values(seed, 1.0, (400,))
    ours, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
    got = _ours(ours, scale, zero_point)
    expected = torch.fake_quantize_per_tensor_affine(theirs, scale, zero_point, -128, 127)
    got.backward(upstream)
    expected.backward(upstream)
    assert torch.equal(got, expected)
    assert torch.equal(ours.grad, theirs.grad)


@given(seeds, scales, zero_points)
def test_gradients_are_torchs_away_from_the_ends(seed: int, scale: float, zero_point: int) -> None:
    values = _values(seed, 100 * scale)
    ends = torch.tensor([-128.5, 127.5]) - zero_point
    near = ((values / scale)[..., None] - ends).abs().min(-1).values < 1e-2
    values = torch.where(near, 0.0, values)
    ours, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
    _ours(ours, scale, zero_point).sum().backward()
    torch.fake_quantize_per_tensor_affine(theirs, scale, zero_point, -128, 127).sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


@given(seeds)
def test_values_and_gradients_are_torchs_per_channel(seed: int) -> None:
    weight = _values(seed, 0.1, (5, 24))
    scale = symmetric_scale(weight, (-1,))
    ours, theirs = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    got = fake_quantize(ours, scale)
    zeros = torch.zeros(5, dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(theirs, scale.flatten(), zeros, 0, -128, 127)
    quanta = weight.double() / scale.double()
    tie = ((quanta % 1) - 0.5).abs() < 1e-3
    difference = (got - expected).abs() / scale
    assert difference[~tie].max() < 1e-3
    assert difference.max() < 1 + 1e-3
    got.sum().backward()
    expected.sum().backward()
    assert torch.equal(ours.grad[~tie], theirs.grad[~tie])


@given(seeds, st.floats(2**-10, 2**10, width=32), zero_points)
def test_values_are_compressed_tensors_bit_for_bit(seed: int, scale: float, zero_point: int) -> None:
    values = _values(seed, 100 * scale)
    values[0, :9] = (torch.arange(9) - 4.5) * scale  # ties
    expected = peer_fake_quantize(
        values, torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int8), ASYMMETRIC
    )
    assert torch.equal(_ours(values, scale, zero_point), expected)


@given(seeds)
def test_weights_are_compressed_tensors_bit_for_bit(seed: int) -> None:
    weight = _values(seed, 0.1, (6, 40))
    scale = symmetric_scale(weight, (-1,))
    expected = peer_fake_quantize(weight, scale, torch.zeros(6, 1, dtype=torch.int8), CHANNEL)
    assert torch.equal(fake_quantize_symmetric(weight, (-1,)), expected)


@given(seeds, st.floats(2**-20, 2**20, width=32), st.booleans())
def test_round_trip_is_within_half_a_quantum(seed: int, spread: float, one_sided: bool) -> None:
    values = _values(seed, spread)
    values = values.abs() if one_sided else values
    scale, zero_point = calculate_qparams(values.min(), values.max(), symmetric=False)
    quantized = quantize(values, scale, zero_point)
    restored = dequantize(quantized, scale, zero_point)
    assert quantized.dtype == torch.int8
    # Half a quantum, or a whole one at the range's ends, where the zero point's own rounding shows.
    inside = (values > restored.min()) & (values < restored.max())
    assert ((restored - values).abs() / scale)[inside].max() <= 0.5 + 1e-4
    assert ((restored - values).abs() / scale).max() <= 1 + 1e-4


@given(seeds, st.floats(2**-20, 2**20, width=32))
def test_symmetric_round_trip_is_within_half_a_quantum_and_keeps_zero_and_sign(seed: int, spread: float) -> None:
    values = _values(seed, spread)
    values[:, 0] = 0.0
    restored = fake_quantize_symmetric(values, (-1,))
    scale = symmetric_scale(values, (-1,))
    # s = max / 127.5, so that the largest value itself is half a quantum from 127.
    assert ((restored - values).abs() / scale).max() <= 0.5 + 1e-4
    assert (restored[:, 0] == 0).all()
    assert (restored * values >= 0).all()


@given(seeds, scales, zero_points)
def test_quantizing_twice_is_quantizing_once(seed: int, scale: float, zero_point: int) -> None:
    once = _ours(_values(seed, 100 * scale), scale, zero_point)
    assert torch.equal(_ours(once, scale, zero_point), once)


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=True), min_size=1, max_size=20), scales, zero_points
)
def test_int8_is_never_left_even_by_huge_values(numbers: list[float], scale: float, zero_point: int) -> None:
    values, point = torch.tensor(numbers), torch.tensor(zero_point, dtype=torch.int8)
    quantized = quantize(values, torch.tensor(scale), point)
    order = values.argsort()
    assert (quantized[order].int().diff() >= 0).all(), "rounding and clipping keep the order"
    assert torch.equal(
        dequantize(quantized, torch.tensor(scale), point), fake_quantize(values, torch.tensor(scale), point)
    )


@given(seeds)
def test_fake_quantize_is_quantize_then_dequantize(seed: int) -> None:
    weight = _values(seed, 0.3, (4, 16))
    scale = symmetric_scale(weight, (-1,))
    expected = dequantize(quantize(weight, scale), scale)
    assert torch.equal(fake_quantize_symmetric(weight, (-1,)), expected)
    assert torch.equal(fake_quantize(weight, scale), expected)


def test_gradient_stops_where_values_are_clipped() -> None:
    # Quanta -129, -128, 0, 127, 128 for s = 1, z = 0; -128.5 still rounds to -128, 127.5 to 128.
    values = torch.tensor([-129.0, -128.5, -128.0, 0.0, 127.0, 127.5, 128.0], requires_grad=True)
    _ours(values, 1.0, 0).sum().backward()
    assert values.grad.tolist() == [0, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_self_scaled_values_passes_everywhere(dtype: torch.dtype) -> None:
    weight = _values(0, 0.1, (3, 8)).to(dtype).requires_grad_()
    upstream = _values(1, 1.0, (3, 8)).to(dtype)
    fake_quantize_symmetric(weight, (-1,)).backward(upstream)
    assert torch.equal(weight.grad, upstream)
    assert weight.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_quantized_in_float32_and_comes_back_as_it_came(dtype: torch.dtype) -> None:
    values = _values(0, 2.0).to(dtype).requires_grad_()
    got = _ours(values, 0.03, 5)
    assert got.dtype == dtype
    assert torch.equal(got, _ours(values.detach().float(), 0.03, 5).to(dtype))
    got.sum().backward()
    assert values.grad.dtype == dtype


def test_scale_and_zero_point_get_no_gradient() -> None:
    values = torch.randn(4, requires_grad=True)
    scale = torch.tensor(0.1, requires_grad=True)
    fake_quantize(values, scale).sum().backward()
    assert scale.grad is None


def test_the_input_is_not_changed() -> None:
    values = _values(0, 1.0)
    before = values.clone()
    fake_quantize_symmetric(values, (-1,))
    quantize(values, torch.tensor(0.01), torch.tensor(3, dtype=torch.int8))
    _ours(values, 0.01, 3)
    assert torch.equal(values, before)
