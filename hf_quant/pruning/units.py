"""Heads, feed-forward neurons and layers: which weights hang together, found by running the model."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..targets import head_names, matches, require_matches
from .blocks import find_blocks, rows_of
from .layers import kind_of
from .probing import Cut, Sources, is_linear_like, output_dim, run_cut, synthetic_batch

UnitKind = Literal["head", "neuron", "layer"]

_LACKING: dict[str, str] = {
    "head": "no attention heads: no Linear-like module reads blocks of channels that do not mix, from query, key and "
    "value projections that nothing else reads. A norm over all heads, a single key/value head, or weights outside of "
    "Linear-like modules (nn.MultiheadAttention, fused experts) leave none; adapters have to be merged first",
    "neuron": "no feed-forward neurons: no Linear-like module reads channels one by one, through an activation "
    "function, from other Linear-like modules that nothing else reads. A norm in between, or weights outside of "
    "Linear-like modules (convolutions, fused experts), leave none; adapters have to be merged first",
    "layer": "no layers that could be left out: no nn.ModuleList holds several modules of one class, each of which "
    "reads exactly what the one before returned, in the same shape",
}


@dataclass(frozen=True, eq=False)
class Slice:
    """The part of one Parameter that belongs to each unit of a group.

    Args:
        parameter (`str`): qualified name of the Parameter.
        dim (`int`, *optional*): the dimension along which the units lie; `None` if the whole Parameter belongs to
            the unit `unit`.
        index (`torch.Tensor`, *optional*): int64, (units, positions): ascending positions along `dim` by unit.
        unit (`int`, *optional*): for `dim=None`.
    """

    parameter: str
    dim: int | None
    index: Tensor | None
    unit: int | None = None


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """Units of one kind in one place, any of which can be removed.

    Args:
        kind (`str`): `"head"` (with grouped queries: a key/value head and all query heads that read it),
            `"neuron"` (of a feed-forward layer, with its gate) or `"layer"`.
        name (`str`): of the Linear-like module that reads the heads or neurons; of the `nn.ModuleList` of layers.
        count (`int`): how many units.
        slices (`tuple[Slice, ...]`): all weights and biases that belong to units. The bias of the module that reads
            heads or neurons belongs to none.
        fixed (`tuple[int, ...]`, *optional*): units that may not be removed.
    """

    kind: UnitKind
    name: str
    count: int
    slices: tuple[Slice, ...]
    fixed: tuple[int, ...] = ()


def find_units(
    model: nn.Module,
    kind: UnitKind,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    *,
    batch: Mapping[str, Any] | None = None,
) -> list[UnitGroup]:
    """Find the heads, neurons or layers of a model by running it, whatever its architecture.

    Every Linear-like module is made to return noise, which cuts the model into pieces. Within a piece, gradients
    say which output channels of the modules before reach which input channels of the module that reads them; the
    channels' numbers are coded in bits, so that C channels take 2 log2(C) backward passes. Channels that map one to
    one are neurons; blocks that do not mix are heads. Nothing is found that runs in no forward of the batch, that
    shares a weight, or whose channels are read by anything else. Modules of the model's head are passed over unless
    `targets` names them.

    Layers differ in their Parameters where a config ties something to a layer's place (T5 keeps its position bias in
    block 0). Layers whose Parameters differ from the last one's are therefore fixed.

    Args:
        model (`torch.nn.Module`): a float or QAT model; it is not changed.
        kind (`str`): `"head"`, `"neuron"` or `"layer"`.
        targets, ignore (list of `str`, *optional*): patterns over the names of the modules that read or make the
            heads or neurons, or of the layers (`"bert.encoder.layer.3"`; a layer that is not chosen is fixed).
        batch (mapping, *optional*): keyword arguments of the forward, on the model's device; made up by default.

    Returns:
        `list[UnitGroup]`: in the order in which they run.

    Raises:
        `ValueError`: if the model has no such units, a pattern matches nothing, or made-up inputs do not fit.
    """
    if kind not in _LACKING:
        raise ValueError(f"unknown kind of unit {kind!r}; there are {', '.join(map(repr, _LACKING))}")
    batch = synthetic_batch(model) if batch is None else batch
    groups = _find_layers(model, batch) if kind == "layer" else _find_channels(model, kind, batch)
    if not groups:
        raise ValueError(f"{type(model).__name__} has {_LACKING[kind]}. Choose another structure.")

    members = {group.name: _members(group) for group in groups}
    names = [name for group in groups for name in members[group.name]]
    for option, patterns in (("targets", targets), ("ignore", ignore)):
        require_matches(option, patterns, names)
    head = () if targets is not None else head_names(model)

    def is_chosen(own: list[str]) -> bool:
        in_head = any(name == part or name.startswith(part + ".") for part in head for name in own)
        wanted = targets is None or any(matches(name, targets) for name in own)
        return wanted and not in_head and not any(matches(name, ignore or ()) for name in own)

    if kind == "layer":
        chosen = []
        for group in groups:
            left = {unit for unit, name in enumerate(members[group.name]) if not is_chosen([name])}
            chosen.append(replace(group, fixed=tuple(sorted(left | set(group.fixed)))))
        chosen = [group for group in chosen if len(group.fixed) < group.count]
    else:
        chosen = [group for group in groups if is_chosen(members[group.name])]
    if not chosen:
        raise ValueError(
            f"no {kind} of {type(model).__name__} is left to prune: found were those of "
            f"{', '.join(group.name for group in groups[:5])}. Loosen `targets` or `ignore`; a model's head is "
            "pruned only if `targets` names it."
        )
    return chosen


def _members(group: UnitGroup) -> list[str]:
    if group.kind == "layer":
        return [f"{group.name}.{unit}" for unit in range(group.count)]
    return list(dict.fromkeys([group.name, *(part.parameter.rpartition(".")[0] for part in group.slices)]))


def _find_layers(model: nn.Module, batch: Mapping[str, Any]) -> list[UnitGroup]:
    lists: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        children = list(module) if isinstance(module, nn.ModuleList) else []
        alike = len(children) > 1 and len({kind_of(child) for child in children}) == 1
        if alike and not is_linear_like(children[0]) and any(map(is_linear_like, children[0].modules())):
            lists[name] = children
    cut = run_cut(model, {f"{name}.{i}": child for name in lists for i, child in enumerate(lists[name])}, batch)
    holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    groups = []
    for name, children in lists.items():
        members = [f"{name}.{unit}" for unit in range(len(children))]
        if not _is_chain(cut, members):
            continue
        # What a Parameter shared with another module means there, the layer cannot know.
        own = [
            {key: parameter for key, parameter in child.named_parameters() if holders[id(parameter)] == 1}
            for child in children
        ]
        forms = [{key: tuple(parameter.shape) for key, parameter in child.named_parameters()} for child in children]
        slices = [Slice(f"{members[unit]}.{key}", None, None, unit) for unit, keys in enumerate(own) for key in keys]
        fixed = tuple(unit for unit, form in enumerate(forms) if form != forms[-1])
        groups.append(UnitGroup("layer", name, len(children), tuple(slices), fixed))
    return groups


def _is_chain(cut: Cut, members: list[str]) -> bool:
    """Whether each module ran once and read exactly what the one before returned."""
    if any(len(cut.inputs[name]) != 1 or len(cut.outputs[name]) != 1 for name in members):
        return False
    shape = cut.inputs[members[0]][0].shape
    if any(cut.outputs[name][0].shape != shape for name in members):
        return False
    return all(
        torch.equal(cut.outputs[before][0], cut.inputs[after][0]) for before, after in itertools.pairwise(members)
    )


def _find_channels(model: nn.Module, kind: UnitKind, batch: Mapping[str, Any]) -> list[UnitGroup]:
    modules = {name: module for name, module in model.named_modules() if is_linear_like(module)}
    cut, still = run_cut(model, modules, batch), run_cut(model, modules, batch, noise=0.0)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    sources = Sources({**cut.outputs, **{name: [parameter] for name, parameter in parameters.items()}})

    read = {name: sources.of(cut.inputs[name]) for name in dict.fromkeys(cut.order)}
    once, shared = sources.of(cut.returned), sources.of(cut.returned)
    for bits in read.values():
        shared |= once & bits
        once |= bits
    groups = []
    for name, bits in read.items():
        inputs = [tensor for tensor in cut.inputs[name] if tensor.requires_grad]
        makers = [source for source in sources.named(bits) if source in modules]
        used_elsewhere = any(source in modules for source in sources.named(bits & shared))
        own = [p for part in (name, *makers) for p in modules[part].parameters(recurse=False)]
        if not makers or used_elsewhere or any(holders[id(parameter)] > 1 for parameter in own):
            continue
        # Whatever else the channels carry (a residual) would be lost with them.
        if any(not torch.equal(rows, rows[:1].expand_as(rows)) for rows in map(rows_of, still.inputs[name])):
            continue
        # A Parameter that several readers share (T5's position bias) belongs to the heads of none of them.
        between = [source for source in sources.named(bits & ~shared) if source in parameters]
        index = find_blocks(
            inputs,
            {source: cut.outputs[source] for source in makers},
            {source: parameters[source] for source in between},
            single=kind == "neuron",
        )
        if index is not None:
            groups.append(_group(kind, name, modules, makers, index))
    return groups


def _group(
    kind: UnitKind,
    name: str,
    modules: Mapping[str, nn.Module],
    makers: list[str],
    index: dict[tuple[str, int], Tensor],
) -> UnitGroup:
    slices = []
    for (source, dim), positions in index.items():
        if source in makers:
            slices.append(Slice(f"{source}.weight", output_dim(modules[source]), positions))
            if getattr(modules[source], "bias", None) is not None:
                slices.append(Slice(f"{source}.bias", 0, positions))
        else:
            slices.append(Slice(source, dim, positions))
    weight: Tensor = modules[name].weight  # type: ignore[assignment]
    dim, count = 1 - output_dim(modules[name]), len(positions)
    slices.append(Slice(f"{name}.weight", dim, torch.arange(weight.shape[dim]).reshape(count, -1)))
    return UnitGroup(kind, name, count, tuple(slices))
