"""The histogram observer and the ranges read off it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_quant.qparams import calculate_qparams, dequantize, quantize
from hf_quant.quantization.histogram import METHODS, HistogramObserver, percentile_range
from hf_quant.quantization.observers import MinMax

methods = pytest.mark.parametrize("method", sorted(METHODS))


def _error(values: Tensor, bounds: tuple[Tensor, Tensor]) -> float:
    scale, zero_point = calculate_qparams(*bounds, symmetric=False)
    return float((dequantize(quantize(values, scale, zero_point), scale, zero_point) - values).square().mean())


def _range(method: str, *batches: Tensor) -> tuple[float, float]:
    observer = HistogramObserver(method)
    for batch in batches:
        observer.observe(batch)
    low, high = observer.range()
    return float(low), float(high)


@methods
def test_nothing_is_clipped_where_nothing_is_rare(method: str) -> None:
    values = torch.linspace(-1, 3, 100_001).reshape(-1, 1)
    low, high = _range(method, values)
    assert low == pytest.approx(-1, abs=0.05)
    assert high == pytest.approx(3, abs=0.05)


@methods
def test_rare_outliers_are_clipped(method: str) -> None:
    values = torch.randn(1_000_000, 1)
    values[0], values[1] = 100.0, -80.0
    low, high = _range(method, values)
    assert -60 < low < -2
    assert 2 < high < 60


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
@settings(max_examples=15)
@given(st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30), min_size=1, max_size=5))
def test_ranges_hold_zero_and_lie_within_what_was_seen(method: str, batches: list[list[float]]) -> None:
    low, high = _range(method, *(torch.tensor(batch).reshape(-1, 1) for batch in batches))
    flat = [value for batch in batches for value in batch]
    assert min(0.0, *flat) <= low <= 0 <= high <= max(0.0, *flat)
    assert math.isfinite(low)
    assert math.isfinite(high)


@given(st.lists(st.integers(-3000, 3000), min_size=1, max_size=200), st.integers(1, 5))
def test_counts_do_not_hang_on_how_values_are_batched(values: list[int], size: int) -> None:
    whole, parts = HistogramObserver(), HistogramObserver()
    rows = torch.tensor(values, dtype=torch.float32).reshape(-1, 1)
    whole.observe(rows)
    for part in rows.split(size):
        parts.observe(part)
    while parts.limit < whole.limit:
        parts._double()
    assert parts.counts.sum() == whole.counts.sum() == len(values)
    assert torch.equal(parts.counts, whole.counts), "bins are merged in pairs, so nothing is estimated"
    assert (parts.low, parts.high) == (whole.low, whole.high)


def test_mse_is_no_worse_than_the_full_range_and_much_better_with_outliers() -> None:
    values = torch.randn(1_000_000, 1)
    values[0] = 100.0
    observers = {"mse": HistogramObserver("mse"), "minmax": MinMax()}
    for observer in observers.values():
        observer.observe(values)
    errors = {name: _error(values, observer.range()) for name, observer in observers.items()}
    assert errors["mse"] < 0.5 * errors["minmax"]


def test_percentile_leaves_out_what_it_says() -> None:
    counts = torch.ones(1000, dtype=torch.float64)
    centers = torch.arange(1000, dtype=torch.float64) - 500
    low, high = percentile_range(counts, centers, -500.0, 499.0, share=0.9)
    assert low == pytest.approx(-450, abs=1)
    assert high == pytest.approx(449, abs=1)


@methods
def test_only_zeros_and_nothing_at_all(method: str) -> None:
    assert _range(method) == (0.0, 0.0)
    assert _range(method, torch.zeros(4, 2)) == (0.0, 0.0)
    assert _range(method, torch.zeros(0, 2), torch.full((4, 2), 2.0)) == (0.0, 2.0)


@methods
def test_one_sided_activations_keep_their_side(method: str) -> None:
    low, high = _range(method, torch.randn(20_000, 1).relu())
    assert low == 0.0
    assert 2 < high < 5
