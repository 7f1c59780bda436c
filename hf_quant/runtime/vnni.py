"""Kernels of this package's own for CPUs with AVX-512 VNNI, in C++: attention, norms, and Linear layers as a whole.

oneDNN's int8 products are as fast for many tokens, but not for a few, and end where a layer's other work begins.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import logging
import math
import mmap
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu

logger = logging.getLogger(__name__)

_PANEL, _FOURS, _LANES = 64, 4, 16  # outputs, inputs, and values of 32 bits in a register
_MAPPED, _LARGE_PAGE = 2**20, 2**21  # bytes: of a weight in memory of its own, and of a large page
_WIDEST = 512  # of an attention's head: from there on, what is left of 31 bits rounds more than bfloat16
_SOURCES = ("common.h", "attention.cpp", "norm.cpp", "linear.cpp", "ops.cpp")
# Numbers of what operations give, and of what they end in.
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}
_DTYPES = {kind: dtype for dtype, kind in KINDS.items()}
POSTS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3}

_numbers = itertools.count()
_WEIGHTS: weakref.WeakValueDictionary[int, Weight] = weakref.WeakValueDictionary()


@functools.cache
def available() -> bool:
    """Whether the CPU has the instructions, the kernels compile here, and what they give is right.

    They are compiled once a machine: Inductor keeps the library beside its own. CPUs with AMX do without: oneDNN uses
    it, and it is many times faster.
    """
    features = cpu.features()
    if not features["avx512_vnni"] or features["amx_int8"] or not cpu.compiler_available():
        return False
    try:
        _library()
        if _multiplies() and _attends() and _normalizes():
            return True
        reason = "they give wrong results"
    except Exception as error:  # what a compiler may say has no class of its own
        reason = str(error)
    logger.warning("the kernels for AVX-512 VNNI cannot be used (%s); PyTorch's are.", reason)
    return False


@functools.cache
def _library() -> ctypes.CDLL:
    from torch._inductor.codecache import CppCodeCache

    folder = Path(__file__).with_name("cpp")
    library = CppCodeCache.load("\n".join((folder / name).read_text(encoding="utf-8") for name in _SOURCES))
    library.hf_quant_register.argtypes = [ctypes.c_int64, ctypes.c_void_p]
    library.hf_quant_forget.argtypes = [ctypes.c_int64]
    library.hf_quant_register.restype = library.hf_quant_forget.restype = None
    return library


def pack(integers: Tensor) -> Tensor:
    """An int8 weight (out, in) as the kernels want it: (out / 64, in / 4, 64, 4), rounded up and filled with 0."""
    rows, columns = integers.shape
    padded = integers
    if rows % _PANEL or columns % _FOURS:
        padded = F.pad(integers, (0, -columns % _FOURS, 0, -rows % _PANEL))
    fours = padded.shape[1] // _FOURS
    packed = _room(padded.shape[0] // _PANEL, fours, _PANEL, _FOURS)
    return packed.copy_(padded.view(-1, _PANEL, fours, _FOURS).transpose(1, 2))


def _room(*shape: int) -> Tensor:
    """Room for a packed weight, int8, on a multiple of 64 bytes.

    A large one is mapped by itself, with large pages where Linux has them. In the heap it would leave a hole in place
    of each form that the weight had before.
    """
    size = math.prod(shape)
    if size < _MAPPED or sys.platform != "linux":
        return torch.empty(shape, dtype=torch.int8)
    # What is not touched costs nothing.
    pages = mmap.mmap(-1, size + _LARGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    room = torch.frombuffer(pages, dtype=torch.int8)  # which keeps the pages for as long as it lives
    start = -room.data_ptr() % _LARGE_PAGE
    if size >= _LARGE_PAGE:
        with contextlib.suppress(OSError):  # a kernel without large pages
            pages.madvise(mmap.MADV_HUGEPAGE, start, size // _LARGE_PAGE * _LARGE_PAGE)
    return room[start : start + size].view(shape)


def unpack(packed: Tensor, rows: int, columns: int) -> Tensor:
    """The int8 weight (out, in) of what [`pack`] made."""
    return packed.transpose(1, 2).reshape(-1, packed.shape[1] * _FOURS)[:rows, :columns].contiguous()


def _filled(values: Tensor) -> Tensor:
    """One value a row, for whole panels; the tensor itself where it is for such."""
    missing = -values.numel() % _PANEL
    return F.pad(values, (0, missing)) if missing else values.contiguous()


class Weight:
    """One layer, as the kernels find it: by number, for as long as this lives.

    Args:
        packed (`torch.Tensor`): from [`pack`].
        scale (`torch.Tensor`): float32 (out,).
        sums (`torch.Tensor`): int32 (out,): of the rows of the weight.
        bias (`torch.Tensor`, *optional*): float (out,).
        in_features (`int`): columns before anything was filled up.
    """

    def __init__(self, packed: Tensor, scale: Tensor, sums: Tensor, bias: Tensor | None, in_features: int) -> None:
        self.packed, self.in_features, self.out_features = packed, in_features, scale.numel()
        bias = None if bias is None else bias.detach().float()
        self._kept = [None if each is None else _filled(each) for each in (scale, sums, bias)]
        beside = [0 if each is None else each.data_ptr() for each in self._kept]
        self.number = next(_numbers)
        _WEIGHTS[self.number] = self
        numbers = (ctypes.c_int64 * 6)(packed.data_ptr(), *beside, in_features, self.out_features)
        _library().hf_quant_register(self.number, numbers)
        weakref.finalize(self, _library().hf_quant_forget, self.number)

    def with_bias(self, bias: Tensor | None) -> Weight:
        """The same weight with another bias."""
        rows = self.out_features
        scale, sums = (each[:rows] for each in self._kept[:2] if each is not None)
        return Weight(self.packed, scale, sums, bias, self.in_features)

    def integers(self) -> Tensor:
        """The weight as int8 (out, in), unpacked anew."""
        return unpack(self.packed, self.out_features, self.in_features)

    def product(
        self,
        quantized: Tensor,
        scale: float,
        zero_point: int,
        dtype: torch.dtype,
        post: str = "none",
        out_scale: float = 1.0,
        out_zero_point: int = 0,
    ) -> Tensor:
        """`post((q - z) s_x (w s_w)^T + b)` of uint8 (..., in_features); see [`PreparedLinear.product`]."""
        return product(quantized, self.number, scale, zero_point, KINDS[dtype], POSTS[post], out_scale, out_zero_point)

    def product_by_token(self, input: Tensor, symmetric: bool, dtype: torch.dtype, post: str = "none") -> Tensor:
        """`post(x w^T + b)` with the input quantized on the way, by the ranges of [`token_qparams`].

        Args:
            input (`torch.Tensor`): float32 (..., in_features).
            symmetric (`bool`): whether zero points are 0.
            dtype (`torch.dtype`): float32 or bfloat16; of the result.
            post (`str`, *optional*, defaults to `"none"`): as for [`PreparedLinear.product`].
        """
        return product_by_token(input, self.number, symmetric, KINDS[dtype], POSTS[post])


def attends(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether [`attention`] takes these, and is made for them.

    A single query reads keys and values once, so that packing them costs more than it saves.
    """
    widths, factors = (query.shape[-1], value.shape[-1]), (query, key, value)
    return (
        all(each.dtype == torch.float32 and each.device.type == "cpu" and each.ndim == 4 for each in factors)
        and all(isinstance(width, int) and width % _LANES == 0 and 0 < width <= _WIDEST for width in widths)
        and not (isinstance(query.shape[2], int) and query.shape[2] == 1)
    )


# --- operations ------------------------------------------------------------------------------------------------------


def _fake_product(quantized: Tensor, number: int, scale: float, zero: int, kind: int, *_: object) -> Tensor:
    return quantized.new_empty(*quantized.shape[:-1], _WEIGHTS[number].out_features, dtype=_DTYPES[kind])


def _fake_product_by_token(input: Tensor, number: int, symmetric: bool, kind: int, post: int) -> Tensor:
    return input.new_empty(*input.shape[:-1], _WEIGHTS[number].out_features, dtype=_DTYPES[kind])


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
    first = input.new_empty(*input.shape[:-1], _WEIGHTS[number].out_features, dtype=torch.float32)
    return _fake_norm(first, *beside)


def _fake_product_by_token_norm(input: Tensor, number: int, symmetric: bool, *beside: Any) -> Any:
    return _fake_product_norm(input, number, 1.0, 0, *beside)


_NORM = "Tensor? second, Tensor? weight, Tensor? bias, float epsilon, float? out_scale, int out_zero_point"

# What they do is in cpp/ops.cpp, which [`available`] loads.
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


# --- whether they are right ------------------------------------------------------------------------------------------


def _multiplies() -> bool:
    """Whether products of the largest values are exact."""
    integers = torch.full((70, 66), -127, dtype=torch.int8)
    integers[1::2] = 127
    weight = Weight(pack(integers), torch.ones(70), integers.sum(-1, dtype=torch.int32), None, 66)
    quantized = torch.full((8, 66), 255, dtype=torch.uint8)
    quantized[1::2] = 0
    expected = (quantized.float() - 128) @ integers.float().t()
    if not torch.equal(weight.product(quantized, 1.0, 128, torch.float32), expected):
        return False
    got = weight.product_by_token(quantized[None].float() - 127.5, True, torch.float32)[0]
    return torch.allclose(got, (quantized.float() - 127.5) @ integers.float().t(), rtol=0.01)


def _attends() -> bool:
    values = torch.arange(3 * 2 * 37 * 16, dtype=torch.float32).mul_(0.7).sin_().view(3, 1, 2, 37, 16).mul_(2)
    mask = torch.zeros(1, 1, 1, 37)
    mask[..., 30:] = -1e30
    query, key, value = values.unbind()
    got = attention(query, key, value, mask, False, 0.25)
    return torch.allclose(got, F.scaled_dot_product_attention(query, key, value, mask), rtol=0, atol=1e-2)


def _normalizes() -> bool:
    values = torch.arange(3 * 50, dtype=torch.float32).sin_().view(3, 50)
    got, _ = norm(values, values, values[0], values[1], 1e-5, 0.1, 3)
    return torch.allclose(got, F.layer_norm(2 * values, (50,), values[0], values[1], 1e-5), atol=1e-5)
