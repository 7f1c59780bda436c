"""Large float Linear layers, such as a language model's head, read at half of their bytes for a few tokens."""

from __future__ import annotations

import functools
import itertools
import weakref
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What is smaller stays in the caches from one token to the next.
LEAST_WEIGHTS = 2**20
# Rows of the input up to which reading the weight costs more than multiplying. bfloat16 reads no fewer bytes, and
# wins as soon as there is something to multiply.
_ROWS = {torch.float32: 32, torch.bfloat16: 8}

_numbers = itertools.count()
_HALVES: weakref.WeakValueDictionary[int, _Half] = weakref.WeakValueDictionary()


class HalfLinear(nn.Linear):
    """A float Linear layer that multiplies a few tokens by a float16 copy of its weight, and more by the weight.

    Sums are float32, so that only the weight is rounded, to 11 bits: one in a bfloat16 model not at all. The copy is
    made at the first call that wants it.
    """

    half_copy: _Half

    def forward(self, input: Tensor) -> Tensor:
        """Like `nn.Linear`."""
        return half_linear(input, self.weight, self.bias, self.half_copy.number)


def halve(model: nn.Module) -> list[str]:
    """Makes the large float Linear layers of a model on the CPU into [`HalfLinear`], in place.

    Parameters stay as they are, tied or not. Layers whose weight float16 cannot hold are left, and where torch has no
    such product, all are.

    Returns:
        `list[str]`: the names of the layers.
    """
    if not available():
        return []
    found = []
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module.weight.numel() >= LEAST_WEIGHTS and _fits(module.weight):
            module.__class__ = HalfLinear
            cast(HalfLinear, module).half_copy = _Half()
            found.append(name)
    return found


@functools.cache
def available() -> bool:
    """Whether torch has products of float32 and float16 here, with sums in float32."""
    x, weight = torch.eye(8, 64) * (1 + 2.0**-20), torch.arange(32 * 64.0).view(32, 64)
    try:
        return torch.equal(multiply(x, pack(weight, None)), x @ weight.t())
    except (RuntimeError, NotImplementedError, AttributeError):
        return False


def pack(weight: Tensor, bias: Tensor | None) -> torch.ScriptObject:
    """A float weight (out_features, in_features) in float16, and a float bias, as [`multiply`] takes them."""
    bias = None if bias is None else bias.detach().float()
    return torch.ops.quantized.linear_prepack_fp16(weight.detach().float(), bias)


def multiply(input: Tensor, packed: torch.ScriptObject) -> Tensor:
    """`input w^T + b` in float32, of a float32 input (..., in_features)."""
    return torch.ops.quantized.linear_dynamic_fp16(input.contiguous(), packed)


class _Half:
    """The float16 copy of one layer."""

    def __init__(self) -> None:
        self.packed: torch.ScriptObject | None = None
        self.number = next(_numbers)
        _HALVES[self.number] = self


def _fits(weight: Tensor) -> bool:
    return weight.dtype in _ROWS and bool(weight.detach().abs().amax() <= torch.finfo(torch.float16).max)


def _half_linear(input: Tensor, weight: Tensor, bias: Tensor | None, half: int) -> Tensor:
    rows = input.numel() // input.shape[-1]
    if not 0 < rows <= _ROWS.get(input.dtype, 0):
        return F.linear(input, weight, bias)
    here = _HALVES[half]
    if here.packed is None:
        here.packed = pack(weight, bias)
    return multiply(input.float(), here.packed).to(input.dtype)


def _fake_half_linear(input: Tensor, weight: Tensor, *_: object) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


_LIBRARY = torch.library.Library("hf_quant", "FRAGMENT")
_LIBRARY.define("half_linear(Tensor input, Tensor weight, Tensor? bias, int half) -> Tensor")
_LIBRARY.impl("half_linear", _half_linear, "CPU")
torch.library.register_fake("hf_quant::half_linear", _fake_half_linear, lib=_LIBRARY)
half_linear = torch.ops.hf_quant.half_linear.default
