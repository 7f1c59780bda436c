"""GPTQ's arithmetic on one weight: against a direct reading of the paper, and against plain rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_quant.qparams import dequantize_weight, integer_range, quantize_weight
from hf_quant.quantization.gptq import gptq_weight, input_hessian, inverse_factor
from hf_quant.schemes import get_scheme, make_scheme

INT4 = get_scheme("int4_weight_only")


def correlated(tokens: int, features: int, rank: int, seed: int) -> Tensor:
    """Inputs whose features go together, as those of real layers do."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(tokens, rank, generator=generator) @ torch.randn(rank, features, generator=generator)
    return common / rank**0.5 + 0.2 * torch.randn(tokens, features, generator=generator)


def error(weight: Tensor, integers: Tensor, scale: Tensor, inputs: Tensor) -> float:
    return float((inputs @ (weight - dequantize_weight(integers, scale)).t()).square().sum())


def obq(weight: Tensor, hessian: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Eq. 2 and 3 of the paper as they stand: the inverse of what is left, shrunk by one column at each step."""
    low, high = integer_range(bits)
    weight, inverse = weight.double().clone(), torch.linalg.inv(hessian.double())
    integers = torch.zeros_like(weight)
    size = weight.shape[1] // scale.shape[1]
    for q in range(weight.shape[1]):
        step = scale[:, q // size].double()
        integers[:, q] = (weight[:, q] / step).clamp(low, high).round()
        wrong = (weight[:, q] - integers[:, q] * step) / inverse[0, 0]
        weight[:, q:] -= torch.outer(wrong, inverse[0])
        inverse = (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return integers.to(torch.int8)


@pytest.mark.parametrize("block_size", [1, 4, 7, 128])
@pytest.mark.parametrize("bits", [2, 4])
def test_integers_are_those_of_the_formulas(bits: int, block_size: int) -> None:
    weight = torch.randn(12, 24)
    hessian = input_hessian(correlated(80, 24, 5, seed=1))
    factor = inverse_factor(hessian, 0.01)
    scheme = make_scheme(bits, None)
    integers, scale = gptq_weight(weight, factor, scheme, block_size=block_size, search=False)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24)
    assert torch.equal(integers, obq(weight, damped, scale, bits))
    assert not torch.equal(integers, quantize_weight(weight, bits)[0])


def test_grouped_integers_are_those_of_the_formulas_at_the_scales_that_were_found() -> None:
    weight = torch.randn(6, 96)
    factor = inverse_factor(hessian := input_hessian(correlated(200, 96, 8, seed=2)), 0.01)
    integers, scale = gptq_weight(weight, factor, INT4, block_size=32)
    assert scale.shape == (6, 3)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(96)
    assert torch.equal(integers, obq(weight, damped, scale, 4))
    # The first group's scale is plain rounding's; later ones are read off weights that were moved.
    plain = quantize_weight(weight, 4, 32, search=True)[1]
    assert torch.equal(scale[:, 0], plain[:, 0])
    assert not torch.equal(scale[:, 1:], plain[:, 1:])


@pytest.mark.parametrize("scheme", ["int4_weight_only_g32", "int3_weight_only_g64", "int2_weight_only_g128"])
def test_block_size_does_not_matter(scheme: str) -> None:
    weight = torch.randn(8, 256)
    factor = inverse_factor(input_hessian(correlated(512, 256, 32, seed=3)), 0.01)
    whole = gptq_weight(weight, factor, get_scheme(scheme), block_size=256)
    blocks = gptq_weight(weight, factor, get_scheme(scheme), block_size=100)
    assert (whole[0] == blocks[0]).float().mean() > 0.99  # float32 sums in another order: a tie may fall otherwise
    assert torch.isclose(whole[1], blocks[1], rtol=1e-4).float().mean() > 0.95


def test_one_column_is_rounded() -> None:
    weight = torch.randn(5, 1)
    factor = inverse_factor(torch.tensor([[3.0]]), 0.0)
    assert float(factor) == pytest.approx(3.0**-0.5)
    integers, scale = gptq_weight(weight, factor, make_scheme(4, None), search=False)
    assert torch.equal(integers, quantize_weight(weight, 4)[0])
    assert torch.equal(scale, quantize_weight(weight, 4)[1])


@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 3),
    bits=st.integers(2, 8),
    grouped=st.booleans(),
    search=st.booleans(),
    half=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40)
def test_with_independent_inputs_it_is_plain_rounding(
    rows: int, groups: int, bits: int, grouped: bool, search: bool, half: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 32 * groups, generator=generator).to(torch.bfloat16 if half else torch.float32)
    hessian = torch.diag(torch.rand(32 * groups, generator=generator) + 0.1)
    scheme = make_scheme(bits, None, 32 if grouped else None)
    got = gptq_weight(weight, inverse_factor(hessian, 0.01), scheme, search=search)
    expected = quantize_weight(weight, bits, scheme.group_size, search)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.is_contiguous()
        assert torch.equal(one, other)


@given(
    rows=st.integers(4, 24),
    groups=st.integers(1, 3),
    rank=st.integers(2, 24),
    bits=st.integers(2, 8),
    grouped=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40)
def test_outputs_are_nearer_than_by_rounding(
    rows: int, groups: int, rank: int, bits: int, grouped: bool, seed: int
) -> None:
    features = 32 * groups
    inputs = correlated(256, features, rank, seed)
    weight = torch.randn(rows, features, generator=torch.Generator().manual_seed(seed + 1))
    scheme = make_scheme(bits, None, 32 if grouped else None)
    factor = inverse_factor(input_hessian(inputs), 0.01)
    for search in (False, True):
        rounded = error(weight, *quantize_weight(weight, bits, scheme.group_size, search), inputs)
        assert error(weight, *gptq_weight(weight, factor, scheme, search=search), inputs) < 0.85 * rounded


@given(features=st.integers(1, 40), rank=st.integers(1, 10), seed=st.integers(0, 2**16))
@settings(max_examples=40)
def test_factor_is_that_of_the_inverse(features: int, rank: int, seed: int) -> None:
    hessian = input_hessian(correlated(30, features, rank, seed))
    factor = inverse_factor(hessian, 0.01).double()
    damped = hessian.double() + 0.01 * hessian.diagonal().mean().double() * torch.eye(features)
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.t() @ factor @ damped, torch.eye(features, dtype=torch.float64), atol=1e-3)


def test_damping_is_raised_until_the_hessian_is_definite() -> None:
    inputs = torch.randn(4, 1) @ torch.randn(1, 64)  # one direction, 64 channels
    inputs[:, 7] = 0.0
    weight = torch.randn(8, 64)
    factor = inverse_factor(input_hessian(inputs), 0.0)
    assert torch.isfinite(factor).all()
    integers, scale = gptq_weight(weight, factor, INT4)
    assert error(weight, integers, scale, inputs) < 0.2 * error(weight, *quantize_weight(weight, 4, 32), inputs)


def test_a_channel_that_was_always_zero_is_rounded_and_touches_no_other() -> None:
    inputs = correlated(100, 32, 4, seed=4)
    inputs[:, 5] = 0.0
    weight = torch.randn(8, 32)
    weight[:, 5] = 0.1
    factor, scheme = inverse_factor(input_hessian(inputs), 0.01), make_scheme(4, None)
    integers, scale = gptq_weight(weight, factor, scheme, search=False)
    assert torch.equal(integers[:, 5], (weight[:, 5] / scale[:, 0]).round().to(torch.int8))
    weight[:, 5] = -0.6  # no row's largest: the scales stay
    changed, _ = gptq_weight(weight, factor, scheme, search=False)
    others = [index for index in range(32) if index != 5]
    assert torch.equal(changed[:, others], integers[:, others])
    assert not torch.equal(changed[:, 5], integers[:, 5])


def test_without_any_token_it_is_plain_rounding() -> None:
    weight = torch.randn(4, 32)
    factor = inverse_factor(input_hessian(torch.empty(0, 32)), 0.01)
    assert torch.equal(gptq_weight(weight, factor, INT4)[0], quantize_weight(weight, 4, 32, search=True)[0])
