"""Signal-to-quantization-noise ratio against hand-computed values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_quant.quantization.fake_quantize import fake_quantize_symmetric
from hf_quant.quantization.sensitivity import layer_sqnr, sqnr


def test_by_hand() -> None:
    # Signal 9 + 16 = 25, noise 0.25: 10 log10(100).
    assert sqnr(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5])) == pytest.approx(20.0)


@given(st.floats(1e-3, 1e3), st.integers(0, 2**16))
def test_scale_does_not_matter(factor: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values, noise = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    assert sqnr(values, values + noise) == pytest.approx(sqnr(factor * values, factor * (values + noise)), abs=1e-6)


@pytest.mark.parametrize(
    ("reference", "quantized", "expected"),
    [([1.0, 2.0], [1.0, 2.0], math.inf), ([0.0], [0.0], math.inf), ([0.0], [1.0], -math.inf), ([1.0], [2.0], 0.0)],
)
def test_edges(reference: list[float], quantized: list[float], expected: float) -> None:
    assert sqnr(torch.tensor(reference), torch.tensor(quantized)) == expected


@pytest.mark.parametrize(("reference", "quantized"), [([math.nan], [1.0]), ([1.0], [math.nan]), ([math.inf], [1.0])])
def test_not_finite_is_nan(reference: list[float], quantized: list[float]) -> None:
    assert math.isnan(sqnr(torch.tensor(reference), torch.tensor(quantized)))


def test_eight_bits_of_a_uniform_signal_give_what_theory_says() -> None:
    """A full-scale uniform signal in b bits: 6.02 b dB (Bennett, 1948), here 48.2 dB."""
    values = torch.linspace(-1, 1, 100_001)[None]
    assert sqnr(values, fake_quantize_symmetric(values, (-1,))) == pytest.approx(20 * math.log10(2**8), abs=0.1)


class _Two(nn.Module):
    def __init__(self, first: float, second: float) -> None:
        super().__init__()
        self.first, self.second, self.unused = _Times(first), _Times(second), _Times(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class _Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def test_each_model_runs_on_its_own_activations() -> None:
    """1.1 instead of 1: 20 dB in the first layer; in the second the errors add up to 1.21: 13.6 dB."""
    batches = [{"x": torch.randn(4)} for _ in range(3)]
    seen: list[int] = []
    result = layer_sqnr(
        _Two(1.0, 1.0), _Two(1.1, 1.1), batches, ["first", "second", "unused", "absent"], lambda: seen.append(1)
    )
    assert result == pytest.approx({"first": 20.0, "second": -20 * math.log10(0.21)}, abs=1e-4)
    assert len(seen) == 3


def test_batches_are_summed_not_averaged() -> None:
    """Two batches, only one of them wrong: signal 1 + 9, noise 9 x 0.01."""
    result = layer_sqnr(_Wrong(0.0), _Wrong(0.1), [{"x": torch.ones(1)}, {"x": 3 * torch.ones(1)}], ["inner"])
    assert result["inner"] == pytest.approx(10 * math.log10(10 / 0.09), abs=1e-4)


class _Wrong(nn.Module):
    """Wrong by a share for inputs above 2."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.inner = _Times(1.0)
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * (1 + self.share * (x > 2)))


def test_hooks_are_taken_off_even_after_an_error() -> None:
    model, other = _Two(1.0, 1.0), _Two(1.0, 1.0)
    with pytest.raises(TypeError):
        layer_sqnr(model, other, [{"wrong": torch.ones(1)}], ["first"])
    assert not model.first._forward_hooks
    assert not other.first._forward_hooks


def test_no_batch_is_no_result() -> None:
    assert layer_sqnr(_Two(1.0, 1.0), _Two(1.0, 1.0), [], ["first"]) == {}
