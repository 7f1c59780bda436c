"""SmoothQuant with its exponent chosen group by group, by the error that is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..qparams import calculate_qparams, dequantize, dequantize_weight, quantize, quantize_weight, token_qparams
from ..schemes import Scheme
from .equalization import apply_scales, by_channel, factors_of, rows_of, shared_groups, sound, watch_inputs

_SAMPLED = 256  # tokens of a group


@torch.no_grad()
def smooth(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], schemes: Mapping[str, Scheme], grid: int = 11
) -> dict[str, Tensor]:
    """Move the spread of activation channels into the weights that read them, as far as it helps each group.

    For each group the scales `s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)` (Xiao et al., 2023, "SmoothQuant", eq. 4)
    are tried for `grid` values of alpha from 0 to 1, and none at all. What counts is the squared error of the layers'
    outputs on 256 tokens, with weights and activations quantized. Behind a norm all tokens are of one size. Elsewhere
    (up to down projection, values to attention output) each counts relative to its own output: otherwise the few with
    giant activations, such as a language model's first one, would choose for all others.

    Args:
        model (`torch.nn.Module`): the float model; changed, and kept from changes of its function, as in [`equalize`].
        batches (list of `dict`): keyword arguments of its forward; padding is not counted.
        schemes (`dict[str, Scheme]`): of the Linear-like modules that will be quantized, by name; no other one's
            columns change.
        grid (`int`, *optional*, defaults to 11): how many alphas are tried.

    Returns:
        `dict[str, torch.Tensor]`: scales (channels,), float32, by the name of the source; groups that are served best
        as they are, are absent.

    Raises:
        `ValueError`: if `grid` is below 2, or there is no batch.
    """
    if grid < 2:
        raise ValueError(f"grid is {grid}, but alpha goes from 0 to 1 in at least 2 steps. 11 is usual.")
    groups = shared_groups(model, batches, list(schemes))
    share = -(-_SAMPLED // len(batches))

    def sample(rows: Tensor) -> Tensor:
        # Some rows, and below them the largest value of each channel over all rows.
        chosen = torch.linspace(0, rows.shape[0] - 1, min(share, rows.shape[0]), device=rows.device)
        return torch.cat([rows[chosen.round().long()], rows.abs().amax(0, keepdim=True)]).float()

    seen = watch_inputs(model, batches, groups, sample)
    plan: dict[Any, Tensor] = {}
    for group in groups:
        if not all(seen[name] for name in group.consumers):
            continue  # padding was all that it saw
        layers = [model.get_submodule(name) for name in group.consumers]
        most = by_channel(model, group, [rows_of(layer).abs().amax(0).float() for layer in layers], "amax")
        largest = [torch.stack([part[-1] for part in seen[name]]).amax(0) for name in group.consumers]
        inputs = by_channel(model, group, largest, "amax")
        rows = [torch.cat([part[:-1] for part in seen[name]])[:_SAMPLED] for name in group.consumers]
        exact = [values @ rows_of(layer).float().T for layer, values in zip(layers, rows, strict=True)]
        best, least = None, torch.inf
        for step in range(-1, grid):
            alpha = step / (grid - 1)
            scales = sound(inputs**alpha / most ** (1 - alpha), inputs * most) if step >= 0 else torch.ones_like(most)
            error = sum(
                _error(
                    rows_of(layer), factors_of(scales, columns), values, target, schemes[name], group.kind == "linear"
                )
                for name, layer, columns, values, target in zip(
                    group.consumers, layers, group.columns, rows, exact, strict=True
                )
            )
            if error < least:
                best, least = (scales if step >= 0 else None), error
        if best is not None:
            plan[group] = best
    return apply_scales(model, batches[0], plan)


def _error(weight: Tensor, factors: Tensor, rows: Tensor, exact: Tensor, scheme: Scheme, relative: bool) -> float:
    """Sum over tokens of the output's squared error, divided by the output's square if `relative`."""
    scaled = dequantize_weight(*quantize_weight(weight.float() * factors, scheme.bits, scheme.group_size))
    inputs = _as_quantized(rows / factors, scheme)
    errors = (inputs @ scaled.T - exact).square().sum(-1)
    return float((errors / exact.square().sum(-1).clamp(min=1e-30) if relative else errors).sum())


def _as_quantized(rows: Tensor, scheme: Scheme) -> Tensor:
    """Tokens (n, features) as the scheme's integers would have them."""
    if scheme.activations is None:
        return rows
    if scheme.activations == "static":
        scale, zeros = calculate_qparams(rows.min(), rows.max(), symmetric=False)
        return dequantize(quantize(rows, scale, zeros), scale, zeros)
    tokens = rows.unsqueeze(0)  # (batch, length, features): one range a token
    found, found_zeros = token_qparams(tokens, scheme.symmetric)
    return dequantize(quantize(tokens, found, found_zeros), found, found_zeros).squeeze(0)
