"""Bias correction: quantization shifts the mean of a layer's outputs, and its bias can take that back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .masks import batch_masks, holds_only_padding, tokens
from .one_pass import After, Finished, merge_batches, one_pass


@torch.no_grad()
def correct_biases(
    float_model: nn.Module,
    quantized_model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    names: Iterable[str],
    progress: Callable[[], None] | None = None,
) -> dict[str, Tensor]:
    """Give each layer of a quantized model the mean outputs of the float model: `b += E[y] - E[y_quantized]`.

    Empirical bias correction, Nagel et al. (2019), "Data-free quantization through weight equalization and bias
    correction", section 4.2 and appendix D: one mean for each output channel, over the tokens of all batches without
    padding. The quantized model runs forward once, on all batches together, and a layer is corrected when its output
    is there, so that each layer's mean is taken on inputs from layers that are corrected already.

    Args:
        float_model (`torch.nn.Module`): the model before quantization.
        quantized_model (`torch.nn.Module`): its quantized modules get a new `bias` tensor of the same dtype; tensors
            that others hold too are never written to.
        batches (list of `dict`): keyword arguments of `forward`, on the models' device; see [`merge_batches`].
        names (iterable of `str`): qualified names of quantized Linear layers. Those without a bias are passed over:
            a plain reload has no place for one.
        progress (callable, *optional*): called once for each layer that is corrected.

    Returns:
        `dict[str, Tensor]`: what was added, (out,) in float32, by name. Absent are layers without a bias, and layers
        that never ran. A layer that runs several times is corrected by its first call.

    Raises:
        `ValueError`: if batches do not fit together or hold only padding, or the mean output of a layer is NaN or
            infinite in either model; all biases are then as they were.
    """
    names = [name for name in names if getattr(quantized_model.get_submodule(name), "bias", None) is not None]
    merged = merge_batches(batches)
    if all(holds_only_padding(batch) for batch in batches):
        raise ValueError("all calibration batches hold only padding: their attention masks are 0. Give some tokens.")
    if not names:
        return {}
    expected = _mean_outputs(float_model, batches, names)
    masks = batch_masks(merged)
    before: dict[str, Tensor] = {}
    corrections: dict[str, Tensor] = {}

    def correct(name: str, module: nn.Module, output: Tensor) -> Tensor | None:
        if name in corrections or name not in expected:
            return None
        rows = tokens(output, masks)
        if not len(rows):
            return None
        shift = expected[name] - _sum(rows) / len(rows)
        _require_finite(name, shift)
        bias: Tensor = module.bias  # type: ignore[assignment]
        before[name] = bias
        _set_bias(module, (bias.float() + shift).to(bias.dtype))
        corrections[name] = module.bias.float() - bias.float()  # type: ignore[operator]
        if progress is not None:
            progress()
        if len(corrections) == len(expected):
            raise Finished
        return output + corrections[name].to(output.dtype)

    try:
        one_pass(quantized_model, merged, expected, after=correct)
    except BaseException:
        for name, bias in before.items():
            _set_bias(quantized_model.get_submodule(name), bias)
        raise
    return corrections


def _mean_outputs(model: nn.Module, batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Tensor]:
    """The mean output of each layer's first call, float32 (out,), by name; one batch after another."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def adder(masks: list[Tensor]) -> After:
        seen: set[str] = set()

        def add(name: str, module: nn.Module, output: Tensor) -> None:
            if name not in seen:
                rows = tokens(output, masks)
                sums[name] = _sum(rows) + sums[name] if name in sums else _sum(rows)
                counts[name] = counts.get(name, 0) + len(rows)
                seen.add(name)
                if len(seen) == len(names):
                    raise Finished

        return add

    for batch in batches:
        one_pass(model, batch, names, after=adder(batch_masks(batch)))
    return {name: sums[name] / counts[name] for name in names if counts.get(name)}


def _sum(rows: Tensor) -> Tensor:
    return rows.sum(0, dtype=torch.float32)


def _set_bias(module: nn.Module, bias: Tensor) -> None:
    module.bias = bias
    if hasattr(module, "unpack"):
        module.unpack()  # type: ignore[operator]  # a kernel has prepared the old one


def _require_finite(name: str, shift: Tensor) -> None:
    bad = int((~torch.isfinite(shift)).sum())
    if bad:
        raise ValueError(
            f"the mean output of {name} is NaN or infinite in {bad} of {len(shift)} channels on the calibration data. "
            "Look for a float16 overflow or a broken checkpoint, or put the layer into `ignore`."
        )
