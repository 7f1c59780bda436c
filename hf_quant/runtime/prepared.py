"""One layer's int8 weight in the form that the kernels want it, for `hf_quant.optimize`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import choice, products, vnni
from . import kernels as int8


class PreparedLinear:
    """One layer's int8 weight, ready for the kernels that were chosen for it.

    The weight is held once, as the kernel in use wants it; a second form is made when another number of tokens asks
    for another kernel.

    Args:
        integers (`torch.Tensor`): int8 (out_features, in_features), on the CPU.
        weight_scale (`torch.Tensor`): float (out_features,) or (out_features, 1).
        bias (`torch.Tensor`, *optional*): float (out_features,).
        kernels (`Callable`, *optional*): from a number of tokens to the name of a kernel, one of
            `products.KERNELS`; asked once a bucket of tokens. By default the fastest one for this shape on this
            machine, by measurement.

    Raises:
        `ValueError`: if the weight is not int8, or the shapes do not fit each other.
    """

    def __init__(
        self,
        integers: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        kernels: Callable[[int], str] | None = None,
    ) -> None:
        if integers.dtype != torch.int8 or integers.ndim != 2:
            raise ValueError(
                f"the weight is {integers.dtype} {tuple(integers.shape)}; pass int8 (out_features, in_features)"
            )
        self.out_features, self.in_features = integers.shape
        for name, tensor in (("weight_scale", weight_scale), ("bias", bias)):
            if tensor is not None and tensor.numel() != self.out_features:
                raise ValueError(
                    f"{name} has {tensor.numel()} values; a weight of {tuple(integers.shape)} needs one a row"
                )
        self._rows = products.Rows(integers, weight_scale, bias)
        self._plain: Tensor | None = integers
        self._forms: dict[str, Any] = {}  # as [`products.prepare`] makes them
        self._choose = kernels
        self._names: dict[int, str] = {}
        self._by_token: vnni.Weight | None = None

    @property
    def row_sums(self) -> Tensor:
        """Sums of the weight's rows times their scales: float32 (out_features,), made anew at each read."""
        return self._rows.sums.float() * self._rows.scale

    @property
    def integers(self) -> Tensor:
        """The weight as int8 (out_features, in_features); unpacked anew where only the packed form is held."""
        if self._plain is not None:
            return self._plain
        if "int_mm" in self._forms:
            return self._forms["int_mm"]
        held = self._forms.get("vnni")
        if isinstance(held, vnni.Weight):
            return held.integers()
        if "onednn" in self._forms:
            return int8.onednn_unpack(self._forms["onednn"])
        return self._forms["float32"].to(torch.int8)

    def names(self) -> dict[int, str]:
        """The kernel of each bucket of tokens that was asked for so far."""
        return dict(sorted(self._names.items()))

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
        """`post((q - z) s_x (w s_w)^T + b)`, the product in integers or as exact as that.

        All kernels give the same numbers up to the rounding of float32 sums.

        Args:
            quantized (`torch.Tensor`): uint8 (..., in_features).
            scale (`float`): the activations' scale.
            zero_point (`int`): the activations' zero point, 0 to 255.
            dtype (`torch.dtype`): float32, bfloat16 or uint8; of the result.
            post (`str`, *optional*, defaults to `"none"`): `"relu"`, `"gelu"` (by erf) or `"gelu_tanh"`.
            out_scale (`float`, *optional*, defaults to 1): for uint8, which is `round(y / out_scale) + out_zero_point`
                within 0 to 255.
            out_zero_point (`int`, *optional*, defaults to 0): for uint8; 0 to 255.

        Returns:
            `torch.Tensor`: (..., out_features) in `dtype`.

        Raises:
            `ValueError`: for another `dtype` or `post`.
        """
        if dtype not in products.DTYPES:
            raise ValueError(f"dtype={dtype} is not made by a product: choose float32, bfloat16 or uint8")
        if post not in products.POSTS:
            raise ValueError(f"post={post!r} is unknown: choose one of {', '.join(products.POSTS)}")
        tokens = quantized.numel() // self.in_features
        if tokens == 0:
            return torch.empty(*quantized.shape[:-1], self.out_features, dtype=dtype)
        kernel = self._kernel(tokens)
        return products.product(
            kernel,
            quantized,
            scale,
            zero_point,
            self._form(kernel),
            self._rows,
            dtype,
            post,
            out_scale,
            out_zero_point,
        )

    def whole(self) -> vnni.Weight | None:
        """The weight for the kernels that do all that a static layer does, where they are chosen for any input."""
        if not vnni.available():
            return None
        if any(self._kernel(tokens) != "vnni" for tokens in choice.BUCKETS):
            return None
        form = self._form("vnni")
        assert isinstance(form, vnni.Weight)
        return form

    def whole_by_token(self, bias: Tensor | None) -> vnni.Weight | None:
        """The same for a dynamic layer, with its bias, in which no other kernel takes part; where there are such."""
        if self._by_token is None and vnni.available():
            form = self._form("vnni")
            assert isinstance(form, vnni.Weight)
            self._by_token = form.with_bias(bias)
        return self._by_token

    def _kernel(self, tokens: int) -> str:
        bucket = choice.bucket(tokens)
        name = self._names.get(bucket)
        if name is None:
            if self._choose is None:
                name = choice.choose(self.in_features, self.out_features, tokens)
            else:
                name = self._choose(tokens)
            if name not in products.KERNELS:
                raise ValueError(f"unknown kernel {name!r}: choose one of {', '.join(products.KERNELS)}")
            self._names[bucket] = name
        return name

    def _form(self, kernel: str) -> Tensor | vnni.Weight:
        form = self._forms.get(kernel)
        if form is None:
            integers = self.integers
            form = products.prepare(kernel, integers, self._rows)
            if form is integers and not form.untyped_storage().resizable():
                form = form.clone()  # else a whole file stays in memory for this one weight
            self._forms[kernel] = form
            self._plain = None  # held in that form, and only there
        return form
