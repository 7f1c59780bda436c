"""PreparedWeightOnly: every kernel against the product with the dequantized weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_quant.qparams import dequantize_weight
from hf_quant.runtime import choice, weight_only
from hf_quant.runtime.weight_only import PreparedWeightOnly

BFLOAT16 = torch.bfloat16


def _weight(out_features: int, in_features: int, groups: int, bits: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    most = 2 ** (bits - 1)
    integers = torch.randint(-most, most, (out_features, in_features), generator=generator).to(torch.int8)
    return integers, torch.rand(out_features, groups, generator=generator) * 0.1 + 0.01


def _on(kernel: str, integers: Tensor, scale: Tensor, bias: Tensor | None, bits: int) -> PreparedWeightOnly:
    return PreparedWeightOnly(integers, scale, bias, bits, kernels=lambda tokens, dtype: kernel)


def _exact(x: Tensor, integers: Tensor, scale: Tensor) -> Tensor:
    return x.double() @ dequantize_weight(integers, scale).double().t()


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("groups", [1, 3])
def test_float32_is_the_dequantized_product(bits: int, groups: int) -> None:
    integers, scale = _weight(33, 96, groups, bits)
    bias, x = torch.randn(33), torch.randn(7, 96)
    prepared = PreparedWeightOnly(integers, scale, bias, bits)
    got = prepared.matmul(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), _exact(x, integers, scale) + bias.double(), rtol=1e-5, atol=1e-4)
    assert prepared.names() == {(torch.float32, 8): "float32"}, "there is no other one, so nothing is measured"


@pytest.mark.parametrize(
    ("bits", "shape", "groups", "kernels"),
    [
        (8, (48, 64), 1, ["int8pack", "bfloat16"]),
        (8, (33, 80), 1, ["int8pack", "bfloat16"]),
        (8, (33, 100), 1, ["bfloat16"]),  # rows are no multiple of 16
        (8, (48, 64), 2, ["bfloat16"]),  # groups
        (4, (48, 128), 4, ["int4pack", "bfloat16"]),
        (4, (48, 128), 2, ["int4pack", "bfloat16"]),
        (4, (48, 512), 2, ["int4pack", "bfloat16"]),
        (4, (48, 384), 1, ["int4pack", "bfloat16"]),  # one scale a row, in groups of 128
        (4, (33, 128), 4, ["bfloat16"]),  # out_features no multiple of 16
        (4, (48, 128), 8, ["bfloat16"]),  # groups of 16
        (6, (48, 64), 2, ["bfloat16"]),
    ],
)
def test_bfloat16(bits: int, shape: tuple[int, int], groups: int, kernels: list[str]) -> None:
    integers, scale = _weight(*shape, groups, bits)
    assert PreparedWeightOnly(integers, scale, None, bits).kernels(BFLOAT16) == tuple(kernels)
    for tokens in (1, 6, 40):
        x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(3)).to(BFLOAT16)
        expected = _exact(x, integers, scale)
        for kernel in kernels:
            got = _on(kernel, integers, scale, None, bits).matmul(x)
            assert got.dtype == BFLOAT16
            assert _error(got, expected) < 2**-8, "a half of bfloat16's last digit for weights, and for the result"
            biased = _on(kernel, integers, scale, torch.ones(shape[0]), bits)
            assert torch.equal(biased.matmul(x), got + 1)


@pytest.mark.parametrize("bits", [4, 8])
def test_tensors_that_lie_anywhere_in_memory(bits: int) -> None:
    """torch's int8 product loads aligned vectors."""
    if len(weight_only.kernels_for(64, 48, 64, bits, BFLOAT16)) == 1:
        pytest.skip("torch has no such kernel here")
    integers, scale = _weight(48, 64, 1, bits)
    shifted = torch.empty(48 * 64 + 1, dtype=torch.int8)[1:].view(48, 64).copy_(integers)
    x = torch.randn(5, 65).to(BFLOAT16)[:, 1:]
    first = x.contiguous().view(-1)
    moved = torch.empty(5 * 64 + 1, dtype=BFLOAT16)[1:].copy_(first).view(5, 64)
    prepared = _on(f"int{bits}pack", shifted, scale, None, bits)
    for values in (x, moved):
        assert _error(prepared.matmul(values), _exact(x, integers, scale)) < 2**-8


def test_kernels_by_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is the fastest is injected; that it is taken is what counts."""
    if len(weight_only.kernels_for(64, 48, 64, 8, BFLOAT16)) == 1:
        pytest.skip("torch has no such kernel here")
    found = {1: {"int8pack": 5.0, "bfloat16": 9.0}, 8: {"int8pack": 10.0, "bfloat16": 9.5}}
    found[32] = {"int8pack": 20.0, "bfloat16": 9.0}
    monkeypatch.setattr(choice, "remembered", lambda what, names, measure: found[int(what.rsplit(" ", 1)[1])])
    prepared = PreparedWeightOnly(*_weight(48, 64, 1, 8), None, 8)
    for tokens in (1, 8, 32):
        prepared.matmul(torch.randn(tokens, 64).to(BFLOAT16))
    expected = {(BFLOAT16, 1): "int8pack", (BFLOAT16, 8): "int8pack", (BFLOAT16, 32): "bfloat16"}
    assert prepared.names() == expected, "at 8 tokens the other one is faster by less than a tenth"


def test_measurement_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = weight_only.kernels_for(64, 48, 32, 4, BFLOAT16)
    if len(names) == 1:
        pytest.skip("torch has no such kernel here")
    monkeypatch.setenv("HF_QUANT_CACHE", str(tmp_path))
    monkeypatch.setattr(choice, "_times", {})
    found = weight_only.times(64, 48, 32, 4, 8, BFLOAT16)
    assert set(found) == set(names)
    assert all(value > 0 for value in found.values())
    monkeypatch.setattr(choice, "measure", lambda *_: pytest.fail("measured twice"))
    assert weight_only.times(64, 48, 32, 4, 5, BFLOAT16) == found, "the same bucket"
    assert weight_only.times(64, 48, 32, 4, 8, torch.float32) == {"float32": 0.0}


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, *_: object) -> Tensor:
        return torch.zeros(x.shape[0], 32, dtype=x.dtype)

    monkeypatch.setattr(weight_only, "multiply", wrong)
    weight_only._is_right.cache_clear()
    try:
        assert weight_only.kernels_for(64, 48, 64, 8, BFLOAT16) == ("bfloat16",)
        assert weight_only.kernels_for(64, 48, 32, 4, BFLOAT16) == ("bfloat16",)
    finally:
        weight_only._is_right.cache_clear()


def test_no_tokens() -> None:
    prepared = PreparedWeightOnly(*_weight(48, 64, 1, 8), None, 8)
    assert prepared.matmul(torch.empty(0, 64)).shape == (0, 48)


def test_refusals() -> None:
    integers, scale = _weight(8, 48, 1, 8)
    with pytest.raises(ValueError, match=r"the weight is torch\.int32 \(8, 48\); pass int8 \(out_features, in_feat"):
        PreparedWeightOnly(integers.int(), scale, None, 8)
    with pytest.raises(ValueError, match=r"scale has shape \(8, 5\); a weight of \(8, 48\) needs \(8, groups\)"):
        PreparedWeightOnly(integers, torch.ones(8, 5), None, 8)
    prepared = _on("int4pack", integers, scale, None, 8)
    with pytest.raises(ValueError, match=r"the activations are torch\.float16; pass float32 or bfloat16"):
        prepared.matmul(torch.ones(2, 48, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"'int4pack' does not take this weight and torch\.float32: choose one of fl"):
        prepared.matmul(torch.ones(2, 48))
