"""Scales and zero points against compressed-tensors, bit for bit, and by hand."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams as peer_qparams
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_quant.qparams import calculate_qparams, symmetric_scale, token_dims

SYMMETRIC = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="tensor")
ASYMMETRIC = QuantizationArgs(num_bits=8, type="int", symmetric=False, strategy="tensor")
TOKEN = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)

# All of float32: both zeros, subnormals, the largest. Infinity is refused before a range is made.
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
# bfloat16 values, exactly.
bfloats = floats.map(lambda value: float(torch.tensor(value).bfloat16())).filter(lambda value: abs(value) < 1e38)


@st.composite
def ranges(draw: st.DrawFn, values: st.SearchStrategy[float] = floats) -> tuple[float, float]:
    low, high = sorted((draw(values), draw(values)))
    return {
        "both": (low, high),
        "empty": (0.0, 0.0),
        "one value": (low, low),
        "positive": (abs(low), max(abs(low), abs(high))),
        "negative": (-max(abs(low), abs(high)), -abs(low)),
    }[draw(st.sampled_from(["both", "empty", "one value", "positive", "negative"]))]


def _same_bits(ours: Tensor, theirs: Tensor) -> bool:
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs.reshape(ours.shape))


@given(ranges())
def test_symmetric_scales_are_the_peers_bit_for_bit(bounds: tuple[float, float]) -> None:
    low, high = torch.tensor(bounds[0]), torch.tensor(bounds[1])
    scale, zero_point = calculate_qparams(low, high, symmetric=True)
    expected_scale, _ = peer_qparams(low, high, SYMMETRIC)
    assert _same_bits(scale, expected_scale)
    assert zero_point.dtype == torch.int8
    assert zero_point == 0


@given(ranges())
def test_asymmetric_scales_and_zero_points_are_the_peers_bit_for_bit(bounds: tuple[float, float]) -> None:
    low, high = torch.tensor(bounds[0]), torch.tensor(bounds[1])
    scale, zero_point = calculate_qparams(low, high, symmetric=False)
    expected_scale, expected_zero_point = peer_qparams(low, high, ASYMMETRIC)
    assert _same_bits(scale, expected_scale)
    # An empty range is 0/0 there, which becomes whatever int8 a NaN casts to; any zero point serves it. A range
    # below the smallest float divides by 0 as well.
    if float((high.clamp(min=0) - low.clamp(max=0)) / 255) != 0:
        assert _same_bits(zero_point, expected_zero_point)


@given(ranges(bfloats))
def test_symmetric_bfloat16_scales_are_the_peers_bit_for_bit(bounds: tuple[float, float]) -> None:
    low, high = (torch.tensor(bound, dtype=torch.bfloat16) for bound in bounds)
    scale, _ = calculate_qparams(low, high, symmetric=True)
    assert _same_bits(scale, peer_qparams(low, high, SYMMETRIC)[0])


@pytest.mark.parametrize(
    ("low", "high", "symmetric", "scale", "zero_point"),
    [
        (-1.0, 1.0, True, 1 / 127.5, 0),
        (-2.0, 1.0, True, 2 / 127.5, 0),
        (0.0, 2.55, False, 0.01, -128),  # one-sided: the whole of int8 for the positive side
        (-2.55, 0.0, False, 0.01, 127),
        (-1.0, 1.55, False, 0.01, -28),  # round(-128 + 100)
        (1.0, 2.55, False, 0.01, -128),  # widened to hold 0
        (0.0, 0.0, False, torch.finfo(torch.float32).eps, None),
        (0.0, 0.0, True, torch.finfo(torch.float32).eps, 0),
    ],
)
def test_by_hand(low: float, high: float, symmetric: bool, scale: float, zero_point: int | None) -> None:
    got_scale, got_zero_point = calculate_qparams(torch.tensor(low), torch.tensor(high), symmetric=symmetric)
    assert float(got_scale) == pytest.approx(scale, rel=1e-6)
    assert zero_point is None or int(got_zero_point) == zero_point


@given(ranges())
def test_zero_is_a_quantum_of_every_range(bounds: tuple[float, float]) -> None:
    low, high = torch.tensor(bounds[0]), torch.tensor(bounds[1])
    scale, zero_point = calculate_qparams(low, high, symmetric=False)
    assert float(scale) > 0
    assert -128 <= int(zero_point) <= 127


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**16))
def test_token_scales_are_the_peers(batch: int, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for shape in ((length, 6), (batch, length, 6), (batch, length, 2, 6)):
        values = torch.randn(shape, generator=generator)
        expected, _ = compute_dynamic_scales_and_zp(values, TOKEN, torch.nn.Identity())
        assert torch.equal(symmetric_scale(values, token_dims(values)).flatten(), expected.flatten())


def test_channel_scales_keep_their_dimension() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]])
    scale = symmetric_scale(weight, (-1,))
    assert scale.shape == (2, 1)
    assert scale.flatten().tolist() == pytest.approx([2 / 127.5, torch.finfo(torch.float32).eps])
