"""The running range against its closed form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_quant.quantization.observers import MovingAverageMinMax


def test_range_is_the_mean_at_first_and_an_exponential_average_then() -> None:
    """n <= 1/c: the mean of the batches' extremes; later r <- r + c (x - r), from that mean on."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(5, 3, generator=generator) * (1 + index) for index in range(12)]
    observer = MovingAverageMinMax(averaging_constant=0.25)
    lows = [float(batch.min()) for batch in batches]
    highs = [float(batch.max()) for batch in batches]

    for count, batch in enumerate(batches[:4], start=1):
        observer.observe(batch)
        assert float(observer.min_val) == pytest.approx(sum(lows[:count]) / count, rel=1e-6)
        assert float(observer.max_val) == pytest.approx(sum(highs[:count]) / count, rel=1e-6)

    for batch in batches[4:]:
        observer.observe(batch)
    # Closed form: the mean of the first four decays by 0.75 a batch, the k-th last batch weighs 0.25 * 0.75^k.
    for got, extremes in ((observer.min_val, lows), (observer.max_val, highs)):
        mean = sum(extremes[:4]) / 4
        expected = 0.75**8 * mean + sum(0.25 * 0.75 ** (11 - index) * extremes[index] for index in range(4, 12))
        assert float(got) == pytest.approx(expected, rel=1e-5)
    assert int(observer.num_batches) == 12


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=8), st.integers(1, 20))
def test_equal_batches_have_their_own_range(values: list[float], repeats: int) -> None:
    batch = torch.tensor(values)
    observer = MovingAverageMinMax(averaging_constant=0.1)
    for _ in range(repeats):
        observer.observe(batch)
    assert float(observer.min_val) == pytest.approx(min(0.0, *values, 0.0), rel=1e-5, abs=1e-37)
    assert float(observer.max_val) == pytest.approx(max(0.0, *values, 0.0), rel=1e-5, abs=1e-37)


def test_range_always_holds_zero() -> None:
    observer = MovingAverageMinMax()
    observer.observe(torch.tensor([[2.0, 3.0]]))
    assert (float(observer.min_val), float(observer.max_val)) == (0.0, 3.0)
    observer.reset()
    observer.observe(torch.tensor([[-2.0, -3.0]]))
    assert (float(observer.min_val), float(observer.max_val)) == (-3.0, 0.0)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**16))
def test_padding_is_not_counted(batch: int, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, length, 4, generator=generator)
    mask = torch.rand(batch, length, generator=generator) < 0.6
    masked, plain = MovingAverageMinMax(), MovingAverageMinMax()
    masked.observe(torch.where(mask[..., None], values, 1e9), mask)
    plain.observe(values[mask] if mask.any() else torch.zeros(1, 4))
    assert torch.equal(masked.min_val, plain.min_val)
    assert torch.equal(masked.max_val, plain.max_val)


@pytest.mark.parametrize("garbage", [float("inf"), float("nan")])
def test_what_padding_holds_does_not_matter(garbage: float) -> None:
    """Attention over a fully masked row yields NaN in many models; it must not reach the range."""
    values = torch.tensor([[[1.0, -2.0], [garbage, 5.0]]])
    observer = MovingAverageMinMax()
    observer.observe(values, torch.tensor([[True, False]]))
    assert (float(observer.min_val), float(observer.max_val)) == (-2.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_ranges_are_kept_in_float32(dtype: torch.dtype) -> None:
    batches = [torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(10)]
    half, single = MovingAverageMinMax(), MovingAverageMinMax()
    for batch in batches:
        half.observe(batch)
        single.observe(batch.float())
    assert half.min_val.dtype == torch.float32
    assert torch.equal(half.min_val, single.min_val)
    assert torch.equal(half.max_val, single.max_val)


def test_no_gradient_is_recorded() -> None:
    values = torch.randn(2, 3, requires_grad=True)
    observer = MovingAverageMinMax()
    observer.observe(values)
    assert not observer.max_val.requires_grad


def test_batch_without_a_row_changes_nothing() -> None:
    """An expert that no token was sent to."""
    observer = MovingAverageMinMax()
    observer.observe(torch.tensor([[-1.0, 2.0]]))
    observer.observe(torch.empty(0, 2))
    assert (float(observer.min_val), float(observer.max_val)) == (-1.0, 2.0)


def test_state_survives_a_state_dict() -> None:
    first, second = MovingAverageMinMax(), MovingAverageMinMax()
    for seed in range(3):
        first.observe(torch.randn(4, generator=torch.Generator().manual_seed(seed)))
    second.load_state_dict(first.state_dict())
    batch = torch.randn(4)
    first.observe(batch)
    second.observe(batch)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first.buffers(), second.buffers(), strict=True))


def test_print_shows_range_and_count() -> None:
    observer = MovingAverageMinMax()
    observer.observe(torch.tensor([-1.5, 2.0]))
    assert repr(observer) == "MovingAverageMinMax(range=[-1.5, 2], batches=1)"
