"""How far a quantized model is from its reference, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..qparams import dequantize_weight, row_chunks


def sqnr(reference: Tensor, quantized: Tensor) -> float:
    """Signal-to-quantization-noise ratio in decibels: `10 log10(sum(r^2) / sum((r - q)^2))`.

    Args:
        reference (`torch.Tensor`): the float values, any shape.
        quantized (`torch.Tensor`): the same values after quantization, the same shape.

    Returns:
        `float`: decibels; `inf` where both are equal, `nan` where either holds NaN.
    """
    noise, signal = _powers(reference, quantized)
    return decibels(signal, noise)


def weight_sqnr(weight: Tensor, quantized: Tensor, scale: Tensor) -> float:
    """SQNR of a quantized weight, found a few rows at a time.

    Args:
        weight (`torch.Tensor`): (rows, columns), float.
        quantized (`torch.Tensor`): int8, the same shape.
        scale (`torch.Tensor`): (rows, groups).
    """
    powers = [_powers(weight[rows], dequantize_weight(quantized[rows], scale[rows])) for rows in row_chunks(weight)]
    return decibels(sum(signal for _, signal in powers), sum(noise for noise, _ in powers))


def layer_sqnr(
    reference: nn.Module,
    quantized: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    names: Iterable[str],
    progress: Callable[[], None] | None = None,
) -> dict[str, float]:
    """SQNR of every named layer's output, each model running on its own activations.

    The error of a layer is therefore the one that it has in the quantized model: its own rounding plus all
    that it inherits from the layers below.

    Args:
        reference (`torch.nn.Module`): the float (or fake-quant) model, in eval mode.
        quantized (`torch.nn.Module`): the model held against it; it has modules of the same names.
        batches (iterable of `dict`): keyword arguments of `forward`, on each model's device.
        names (iterable of `str`): qualified names of modules that return a tensor (Linear, Embedding ...).
        progress (callable, *optional*): called once after each batch.

    Returns:
        `dict[str, float]`: decibels by name, over all batches; layers that never ran are absent.
    """
    names = list(names)
    signal: dict[str, float] = {}
    noise: dict[str, float] = {}
    for batch in batches:
        expected = _outputs(reference, batch, names)
        got = _outputs(quantized, batch, names)
        for name, value in expected.items():
            if name in got and got[name].shape == value.shape:
                powers = _powers(value, got[name].to(value.device))
                noise[name] = noise.get(name, 0.0) + powers[0]
                signal[name] = signal.get(name, 0.0) + powers[1]
        if progress is not None:
            progress()
    return {name: decibels(signal[name], noise[name]) for name in names if name in signal}


def output_sqnr(expected: Tensor, got: Tensor) -> float:
    """SQNR without the entries that a model masks, with infinity or with the smallest number there is."""
    masked = ~expected.isfinite() | (expected.abs() > 1e30)
    if not torch.equal(masked, ~got.isfinite() | (got.abs() > 1e30)):
        return float("nan")
    return sqnr(expected[~masked], got[~masked])


def first_output(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Logits, or whatever float tensor the model returns first after its loss."""
    # Some models draw random numbers in eval mode too (ViTMAE's masks); and a proof must not disturb later draws.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        output = model(**batch)
    if isinstance(output, Tensor):
        return output.float()
    values = output.values() if hasattr(output, "values") else output
    tensors = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    with_axes = [value for value in tensors if value.ndim > 0]
    return (with_axes or tensors)[0].float()


def _outputs(model: nn.Module, batch: Mapping[str, Any], names: Iterable[str]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # A layer that runs twice (a decoder called in a loop, shared layers) is judged by its last run.
            seen[name] = output.detach()

        return hook

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(keep(name)) for name in names if name in modules]
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _powers(reference: Tensor, quantized: Tensor) -> tuple[float, float]:
    """Sums of squares of noise and signal."""
    reference, quantized = reference.detach(), quantized.detach()
    dtype = torch.promote_types(reference.dtype, torch.float32)
    reference = reference.to(dtype)
    noise = torch.linalg.vector_norm(reference - quantized.to(dtype)).item()
    return noise**2, torch.linalg.vector_norm(reference).item() ** 2


def decibels(signal: float, noise: float) -> float:
    """`10 log10(signal / noise)` of two powers; `inf` without noise, `nan` where either is NaN."""
    if noise != noise or signal != signal:
        return float("nan")
    if noise == 0.0:
        return float("inf")
    if signal == 0.0:
        return float("-inf")
    return 10.0 * (math.log10(signal) - math.log10(noise))
