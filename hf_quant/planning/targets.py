"""Which modules a recipe's patterns match, and what is pruned and quantized: on a model without its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..callbacks.pruning import PruningCallback
from ..pruning.masks import UnitMasks
from ..pruning.pruner import Pruner
from ..recipe.source import KeyPath, Problem
from ..recipe.values import dotted
from ..schemes import get_scheme
from ..targets import Selection, matches, require_matches, select_modules

if TYPE_CHECKING:
    from ..recipe.schema import Recipe


@dataclass(frozen=True)
class Match:
    """What one pattern of a recipe matches.

    Args:
        section (`str`): where it stands, such as `"pruning[0]"`.
        option (`str`): `"targets"`, `"ignore"` or `"final_sparsity"`.
        pattern (`str`): the pattern.
        modules (`tuple[str, ...]`): names of the modules, or of groups of heads, neurons or layers; empty: an error.
    """

    section: str
    option: str
    pattern: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Chosen:
    """What one section of a recipe works on.

    Args:
        section (`str`): `"quantization"`, `"pruning"` or `"pruning[0]"`.
        kinds (`dict[str, int]`): how many modules by kind (`"linear"`, `"embedding"`), or how many `"heads"`.
        left (`dict[str, int]`): how many modules are left, by reason.
    """

    section: str
    kinds: dict[str, int]
    left: dict[str, int] = field(default_factory=dict)


@dataclass
class Targets:
    """What a recipe does to which parts of its model.

    Args:
        model (`PreTrainedModel`): without its weights: on the meta device, or random where it has to run.
        selection ([`Selection`], *optional*): what is quantized; none if the recipe does not, or cannot.
        pruners (`dict[int, Pruner]`): of each pruning section that can be, by its number.
        matches (`list[Match]`): of all patterns.
        chosen (`list[Chosen]`): of all sections.
        problems (`list[Problem]`): what cannot be.
    """

    model: PreTrainedModel
    selection: Selection | None = None
    pruners: dict[int, Pruner] = field(default_factory=dict)
    matches: list[Match] = field(default_factory=list)
    chosen: list[Chosen] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def build_model(kind: Any, config: PreTrainedConfig, running: bool) -> PreTrainedModel:
    """The model that a run would train, without loading weights.

    Args:
        kind (`type`): such as `AutoModelForSequenceClassification`.
        config (`PreTrainedConfig`): with the labels of the task.
        running (`bool`): whether it has to run; it then has random weights, else it is on the meta device.
    """
    with torch.random.fork_rng():
        if not running:
            with torch.device("meta"):
                model = kind.from_config(config, dtype=torch.float32)
            # Whether a subclass of Linear only computes what Linear does is found by calling it.
            linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
            running = any(type(module).forward is not nn.Linear.forward for module in linears)
        if running:
            model = kind.from_config(config, dtype=torch.float32)
    return model.eval()


def pruning_place(recipe: Recipe, index: int) -> KeyPath:
    """Where a pruning section stands in the recipe."""
    # One alone may be a mapping in the file, or a list of one.
    listed = ("pruning", index) in recipe.source.values or len(recipe.pruning) > 1
    return ("pruning", index) if listed else ("pruning",)


def find_targets(recipe: Recipe, model: PreTrainedModel, prunings: Mapping[int, PruningCallback]) -> Targets:
    """Match all patterns, and choose what is pruned and quantized.

    Args:
        recipe ([`Recipe`]): the recipe.
        model (`PreTrainedModel`): of [`build_model`].
        prunings (`dict[int, PruningCallback]`): new ones of its pruning sections, by number.

    Returns:
        [`Targets`]: with everything that is wrong among its `problems`.
    """
    found = Targets(model)
    names = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding, Conv1D))]
    for index, callback in prunings.items():
        place = pruning_place(recipe, index)
        options: dict[str, Any] = {"targets": callback.targets, "ignore": callback.ignore}
        if isinstance(callback.settings.goal, Mapping):
            options["final_sparsity"] = list(callback.settings.goal)
        if callback.settings.structure.in_units or _match(recipe, found, place, options, names):
            _choose_pruned(recipe, found, index, callback, options)
    _find_shared(recipe, found)
    wanted = recipe.quantization
    if wanted is not None:
        options = {"targets": wanted.targets, "ignore": wanted.ignore}
        if _match(recipe, found, ("quantization",), options, names):
            try:
                found.selection = select_modules(
                    found.model, wanted.targets, wanted.ignore, wanted.embeddings, get_scheme(wanted.scheme)
                )
            except ValueError as error:
                found.problems.append(_problem(recipe, ("quantization",), error))
            else:
                left = dict(Counter(found.selection.left.values()))
                found.chosen.append(Chosen("quantization", dict(Counter(found.selection.quantized.values())), left))
    return found


def kept_units(pruner: Pruner) -> dict[str, Tensor]:
    """Which units a shrinking pruning leaves, as far as is known before: so many of each group, by its name.

    Returns:
        `dict[str, torch.Tensor]`: boolean, (units,); which of them are left is made up.
    """
    assert isinstance(pruner.plan, UnitMasks)
    keep = {}
    for group in pruner.plan.groups:
        gone = round(pruner.final[group.name] * group.count)
        keep[group.name] = torch.ones(group.count, dtype=torch.bool)
        keep[group.name][[unit for unit in range(group.count) if unit not in group.fixed][:gone]] = False
    return keep


def _match(recipe: Recipe, found: Targets, place: KeyPath, options: Mapping[str, Any], names: list[str]) -> bool:
    """Note what each pattern matches; whether all match something."""
    whole = True
    for option, patterns in options.items():
        for number, pattern in enumerate(patterns or ()):
            hit = tuple(name for name in names if matches(name, [pattern]))
            found.matches.append(Match(dotted(place), option, pattern, hit))
            try:
                require_matches(option, [pattern], names)
            except ValueError as error:
                where = (*place, option, pattern if option == "final_sparsity" else number)
                found.problems.append(_problem(recipe, where, error, dotted(place)))
                whole = False
    return whole


def _choose_pruned(
    recipe: Recipe, found: Targets, index: int, callback: PruningCallback, options: Mapping[str, Any]
) -> None:
    place, wanted = pruning_place(recipe, index), callback.settings
    try:
        pruner = callback.pruner_for(found.model)
        pruner.release()
    except ValueError as error:
        found.problems.append(_problem(recipe, place, error))
        return
    found.pruners[index] = pruner
    plan = pruner.plan
    if isinstance(plan, UnitMasks):
        kinds = {f"{wanted.structure.kind}s": sum(plan.sizes.values())}
        for option, patterns in options.items():
            for pattern in patterns or ():
                hit = tuple(group.name for group in plan.groups if matches(group.name, [pattern]))
                parts = {part.parameter.rpartition(".")[0] for group in plan.groups for part in group.slices}
                hit = hit or tuple(sorted(part for part in parts if matches(part, [pattern])))
                found.matches.append(Match(dotted(place), option, pattern, hit))
    else:
        modules = [found.model.get_submodule(name) for name in plan.sizes]
        kinds = dict(Counter("conv1d" if isinstance(m, Conv1D) else type(m).__name__.lower() for m in modules))
    found.chosen.append(Chosen(dotted(place), kinds))


def _find_shared(recipe: Recipe, found: Targets) -> None:
    """Weights that two sections prune: refused when training begins."""
    owner: dict[str, int] = {}
    for index, pruner in found.pruners.items():
        shared = [name for name in pruner.plan.scored if name in owner]
        if shared:
            message = (
                f"`{dotted(pruning_place(recipe, index))}` and `{dotted(pruning_place(recipe, owner[shared[0]]))}` "
                f"both prune {min(shared)}. Give each weight to one of them, with `targets` and `ignore`"
            )
            found.problems.append(recipe.source.problem(pruning_place(recipe, index), message))
        owner.update(dict.fromkeys(pruner.plan.scored, index))


def _problem(recipe: Recipe, place: KeyPath, error: Exception, section: str | None = None) -> Problem:
    return recipe.source.problem(place, f"`{section or dotted(place)}`: {error}")
