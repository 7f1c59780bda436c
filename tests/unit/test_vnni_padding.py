"""The package's own kernels where a batch has padding, and two layers as one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hf_quant.runtime import products, vnni, vnni_ops

pytestmark = pytest.mark.skipif(not vnni.available(), reason="this CPU has no AVX-512 VNNI, or has AMX too")

GELU = vnni_ops.POSTS["gelu"]
LENGTHS = [(1, 7), (20, 3, 11, 20), (40, 2, 60, 5, 33)]


@pytest.fixture(params=[1, 2, 3], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(1)


def layer(columns: int, rows: int) -> vnni.Weight:
    integers = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    return products.prepare("vnni", integers, products.Rows(integers, torch.rand(rows) * 0.01, torch.randn(rows)))


def rows_of(lengths: tuple[int, ...]) -> Tensor:
    """Where the tokens are, (sentences, length)."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def bytes_of(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def assert_left_out(got: Tensor, expected: Tensor, tokens: Tensor) -> None:
    """Tokens are those of a batch without padding, and floats of padding 0."""
    assert torch.equal(got[tokens][None], expected)
    if got.dtype != torch.uint8:
        assert not got[~tokens].any()


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("width", [64, 50])  # whole registers of inputs, and not
def test_layers_leave_padding_out(lengths: tuple[int, ...], width: int) -> None:
    tokens = rows_of(lengths)
    first, then = layer(width, 100), layer(100, 70)
    floats, quantized = torch.randn(*tokens.shape, width), bytes_of(*tokens.shape, width)
    floats[~tokens] = torch.nan  # shows wherever it is read
    around = torch.randn(*tokens.shape, 70)
    around[~tokens] = torch.nan
    wide = torch.randn(*tokens.shape, 100)
    end = (torch.randn(70), torch.randn(70), 1e-5, 0.05, 100)
    wide_end = (torch.randn(100), torch.randn(100), 1e-5, 0.05, 100)

    def run(floats: Tensor, quantized: Tensor, around: Tensor, wide: Tensor) -> list[Tensor]:
        return [
            *(first.product(quantized, 0.03, 7, torch.float32, post, 0.05, 9) for post in vnni_ops.POSTS),
            first.product(quantized, 0.03, 7, torch.bfloat16),
            first.product(quantized, 0.03, 7, torch.uint8, "gelu", 0.05, 9),
            first.product_by_token(floats, False, torch.float32),
            first.product_by_token(floats, True, torch.bfloat16, "gelu"),
            *vnni_ops.norm(wide, wide, *wide_end),
            *vnni_ops.product_norm(quantized, first.number, 0.03, 7, wide, *wide_end),
            *vnni_ops.product_by_token_norm(floats, first.number, False, wide, *wide_end),
            *vnni_ops.feed_forward(quantized, first.number, 0.03, 7, GELU, 0.02, 9, then.number, around, *end),
            *vnni_ops.feed_forward_by_token(floats, first.number, True, GELU, then.number, around, *end),
        ]

    given = (floats, quantized, around, wide)
    with vnni.skipping_padding(lengths, tokens.shape[1]):
        got = run(*given)
        # Of another batch, everything is computed.
        other = floats[:, :1].nan_to_num()
        assert first.product_by_token(other, False, torch.float32).all()
    for one, expected in zip(got, run(*(each[tokens][None] for each in given)), strict=True):
        assert_left_out(one, expected, tokens)
    assert first.product_by_token(floats.nan_to_num(), False, torch.float32).all(), "over with the context"


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
def test_attention_leaves_padding_out(lengths: tuple[int, ...], causal: bool, heads: tuple[int, int]) -> None:
    tokens = rows_of(lengths)
    batch, length = tokens.shape
    query, key, value = (torch.randn(batch, count, length, 32) for count in (heads[0], heads[1], heads[1]))
    for each in (query, key, value):
        each.transpose(1, 2)[~tokens] = torch.nan
    mask = torch.randn(batch, 1, length, length)
    with vnni.skipping_padding(lengths, length):
        got = vnni_ops.attention(query, key, value, mask, causal, 0.2)
        rounded = vnni_ops.attention(query, key, value, mask, causal, 0.2, 0.013, 117)
    for row, count in enumerate(lengths):
        parts = [each[row : row + 1, :, :count] for each in (query, key, value)]
        shown = mask[row : row + 1, :, :count, :count]
        # Threads that share a head round its queries by ranges of their own.
        expected = vnni_ops.attention(*parts, shown, causal, 0.2)
        torch.testing.assert_close(got[row : row + 1, :, :count], expected, rtol=0, atol=2e-3)
        expected = vnni_ops.attention(*parts, shown, causal, 0.2, 0.013, 117)
        assert (rounded[row : row + 1, :, :count].int() - expected.int()).abs().max() <= 1
        assert not got[row, :, count:].any()


@pytest.mark.parametrize("rows", [1, 5, 47, 48, 60, 131, 300])
@pytest.mark.parametrize("inner", [100, 90])  # a multiple of four bytes, and not
@pytest.mark.parametrize("dims", [2, 3, 4])
def test_two_layers_as_one(rows: int, inner: int, dims: int) -> None:
    torch.manual_seed(rows)
    first, then = layer(50, inner), layer(inner, 70)
    shape = [1] * (dims - 2) + [rows] if dims < 4 else [rows, 1, 2]
    x, quantized, around = torch.randn(*shape, 50), bytes_of(*shape, 50), torch.randn(*shape, 70)
    for other in (around, None):
        end = (other, torch.randn(70), torch.randn(70), 1e-5, 0.05, 100)
        between = first.product(quantized, 0.03, 7, torch.uint8, "gelu", 0.02, 9)
        expected = vnni_ops.product_norm(between, then.number, 0.02, 9, *end)
        got = vnni_ops.feed_forward(quantized, first.number, 0.03, 7, GELU, 0.02, 9, then.number, *end)
        assert all(map(torch.equal, got, expected))
        for symmetric in (False, True):
            floats = first.product_by_token(x, symmetric, torch.float32, "gelu")
            expected = vnni_ops.product_by_token_norm(floats, then.number, symmetric, *end)
            got = vnni_ops.feed_forward_by_token(x, first.number, symmetric, GELU, then.number, *end)
            assert all(map(torch.equal, got, expected))


def test_nothing_to_feed_forward() -> None:
    first, then = layer(8, 16), layer(16, 8)
    end = (then.number, None, None, None, 1e-5, None, 0)
    empty = torch.zeros(2, 0, 8)
    assert vnni_ops.feed_forward_by_token(empty, first.number, True, GELU, *end)[0].shape == (2, 0, 8)
    got = vnni_ops.feed_forward(empty.to(torch.uint8), first.number, 1.0, 0, GELU, 1.0, 0, *end)
    assert got[0].shape == (2, 0, 8)
