"""Which zeros belong together: the masks of plain weights, and those of units. Both are read off the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..targets import is_transposed, select_prunable
from .layers import is_skipped, skip_layer
from .structures import Structure, blocks_of, choose, choose_units, spread
from .units import UnitGroup, find_units


class WeightMasks:
    """Masks of single weights, N:M, blocks, rows and columns.

    Args:
        model (`torch.nn.Module`): the model.
        structure ([`Structure`]): not of units.
        targets, ignore (list of `str`, *optional*): see [`select_prunable`].

    Attributes:
        scored (`dict[str, torch.nn.Parameter]`): the weights whose scores decide, by qualified parameter name.
        sizes (`dict[str, int]`): what each target counts, by module name: its weights.
        blocks (`dict[str, int]`): in how many parts each target is pruned.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] | None = None,
    ) -> None:
        self.structure = structure
        modules = select_prunable(model, targets, ignore)
        self._transposed = {name for name, module in modules.items() if is_transposed(module)}
        self.scored: dict[str, nn.Parameter] = {f"{name}.weight": module.weight for name, module in modules.items()}  # type: ignore[misc]
        self.sizes = {name: module.weight.numel() for name, module in modules.items()}  # type: ignore[operator]
        self.blocks: dict[str, int] = {}
        for name, size in self.sizes.items():
            shape = self._oriented(name, self.scored[f"{name}.weight"]).shape
            structure.check(name, shape)
            rows, columns = structure.block(shape)
            self.blocks[name] = size // (rows * columns)

    def pruned(self) -> dict[str, Tensor]:
        """What is pruned now, by module name: boolean, (out, in)."""
        found = {}
        for name in self.sizes:
            zero = self._oriented(name, self.scored[f"{name}.weight"].detach()) == 0
            found[name] = spread(blocks_of(zero, self.structure), zero.shape, self.structure)
        return found

    def choose(
        self, scores: Mapping[str, Tensor], pruned: Mapping[str, Tensor], goals: Mapping[str, float], scope: str
    ) -> dict[str, Tensor]:
        """What to prune for these scores (by parameter name) and goals (by module name)."""
        oriented = {name: self._oriented(name, scores[f"{name}.weight"]) for name in self.sizes}
        return choose(oriented, pruned, goals, self.structure, scope)

    def of_parameters(self, pruned: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same masks in the shape of each parameter, by parameter name."""
        return {f"{name}.weight": self._oriented(name, mask) for name, mask in pruned.items()}

    def settle(self, model: nn.Module, pruned: Mapping[str, Tensor]) -> None:
        """Nothing beyond zeros is needed."""

    def _oriented(self, name: str, weight: Tensor) -> Tensor:
        return weight.t() if name in self._transposed else weight


class UnitMasks:
    """Masks of attention heads, feed-forward neurons and layers; a unit is pruned when all of it is 0.

    Args:
        model (`torch.nn.Module`): the model; it runs once.
        structure ([`Structure`]): of units.
        targets, ignore (list of `str`, *optional*): see [`find_units`].

    Attributes:
        groups (list of [`UnitGroup`]): the units that share a fate, such as the heads of one layer.
        scored (`dict[str, torch.nn.Parameter]`): the weight matrices of all units, by qualified parameter name.
        sizes, blocks (`dict[str, int]`): what each group counts, by its name: its units.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] | None = None,
    ) -> None:
        self.structure = structure
        self.groups: list[UnitGroup] = find_units(model, structure.kind, targets, ignore)  # type: ignore[arg-type]
        self.sizes = self.blocks = {group.name: group.count for group in self.groups}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._parameters = {part.parameter: parameters[part.parameter] for g in self.groups for part in g.slices}
        self.scored = {name: parameter for name, parameter in self._parameters.items() if parameter.ndim > 1}

    def pruned(self) -> dict[str, Tensor]:
        """What is pruned now, by group: boolean, (units,)."""
        found = {}
        for group in self.groups:
            dead = torch.ones(group.count, dtype=torch.bool)
            for part in group.slices:
                zero = self._parameters[part.parameter].detach() == 0
                if part.dim is None or part.index is None:
                    dead[part.unit] &= bool(zero.all())
                else:
                    others = [dim for dim in range(zero.ndim) if dim != part.dim]
                    lines = zero.all(dim=others) if others else zero
                    dead &= lines[part.index.to(zero.device)].all(1).cpu()
            dead[list(group.fixed)] = False
            found[group.name] = dead
        return found

    def choose(
        self, scores: Mapping[str, Tensor], pruned: Mapping[str, Tensor], goals: Mapping[str, float], scope: str
    ) -> dict[str, Tensor]:
        """What to prune for these scores (by parameter name) and goals (by group)."""
        return choose_units({g.name: _unit_scores(g, scores) for g in self.groups}, pruned, goals, scope)

    def of_parameters(self, pruned: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The masks of all parameters that the units have a part in, by parameter name."""
        masks: dict[str, Tensor] = {}
        for group in self.groups:
            dead = pruned[group.name]
            for part in group.slices:
                parameter = self._parameters[part.parameter]
                mask = masks.setdefault(part.parameter, torch.zeros_like(parameter, dtype=torch.bool))
                if part.dim is None or part.index is None:
                    mask |= bool(dead[part.unit])
                else:
                    lines = part.index[dead].flatten().to(mask.device)
                    mask.index_fill_(part.dim, lines, True)
        return masks

    def settle(self, model: nn.Module, pruned: Mapping[str, Tensor]) -> None:
        """Bypass pruned layers: after a norm, a layer of zeros is no identity."""
        if self.structure.kind != "layer":
            return
        for group in self.groups:
            for unit in pruned[group.name].nonzero().flatten().tolist():
                layer = f"{group.name}.{unit}"
                if not is_skipped(model.get_submodule(layer)):
                    skip_layer(model, layer)


def _unit_scores(group: UnitGroup, scores: Mapping[str, Tensor]) -> Tensor:
    """The mean score of the weights of each unit, (units,); infinity for those that have to stay."""
    total = torch.zeros(group.count, dtype=torch.float64)
    weights = torch.zeros(group.count, dtype=torch.float64)
    for part in group.slices:
        if part.parameter not in scores:
            continue  # biases do not decide
        score = scores[part.parameter]
        if part.dim is None or part.index is None:
            total[part.unit] += float(score.sum(dtype=torch.float64))
            weights[part.unit] += score.numel()
        else:
            others = [dim for dim in range(score.ndim) if dim != part.dim]
            total += score.sum(dim=others, dtype=torch.float64).cpu()[part.index].sum(1)
            weights += part.index.shape[1] * (score.numel() // score.shape[part.dim])
    mean = (total / weights.clamp(min=1)).float()
    mean[list(group.fixed)] = torch.inf
    return mean
