"""The int8 modules: int8 weight, scales, nothing else."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..qparams import calculate_qparams, dequantize, quantize, quantize_weight, token_qparams
from ..schemes import Scheme
from . import cuda, kernels, ops
from .base import QuantizedModule, refuse_training


class _Int8Weight(QuantizedModule):
    """A module with an int8 buffer `weight`, which the outside sees dequantized."""

    shape: torch.Size
    optimized: ops.Operands | None = None  # set by [`optimize`], which holds the weight from then on

    @property
    def int8_weight(self) -> Tensor:
        """The stored weight: int8, (out_features, in_features) or (num_embeddings, embedding_dim)."""
        stored = self._buffers.get("weight")
        if stored is None and self.optimized is not None:
            return ops.layer(self.optimized[0]).integers
        if stored is None:
            raise AttributeError("the int8 weight is not there yet")
        return stored

    @int8_weight.setter
    def int8_weight(self, value: Tensor) -> None:
        self._buffers["weight"] = value

    @property
    def integers(self) -> Tensor:
        """The stored weight."""
        return self.int8_weight

    @property
    def stored_bits(self) -> int:
        """Bits of one stored weight."""
        return 8

    @property
    def weight(self) -> Tensor:
        """The weight dequantized, in the shape of the float module's; made anew at each read."""
        if self.optimized is not None:  # graphs may read it, and cannot read the layout that it is held in
            values = ops.weight(self.weight_scale, self.optimized[0])
            return values.t() if self.transposed else values
        stored = self.int8_weight
        if stored.is_meta:  # a shell that is being loaded into: its loader asks for the stored tensor
            return stored
        values = dequantize(stored, self.weight_scale)
        return values.t() if self.transposed else values

    def stored_shapes(self) -> list[tuple[str, torch.Size, torch.Size]]:
        """Name, present shape and right shape of what holds the weight."""
        return [("weight", self.int8_weight.shape, self.shape)]


class Int8Linear(_Int8Weight):
    """A Linear layer with an int8 weight.

    Buffers: `weight` int8 (out_features, in_features), `weight_scale` (out_features, 1), `bias` (out_features,)
    or absent; with static activations also `input_scale` (1,) and `input_zero_point` int8 (1,). Their names and
    shapes are those of the compressed-tensors layout.

    Args:
        in_features (`int`): size of the input's last dimension.
        out_features (`int`): size of the output's last dimension.
        scheme ([`Scheme`]): what happens to activations.
        bias (`bool`, *optional*, defaults to `True`): whether there is a bias.
        transposed (`bool`, *optional*, defaults to `False`): whether it stands for a transformers `Conv1D`, whose
            float weight is (in, out).
        dtype (`torch.dtype`, *optional*, defaults to float32): of scales and bias.
        device (`torch.device`, *optional*): where buffers are made.
    """

    bias: Tensor | None
    input_scale: Tensor
    input_zero_point: Tensor

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
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.empty(out_features, 1, dtype=dtype, device=device))
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)
        if scheme.activations == "static":
            self.register_buffer("input_scale", torch.empty(1, dtype=dtype, device=device))
            self.register_buffer("input_zero_point", torch.zeros(1, dtype=torch.int8, device=device))
        self._packed: _Packed | None = None
        # Of the weight, int32 (out_features,), once `prepare_for_cuda` made it.
        self.register_buffer("row_sums", None, persistent=False)
        self._reads_integers = False  # for a few rows

    @classmethod
    @torch.no_grad()
    def from_float(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        scheme: Scheme,
        input_range: tuple[Tensor, Tensor] | None = None,
        transposed: bool = False,
        search: bool = False,
    ) -> Int8Linear:
        """Quantize a float weight.

        Args:
            weight (`torch.Tensor`): (out, in), or (in, out) if `transposed`.
            bias (`torch.Tensor`, *optional*): (out,).
            scheme ([`Scheme`]): what happens to activations.
            input_range (`tuple`, *optional*): smallest and largest activation, shape (); for static schemes.
            transposed (`bool`, *optional*, defaults to `False`): as for the class.
            search (`bool`, *optional*, defaults to `False`): see [`quantize_weight`].
        """
        rows = weight.detach().t() if transposed else weight.detach()
        integers, weight_scale = quantize_weight(rows, search=search)
        return cls.from_integers(integers, weight_scale, bias, scheme, input_range, transposed)

    @classmethod
    @torch.no_grad()
    def from_integers(
        cls,
        integers: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        scheme: Scheme,
        input_range: tuple[Tensor, Tensor] | None = None,
        transposed: bool = False,
    ) -> Int8Linear:
        """Take a weight that is quantized already: int8 (out, in) and scales (out, 1); the rest as in `from_float`."""
        out_features, in_features = integers.shape
        dtype = weight_scale.dtype
        module = cls(in_features, out_features, scheme, False, transposed, dtype, "meta")
        module.int8_weight, module.weight_scale = integers, weight_scale
        module.bias = None if bias is None else bias.detach().clone()
        if scheme.activations == "static":
            if input_range is None:
                raise ValueError(f"scheme {scheme.name!r} needs the range of the inputs: pass `input_range`")
            scale, zero_point = calculate_qparams(*input_range, symmetric=False)
            module.input_scale = scale.reshape(1).to(integers.device, dtype)
            module.input_zero_point = zero_point.reshape(1).to(integers.device)
        return module

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
            if self._reads_integers and cuda.is_few(input):
                return cuda.int8_linear(input, self.int8_weight, self.weight_scale, self.bias)
            kernel = kernels.choose_kernel(input.device)
            if kernel == "int_mm" and input.is_cuda and (self.in_features % 8 or self.out_features % 8):
                kernel = "reference"
            if self.scheme.activations is None or kernel == "reference":
                return self._reference(input)
            if kernel == "onednn":
                return self._onednn(input)
            return self._int_mm(input)

    def _reference(self, input: Tensor) -> Tensor:
        # The operations, order and dtypes of compressed-tensors: equal to a plain reload, bit for bit.
        if self.scheme.activations == "static":
            scale, zero_point = self.input_scale.float(), self.input_zero_point
            input = dequantize(quantize(input, scale, zero_point), scale, zero_point).to(input.dtype)
        elif self.scheme.activations == "dynamic":
            scale, zeros = token_qparams(input, self.scheme.symmetric)
            input = dequantize(quantize(input, scale, zeros), scale, zeros).to(input.dtype)
        weight = dequantize(self.int8_weight, self.weight_scale).to(input.dtype)
        return F.linear(input, weight, None if self.bias is None else self.bias.to(input.dtype))

    def _onednn(self, input: Tensor) -> Tensor:
        packed = self._packed
        if packed is None or packed.source is not self.int8_weight:
            packed = self._packed = _Packed(self)
        out_dtype = torch.bfloat16 if input.dtype == torch.bfloat16 else torch.float32
        if self.scheme.activations == "static":
            quantized = quantize(input, self.input_scale, self.input_zero_point).reshape(-1, self.in_features)
            output = kernels.onednn_linear(
                quantized, packed.weight, packed.weight_scale, packed.bias,
                packed.input_scale, packed.input_zero_point, out_dtype,
            )  # fmt: skip
        else:
            scale, zeros = token_qparams(input, self.scheme.symmetric)
            quantized = quantize(input, scale, zeros).reshape(-1, self.in_features)
            output = kernels.onednn_linear(quantized, packed.weight, packed.weight_scale, None, 1.0, 0)
            if zeros is not None:  # (q - z) w^T = q w^T - z sum(w)
                output.addcmul_(_one_per_row(zeros, input).float(), packed.weight_sum, value=-1)
            output.mul_(_one_per_row(scale, input))
            if packed.bias is not None:
                output.add_(packed.bias)
        return output.reshape(*input.shape[:-1], self.out_features).to(input.dtype)

    def _int_mm(self, input: Tensor) -> Tensor:
        if self.scheme.activations == "static":
            scale, zero_point = self.input_scale.float(), self.input_zero_point
            quantized = quantize(input, scale, zero_point).reshape(-1, self.in_features)
            product = kernels.int_mm_linear(quantized, self.int8_weight)
            # (q - z) w^T = q w^T - z sum(w)
            product = product - self._sums() * zero_point.to(torch.int32)
        else:
            scale, zeros = token_qparams(input, self.scheme.symmetric)
            scale = _one_per_row(scale, input)
            zeros = None if zeros is None else _one_per_row(zeros, input)
            quantized = quantize(input.reshape(-1, self.in_features), scale, zeros)
            product = kernels.int_mm_linear(quantized, self.int8_weight)
            if zeros is not None:
                product = product - self._sums() * zeros.to(torch.int32)
        output = product.float().mul_(self.weight_scale.float().t()).mul_(scale)
        if self.bias is not None:
            output.add_(self.bias)
        return output.reshape(*input.shape[:-1], self.out_features).to(input.dtype)

    def _sums(self) -> Tensor:
        return self.int8_weight.sum(-1, dtype=torch.int32) if self.row_sums is None else self.row_sums

    def prepare_for_cuda(self) -> None:
        """Make what an optimized forward on CUDA reads beside the weight, which is not to change any more."""
        if self.scheme.activations is None:
            self._reads_integers = cuda.has_int8_product(self.int8_weight.device)
        elif not self.scheme.symmetric:
            self.row_sums = self._sums()

    def hand_over(self) -> None:
        """Hold the weight no more, once `optimized` names who does."""
        self.unpack()
        self._buffers["weight"] = None

    def unpack(self) -> None:
        """Drop what a kernel prepared of the weight; the next forward prepares it again."""
        self._packed = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.optimized is not None:  # first, as without
            destination[f"{prefix}weight"] = self.int8_weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()  # the weight is overwritten in place
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Int8Linear:
        self.unpack()  # a cast changes the scales, though not the weight
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # A packed weight is opaque to copy and pickle, and cheap to make again.
        return {**self.__dict__, "_packed": None}

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scheme={self.scheme.name!r}"
        )


class Int8Embedding(_Int8Weight):
    """An embedding table in int8.

    Buffers: `weight` int8 (num_embeddings, embedding_dim) and `weight_scale` (num_embeddings, 1), one scale a row.

    Args:
        num_embeddings (`int`): rows.
        embedding_dim (`int`): columns.
        padding_idx (`int`, *optional*): kept for those who ask; a lookup does not need it.
        dtype (`torch.dtype`, *optional*, defaults to float32): of scales and of what a lookup returns.
        device (`torch.device`, *optional*): where buffers are made.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.shape = torch.Size((num_embeddings, embedding_dim))
        self.padding_idx = padding_idx
        weight = torch.empty(num_embeddings, embedding_dim, dtype=torch.int8, device=device)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", torch.empty(num_embeddings, 1, dtype=dtype, device=device))

    @classmethod
    @torch.no_grad()
    def from_float(cls, weight: Tensor, padding_idx: int | None = None) -> Int8Embedding:
        """Quantize a float table (num_embeddings, embedding_dim)."""
        rows, columns = weight.shape
        module = cls(rows, columns, padding_idx, weight.dtype, "meta")
        module.int8_weight, module.weight_scale = quantize_weight(weight.detach())
        return module

    def forward(self, input: Tensor) -> Tensor:
        """`input` (...) of indices to (..., embedding_dim) in `weight_scale`'s dtype."""
        return dequantize(F.embedding(input, self.int8_weight), F.embedding(input, self.weight_scale))

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


class _Packed:
    """What oneDNN wants of one layer: a blocked weight, and numbers instead of tensors."""

    def __init__(self, module: Int8Linear) -> None:
        self.source = module.int8_weight
        self.weight = kernels.onednn_prepack(module.int8_weight)
        self.weight_scale = module.weight_scale.float().flatten()
        self.bias = None if module.bias is None else module.bias.float()
        if module.scheme.activations == "static":
            self.input_scale = float(module.input_scale)
            self.input_zero_point = int(module.input_zero_point)
        elif not module.scheme.symmetric:
            self.weight_sum = module.int8_weight.sum(-1, dtype=torch.int32).float() * self.weight_scale


def _one_per_row(scale: Tensor, input: Tensor) -> Tensor:
    """Scales of a dynamic activation as a column that fits the flattened input (tokens, in_features)."""
    return scale.expand(*input.shape[:-1], 1).reshape(-1, 1) if scale.numel() > 1 else scale.reshape(1, 1)
