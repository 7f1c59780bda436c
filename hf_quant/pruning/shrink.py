"""Remove pruned heads, neurons and layers for good: a smaller model that plain `from_pretrained` loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..quantization.graph import evaluating
from ..quantization.qat import qat_modules
from ..quantization.sensitivity import first_output, output_sqnr
from .probing import synthetic_batch
from .rebuild import Plan, plan, renamed
from .units import UnitGroup

# Removing zeros reorders sums, about 130 dB in float32; one unit that was no zero costs all but some 30.
MIN_SQNR = 60.0
MIN_SQNR_HALF = 30.0  # in float16 and bfloat16, whose own rounding is that large


def check_shrinkable(model: nn.Module, groups: Sequence[UnitGroup], kept: Mapping[str, int]) -> PreTrainedConfig:
    """The config of the model with so many units left, before it is known which.

    Args:
        model (`torch.nn.Module`): a float or QAT model; it is not changed.
        groups (list of [`UnitGroup`]): as [`find_units`] gives them.
        kept (`dict[str, int]`): how many units are to be left, by group name; groups that are not named stay whole.

    Returns:
        `PreTrainedConfig`: of the smaller model; the model keeps its own.

    Raises:
        `ValueError`: if no config can say it, with the reason and what can be done.
    """
    by_name = _by_name(groups, kept)
    keep = {}
    for name, number in kept.items():
        group = by_name[name]
        order = [*group.fixed, *(unit for unit in range(group.count) if unit not in group.fixed)]
        keep[name] = torch.zeros(group.count, dtype=torch.bool)
        keep[name][order[: max(0, number)]] = True
        if number > group.count or number < len(group.fixed):
            raise ValueError(
                f"{name} cannot keep {number} of {group.count} units, {len(group.fixed)} of which are fixed. "
                f"Keep {max(1, len(group.fixed))} to {group.count}."
            )
    return plan(model, groups, _checked(by_name, keep)).config


def shrink(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    keep: Mapping[str, Tensor],
    batch: Mapping[str, Any] | None = None,
) -> None:
    """Remove all units that are not kept, in place, and prove that the model computes the same.

    The removed heads and neurons have to be zero, the removed layers skipped ([`skip_layer`]). Parameters become new,
    smaller ones; modules stay the objects that they are, QAT modules with their observers and hooks too. The model
    gets the config that builds it, and layers their new numbers ([`renamed`]).

    Args:
        model (`torch.nn.Module`): changed in place.
        groups (list of [`UnitGroup`]): as [`find_units`] gave them before.
        keep (`dict[str, torch.Tensor]`): boolean, (count,), by group name; groups that are not named stay whole.
        batch (mapping, *optional*): keyword arguments of the forward on which outputs are compared; made up from the
            config by default.

    Raises:
        `ValueError`: if no config can say it, or the outputs differ; the model is then as it was.
    """
    keep = _checked(_by_name(groups, keep), keep)
    if all(bool(kept.all()) for kept in keep.values()):
        return
    planned = plan(model, groups, keep)
    batch = synthetic_batch(model) if batch is None else batch
    expected = _output(model, batch)
    changes = _Changes()
    try:
        _apply(model, groups, keep, planned, changes)
        reached = output_sqnr(expected, _output(model, batch))
        least = MIN_SQNR if next(model.parameters()).dtype == torch.float32 else MIN_SQNR_HALF
        if not reached >= least:
            raise ValueError(
                f"{type(model).__name__} without the pruned units gives other outputs ({reached:.1f} dB, at least "
                f"{least:.0f} are needed), so it was put back. Either a unit that is removed was not zero or its "
                "layer not skipped, or the model computes something from its numbers of units or layers. Use "
                "shrink=False."
            )
    except BaseException:
        changes.undo()
        raise


class _Changes:
    """Entries put into dicts of modules, which can be taken back."""

    def __init__(self) -> None:
        self.before: list[tuple[dict[str, Any], str, Any]] = []

    def put(self, holder: dict[str, Any], key: str, value: Any) -> None:
        self.before.append((holder, key, holder[key]))
        holder[key] = value

    def undo(self) -> None:
        for holder, key, value in reversed(self.before):
            holder[key] = value


def _apply(
    model: nn.Module, groups: Sequence[UnitGroup], keep: Mapping[str, Tensor], planned: Plan, changes: _Changes
) -> None:
    smaller = _smaller_parameters(model, groups, keep)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in smaller:
                changes.put(module._parameters, key, smaller[id(parameter)])

    before, after = dict(planned.present.named_modules()), dict(planned.smaller.named_modules())
    for name, module in model.named_modules():
        new = renamed(name, groups, keep)
        if name in before and new in after:
            _take_attributes(module, before[name], after[new], changes)

    for group in groups:
        if group.kind == "layer" and group.name in keep:
            layers = model.get_submodule(group.name)
            kept = [child for child, stays in zip(layers.children(), keep[group.name].tolist(), strict=True) if stays]
            changes.put(layers.__dict__, "_modules", {str(place): child for place, child in enumerate(kept)})


def _smaller_parameters(
    model: nn.Module, groups: Sequence[UnitGroup], keep: Mapping[str, Tensor]
) -> dict[int, nn.Parameter]:
    """New Parameters by the identity of the old ones."""
    old = dict(model.named_parameters())
    values: dict[str, Tensor] = {}
    for group in groups:
        if group.name not in keep or bool(keep[group.name].all()):
            continue
        for part in group.slices:
            if part.dim is not None and part.index is not None and renamed(part.parameter, groups, keep) is not None:
                value = values.get(part.parameter, old[part.parameter].detach())
                positions = part.index[keep[group.name]].flatten().sort().values
                values[part.parameter] = value.index_select(part.dim, positions.to(value.device))
    found = {}
    for name, value in values.items():
        parameter = nn.Parameter(value.contiguous(), requires_grad=old[name].requires_grad)
        parameter.__dict__.update(old[name].__dict__)
        found[id(old[name])] = parameter
    return found


def _take_attributes(module: nn.Module, before: nn.Module, after: nn.Module, changes: _Changes) -> None:
    """Sizes and numbers that the config decides; what a user changed by hand stays."""
    for key, value in after.__dict__.items():
        own = module.__dict__.get(key)
        plain = key in module.__dict__ and key != "training" and isinstance(value, (int, float, str, tuple, list))
        if isinstance(own, PreTrainedConfig) or (plain and before.__dict__.get(key) != value):
            changes.put(module.__dict__, key, value)


def _output(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """What the float model computes, whatever the phase of QAT; the model's own hooks and autocast do not run."""
    states = {id(module.state): module.state for module in qat_modules(model).values()}
    active = [state for state in states.values() if state.fake_quantizing]
    forward = model.__dict__.get("_original_forward", model.forward)
    for state in active:
        state.fake_quantizing = False
    try:
        with evaluating(model):
            return first_output(forward, batch)
    finally:
        for state in active:
            state.fake_quantizing = True


def _by_name(groups: Sequence[UnitGroup], names: Mapping[str, Any]) -> dict[str, UnitGroup]:
    by_name = {group.name: group for group in groups}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no group of units; there are {', '.join(map(repr, by_name))}")
    return by_name


def _checked(by_name: Mapping[str, UnitGroup], keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`keep` on the CPU, where the positions of units are."""
    checked = {}
    for name, kept in keep.items():
        group = by_name[name]
        kept = kept.detach().cpu()
        if kept.dtype != torch.bool or kept.shape != (group.count,):
            raise ValueError(
                f"`keep` of {name} has the dtype {kept.dtype} and the shape {tuple(kept.shape)}, but needs torch.bool "
                f"and ({group.count},): one value for each unit"
            )
        gone = [unit for unit in group.fixed if not bool(kept[unit])]
        if gone:
            raise ValueError(f"unit {gone[0]} of {name} is fixed and cannot be removed; keep it")
        if not bool(kept.any()):
            raise ValueError(
                f"all {group.count} units of {name} would be removed, which leaves nothing to compute with. Keep at "
                "least one: lower the sparsity, or use scope='layer'."
            )
        checked[name] = kept
    return checked
