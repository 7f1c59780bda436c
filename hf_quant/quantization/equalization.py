"""Scales per channel, moved from a layer into those that read it: the same function, easier to quantize."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..qparams import dequantize_weight, quantize_weight
from .channels import UNSCALED
from .graph import ScalingGroup, channels_of, evaluating, find_scaling_groups, tensors_of
from .masks import batch_masks, tokens
from .sensitivity import sqnr

logger = logging.getLogger(__name__)

_TRACED = 4  # batches in which a group must show, so that a branch that some of them take is seen
_COMPARED = 2**20  # values of each output
_LIMIT = 2.0**10  # scales beyond this, or below its inverse, serve nothing and cost half precision its digits
_SAMPLED = 256  # tokens of a group: enough to choose one exponent


def equalize(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], names: Collection[str], alpha: float = 0.5
) -> dict[str, Tensor]:
    """Move the spread of activation channels into the weights that read them, after SmoothQuant.

    `s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)` (Xiao et al., 2023, "SmoothQuant", eq. 4), with the maxima of W over
    all layers that read channel j; the source's channels are divided by s, the columns of W multiplied by it (eq. 3).
    An activation with a few large channels then loses less where all of them share one range or one scale per token.

    Args:
        model (`torch.nn.Module`): the float model, changed in place: layers that take part get new Parameters, whose
            old ones keep their values. Its outputs on the first batch stay the same, or the groups of layers that
            change them are put back and named in a warning.
        batches (list of `dict`): keyword arguments of its forward; padding is not counted.
        names (collection of `str`): the Linear-like modules that will be quantized; no other one's columns change.
        alpha (`float`, *optional*, defaults to 0.5): 0 flattens the weights only, 1 the activations only.

    Returns:
        `dict[str, torch.Tensor]`: for each group that was found and applied, by the name of its source, the scales
        (channels,), float32. Empty where the model has none.

    Raises:
        `ValueError`: if `alpha` lies outside of 0 to 1, or there is no batch.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}, but it shares out between 0 (weights) and 1 (activations). Try 0.5.")
    groups = shared_groups(model, batches, names)
    seen = watch_inputs(model, batches, groups, lambda rows: rows.abs().amax(0).float())
    plan = {}
    for group in groups:
        if not all(seen[name] for name in group.consumers):
            continue  # padding was all that it saw
        layers = [model.get_submodule(name) for name in group.consumers]
        weights = by_channel(model, group, [rows_of(layer).abs().amax(0).float() for layer in layers], "amax")
        inputs = by_channel(model, group, [torch.stack(seen[name]).amax(0) for name in group.consumers], "amax")
        plan[group] = sound(inputs**alpha / weights ** (1 - alpha), inputs * weights)
    return apply_scales(model, batches[0], plan)


def awq_scale(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    names: Collection[str],
    bits: int,
    group_size: int | None,
    grid: int = 20,
) -> dict[str, Tensor]:
    """Give weights that read large activations finer steps, after AWQ.

    `s_j = mean|X_j|^a`, divided by the geometric mean of the largest and the smallest, with the a in [0, 1) that has
    the least `sum ||(Q(W diag(s)) diag(s)^-1 - W) X||^2` over the layers that read the channels (Lin et al., 2023,
    "AWQ", eq. 4 and 5) on 256 tokens. a = 0 is among the candidates: no group is worse off, by that measure.

    Args:
        model (`torch.nn.Module`): the float model; changed, and kept from changes of its function, as in [`equalize`].
        batches (list of `dict`): keyword arguments of its forward; padding is not counted.
        names (collection of `str`): the Linear-like modules that will be quantized; no other one's columns change.
        bits (`int`): of the weights, 2 to 8.
        group_size (`int` or `None`): input features that share a scale; `None`: all of them.
        grid (`int`, *optional*, defaults to 20): how many a are tried.

    Returns:
        `dict[str, torch.Tensor]`: scales (channels,), float32, by the name of the source; groups that rounding serves
        best as they are, are absent.

    Raises:
        `ValueError`: if `grid` is below 1, there is no batch, or `group_size` does not divide a layer's inputs.
    """
    if grid < 1:
        raise ValueError(f"grid is {grid}, but at least one candidate must be tried. 20 is usual.")
    groups = shared_groups(model, batches, names)
    for name in (name for group in groups for name in group.consumers):
        width = rows_of(model.get_submodule(name)).shape[1]
        if group_size is not None and width % group_size:
            raise ValueError(
                f"{name} has {width} inputs, which groups of {group_size} do not divide. Leave it out of `names`, "
                "or choose another group size."
            )
    share = -(-_SAMPLED // len(batches))

    def sample(rows: Tensor) -> Tensor:
        chosen = torch.linspace(0, rows.shape[0] - 1, min(share, rows.shape[0]), device=rows.device)
        return rows[chosen.round().long()]

    seen = watch_inputs(model, batches, groups, sample)
    plan = {}
    for group in groups:
        if not all(seen[name] for name in group.consumers):
            continue  # padding was all that it saw
        inputs = [torch.cat(seen[name])[:_SAMPLED].float() for name in group.consumers]
        size = by_channel(model, group, [rows.abs().mean(0) for rows in inputs], "mean")
        layers = [model.get_submodule(name) for name in group.consumers]
        best, least = None, torch.inf
        for step in range(grid):
            scales = size ** (step / grid)
            alive = scales[size > 0]
            scales = sound(scales / (alive.max() * alive.min()).sqrt() if len(alive) else scales, size)
            error = sum(
                _rounding_error(rows_of(layer), factors_of(scales, columns), rows, bits, group_size)
                for layer, columns, rows in zip(layers, group.columns, inputs, strict=True)
            )
            if error < least:
                best, least = (scales if step else None), error
        if best is not None:
            plan[group] = best
    return apply_scales(model, batches[0], plan)


def scale_group(model: nn.Module, group: ScalingGroup, scales: Tensor) -> None:
    """Divide the output channels of a group's source by scales, and multiply the columns that read them.

    Args:
        model (`torch.nn.Module`): changed in place; the weights and biases that change are new Parameters, so that a
            model that shares the old ones keeps its values.
        group ([`ScalingGroup`]): one of [`find_scaling_groups`].
        scales (`torch.Tensor`): (channels of the source,), positive; those of channels that no consumer names are
            taken as 1.

    Raises:
        `ValueError`: if there is not one positive, finite scale for each channel.
    """
    source = model.get_submodule(group.source)
    if scales.shape != (channels_of(source),) or not bool(((scales > 0) & torch.isfinite(scales)).all()):
        raise ValueError(
            f"{group.source} has {channels_of(source)} channels and needs a positive, finite scale for each, but got "
            f"a tensor of shape {tuple(scales.shape)}"
            + (f" from {scales.min().item():g} to {scales.max().item():g}." if scales.numel() else ".")
        )
    scales = scales.float()
    named = torch.zeros_like(scales, dtype=torch.bool)
    for columns in group.columns:
        index = torch.tensor(columns, device=scales.device)
        named[index[index != UNSCALED]] = True
    scales = torch.where(named, scales, 1.0)
    along = scales if isinstance(source, Conv1D) or group.kind == "norm" else scales.unsqueeze(1)
    _replace(source, "weight", lambda weight: (weight + group.offset) / along.to(weight.device) - group.offset)
    if source._parameters.get("bias") is not None:
        _replace(source, "bias", lambda bias: bias / scales.to(bias.device))
    for name, columns in zip(group.consumers, group.columns, strict=True):
        consumer = model.get_submodule(name)
        factors = factors_of(scales, columns)
        _multiply(consumer, factors.unsqueeze(1) if isinstance(consumer, Conv1D) else factors)


def rows_of(module: nn.Module) -> Tensor:
    """The weight of a Linear-like module as (outputs, inputs), detached."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()


def _replace(module: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> None:
    old = module._parameters[name]
    assert old is not None
    new = change(old.detach().to(torch.promote_types(old.dtype, torch.float32))).to(old.dtype)
    module._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)


def _multiply(module: nn.Module, factors: Tensor) -> None:
    _replace(module, "weight", lambda weight: weight * factors.to(weight.device))


def factors_of(scales: Tensor, columns: Sequence[int]) -> Tensor:
    """What the columns of a consumer are multiplied by: (inputs,)."""
    index = torch.tensor(columns, device=scales.device)
    return torch.where(index == UNSCALED, 1.0, scales[index.clamp(min=0)])


def by_channel(model: nn.Module, group: ScalingGroup, values: Sequence[Tensor], reduce: str) -> Tensor:
    """Values of each consumer's columns, reduced to one for each channel of the source; 0 where no column names it."""
    index = torch.tensor([column for columns in group.columns for column in columns], device=values[0].device)
    found = torch.zeros(channels_of(model.get_submodule(group.source)), device=index.device)
    kept = index != UNSCALED
    return found.scatter_reduce(0, index[kept], torch.cat(list(values))[kept], reduce, include_self=False)


def sound(scales: Tensor, alive: Tensor) -> Tensor:
    """The scales within limits, and 1 for channels in which nothing or NaN runs."""
    fine = (alive > 0) & torch.isfinite(alive) & torch.isfinite(scales)
    return torch.where(fine, scales.clamp(1 / _LIMIT, _LIMIT), 1.0)


def _rounding_error(weight: Tensor, factors: Tensor, rows: Tensor, bits: int, group_size: int | None) -> float:
    """`||(Q(W diag(s)) diag(s)^-1 - W) X||^2` for rows X (tokens, inputs)."""
    weight = weight.float()
    rounded = dequantize_weight(*quantize_weight(weight * factors, bits, group_size))
    return (rows @ (rounded.div_(factors).sub_(weight)).T).square().sum().item()


def shared_groups(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], names: Collection[str]
) -> list[ScalingGroup]:
    """The groups that are the same in each of the first batches."""
    if not batches:
        raise ValueError("there is no batch to observe activations with. Pass at least one.")
    groups = find_scaling_groups(model, batches[0], names)
    for batch in batches[1:_TRACED] if groups else ():
        again = set(find_scaling_groups(model, batch, names))
        groups = [group for group in groups if group in again]
    return groups


def watch_inputs(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    groups: Sequence[ScalingGroup],
    reduce: Callable[[Tensor], Tensor],
) -> dict[str, list[Tensor]]:
    """Run the batches, and keep by consumer what `reduce` makes of its input's rows, without those of padding."""
    seen: dict[str, list[Tensor]] = {name: [] for group in groups for name in group.consumers}
    masks: list[Tensor] = []
    last: list[Tensor] = []  # an input and what became of it: the layers of a group mostly read one tensor

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            values = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            if not last or last[0] is not values:
                rows = tokens(values, masks)
                last[:] = [values, reduce(rows)] if rows.numel() else [values]
            seen[name].extend(last[1:])

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name), with_kwargs=True) for name in seen]
    try:
        with evaluating(model):
            for batch in batches if groups else ():
                masks[:] = batch_masks(batch)
                model(**batch)
                last.clear()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def apply_scales(model: nn.Module, batch: Mapping[str, Any], plan: Mapping[ScalingGroup, Tensor]) -> dict[str, Tensor]:
    """Scale the groups; put back those that change the model's outputs."""
    if not plan:
        return {}
    expected = _outputs(model, batch)
    touched = {name: model.get_submodule(name) for group in plan for name in (group.source, *group.consumers)}
    before = {name: dict(module._parameters) for name, module in touched.items()}
    # Half of the coarsest dtype's digits: 69 dB in float32. Rounding leaves far more, a changed function far less.
    weights = [parameter for module in touched.values() for parameter in module.parameters(recurse=False)]
    least = -10 * math.log10(max(torch.finfo(weight.dtype).eps for weight in weights))
    for group, scales in plan.items():
        scale_group(model, group, scales)
    if _unchanged(expected, _outputs(model, batch), least):
        return {group.source: scales for group, scales in plan.items()}
    for name, module in touched.items():
        module._parameters.update(before[name])
    done: dict[str, Tensor] = {}
    undone: list[str] = []
    for group, scales in plan.items():
        modules = [touched[name] for name in (group.source, *group.consumers)]
        own = [dict(module._parameters) for module in modules]
        scale_group(model, group, scales)
        if _unchanged(expected, _outputs(model, batch), least):
            done[group.source] = scales
            continue
        undone.append(group.source)
        for module, parameters in zip(modules, own, strict=True):
            module._parameters.update(parameters)
    logger.warning(
        "%s changed the outputs of %s when scaled, and was put back.", ", ".join(undone), type(model).__name__
    )
    return done


def _outputs(model: nn.Module, batch: Mapping[str, Any]) -> list[Tensor]:
    """The outputs' floats; of large ones, such as logits over a vocabulary, an even sample."""
    with evaluating(model):
        found = [tensor for tensor in tensors_of(model(**batch)) if tensor.is_floating_point()]
    return [tensor.reshape(-1)[:: 1 + tensor.numel() // _COMPARED].clone() for tensor in found]


def _unchanged(expected: Sequence[Tensor], got: Sequence[Tensor], least: float) -> bool:
    """Whether all outputs are equal up to rounding, of at least so many decibels; infinite ones must stay so."""
    for reference, values in zip(expected, got, strict=True):
        finite = torch.isfinite(reference)
        if not torch.equal(finite, torch.isfinite(values)):
            return False
        if not sqnr(reference[finite], values[finite]) >= least:
            return False
    return True
