"""PreparedLinear: every kernel against a product of 64-bit integers, and what is held of a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_quant.runtime import choice, products
from hf_quant.runtime.prepared import PreparedLinear

POSTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}
SHAPES = [(1, 1, 1), (1, 64, 16), (3, 7, 5), (9, 33, 17), (40, 768, 64), (130, 64, 48)]  # tokens, in, out

each_kernel = pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(name, marks=pytest.mark.skipif(name not in products.exact_kernels(), reason="not exact here"))
        for name in products.KERNELS
    ],
)


class Weight(NamedTuple):
    integers: Tensor
    scale: Tensor
    bias: Tensor | None

    def prepared(self, *kernels: str) -> PreparedLinear:
        """On the first of these kernels for one token, on the second for up to 8, and so on; on the last for more."""
        limits = dict(zip(choice.BUCKETS, kernels, strict=False))
        return PreparedLinear(*self, kernels=lambda tokens: limits.get(choice.bucket(tokens), kernels[-1]))

    def expected(self, quantized: Tensor, scale: float, zero_point: int, post: str = "none") -> Tensor:
        sums = (quantized.long() - zero_point) @ self.integers.long().t()
        output = sums.double() * scale * self.scale.double().flatten()
        return POSTS[post](output if self.bias is None else output + self.bias.double())


def _weight(out_features: int, in_features: int, bias: bool = True, seed: int = 0) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(-128, 128, (out_features, in_features), generator=generator, dtype=torch.int8)
    scale = torch.rand(out_features, generator=generator) * 0.01 + 1e-4
    return Weight(integers, scale, torch.randn(out_features, generator=generator) if bias else None)


def _quantized(tokens: int, in_features: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (tokens, in_features), generator=generator, dtype=torch.uint8)


@each_kernel
@pytest.mark.parametrize("post", POSTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float_results(kernel: str, shape: tuple[int, int, int], post: str) -> None:
    tokens, in_features, out_features = shape
    quantized = _quantized(tokens, in_features)
    for bias in (True, False):
        weight = _weight(out_features, in_features, bias)
        prepared = weight.prepared(kernel)
        for zero_point in (0, 117, 255):
            expected = weight.expected(quantized, 0.02, zero_point, post)
            rounding = 1e-6 * (float(expected.abs().max()) + 1)
            got = prepared.product(quantized, 0.02, zero_point, torch.float32, post)
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=5 * rounding)
            half = prepared.product(quantized, 0.02, zero_point, torch.bfloat16, post)
            assert half.dtype == torch.bfloat16
            torch.testing.assert_close(half.double(), expected, rtol=2**-8, atol=5 * rounding)


@each_kernel
@pytest.mark.parametrize("post", POSTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_uint8_results(kernel: str, shape: tuple[int, int, int], post: str) -> None:
    tokens, in_features, out_features = shape
    weight, quantized = _weight(out_features, in_features), _quantized(tokens, in_features)
    expected = weight.expected(quantized, 0.02, 117, post)
    for out_scale, out_zero_point in ((0.5, 10), (0.01, 128)):  # the second one clips both ends
        got = weight.prepared(kernel).product(quantized, 0.02, 117, torch.uint8, post, out_scale, out_zero_point)
        exact = expected / out_scale + out_zero_point
        assert got.dtype == torch.uint8
        # Half a quantum from the exact value, and the rounding of float32.
        distance = (got.double() - exact.clamp(0, 255)).abs()
        assert float(distance.max()) <= 0.5 + 1e-5 * float(exact.abs().max() + 1)


@each_kernel
def test_the_largest_values_do_not_saturate(kernel: str) -> None:
    quantized = torch.full((5, 512), 255, dtype=torch.uint8)
    for value in (127, -128):
        weight = Weight(torch.full((32, 512), value, dtype=torch.int8), torch.ones(32), None)
        got = weight.prepared(kernel).product(quantized, 1.0, 0, torch.float32)
        assert torch.equal(got, torch.full((5, 32), 512.0 * 255 * value))


@given(
    tokens=st.integers(1, 40),
    in_features=st.integers(1, 70),
    out_features=st.integers(1, 70),
    zero_point=st.integers(0, 255),
    seed=st.integers(0, 2**16),
)
def test_all_kernels_agree(tokens: int, in_features: int, out_features: int, zero_point: int, seed: int) -> None:
    weight, quantized = _weight(out_features, in_features, seed=seed), _quantized(tokens, in_features, seed + 1)
    expected = weight.expected(quantized, 0.01, zero_point)
    for kernel in products.exact_kernels():
        prepared = weight.prepared(kernel)
        got = prepared.product(quantized, 0.01, zero_point, torch.float32)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(prepared.integers, weight.integers), "given back bit for bit"


@each_kernel
def test_inputs_of_any_layout(kernel: str) -> None:
    weight = _weight(24, 40)
    quantized = _quantized(6, 80)[:, ::2]
    prepared = weight.prepared(kernel)
    got = prepared.product(quantized, 0.1, 3, torch.float32)
    assert torch.equal(got, prepared.product(quantized.contiguous(), 0.1, 3, torch.float32))
    assert prepared.product(quantized[:0], 0.1, 3, torch.bfloat16).shape == (0, 24)
    column = Weight(weight.integers, weight.scale[:, None], weight.bias).prepared(kernel)
    assert torch.equal(column.product(quantized, 0.1, 3, torch.float32), got), "scales as the modules have them"


@pytest.mark.parametrize("sizes", [(24, 300), (300, 200), (3, 40000), (1, 1)], ids=str)
def test_row_sums(sizes: tuple[int, int]) -> None:
    weight = _weight(*sizes)
    expected = (weight.integers.double() * weight.scale.double()[:, None]).sum(-1)
    row_sums = weight.prepared("float32").row_sums
    assert row_sums.dtype == torch.float32
    torch.testing.assert_close(row_sums.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_kernel_for_each_bucket() -> None:
    asked: list[int] = []

    def kernels(tokens: int) -> str:
        asked.append(tokens)
        return "int_mm" if tokens <= 8 else "float32"

    prepared = PreparedLinear(*_weight(8, 16), kernels=kernels)
    assert prepared.names() == {}
    for tokens in (100, 5, 8, 2, 90, 5000):
        prepared.product(_quantized(tokens, 16), 1.0, 0, torch.float32)
    assert asked == [100, 5, 5000], "once a bucket"
    assert prepared.names() == {8: "int_mm", 128: "float32", 1024: "float32"}


@pytest.mark.parametrize(
    "kernels",
    [("onednn", "int_mm"), ("int_mm", "onednn"), ("float32", "onednn"), ("onednn", "vnni"), ("vnni", "float32")],
    ids="-".join,
)
def test_forms_are_made_when_they_are_needed(kernels: tuple[str, str]) -> None:
    if not set(kernels) <= set(products.exact_kernels()):
        pytest.skip("not exact here")
    weight = _weight(16, 32)
    prepared = weight.prepared(*kernels)
    assert prepared.integers is weight.integers
    prepared.product(_quantized(1, 32), 1.0, 0, torch.float32)
    held = [value for value in vars(prepared).values() if value is weight.integers]
    assert not held, "the weight is held in the first kernel's form only"
    assert torch.equal(prepared.integers, weight.integers)
    quantized = _quantized(5, 32)
    got = prepared.product(quantized, 0.1, 7, torch.float32)
    torch.testing.assert_close(got.double(), weight.expected(quantized, 0.1, 7), rtol=1e-5, atol=1e-5)
    assert torch.equal(prepared.integers, weight.integers)
    assert list(prepared.names().values()) == list(kernels)


def test_refusals() -> None:
    integers, scale, bias = _weight(8, 16)
    with pytest.raises(ValueError, match=r"the weight is torch\.float32 \(8, 16\); pass int8 \(out_features, in_"):
        PreparedLinear(integers.float(), scale, bias)
    with pytest.raises(ValueError, match=r"weight_scale has 7 values; a weight of \(8, 16\) needs one a row"):
        PreparedLinear(integers, scale[:7], bias)
    with pytest.raises(ValueError, match=r"bias has 1 values; a weight of \(8, 16\) needs one a row"):
        PreparedLinear(integers, scale, torch.zeros(1))
    prepared, quantized = PreparedLinear(integers, scale, bias, kernels=lambda tokens: "float32"), _quantized(2, 16)
    with pytest.raises(ValueError, match=r"dtype=torch\.float16 is not made .* choose float32, bfloat16 or uint8"):
        prepared.product(quantized, 1.0, 0, torch.float16)
    with pytest.raises(ValueError, match="post='silu' is unknown: choose one of none, relu, gelu, gelu_tanh"):
        prepared.product(quantized, 1.0, 0, torch.float32, "silu")
    unknown = PreparedLinear(integers, scale, bias, kernels=lambda tokens: "mkl")
    with pytest.raises(ValueError, match="unknown kernel 'mkl': choose one of vnni, onednn, int_mm, float32"):
        unknown.product(quantized, 1.0, 0, torch.float32)
