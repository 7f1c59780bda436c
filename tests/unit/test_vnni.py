"""The kernels for AVX-512 VNNI against PyTorch's in double precision; skipped on CPUs that do without them."""

from __future__ import annotations

import logging
import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_quant.qparams import dequantize, quantize, token_qparams
from hf_quant.runtime import cpu, ops, products, vnni, vnni_ops

needs_vnni = pytest.mark.skipif(not vnni.available(), reason="this CPU has no AVX-512 VNNI, or has AMX too")


def decibels(got: Tensor, expected: Tensor) -> float:
    noise = (got.double() - expected).square().sum().item()
    return 10 * math.log10(expected.square().sum().item() / noise) if noise else math.inf


# --- attention -------------------------------------------------------------------------------------------------------


def factors(batch: int, heads: int, kv: int, queries: int, keys: int, width: int, value_width: int) -> list[Tensor]:
    """Query, key and value, each a slice of what one layer gives, as models have them."""
    torch.manual_seed(batch + 10 * queries + 100 * keys + 1000 * width)
    sizes = ((heads, queries, width), (kv, keys, width), (kv, keys, value_width))
    return [2 * torch.randn(batch, rows, count * size + 16)[..., 16:].view(batch, rows, count, size).transpose(1, 2)
            for count, rows, size in sizes]  # fmt: skip


def expected_attention(query: Tensor, key: Tensor, value: Tensor, mask: Any, causal: bool, scale: float) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (each.double().repeat_interleave(groups, 1) for each in (key, value))
    scores = scale * query.double() @ key.transpose(2, 3)
    if mask is not None:
        scores = scores + mask
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[2:], dtype=torch.bool).triu(1), -math.inf)
    return scores.softmax(-1) @ value


@needs_vnni
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 3, 3, 7, 7, 16, 16),
        (1, 2, 2, 128, 128, 32, 32),
        (3, 4, 2, 65, 65, 64, 64),
        (1, 6, 1, 33, 200, 48, 80),
        (2, 1, 1, 5, 1, 128, 16),
        (1, 1, 1, 300, 700, 96, 96),
        (1, 1, 1, 2, 70, 512, 512),
    ],
    ids=str,
)
def test_attention(sizes: tuple[int, ...], causal: bool, threads: int) -> None:
    query, key, value = factors(*sizes)
    scale = sizes[5] ** -0.5
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = vnni_ops.attention(query, key, value, None, causal, scale)
    finally:
        torch.set_num_threads(before)
    assert got.transpose(1, 2).is_contiguous(), "heads lie side by side"
    assert decibels(got, expected_attention(query, key, value, None, causal, scale)) > 55


@needs_vnni
@pytest.mark.parametrize(
    "shape", [(3, 1, 1, 41), (1, 1, 41, 41), (3, 2, 41, 41), (3, 1, 41, 41), (41, 41), (41,)], ids=str
)
def test_masks(shape: tuple[int, ...]) -> None:
    query, key, value = factors(3, 2, 2, 41, 41, 32, 32)
    mask = torch.randn(shape).masked_fill_(torch.rand(shape) < 0.3, -1e30)
    got = vnni_ops.attention(query, key, value, mask, False, 0.2)
    assert decibels(got, expected_attention(query, key, value, mask.double(), False, 0.2)) > 60
    shown = torch.rand(shape) < 0.7
    got = vnni_ops.attention(query, key, value, shown, False, 0.2)
    mask = torch.zeros(shape, dtype=torch.double).masked_fill_(~shown, -1e30)
    assert decibels(got, expected_attention(query, key, value, mask, False, 0.2)) > 60


@needs_vnni
def test_a_row_without_a_key_is_the_mean() -> None:
    query, key, value = factors(1, 1, 1, 4, 10, 16, 16)
    for mask in (torch.full((1, 1, 1, 10), -1e30), torch.zeros(1, 1, 1, 10, dtype=torch.bool)):
        got = vnni_ops.attention(query, key, value, mask, False, 0.25)
        torch.testing.assert_close(got, value.mean(2, keepdim=True).expand(-1, -1, 4, -1), rtol=0, atol=2e-2)


@needs_vnni
def test_rounded_attention() -> None:
    query, key, value = factors(2, 3, 3, 50, 50, 32, 32)
    plain = vnni_ops.attention(query, key, value, None, False, 0.2)
    got = vnni_ops.attention(query, key, value, None, False, 0.2, 0.013, 117)
    assert torch.equal(got, ops.quantize_static(plain, 0.013, 117))


@needs_vnni
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_is_not_finite_stays_visible(where: int, value: float) -> None:
    parts = factors(2, 2, 2, 9, 9, 16, 16)
    parts[where][1, 0, 3, 5] = value
    got = vnni_ops.attention(*parts, None, False, 0.25)
    assert got[1, 0].isnan().all()
    assert got[0].isfinite().all()
    assert got[1, 1].isfinite().all()


@needs_vnni
def test_zeros() -> None:
    query, key, value = (torch.zeros(1, 1, 8, 16) for _ in range(3))
    assert torch.equal(vnni_ops.attention(query, key, value, None, False, 1.0), torch.zeros(1, 1, 8, 16))


@needs_vnni
@pytest.mark.parametrize("sizes", [(0, 2, 2, 5, 5, 16, 16), (2, 2, 2, 0, 5, 16, 16)], ids=str)
def test_nothing_to_attend(sizes: tuple[int, ...]) -> None:
    query, key, value = factors(*sizes)
    assert vnni_ops.attention(query, key, value, None, False, 1.0).shape == (*query.shape[:3], 16)


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"width": 24}, False),
        ({"width": 528}, False),
        ({"queries": 1}, False),
        ({"dtype": torch.bfloat16}, False),
        ({"device": "meta"}, False),
    ],
    ids=str,
)
def test_what_it_is_made_for(change: dict[str, Any], fits: bool) -> None:
    kind = {"dtype": change.get("dtype", torch.float32), "device": change.get("device", "cpu")}
    query = torch.empty(2, 3, change.get("queries", 8), change.get("width", 32), **kind)
    key = torch.empty(2, 3, 8, change.get("width", 32), **kind)
    assert vnni.attends(query, key, key) == fits


# --- Linear layers ---------------------------------------------------------------------------------------------------

sizes_of_layers = st.tuples(st.integers(1, 20), st.integers(1, 150), st.integers(1, 150))


@needs_vnni
@given(sizes_of_layers)
@settings(max_examples=50, deadline=None)
def test_packing(sizes: tuple[int, int, int]) -> None:
    _, rows, columns = sizes
    integers = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    packed = vnni.pack(integers)
    assert packed.shape == (-(-rows // 64), -(-columns // 4), 64, 4)
    assert torch.equal(vnni.unpack(packed, rows, columns), integers)


@pytest.mark.parametrize("sizes", [(1100, 1000), (3072, 768), (3001, 999)], ids=str)
def test_packing_of_large_weights(sizes: tuple[int, int]) -> None:
    integers = torch.randint(-128, 128, sizes, dtype=torch.int8)
    packed = vnni.pack(integers)
    assert packed.is_contiguous()
    assert packed.data_ptr() % 64 == 0
    assert packed.untyped_storage().resizable() is (sys.platform != "linux"), "in memory of its own"
    assert torch.equal(vnni.unpack(packed, *sizes), integers)
    assert int(packed.long().sum()) == int(integers.long().sum()), "filled up with 0"


@pytest.mark.skipif(sys.platform != "linux", reason="where weights are in memory of their own")
def test_memory_of_a_large_weight_goes_with_it() -> None:
    import resource

    integers = torch.ones(2**13, 2**10, dtype=torch.int8)
    vnni.pack(integers)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(30):
        vnni.pack(integers)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 8192, "KB, of 30 times 8192"


@needs_vnni
def test_product_of_a_large_weight() -> None:
    layer, values, shift = weight(1100, 1000, True)
    quantized = torch.randint(0, 256, (5, 1000), dtype=torch.uint8)
    close(layer.product(quantized, 0.03, 7, torch.float32), (quantized.double() - 7) * 0.03 @ values.t() + shift,
          torch.float32)  # fmt: skip


def weight(rows: int, columns: int, bias: bool) -> tuple[vnni.Weight, Tensor, Tensor | None]:
    integers = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    scale = torch.rand(rows) * 0.01
    shift = torch.randn(rows) if bias else None
    layer = products.prepare("vnni", integers, products.Rows(integers, scale, shift))
    return layer, integers.double() * scale[:, None], shift


ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    rough = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.double(), expected, rtol=rough, atol=rough * float(expected.abs().max()) + 1e-6)


@needs_vnni
@given(sizes_of_layers, st.booleans(), st.sampled_from(sorted(ACTIVATIONS)), st.integers(0, 255), st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_products(sizes: tuple[int, int, int], bias: bool, post: str, zero: int, seed: int) -> None:
    torch.manual_seed(seed)
    tokens, rows, columns = sizes
    layer, values, shift = weight(rows, columns, bias)
    quantized = torch.randint(0, 256, (tokens, columns), dtype=torch.uint8)
    expected = (quantized.double() - zero) * 0.03 @ values.t()
    expected = ACTIVATIONS[post](expected if shift is None else expected + shift)
    for dtype in (torch.float32, torch.bfloat16):
        close(layer.product(quantized, 0.03, zero, dtype, post), expected, dtype)
    got = layer.product(quantized, 0.03, zero, torch.uint8, post, 0.2, 50)
    assert torch.equal(got, ops.quantize_static(layer.product(quantized, 0.03, zero, torch.float32, post), 0.2, 50))


@needs_vnni
@given(sizes_of_layers, st.booleans(), st.booleans(), st.sampled_from(sorted(ACTIVATIONS)), st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_products_by_token(sizes: tuple[int, int, int], bias: bool, symmetric: bool, post: str, seed: int) -> None:
    torch.manual_seed(seed)
    tokens, rows, columns = sizes
    layer, values, shift = weight(rows, columns, bias)
    x = torch.randn(1, tokens, columns) * torch.logspace(-3, 3, tokens)[:, None]
    scale, zeros = token_qparams(x, symmetric)
    expected = dequantize(quantize(x, scale, zeros), scale, zeros).double() @ values.t()
    expected = ACTIVATIONS[post](expected if shift is None else expected + shift)
    for dtype in (torch.float32, torch.bfloat16):
        close(layer.product_by_token(x, symmetric, dtype, post), expected, dtype)


@needs_vnni
@pytest.mark.parametrize("shape", [(30,), (6, 30), (2, 3, 30), (2, 3, 4, 30), (1, 2, 2, 3, 30)], ids=str)
def test_tokens_that_share_a_range(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer, values, shift = weight(70, 30, True)
    x = torch.randn(shape) * (1 + torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1)))
    scale, zeros = token_qparams(x, False)
    expected = dequantize(quantize(x, scale, zeros), scale, zeros).double() @ values.t() + shift
    close(layer.product_by_token(x, False, torch.float32), expected, torch.float32)


@needs_vnni
def test_tokens_of_zeros_and_of_what_is_not_finite() -> None:
    layer, _, shift = weight(70, 30, True)
    x = torch.zeros(4, 30)
    x[1, 3], x[2, 29] = math.nan, math.inf
    for symmetric in (False, True):
        got = layer.product_by_token(x[None], symmetric, torch.float32)[0]
        torch.testing.assert_close(got[0], shift)
        torch.testing.assert_close(got[3], shift)
        assert got[1:3].isnan().all()


@needs_vnni
@pytest.mark.parametrize("step", [1.0, 0.1, 1 / 3, 3.0000002, 1e-6, 1e4, 7.7e-30, 1.9999999])
def test_values_between_two_integers_round_as_by_division(step: float) -> None:
    places = torch.arange(-140, 140).repeat_interleave(9) + 0.5
    values = places * step * (1 + 2**-23 * torch.arange(-4, 5).repeat(280))
    for extreme in (math.inf, -math.inf, 3e38, -3e38):
        values = torch.cat([values, torch.tensor([extreme])])
    zeros = torch.zeros(len(values), 4, dtype=torch.int8)
    layer = products.prepare("vnni", zeros, products.Rows(zeros, torch.ones(len(values)), values))
    quantized = torch.zeros(1, 4, dtype=torch.uint8)
    for zero in (0, 77, 128, 255):
        got = layer.product(quantized, 1.0, 0, torch.uint8, out_scale=step, out_zero_point=zero)[0]
        assert torch.equal(got, ops.quantize_static(values, step, zero))


@needs_vnni
def test_activation_functions_are_those_of_torch() -> None:
    values = torch.linspace(-12, 12, 4001)
    zeros = torch.zeros(4001, 4, dtype=torch.int8)
    layer = products.prepare("vnni", zeros, products.Rows(zeros, torch.ones(4001), values))
    bounds = {"none": 0.0, "relu": 0.0, "gelu": 1e-7, "gelu_tanh": 3e-6}
    for post, function in ACTIVATIONS.items():
        got = layer.product(torch.zeros(1, 4, dtype=torch.uint8), 1.0, 0, torch.float32, post)[0]
        assert ((got - function(values.double())).abs() <= bounds[post] * values.abs()).all(), post


@needs_vnni
def test_a_layer_that_is_gone() -> None:
    layer, _, _ = weight(8, 8, False)
    number, quantized = layer.number, torch.zeros(2, 8, dtype=torch.uint8)
    assert vnni_ops.product(quantized, number, 1.0, 0, 0, 0, 1.0, 0).shape == (2, 8)
    del layer
    for wrong in (number, -1, 10**6):
        with pytest.raises(RuntimeError, match="the layer of this graph is gone, with the model that was optimized"):
            vnni_ops.product(quantized, wrong, 1.0, 0, 0, 0, 1.0, 0)


@needs_vnni
def test_nothing_to_multiply() -> None:
    layer, _, _ = weight(8, 8, False)
    assert layer.product(torch.zeros(0, 8, dtype=torch.uint8), 1.0, 0, torch.float32).shape == (0, 8)
    assert layer.product_by_token(torch.zeros(2, 0, 8), True, torch.bfloat16).shape == (2, 0, 8)


# --- norms -----------------------------------------------------------------------------------------------------------


@needs_vnni
@given(st.integers(1, 40), st.integers(1, 200), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_norms(rows: int, width: int, two: bool, scaled: bool, rounded: bool, seed: int) -> None:
    torch.manual_seed(seed)
    first, second = 3 * torch.randn(rows, width) + 5, torch.randn(rows, width) if two else None
    weight, bias = (torch.randn(width), torch.randn(width)) if scaled else (None, None)
    step = (0.05, 100) if rounded else (None, 0)
    got, integers = vnni_ops.norm(first, second, weight, bias, 1e-5, *step)
    total = (first if second is None else first + second).double()
    beside = [None if each is None else each.double() for each in (weight, bias)]
    expected = F.layer_norm(total, (width,), *beside, 1e-5)
    # The mean of numbers far from 0 is rounded to float32, and the quotient by a small deviation with it.
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4 if width > 1 else 1e-2)
    if rounded:
        assert torch.equal(integers, ops.quantize_static(got, 0.05, 100))
    else:
        assert integers.numel() == 0


@needs_vnni
@pytest.mark.parametrize("rows", [1, 5, 47, 48, 60, 131])
@pytest.mark.parametrize("scheme", ["static", "by token"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_products_that_end_in_a_norm(rows: int, scheme: str, threads: int) -> None:
    torch.manual_seed(rows)
    layer, _, _ = weight(100, 50, True)
    second, factor, shift = torch.randn(1, rows, 100), torch.randn(100), torch.randn(100)
    quantized, x = torch.randint(0, 256, (1, rows, 50), dtype=torch.uint8), torch.randn(1, rows, 50)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for other in (second, None):
            beside = (other, factor, shift, 1e-5, 0.05, 100)
            if scheme == "static":
                first = layer.product(quantized, 0.03, 7, torch.float32)
                got = vnni_ops.product_norm(quantized, layer.number, 0.03, 7, *beside)
            else:
                first = layer.product_by_token(x, False, torch.float32)
                got = vnni_ops.product_by_token_norm(x, layer.number, False, *beside)
            expected = vnni_ops.norm(first, *beside)
            assert torch.equal(got[0], expected[0])
            assert torch.equal(got[1], expected[1])
    finally:
        torch.set_num_threads(before)


@needs_vnni
def test_nothing_to_normalize() -> None:
    layer, _, _ = weight(8, 8, False)
    beside = (None, None, None, 1e-5, None, 0)
    assert vnni_ops.norm(torch.zeros(0, 8), *beside)[0].shape == (0, 8)
    empty = torch.zeros(2, 0, 8)
    assert vnni_ops.product_norm(empty.to(torch.uint8), layer.number, 1.0, 0, *beside)[0].shape == (2, 0, 8)
    assert vnni_ops.product_by_token_norm(empty, layer.number, True, *beside)[0].shape == (2, 0, 8)


@needs_vnni
def test_a_norm_of_what_is_not_finite() -> None:
    x = torch.randn(3, 20)
    x[1, 4] = math.nan
    got, _ = vnni_ops.norm(x, None, None, None, 1e-5, None, 0)
    assert got[1].isnan().all()
    assert got[::2].isfinite().all()


# --- where they are there --------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not cpu.features()["avx512_vnni"] or cpu.features()["amx_int8"] or not cpu.compiler_available(),
    reason="this CPU has no AVX-512 VNNI, or has AMX too, or there is no compiler",
)
def test_cpus_that_have_them() -> None:
    assert vnni.available(), "all tests of the kernels would be skipped"


@pytest.mark.parametrize(
    "features", [{"avx512_vnni": False, "amx_int8": False}, {"avx512_vnni": True, "amx_int8": True}]
)
def test_cpus_that_do_without(features: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "features", lambda: features)
    assert not vnni.available.__wrapped__()


@needs_vnni
def test_kernels_that_do_not_compile_are_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vnni, "_SOURCES", ("common.h",))  # which compiles, and holds no kernel
    vnni._library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "hf_quant.runtime.vnni"):
            assert not vnni.available.__wrapped__()
        assert "the kernels for AVX-512 VNNI cannot be used" in caplog.text
        assert "hf_quant_register" in caplog.text
    finally:
        vnni._library.cache_clear()
