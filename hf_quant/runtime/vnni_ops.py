"""The operations of `vnni.py`'s kernels, as torch knows them: signatures, and shapes of what comes out."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .vnni import Weight

WEIGHTS: weakref.WeakValueDictionary[int, Weight] = weakref.WeakValueDictionary()  # by number
# Numbers of what operations give, and of what they end in.
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}
_DTYPES = {kind: dtype for dtype, kind in KINDS.items()}
POSTS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3}


def _fake_product(quantized: Tensor, number: int, scale: float, zero: int, kind: int, *_: object) -> Tensor:
    return quantized.new_empty(*quantized.shape[:-1], WEIGHTS[number].out_features, dtype=_DTYPES[kind])


def _fake_product_by_token(input: Tensor, number: int, symmetric: bool, kind: int, post: int) -> Tensor:
    return input.new_empty(*input.shape[:-1], WEIGHTS[number].out_features, dtype=_DTYPES[kind])


def _fake_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    out_scale: float | None = None,
    out_zero_point: int = 0,
) -> Tensor:
    batch, heads, queries, _ = query.shape
    dtype = torch.float32 if out_scale is None else torch.uint8
    # Heads side by side, as the next layer wants them.
    return query.new_empty(batch, queries, heads, value.shape[-1], dtype=dtype).transpose(1, 2)


def _fake_norm(
    first: Tensor,
    second: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    epsilon: float,
    out_scale: float | None,
    out_zero_point: int,
) -> tuple[Tensor, Tensor]:
    rounded = first.new_empty(0 if out_scale is None else first.shape, dtype=torch.uint8)
    return first.new_empty(first.shape), rounded


def _fake_product_norm(input: Tensor, number: int, scale: float, zero_point: int, *beside: Any) -> Any:
    first = input.new_empty(*input.shape[:-1], WEIGHTS[number].out_features, dtype=torch.float32)
    return _fake_norm(first, *beside)


def _fake_product_by_token_norm(input: Tensor, number: int, symmetric: bool, *beside: Any) -> Any:
    return _fake_product_norm(input, number, 1.0, 0, *beside)


def _fake_feed_forward(
    input: Tensor, number: int, scale: float, zero: int, post: int, out_scale: float, out_zero: int, *beside: Any
) -> Any:
    return _fake_product_norm(input, beside[0], scale, zero, *beside[1:])


def _fake_feed_forward_by_token(input: Tensor, number: int, symmetric: bool, post: int, *beside: Any) -> Any:
    return _fake_product_norm(input, beside[0], 1.0, 0, *beside[1:])


_NORM = "Tensor? second, Tensor? weight, Tensor? bias, float epsilon, float? out_scale, int out_zero_point"

# What they do is in cpp/ops.cpp, which `vnni.available` loads.
_LIBRARY = torch.library.Library("hf_quant", "FRAGMENT")
for _signature, _fake in (
    (
        "vnni_product(Tensor quantized, int number, float scale, int zero_point, int kind, int post, "
        "float out_scale, int out_zero_point) -> Tensor",
        _fake_product,
    ),
    (
        "vnni_product_by_token(Tensor input, int number, bool symmetric, int kind, int post) -> Tensor",
        _fake_product_by_token,
    ),
    (
        "vnni_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, float scale, "
        "float? out_scale=None, int out_zero_point=0) -> Tensor",
        _fake_attention,
    ),
    (f"vnni_norm(Tensor first, {_NORM}) -> (Tensor, Tensor)", _fake_norm),
    (
        f"vnni_product_norm(Tensor quantized, int number, float scale, int zero_point, {_NORM}) -> (Tensor, Tensor)",
        _fake_product_norm,
    ),
    (
        f"vnni_product_by_token_norm(Tensor input, int number, bool symmetric, {_NORM}) -> (Tensor, Tensor)",
        _fake_product_by_token_norm,
    ),
    (
        "vnni_feed_forward(Tensor quantized, int number, float scale, int zero_point, int post, float inner_scale, "
        f"int inner_zero_point, int then, {_NORM}) -> (Tensor, Tensor)",
        _fake_feed_forward,
    ),
    (
        f"vnni_feed_forward_by_token(Tensor input, int number, bool symmetric, int post, int then, {_NORM}) "
        "-> (Tensor, Tensor)",
        _fake_feed_forward_by_token,
    ),
):
    _LIBRARY.define(_signature)
    torch.library.register_fake(f"hf_quant::{_signature.partition('(')[0]}", _fake, lib=_LIBRARY)

product = torch.ops.hf_quant.vnni_product.default
product_by_token = torch.ops.hf_quant.vnni_product_by_token.default

# softmax(s Q K^T + M) V of float32 (batch, heads, queries, width), (batch, heads or fewer, keys, width) and the same
# with the outputs' width. The mask broadcasts: float32 (..., keys), which is added, or bool, false for keys that are
# hidden. With an `out_scale`, what comes out is uint8, as from [`quantize_static`].
attention = torch.ops.hf_quant.vnni_attention.default

# Layer normalization over the last dimension of one float32 tensor or the sum of two alike; and, with an `out_scale`,
# the same as uint8, as from [`quantize_static`].
norm = torch.ops.hf_quant.vnni_norm.default

# A product without activation function, in float32, and the norm of it alone or of the sum with a second tensor.
product_norm = torch.ops.hf_quant.vnni_product_norm.default
product_by_token_norm = torch.ops.hf_quant.vnni_product_by_token_norm.default

# Such a product that ends in an activation function, and `then` another layer, which ends in a norm: what lies between
# the two is never written to memory.
feed_forward = torch.ops.hf_quant.vnni_feed_forward.default
feed_forward_by_token = torch.ops.hf_quant.vnni_feed_forward_by_token.default
