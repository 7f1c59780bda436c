"""Linear layers whose weights have fewer than eight bits, or one scale a group: packed, on disk and in memory."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..qparams import dequantize, dequantize_weight, quantize, quantize_weight, token_qparams
from ..schemes import Scheme
from . import cuda, ops
from .base import QuantizedModule, refuse_training

_WORD = 32  # bits


class PackedLinear(QuantizedModule):
    """A Linear layer with a packed weight of 2 to 8 bits.

    Buffers: `weight_packed` int32 (out_features, ceil(in_features * bits / 32)), `weight_scale`
    (out_features, groups), `weight_shape` int64 (2,), `bias` (out_features,) or absent. Their names and shapes are
    those of the compressed-tensors layout, format `pack-quantized`: element i of a row, plus 2^(bits-1), lies at bits
    `i * bits` and up.

    The product is one of floats: the weight is unpacked at each forward, so memory stays small and no time is won,
    until [`optimize`] prepares it.

    Args:
        in_features (`int`): size of the input's last dimension.
        out_features (`int`): size of the output's last dimension.
        scheme ([`Scheme`]): bits, group size, and what happens to activations (dynamic, or none).
        bias (`bool`, *optional*, defaults to `True`): whether there is a bias.
        transposed (`bool`, *optional*, defaults to `False`): whether it stands for a transformers `Conv1D`, whose
            float weight is (in, out).
        dtype (`torch.dtype`, *optional*, defaults to float32): of scales and bias.
        device (`torch.device`, *optional*): where buffers are made.
    """

    weight_packed: Tensor
    weight_shape: Tensor
    bias: Tensor | None
    tiles: Tensor | None  # instead of `weight_packed`, after `prepare_for_cuda`
    tile_scales: Tensor | None
    optimized: ops.Operands | None = None  # set by [`optimize`]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        bias: bool = True,
        transposed: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.shape = torch.Size((out_features, in_features))
        self.scheme = scheme
        self.transposed = transposed
        self._words = words = -(-in_features * scheme.bits // _WORD)
        groups = 1 if scheme.group_size is None else in_features // scheme.group_size
        self.register_buffer("weight_packed", torch.empty(out_features, words, dtype=torch.int32, device=device))
        self.register_buffer("weight_scale", torch.empty(out_features, groups, dtype=dtype, device=device))
        self.register_buffer("weight_shape", torch.empty(2, dtype=torch.int64, device=device))
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)
        self.register_buffer("tiles", None, persistent=False)
        self.register_buffer("tile_scales", None, persistent=False)

    @classmethod
    @torch.no_grad()
    def from_float(
        cls, weight: Tensor, bias: Tensor | None, scheme: Scheme, transposed: bool = False, search: bool = False
    ) -> PackedLinear:
        """Quantize a float weight.

        Args:
            weight (`torch.Tensor`): (out, in), or (in, out) if `transposed`.
            bias (`torch.Tensor`, *optional*): (out,).
            scheme ([`Scheme`]): bits, group size and activations.
            transposed (`bool`, *optional*, defaults to `False`): as for the class.
            search (`bool`, *optional*, defaults to `False`): see [`quantize_weight`].
        """
        rows = weight.detach().t() if transposed else weight.detach()
        integers, scale = quantize_weight(rows, scheme.bits, scheme.group_size, search)
        return cls.from_integers(integers, scale, bias, scheme, transposed)

    @classmethod
    @torch.no_grad()
    def from_integers(
        cls, integers: Tensor, scale: Tensor, bias: Tensor | None, scheme: Scheme, transposed: bool = False
    ) -> PackedLinear:
        """Take a weight that is quantized already.

        Args:
            integers (`torch.Tensor`): int8 (out, in), within the scheme's bits.
            scale (`torch.Tensor`): (out, groups).
            bias (`torch.Tensor`, *optional*): (out,).
            scheme ([`Scheme`]): bits, group size and activations.
            transposed (`bool`, *optional*, defaults to `False`): as for the class.
        """
        out_features, in_features = integers.shape
        module = cls(in_features, out_features, scheme, False, transposed, scale.dtype, "meta")
        module.weight_packed = pack(integers, scheme.bits)
        module.weight_scale = scale
        module.weight_shape = torch.tensor(integers.shape, dtype=torch.int64, device=integers.device)
        module.bias = None if bias is None else bias.detach().clone()
        return module

    @property
    def integers(self) -> Tensor:
        """The weight as int8 (out_features, in_features), unpacked anew at each read."""
        if self.tiles is not None:
            return cuda.from_tiles(self.tiles)
        return unpack(self.weight_packed, self.scheme.bits, self.in_features)

    @property
    def stored_bits(self) -> int:
        """Bits of one stored weight."""
        return self.scheme.bits

    @property
    def weight(self) -> Tensor:
        """The weight dequantized, in the shape of the float module's; made anew at each read."""
        if self.tiles is None and self.weight_packed.is_meta:
            shape = self.shape[::-1] if self.transposed else self.shape
            return torch.empty(shape, dtype=self.weight_scale.dtype, device="meta")
        values = dequantize_weight(self.integers, self.weight_scale)
        return values.t() if self.transposed else values

    def stored_shapes(self) -> list[tuple[str, torch.Size, torch.Size]]:
        """Name, present shape and right shape of what holds the weight."""
        words = torch.Size((self.out_features, self._words))
        written = torch.Size(self.weight_shape.tolist())
        held = words if self.tiles is not None else self.weight_packed.shape
        return [("weight_packed", held, words), ("weight_shape", written, self.shape)]

    def forward(self, input: Tensor) -> Tensor:
        """`input` (..., in_features) to (..., out_features), in `input`'s dtype; no gradient flows through.

        Raises:
            `RuntimeError`: when trained.
        """
        if self.optimized is not None:
            return ops.linear(input, *self.optimized)
        refuse_training(self, input, torch.is_grad_enabled())
        if input.numel() == 0:
            return input.new_zeros(*input.shape[:-1], self.out_features)
        with torch.no_grad():
            if self.scheme.activations == "dynamic":
                scale, zeros = token_qparams(input, self.scheme.symmetric)
                input = dequantize(quantize(input, scale, zeros), scale, zeros).to(input.dtype)
            if self.tiles is not None and input.dtype == torch.bfloat16 and cuda.is_few(input):
                return cuda.int4_linear(input, self.tiles, self.tile_scales, self.bias)
            # The operations, order and dtypes of compressed-tensors: equal to a plain reload, bit for bit.
            weight = dequantize_weight(self.integers, self.weight_scale).to(input.dtype)
            return F.linear(input, weight, None if self.bias is None else self.bias.to(input.dtype))

    def prepare_for_cuda(self) -> None:
        """Hold the weight in the layout of torch's int4 product, where that takes it and the model is in bfloat16."""
        group = self.in_features // self.weight_scale.shape[1]
        fits = cuda.fits_tiles(self.in_features, self.out_features, group, self.scheme.bits)
        if not fits or self.weight_scale.dtype != torch.bfloat16 or self.scheme.activations is not None:
            return
        if cuda.has_tiles(self.weight_scale.device):
            self.tiles, self.tile_scales = cuda.to_tiles(self.integers, self.weight_scale)
            self._buffers["weight_packed"] = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.tiles is not None:  # first, as without
            destination[f"{prefix}weight_packed"] = pack(self.integers, self.scheme.bits)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scheme={self.scheme.name!r}"
        )


def pack(integers: Tensor, bits: int) -> Tensor:
    """Integers (rows, columns) as int32 words (rows, ceil(columns * bits / 32)).

    Raises:
        `ImportError`: for 3, 5, 6 or 7 bits, where the installed compressed-tensors leaves bits of a word unused.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    require_dense_packing(bits)
    return torch.cat([pack_to_int32(rows, bits) for rows in integers.split(max(1, 2**20 // integers.shape[1]))])


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The int8 integers (rows, columns) of what [`pack`] made."""
    rows = packed.shape[0]
    if bits == 4:  # the usual one, without the general one's many temporaries
        pairs = packed.view(torch.uint8)
        nibbles = torch.stack((pairs & 15, pairs >> 4), dim=-1).view(rows, -1)[:, :columns]
        return nibbles.view(torch.int8) - 8
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    require_dense_packing(bits)
    return unpack_from_int32(packed, bits, torch.Size((rows, columns)))


@functools.cache
def _packs_densely(bits: int) -> bool:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    return bool(pack_to_int32(torch.zeros(1, _WORD, dtype=torch.int8), bits).shape[1] == bits)


def require_dense_packing(bits: int) -> None:
    """Refuse a number of bits that the installed compressed-tensors would store as more.

    Raises:
        `ImportError`: naming the version that is needed.
    """
    if not _packs_densely(bits):
        import compressed_tensors

        raise ImportError(
            f"int{bits} weights need compressed-tensors 0.20 or newer; {compressed_tensors.__version__} packs "
            f"{_WORD // bits} of them into 32 bits and is read by no later version. Upgrade it, or use 2, 4 or 8 bits."
        )
