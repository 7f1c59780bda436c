"""The int8 kernels against exact integer arithmetic and against each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_quant.qparams import calculate_qparams
from hf_quant.runtime import kernels
from hf_quant.runtime.kernels import Kernel, choose_kernel, int_mm_linear, onednn_is_exact, use_kernel
from hf_quant.runtime.modules import Int8Linear
from hf_quant.schemes import SCHEMES

onednn = pytest.mark.skipif(not onednn_is_exact(), reason="this CPU or torch build has no exact oneDNN int8 product")
FAST: list[object] = [pytest.param("onednn", marks=onednn), "int_mm"]

seeds = st.integers(0, 2**16)
sizes = st.integers(1, 70)
# Rows of one token, an odd number of them, none; and 1 to 4 dimensions before the features.
leading = st.lists(st.integers(0, 5), min_size=1, max_size=3)


def _layer(seed: int, out_features: int, in_features: int, scheme: str, bias: bool = True) -> Int8Linear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    offset = torch.randn(out_features, generator=generator) if bias else None
    bounds = (torch.tensor(-2.0), torch.tensor(3.5)) if scheme == "int8_static" else None
    return Int8Linear.from_float(weight, offset, SCHEMES[scheme], bounds)


def _run(layer: Int8Linear, values: Tensor, kernel: Kernel) -> Tensor:
    with use_kernel(kernel):
        return layer(values)


def _close(got: Tensor, expected: Tensor, layer: Int8Linear, values: Tensor) -> None:
    """Equal but for the rounding of float32 sums, whose bound grows with the size of what is added up."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    size = values.abs().amax().item() if values.numel() else 0.0
    weight = (layer.int8_weight.float() * layer.weight_scale).abs().sum(-1).max().item()
    bias = 0.0 if layer.bias is None else layer.bias.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * (size * weight + bias) + 1e-30)


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic"])
@pytest.mark.parametrize("kernel", FAST)
@given(seeds, sizes, sizes, leading, st.booleans())
def test_fast_kernels_agree_with_the_reference(
    kernel: Kernel, scheme: str, seed: int, out_features: int, in_features: int, shape: list[int], bias: bool
) -> None:
    layer = _layer(seed, out_features, in_features, scheme, bias)
    values = torch.randn(*shape, in_features, generator=torch.Generator().manual_seed(seed + 1)).clamp(-2, 3.5)
    _close(_run(layer, values, kernel), _run(layer, values, "reference"), layer, values)


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic"])
@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(3, 16),
        torch.full((3, 16), 1e30),
        torch.full((3, 16), -1e30),
        torch.full((2, 1, 16), 1e-30),
        torch.tensor([[1e4, -1e4] * 8, [1e-4, -1e-4] * 8]),
    ],
    ids=["zeros", "huge", "hugely negative", "tiny", "mixed"],
)
def test_fast_kernels_agree_with_the_reference_on_extreme_values(kernel: Kernel, scheme: str, values: Tensor) -> None:
    layer = _layer(0, 5, 16, scheme)
    got, expected = _run(layer, values, kernel), _run(layer, values, "reference")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", FAST)
def test_non_contiguous_inputs(kernel: Kernel) -> None:
    base = torch.randn(16, 6, 4)
    for scheme in ("int8_static", "int8_dynamic"):
        layer = _layer(1, 7, 16, scheme)
        for values in (base.permute(2, 1, 0), base.permute(1, 2, 0)[::2], base[..., 0].t()[:, :16]):
            assert not values.is_contiguous()
            assert torch.equal(_run(layer, values, kernel), _run(layer, values.contiguous(), kernel))


@pytest.mark.parametrize("kernel", [*FAST, "reference"])
@pytest.mark.parametrize("scheme", sorted(SCHEMES))
@pytest.mark.parametrize("shape", [(0, 8), (0, 3, 8), (2, 0, 8)])
def test_empty_batch(kernel: Kernel, scheme: str, shape: tuple[int, ...]) -> None:
    layer = _layer(0, 5, 8, scheme)
    assert _run(layer, torch.empty(shape), kernel).shape == (*shape[:-1], 5)


@pytest.mark.parametrize("kernel", [*FAST, "reference"])
@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_a_single_vector(kernel: Kernel, scheme: str) -> None:
    layer = _layer(0, 5, 8, scheme)
    values = torch.linspace(-1, 1, 8)
    torch.testing.assert_close(_run(layer, values, kernel), _run(layer, values[None], kernel)[0])


@onednn
@given(seeds, st.integers(1, 20), sizes, sizes, st.integers(-128, 127))
def test_onednn_sums_are_exact_integers(
    seed: int, tokens: int, in_features: int, out_features: int, zero_point: int
) -> None:
    """In units of the scales: sum over k of (q - z) w, by numpy in 64 bits. 70 x 255 x 128 fits a float32."""
    generator = np.random.default_rng(seed)
    values = generator.integers(-128, 128, (tokens, in_features))
    weight = generator.integers(-128, 128, (out_features, in_features))
    packed = kernels.onednn_prepack(torch.from_numpy(weight.astype(np.int8)))
    got = kernels.onednn_linear(
        torch.from_numpy(values.astype(np.int8)), packed, torch.ones(out_features), None, 1.0, zero_point
    )
    assert np.array_equal(got.numpy().astype(np.int64), (values - zero_point) @ weight.T)


@given(seeds, st.integers(1, 20), sizes, sizes)
def test_int_mm_sums_are_exact_integers(seed: int, tokens: int, in_features: int, out_features: int) -> None:
    generator = np.random.default_rng(seed)
    values = generator.integers(-128, 128, (tokens, in_features))
    weight = generator.integers(-128, 128, (out_features, in_features))
    got = int_mm_linear(torch.from_numpy(values.astype(np.int8)), torch.from_numpy(weight.astype(np.int8)))
    assert got.dtype == torch.int32
    assert np.array_equal(got.numpy(), values @ weight.T)


@pytest.mark.parametrize("kernel", [*FAST, "reference"])
def test_by_hand(kernel: Kernel) -> None:
    """Inputs in -1..1.55: s_x = 0.01, z = -28; weights 64 and -127.5: s_w = 1, and a tie, rounded to even."""
    bounds = (torch.tensor(-1.0), torch.tensor(1.55))
    layer = Int8Linear.from_float(torch.tensor([[64.0, -127.5]]), torch.tensor([0.5]), SCHEMES["int8_static"], bounds)
    assert layer.int8_weight.tolist() == [[64, -128]]
    assert layer.input_zero_point.tolist() == [-28]
    # 0.5 is a quantum, 3 is clipped to 1.55.
    assert _run(layer, torch.tensor([[0.5, 3.0]]), kernel).item() == pytest.approx(0.5 * 64 - 1.55 * 128 + 0.5)


def test_choice_on_a_cpu_is_the_exact_fast_kernel_or_the_reference() -> None:
    cpu = torch.device("cpu")
    assert choose_kernel(cpu) == ("onednn" if onednn_is_exact() else "reference")
    with use_kernel("int_mm"):
        assert choose_kernel(cpu) == "int_mm"
        with use_kernel("reference"):
            assert choose_kernel(cpu) == "reference"
        assert choose_kernel(cpu) == "int_mm"
    assert choose_kernel(cpu) != "int_mm"


def test_forced_kernel_is_let_go_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="mine"), use_kernel("reference"):
        raise RuntimeError("mine")
    assert choose_kernel(torch.device("cpu")) == ("onednn" if onednn_is_exact() else "reference")


def test_unknown_kernel() -> None:
    with (
        pytest.raises(ValueError, match=r"unknown kernel 'fbgemm'. Choose one of: onednn, int_mm, reference\."),
        use_kernel("fbgemm"),  # type: ignore[arg-type]
    ):
        pass


@pytest.fixture
def _fresh_probe() -> object:
    onednn_is_exact.cache_clear()
    yield
    onednn_is_exact.cache_clear()


@pytest.mark.usefixtures("_fresh_probe")
def test_a_saturating_product_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without VNNI: pairs of u8 x s8 products are added in 16 bits."""

    def saturating(values: Tensor, packed: Tensor, *rest: object) -> Tensor:
        unsigned = values.to(torch.int32) + 128
        pairs = (unsigned[:, None, :] * 127).unflatten(-1, (-1, 2)).sum(-1).clamp(-(2**15), 2**15 - 1)
        return (pairs.sum(-1) - 128 * 127 * 64).float().expand(-1, 16)

    monkeypatch.setattr(kernels, "onednn_linear", saturating)
    assert not onednn_is_exact()
    assert choose_kernel(torch.device("cpu")) == "reference"


@pytest.mark.usefixtures("_fresh_probe")
def test_a_missing_or_refusing_operator_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> Tensor:
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(kernels, "onednn_prepack", refuse)
    assert not onednn_is_exact()


def test_one_sided_ranges_use_every_integer() -> None:
    scale, zero_point = calculate_qparams(torch.tensor(0.0), torch.tensor(5.1), symmetric=False)
    assert (round(float(scale), 6), int(zero_point)) == (0.02, -128)
