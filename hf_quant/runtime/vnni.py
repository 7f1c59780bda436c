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
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu
from .vnni_ops import KINDS, POSTS, WEIGHTS, attention, norm, product, product_by_token

logger = logging.getLogger(__name__)

_PANEL, _FOURS, _LANES = 64, 4, 16  # outputs, inputs, and values of 32 bits in a register
_MAPPED, _LARGE_PAGE = 2**20, 2**21  # bytes: of a weight in memory of its own, and of a large page
_WIDEST = 512  # of an attention's head: from there on, what is left of 31 bits rounds more than bfloat16
_SOURCES = ("common.h", "attention.cpp", "norm.cpp", "linear.cpp", "encoder.cpp", "ops.cpp")

_numbers = itertools.count()


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
    library.hf_quant_keep.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    for function in (library.hf_quant_register, library.hf_quant_forget, library.hf_quant_keep):
        function.restype = None
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
        WEIGHTS[self.number] = self
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


@contextlib.contextmanager
def skipping_padding(lengths: Sequence[int], length: int) -> Iterator[None]:
    """In here, operations called by this thread leave out the padding of one batch.

    Of inputs of (sentences, length, width), and in attention of (sentences, heads, length, width), only the first
    tokens of each sentence are computed and attended to. Where there is padding, float outputs are 0, and uint8 ones
    anything.

    Args:
        lengths (sequence of `int`): tokens of each sentence, from 1 to `length`.
        length (`int`): of the batch.
    """
    _library().hf_quant_keep(len(lengths), length, (ctypes.c_int64 * len(lengths))(*lengths))
    try:
        yield
    finally:
        _library().hf_quant_keep(0, 0, None)


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
