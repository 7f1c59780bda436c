"""Products of float activations and an integer weight on CUDA, in operations that a compiler sees through.

For a few rows, reading the weight is what takes the time: int4 goes through torch's own kernel, which wants a layout
of its own; int8 through a Triton kernel, because torch's for CUDA takes many times as long as a bfloat16 product. For
more rows the layers dequantize and multiply floats.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton_package

from ..qparams import dequantize_weight

logger = logging.getLogger(__name__)

# Rows of an input up to which a product with the integers themselves is faster than one with a dequantized copy.
FEW_ROWS = 16
_GROUPS = (256, 128, 64, 32)  # that torch's int4 product knows, the largest first
_TILES = (8, 4, 2)  # of 16 inputs, that lie side by side in its layout, the most first
# Of one program of the int8 product, and of one of its steps; and how many programs keep a GPU busy.
_OUTPUTS, _INPUTS, _PROGRAMS = 32, 256, 256

if has_triton_package():
    triton, tl = importlib.import_module("triton"), importlib.import_module("triton.language")

    @triton.jit
    def _partial_products(  # type: ignore[no-untyped-def]
        x_ptr, weight_ptr, parts_ptr, rows, outputs, inputs,
        SPAN: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,  # type: ignore[name-defined]
    ):  # fmt: skip
        # x (rows, inputs) times integers (outputs, inputs), over a span of the inputs: parts (spans, rows, outputs).
        row = tl.arange(0, ROWS)
        output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        first = tl.program_id(1) * SPAN
        total = tl.zeros((ROWS, OUTPUTS), tl.float32)
        for start in range(0, SPAN, INPUTS):
            input = first + start + tl.arange(0, INPUTS)
            x_mask = (row[:, None] < rows) & (input[None, :] < inputs)
            x = tl.load(x_ptr + row[:, None] * inputs + input[None, :], mask=x_mask, other=0.0)
            weight_mask = (output[None, :] < outputs) & (input[:, None] < inputs)
            weight = tl.load(weight_ptr + output[None, :] * inputs + input[:, None], mask=weight_mask, other=0)
            total = tl.dot(x, weight.to(x.dtype), total)
        place = (tl.program_id(1) * rows + row[:, None]) * outputs + output[None, :]
        tl.store(parts_ptr + place, total, mask=(row[:, None] < rows) & (output[None, :] < outputs))


def fits_tiles(in_features: int, out_features: int, group: int, bits: int) -> bool:
    """Whether torch's int4 product takes a weight of that shape, with that many inputs to a scale."""
    return bits == 4 and group % _GROUPS[-1] == 0 and in_features % (16 * _TILES[-1]) == 0 and out_features % 8 == 0


@functools.cache
def has_tiles(device: torch.device) -> bool:
    """Whether torch's int4 product runs on that device, is right, and keeps the layout that [`from_tiles`] reads."""
    most = 2**3
    integers = (torch.arange(16 * 256, dtype=torch.int32, device=device) * 7 % (2 * most) - most).to(torch.int8)
    integers = integers.view(16, 256)
    x = (torch.arange(5 * 256, device=device).view(5, 256) % 7 - 3).to(torch.bfloat16)
    scale = torch.full((16, 8), 2.0**-6, device=device, dtype=torch.bfloat16)
    try:
        tiles, scales = to_tiles(integers, scale)
        got = int4_linear(x, tiles, scales, None)
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    expected = x.float() @ dequantize_weight(integers, scale.float()).t()
    same = torch.equal(from_tiles(tiles), integers)
    return same and torch.allclose(got.float(), expected, rtol=2**-7, atol=2**-7)


def to_tiles(integers: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The form that torch's int4 product on CUDA wants.

    Args:
        integers (`torch.Tensor`): int8 (out, in), -8 to 7, of a shape that [`fits_tiles`].
        scale (`torch.Tensor`): float (out, groups).

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: int32 (out / 8, in / (16 t), 32, t / 2), where t tiles of 16 inputs lie
        side by side, and bfloat16 (known groups, out, 2): scales, and what is added to them, which is 0.
    """
    columns = integers.shape[1]
    group = columns // scale.shape[1]
    known = next(size for size in _GROUPS if group % size == 0)
    tiles = next(count for count in _TILES if columns % (16 * count) == 0)
    unsigned = (integers + 8).to(torch.uint8)
    pairs = unsigned[:, ::2] << 4 | unsigned[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), tiles)
    scales = scale.repeat_interleave(group // known, dim=1).t()
    beside = torch.stack((scales, torch.zeros_like(scales)), dim=-1).to(torch.bfloat16).contiguous()
    return packed, beside


def from_tiles(tiles: Tensor) -> Tensor:
    """The int8 integers (out, in) of what [`to_tiles`] made.

    A word holds 8 inputs of one output, 4 bits each; from the lowest: which half of a tile, which of two, and whether
    the input is odd. Its lane says which of 8 outputs, and which of 4 pairs of inputs.
    """
    blocks, steps, _, words = tiles.shape
    values = tiles.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32, device=tiles.device) & 15
    values = values.view(blocks, steps, 8, 4, words, 2, 2, 2)  # block, step, output, pair, word, odd, tile, half
    return values.permute(0, 2, 1, 4, 6, 7, 3, 5).reshape(blocks * 8, -1).to(torch.int8) - 8


def is_few(input: Tensor) -> bool:
    """Whether an input (..., in) has at most `FEW_ROWS` rows, of a dtype that the products here take."""
    return input.dtype in (torch.bfloat16, torch.float16) and input.numel() <= FEW_ROWS * input.shape[-1]


def int4_linear(input: Tensor, tiles: Tensor, scales: Tensor | None, bias: Tensor | None) -> Tensor:
    """`x (w s)^T + b` of what [`to_tiles`] made, for bfloat16 `input` (..., in): (..., out) in bfloat16."""
    assert scales is not None
    x = input.reshape(-1, input.shape[-1]).contiguous()  # which the first tokens of a batch are not
    output = torch.ops.aten._weight_int4pack_mm(x, tiles, x.shape[1] // scales.shape[0], scales)
    output = output.view(*input.shape[:-1], -1)
    return output if bias is None else output + bias


def int8_linear(input: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`x (w s)^T + b` for a few rows, which reads the integers once.

    Args:
        input (`torch.Tensor`): (..., in), at most `FEW_ROWS` rows of bfloat16 or float16.
        weight (`torch.Tensor`): int8 (out, in).
        scale (`torch.Tensor`): float (out, 1).
        bias (`torch.Tensor`, *optional*): (out,).

    Returns:
        `torch.Tensor`: (..., out) in `input`'s dtype.
    """
    x = input.reshape(-1, input.shape[-1]).contiguous()
    outputs, inputs = weight.shape
    blocks = -(-outputs // _OUTPUTS)
    # A row is cut into spans where there are too few outputs to keep a GPU busy.
    span = -(-inputs * blocks // (_PROGRAMS * _INPUTS)) * _INPUTS
    spans = -(-inputs // span)
    parts = x.new_empty(spans, x.shape[0], outputs, dtype=torch.float32)
    _partial_products[(blocks, spans)](
        x, weight, parts, x.shape[0], outputs, inputs, span, FEW_ROWS, _OUTPUTS, _INPUTS, num_warps=4, num_stages=4
    )
    output = parts.sum(0) * scale.flatten()
    if bias is not None:
        output = output + bias
    return output.to(input.dtype).view(*input.shape[:-1], outputs)


@functools.cache
def has_int8_product(device: torch.device) -> bool:
    """Whether [`int8_linear`] runs on that device and is right."""
    if device.type != "cuda" or not has_triton_package():
        return False
    weight = (torch.arange(40 * 600, device=device) * 7 % 255 - 127).to(torch.int8).view(40, 600)
    x = (torch.arange(3 * 600, device=device).view(3, 600) % 7 - 3).to(torch.bfloat16)
    scale = torch.full((40, 1), 2.0**-6, device=device)
    try:
        error = (int8_linear(x, weight, scale, None).float() - x.float() @ (weight * scale).t()).abs().max()
        reason = "" if error < 0.25 else f"a result is off by {float(error):.3g}"  # bfloat16's last digit there
    except Exception as failure:  # of the compiler, whatever is missing
        reason = str(failure)
    if reason:
        logger.warning("int8 weights are dequantized for each product, as Triton's does not work here: %s", reason)
    return not reason


def hold_still(cache: Any) -> bool:
    """Whether a cache stays where it is, as a recorded graph needs; its tensors are marked as such."""
    from transformers.cache_utils import StaticLayer

    layers = getattr(cache, "layers", None)
    if not layers or not all(isinstance(layer, StaticLayer) and layer.is_initialized for layer in layers):
        return False
    for layer in layers:
        for value in vars(layer).values():
            if isinstance(value, Tensor) and not hasattr(value, "_dynamo_static_input_type"):
                torch._dynamo.mark_static_address(value)
    return True
