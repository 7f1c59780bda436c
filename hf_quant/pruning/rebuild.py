"""The config of a smaller model, found by building models from changed configs and comparing all shapes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..quantization.qat import qat_modules
from .probing import output_dim
from .units import UnitGroup

Path = tuple[Any, ...]  # into the config as nested dicts and lists
Edits = dict[Path, Any]
Shapes = dict[str, tuple[int, ...]]

_KINDS = {"head": "heads", "neuron": "neurons", "layer": "layers"}
# Names under which modelling code looks for the size of a head that need not be hidden_size / heads.
_HEAD_SIZES = ("head_dim", "attention_head_size")


@dataclass(frozen=True)
class Plan:
    """What a smaller model is built from.

    Args:
        config (`PreTrainedConfig`): of the smaller model.
        present (`torch.nn.Module`): the present model as its config builds it, on the meta device.
        smaller (`torch.nn.Module`): the smaller one.
    """

    config: PreTrainedConfig
    present: nn.Module
    smaller: nn.Module


def renamed(name: str, groups: Sequence[UnitGroup], keep: Mapping[str, Tensor]) -> str | None:
    """The name of a module or Parameter once layers are removed; `None` if it is removed with its layer.

    Args:
        name (`str`): qualified.
        groups (list of [`UnitGroup`]): those of kind `"layer"` count.
        keep (`dict[str, torch.Tensor]`): boolean, (count,), by group name.
    """
    for group in groups:
        if group.kind == "layer" and group.name in keep and name.startswith(group.name + "."):
            number, dot, rest = name[len(group.name) + 1 :].partition(".")
            kept = keep[group.name]
            if not bool(kept[int(number)]):
                return None
            name = f"{group.name}.{int(kept[: int(number)].sum())}{dot}{rest}"
    return name


def plan(model: nn.Module, groups: Sequence[UnitGroup], keep: Mapping[str, Tensor]) -> Plan:
    """Find the config from which the model without the pruned units is built, names and shapes of Parameters alike.

    Every number of the config that equals a present count or width is tried with the new one, and the change that
    puts most Parameters right is kept, until all are. Nothing about architectures is known here.

    Args:
        model (`torch.nn.Module`): with its `config`; it is not changed.
        groups (list of [`UnitGroup`]): whose units are removed.
        keep (`dict[str, torch.Tensor]`): boolean, (count,), by group name.

    Raises:
        `ValueError`: if no config says it, naming a Parameter that shows why.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(
            f"{type(model).__name__} has no config of transformers, so a smaller one cannot be loaded again. "
            "Use shrink=False."
        )
    present = _build(model, config)
    if present is None or _parameter_shapes(present) != _parameter_shapes(model):
        raise ValueError(
            f"the config of {type(model).__name__} does not build the model as it is (adapters, modules that were "
            "exchanged, or a changed size), so a smaller one could not be loaded again. Merge adapters, or use "
            "shrink=False."
        )
    goal = _Goal(_expected(present, groups, keep), _renumbered(_buffer_shapes(present), groups, keep))
    _require_whole_groups(model, goal.parameters)
    search = _Search(model, config, goal)
    edits = search.run(groups, keep)
    smaller = None if edits is None else _build(model, _edited(config, edits))
    if smaller is None or goal.distance(smaller) > 0:
        raise ValueError(_refusal(model, groups, keep, search))
    assert isinstance(smaller.config, PreTrainedConfig)
    return Plan(smaller.config, present, smaller)


def _parameter_shapes(model: nn.Module) -> Shapes:
    return {name: tuple(value.shape) for name, value in model.named_parameters(remove_duplicate=False)}


def _buffer_shapes(model: nn.Module) -> Shapes:
    return {name: tuple(value.shape) for name, value in model.named_buffers()}


def _expected(present: nn.Module, groups: Sequence[UnitGroup], keep: Mapping[str, Tensor]) -> Shapes:
    shapes = {name: list(shape) for name, shape in _parameter_shapes(present).items()}
    for group in groups:
        for part in group.slices if group.name in keep else ():
            if part.dim is not None and part.index is not None:
                shapes[part.parameter][part.dim] -= part.index.shape[1] * int((~keep[group.name]).sum())
    return _renumbered({name: tuple(shape) for name, shape in shapes.items()}, groups, keep)


def _renumbered(shapes: Shapes, groups: Sequence[UnitGroup], keep: Mapping[str, Tensor]) -> Shapes:
    names = {name: renamed(name, groups, keep) for name in shapes}
    return {new: shapes[name] for name, new in names.items() if new is not None}


def _build(model: nn.Module, config: PreTrainedConfig) -> nn.Module | None:
    """A model of the same class without weights, or `None` if the config allows none."""
    try:
        with torch.random.fork_rng(), torch.device("meta"):
            return type(model)(copy.deepcopy(config))
    except Exception:  # whatever a model raises about sizes that do not fit
        return None


@dataclass(frozen=True)
class _Goal:
    """The shapes that the smaller model is to have; buffers (frequencies of positions) stay as they are."""

    parameters: Shapes
    buffers: Shapes

    @property
    def worst(self) -> int:
        """More than any model's distance that could be built."""
        return 2 * len(self.parameters) + len(self.buffers) + 1

    def distance(self, built: nn.Module | None) -> int:
        """How many Parameters are missing, too many or of another shape, and how many buffers of another shape."""
        if built is None:
            return self.worst
        wrong = set(_parameter_shapes(built).items()) ^ set(self.parameters.items())
        buffers = _buffer_shapes(built)
        return len(wrong) + sum(buffers.get(name, shape) != shape for name, shape in self.buffers.items())


class _Search:
    """The config changed number by number, towards the expected shapes."""

    def __init__(self, model: nn.Module, config: PreTrainedConfig, goal: _Goal) -> None:
        self.model = model
        self.config = config
        self.data: dict[str, Any] = config.to_dict()
        self.goal = goal
        self.nearest: tuple[int, Shapes] = (goal.worst, {})

    def run(self, groups: Sequence[UnitGroup], keep: Mapping[str, Tensor]) -> Edits | None:
        """The changes that make all shapes right, or `None`."""
        pruned = [group for group in groups if group.name in keep and not bool(keep[group.name].all())]
        moves = [move for group in pruned for move in self._moves(group, keep[group.name])]
        moves = [move for place, move in enumerate(moves) if move not in moves[:place]]
        # Numbers that the config leaves open (GPT-2's n_inner) are tried only where those it has do not help.
        stages = [[move for move in moves if not self._opens(move)], moves]
        start = self._score({})
        for first in self._starts(pruned):
            if first and self._score(first) != start:
                continue  # it changes the model as it is
            for stage in stages:
                found = self._climb(first, stage)
                if found is not None:
                    return found
        return None

    def _climb(self, edits: Edits, moves: Sequence[Edits]) -> Edits | None:
        score = self._score(edits)
        while score > 0:
            tried = [{**edits, **move} for move in moves if not set(move) <= set(edits)]
            scores = [self._score(candidate) for candidate in tried]
            if not scores or min(scores) >= score:
                return None
            score = min(scores)
            edits = tried[scores.index(score)]
        return edits

    def _score(self, edits: Edits) -> int:
        data = copy.deepcopy(self.data)
        for path, value in edits.items():
            _at(data, path[:-1])[path[-1]] = value
        try:  # through a dict, as a reload does it
            config = type(self.config).from_dict(data)
        except Exception:  # whatever a config raises about numbers that do not fit
            return self.goal.worst
        built = _build(self.model, config)
        score = self.goal.distance(built)
        if built is not None and score < self.nearest[0]:
            self.nearest = score, _parameter_shapes(built)
        return score

    def _opens(self, move: Edits) -> bool:
        return any(_at(self.data, path) is None for path in move)

    def _moves(self, group: UnitGroup, keep: Tensor) -> Iterator[Edits]:
        kept = int(keep.sum())
        for path, value in _values(self.data):
            if group.kind == "layer" and value == group.count:
                yield from self._layer_moves(path, keep)
            elif group.kind == "neuron" and value in (group.count, None):
                yield {path: kept}
            elif group.kind == "head" and _counts_heads(value, path, group):
                yield {path: value * kept // group.count}

    def _layer_moves(self, path: Path, keep: Tensor) -> Iterator[Edits]:
        """The number of layers, with what the same config lists for each layer cut alike."""
        beside = _at(self.data, path[:-1])
        lists = {
            (*path[:-1], key): [item for item, stays in zip(value, keep.tolist(), strict=True) if stays]
            for key, value in (beside.items() if isinstance(beside, dict) else ())
            if isinstance(value, (list, tuple)) and len(value) == len(keep)
        }
        named = {place: value for place, value in lists.items() if "layer" in str(place[-1])}
        for cut in (lists, named, {}):
            yield {path: int(keep.sum()), **cut}

    def _starts(self, pruned: Sequence[UnitGroup]) -> list[Edits]:
        """The config as it is, then with the size of a head written out, which may follow from others so far."""
        starts: list[Edits] = [{}]
        for name in _HEAD_SIZES:
            for group in pruned:
                for path, value in _values(self.data) if group.kind == "head" else ():
                    beside = _at(self.data, path[:-1])
                    if isinstance(beside, dict) and beside.get(name) is None and _counts_heads(value, path, group):
                        starts.append({(*path[:-1], name): _channels(group) // value})
        return [start for place, start in enumerate(starts) if start not in starts[:place]]


def _values(data: Any, path: Path = ()) -> Iterator[tuple[Path, int | None]]:
    """Every integer of a config, and every value that is left open, by its path."""
    if isinstance(data, (dict, list)):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            if key not in ("id2label", "label2id"):
                yield from _values(value, (*path, key))
    elif data is None or (isinstance(data, int) and not isinstance(data, bool)):
        yield path, data


def _counts_heads(value: int | None, path: Path, group: UnitGroup) -> TypeGuard[int]:
    """Whether a number may be that of query or of key/value heads: the group's units are made of so many."""
    # Half of the head's size in place of half of the heads would give the same shapes, and another model.
    key = str(path[-1])
    named = "head" in key and "dim" not in key and "size" not in key
    return named and value is not None and value > 0 and value % group.count == 0 and _channels(group) % value == 0


def _channels(group: UnitGroup) -> int:
    """The width of the input of the module that reads the heads."""
    index = group.slices[-1].index
    assert index is not None
    return index.numel()


def _at(data: Any, path: Path) -> Any:
    for key in path:
        data = data[key] if isinstance(data, (dict, list, tuple)) else getattr(data, str(key))
    return data


def _edited(config: PreTrainedConfig, edits: Edits) -> PreTrainedConfig:
    """A copy with everything that a dict of it does not hold, such as the choice of attention kernels."""
    config = copy.deepcopy(config)
    for path, value in edits.items():
        holder = _at(config, path[:-1])
        if isinstance(holder, (dict, list)):
            holder[path[-1]] = value
        else:
            setattr(holder, str(path[-1]), value)
    return config


def _require_whole_groups(model: nn.Module, expected: Shapes) -> None:
    for name, module in qat_modules(model).items():
        shape = expected.get(f"{name}.weight")
        size = module.scheme.group_size
        if size is None or isinstance(module, nn.Embedding) or shape is None:
            continue
        width = shape[1 - output_dim(module)]
        if width != module.weight.shape[1 - output_dim(module)] and width % size:
            raise ValueError(
                f"{name} would have {width} inputs, which the scheme {module.scheme.name!r} cannot divide into groups "
                f"of {size}. Prune to a multiple of {size}, or use a scheme without groups."
            )


def _refusal(model: nn.Module, groups: Sequence[UnitGroup], keep: Mapping[str, Tensor], search: _Search) -> str:
    """Why there is no config, and what can be done."""
    left = {group.name: int(keep[group.name].sum()) if group.name in keep else group.count for group in groups}
    pruned = [group for group in groups if left[group.name] < group.count]
    for group in pruned:
        for other in groups:
            mine, its = left[group.name], left[other.name]
            if group.kind == other.kind != "layer" and group.count == other.count and mine != its:
                return (
                    f"{group.name} keeps {mine} of {group.count} {_KINDS[group.kind]} and {other.name} {its}, but the "
                    f"config of {type(model).__name__} has no number for each. Use uniform=True (or scope='layer'), "
                    "which prunes as many everywhere, or shrink=False."
                )
    kinds = " and ".join(dict.fromkeys(_KINDS[group.kind] for group in pruned))
    nearest, expected = search.nearest[1], search.goal.parameters
    wrong = next((name for name, shape in expected.items() if nearest.get(name) != shape), None)
    shows = (
        "builds it with other Parameters"
        if wrong is None
        else f"gives {wrong} the shape {expected[wrong]}"
        + (f"; the nearest gives {nearest[wrong]}" if wrong in nearest else "")
    )
    return (
        f"the config of {type(model).__name__} cannot say that {kinds} are removed: no change of a number in it "
        f"{shows}. Choose another structure, or use shrink=False, which leaves zeros."
    )
