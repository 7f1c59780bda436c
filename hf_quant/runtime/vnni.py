"""Kernels of this package's own for CPUs with AVX-512 VNNI, in C++: attention, norms, and Linear layers as a whole.

oneDNN's int8 products are as fast for many tokens, but not for a few, and end where a layer's other work begins.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu

logger = logging.getLogger(__name__)

PANEL = 64  # outputs
_FOURS = 4  # inputs
_SOURCES = ("common.h", "attention.cpp", "linear.cpp", "norm.cpp")
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}
# Arrays of arguments.
_Three, _Seven, _Eight = ctypes.c_float * 3, ctypes.c_int64 * 7, ctypes.c_int64 * 8
_Nine, _Thirty = ctypes.c_int64 * 9, ctypes.c_int64 * 30
_POSTS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3}


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
    pointer = ctypes.c_void_p
    for name, arguments, result in (
        ("hf_quant_attention", 2, ctypes.c_int),
        ("hf_quant_product", 3, None),
        ("hf_quant_product_by_token", 2, ctypes.c_int),
        ("hf_quant_norm", 2, None),
    ):
        function = getattr(library, name)
        function.argtypes, function.restype = [pointer] * arguments, result
    return library


# --- Linear layers ---------------------------------------------------------------------------------------------------


def pack(integers: Tensor) -> Tensor:
    """An int8 weight (out, in) as the kernels want it: (out / 64, in / 4, 64, 4), rounded up and filled with 0."""
    rows, columns = integers.shape
    padded = F.pad(integers, (0, -columns % _FOURS, 0, -rows % PANEL))
    return padded.view(-1, PANEL, padded.shape[1] // _FOURS, _FOURS).transpose(1, 2).contiguous()


def unpack(packed: Tensor, rows: int, columns: int) -> Tensor:
    """The int8 weight (out, in) of what [`pack`] made."""
    return packed.transpose(1, 2).reshape(-1, packed.shape[1] * _FOURS)[:rows, :columns].contiguous()


def pad(values: Tensor) -> Tensor:
    """Values of a weight's rows (out,), as many as its panels have."""
    return F.pad(values, (0, -values.numel() % PANEL))


class Weight:
    """One layer, as the kernels find it.

    Args:
        packed (`torch.Tensor`): from [`pack`].
        scale (`torch.Tensor`): float32, from [`pad`].
        sums (`torch.Tensor`): int32, from [`pad`]: of the rows of the weight.
        bias (`torch.Tensor`, *optional*): float32, from [`pad`].
        in_features (`int`): before anything was filled up.
        out_features (`int`): likewise.
    """

    def __init__(
        self,
        packed: Tensor,
        scale: Tensor,
        sums: Tensor,
        bias: Tensor | None,
        in_features: int,
        out_features: int,
    ) -> None:
        self.packed, self.in_features, self.out_features = packed, in_features, out_features
        self._kept = scale, sums, bias
        beside = [0 if each is None else each.data_ptr() for each in self._kept]
        self._numbers = (ctypes.c_int64 * 6)(packed.data_ptr(), *beside, in_features, out_features)

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
        tokens, threads = quantized.numel() // self.in_features, torch.get_num_threads()
        if self.in_features % _FOURS:
            quantized = F.pad(quantized, (0, -self.in_features % _FOURS))
        quantized = quantized.contiguous()
        output = torch.empty((*quantized.shape[:-1], self.out_features), dtype=dtype)
        numbers = _Seven(
            quantized.data_ptr(), output.data_ptr(), tokens, _KINDS[dtype], _POSTS[post], zero_point, threads
        )
        _library().hf_quant_product(self._numbers, numbers, _Three(scale, 1 / out_scale, out_zero_point))
        return output

    def product_by_token(
        self, input: Tensor, group: int, symmetric: bool, dtype: torch.dtype, post: str = "none"
    ) -> Tensor:
        """`post(x w^T + b)` with the input quantized on the way.

        Args:
            input (`torch.Tensor`): float (..., in_features), at least one token.
            group (`int`): how many successive tokens share a range.
            symmetric (`bool`): whether zero points are 0.
            dtype (`torch.dtype`): float32 or bfloat16; of the result.
            post (`str`, *optional*, defaults to `"none"`): as for [`PreparedLinear.product`].

        Raises:
            `MemoryError`: if there is none for the integers.
        """
        input = input.float().contiguous()
        output = torch.empty((*input.shape[:-1], self.out_features), dtype=dtype)
        tokens, threads = input.numel() // self.in_features, torch.get_num_threads()
        numbers = _Eight(
            input.data_ptr(), output.data_ptr(), tokens, _KINDS[dtype], _POSTS[post], group, symmetric, threads
        )
        if _library().hf_quant_product_by_token(self._numbers, numbers):
            raise MemoryError(f"no memory for the integers of {tuple(input.shape)} activations")
        return output


# --- attention -------------------------------------------------------------------------------------------------------

_LANES = 16  # values of 32 bits in a register
_WIDEST = 512  # from there on, what is left of 31 bits rounds more than bfloat16


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


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    out_scale: float | None = None,
    out_zero_point: int = 0,
) -> Tensor:
    batch, heads, queries, width = query.shape
    keys, value_width = value.shape[2:]
    query, key, value = _by_rows(query), _by_rows(key), _by_rows(value)
    output = torch.empty(
        (batch, queries, heads, value_width), dtype=torch.float32 if out_scale is None else torch.uint8
    )
    if not output.numel():
        return output.transpose(1, 2)
    mask_pointer, mask_strides = 0, (0, 0, 0)
    if mask is not None:
        mask = _by_rows(mask.expand(batch, heads, queries, keys))
        mask_pointer, mask_strides = mask.data_ptr(), mask.stride()[:3]
    row = heads * value_width
    numbers = _Thirty(
        query.data_ptr(), key.data_ptr(), value.data_ptr(), mask_pointer, output.data_ptr(),
        batch, heads, key.shape[1], queries, keys, width, value_width, causal, out_scale is not None,
        torch.get_num_threads(),
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *mask_strides, queries * row, value_width, row,
    )  # fmt: skip
    if _library().hf_quant_attention(numbers, _Three(scale, 1.0 if out_scale is None else out_scale, out_zero_point)):
        raise MemoryError(f"no memory for the attention of {keys} keys of width {width}")
    return output.transpose(1, 2)


def _by_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


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


_LIBRARY = torch.library.Library("hf_quant", "FRAGMENT")
_LIBRARY.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, float scale, "
    "float? out_scale=None, int out_zero_point=0) -> Tensor"
)
_LIBRARY.impl("attention", _attention, "CPU")
torch.library.register_fake("hf_quant::attention", _fake_attention, lib=_LIBRARY)

# softmax(s Q K^T + M) V of float32 (batch, heads, queries, width), (batch, heads or fewer, keys, width) and the same
# with the outputs' width. The mask is float32 and broadcasts. With an `out_scale`, what comes out is uint8, as from
# [`quantize_static`].
attention = torch.ops.hf_quant.attention.default


# --- norms -----------------------------------------------------------------------------------------------------------


def _norm(
    first: Tensor,
    second: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    epsilon: float,
    out_scale: float | None,
    out_zero_point: int,
) -> tuple[Tensor, Tensor]:
    first = first.contiguous()
    second = None if second is None else second.contiguous()
    output = torch.empty_like(first)
    rounded = torch.empty(0 if out_scale is None else first.shape, dtype=torch.uint8)
    width = first.shape[-1]
    numbers = _Nine(
        first.data_ptr(),
        0 if second is None else second.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        output.data_ptr(),
        0 if out_scale is None else rounded.data_ptr(),
        width,
        first.numel() // width,
        torch.get_num_threads(),
    )
    _library().hf_quant_norm(numbers, _Three(epsilon, 1.0 if out_scale is None else 1 / out_scale, out_zero_point))
    return output, rounded


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


_LIBRARY.define(
    "norm(Tensor first, Tensor? second, Tensor? weight, Tensor? bias, float epsilon, float? out_scale, "
    "int out_zero_point) -> (Tensor, Tensor)"
)
_LIBRARY.impl("norm", _norm, "CPU")
torch.library.register_fake("hf_quant::norm", _fake_norm, lib=_LIBRARY)

# Layer normalization over the last dimension of one float32 tensor or the sum of two alike; and, with an `out_scale`,
# the same as uint8, as from [`quantize_static`].
norm = torch.ops.hf_quant.norm.default


# --- whether they are right ------------------------------------------------------------------------------------------


def _multiplies() -> bool:
    """Whether products of the largest values are exact."""
    integers = torch.full((70, 66), -127, dtype=torch.int8)
    integers[1::2] = 127
    sums = integers.sum(-1, dtype=torch.int32)
    weight = Weight(pack(integers), pad(torch.ones(70)), pad(sums), None, 66, 70)
    quantized = torch.full((8, 66), 255, dtype=torch.uint8)
    quantized[1::2] = 0
    expected = (quantized.float() - 128) @ integers.float().t()
    if not torch.equal(weight.product(quantized, 1.0, 128, torch.float32), expected):
        return False
    got = weight.product_by_token(quantized.float() - 127.5, 1, True, torch.float32)
    return torch.allclose(got, (quantized.float() - 127.5) @ integers.float().t(), rtol=0.01)


def _attends() -> bool:
    values = torch.arange(3 * 2 * 37 * 16, dtype=torch.float32).mul_(0.7).sin_().view(3, 1, 2, 37, 16).mul_(2)
    mask = torch.zeros(1, 1, 1, 37)
    mask[..., 30:] = -1e30
    query, key, value = values.unbind()
    got = _attention(query, key, value, mask, False, 0.25)
    return torch.allclose(got, F.scaled_dot_product_attention(query, key, value, mask), rtol=0, atol=1e-2)


def _normalizes() -> bool:
    values = torch.arange(3 * 50, dtype=torch.float32).sin_().view(3, 50)
    got, _ = _norm(values, values, values[0], values[1], 1e-5, 0.1, 3)
    return torch.allclose(got, F.layer_norm(2 * values, (50,), values[0], values[1], 1e-5), atol=1e-5)
