"""Keeps the masks of a model in training: scores, updates, re-applies, counts."""

from __future__ import annotations

import fnmatch
import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..targets import require_matches
from .criteria import Criterion
from .masks import UnitMasks, WeightMasks
from .structures import Structure

_BUFFER = "pruning_"


class Pruner:
    """Pruning of one model: which weights are 0, and that they stay so.

    A pruned weight is an exact 0 in the model's own Parameter, so checkpoints hold the masks. What a criterion
    gathers from gradients lies in buffers named `pruning_*`, so checkpoints hold that too.

    Args:
        model (`torch.nn.Module`): gets the criterion's buffers, if it has any.
        structure ([`Structure`]): what is pruned as one.
        criterion ([`Criterion`]): what a weight is worth.
        scope (`str`): `"global"`: all targets with the same goal compete; `"layer"`: each meets its goal alone.
        targets, ignore (list of `str`, *optional*): patterns of modules.
        final (`float` or `dict[str, float]`): final sparsity, or one by pattern; targets that no pattern matches
            stay dense.

    Raises:
        `ValueError`: if a pattern matches nothing, the model lacks the structure, a weight is not divided by it,
            or all of a target would be pruned.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        criterion: Criterion,
        scope: str,
        final: float | Mapping[str, float],
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] | None = None,
    ) -> None:
        self.model = model
        self.criterion = criterion
        self.scope = scope
        if isinstance(final, Mapping) and targets is None:
            targets = list(final)
        kind = UnitMasks if structure.in_units else WeightMasks
        self.plan: UnitMasks | WeightMasks = kind(model, structure, targets, ignore)
        self.final = _finals(final, self.plan.sizes)
        for name, goal in self.final.items():
            blocks = self.plan.blocks[name]
            if goal > 0 and round(goal * blocks) >= blocks:
                raise ValueError(
                    f"`final_sparsity` {goal} would prune every weight of {name}, which has {blocks} "
                    f"{_parts(structure)}: no signal would pass. Lower it, or put {name} into `ignore`."
                )
        self.state: dict[str, dict[str, Tensor]] = {}
        self._multipliers: list[tuple[nn.Parameter, Tensor]] = []
        self._counts: dict[str, int] = {}
        self._make_buffers()

    @property
    def names(self) -> list[str]:
        """The targets: module names, or names of groups of units."""
        return list(self.plan.sizes)

    @property
    def memory(self) -> int:
        """Bytes kept while training: masks of the weights' dtype, and what the criterion gathers."""
        masks = sum(parameter.numel() * parameter.element_size() for parameter in self.plan.scored.values())
        return masks + sum(self.criterion.memory(parameter.numel()) for parameter in self.plan.scored.values())

    @property
    def grain(self) -> float:
        """How far rounding to whole parts may leave the sparsity from the goal."""
        return 0.5 * len(self.names) / sum(self.plan.blocks.values())

    @property
    def extent(self) -> str:
        """How much is pruned, in words."""
        parts = f"{self.plan.structure.kind}s" if self.plan.structure.in_units else "weights"
        return f"{sum(self.plan.sizes.values()):,} {parts} in {len(self.names)} modules"

    def bind(self) -> None:
        """Find the criterion's buffers again: modules may have been swapped, or moved to another device."""
        for parameter in self.plan.scored:
            module = self.model.get_submodule(parameter.rpartition(".")[0])
            keys = [key for key in module._buffers if key.startswith(_BUFFER)]
            self.state[parameter] = {key.removeprefix(_BUFFER): module._buffers[key] for key in keys}  # type: ignore[misc]

    @torch.no_grad()
    def accumulate(self) -> None:
        """Count this step's gradients for the scores to come."""
        for name, parameter in self.plan.scored.items():
            if parameter.grad is not None:
                self.criterion.accumulate(parameter.detach(), parameter.grad.detach(), self.state[name])

    @torch.no_grad()
    def update(self, goals: Mapping[str, float], seed: int) -> None:
        """Prune the lowest scores until the goals (by target name) are met.

        Args:
            goals (`dict[str, float]`): sparsity in [0, 1] by name.
            seed (`int`): of the `"random"` criterion, for this update.
        """
        self.apply()  # the optimizer has just moved what is pruned, and the zeros say what that is
        scores = {}
        for name, parameter in self.plan.scored.items():
            generator = torch.Generator(parameter.device).manual_seed(seed + zlib.crc32(name.encode()))
            scores[name] = self.criterion.score(parameter.detach(), self.state[name], generator)
        gone = self.plan.pruned()
        if self.criterion.revives:
            gone = {name: torch.zeros_like(mask) for name, mask in gone.items()}
        chosen = self.plan.choose(scores, gone, goals, self.scope)
        masks = self.plan.of_parameters(chosen)
        for name, parameter in self.plan.scored.items():
            self.criterion.compensate(parameter.data, masks[name], self.state[name])
            self.criterion.renew(self.state[name])
        self._hold(chosen, masks)

    @torch.no_grad()
    def read(self) -> None:
        """Take the zeros that the weights have for the masks: a resumed run, or sparse transfer."""
        pruned = self.plan.pruned()
        self._hold(pruned, self.plan.of_parameters(pruned))

    @torch.no_grad()
    def apply(self) -> None:
        """Set pruned weights to 0 again; the optimizer moved them by momentum."""
        for parameter, multiplier in self._multipliers:
            parameter.mul_(multiplier)

    def sparsity(self) -> float:
        """Share of the targets' weights, or units, that the masks prune."""
        return sum(self._counts.values()) / sum(self.plan.sizes.values())

    def sparsities(self) -> dict[str, float]:
        """The same by target."""
        return {name: self._counts.get(name, 0) / size for name, size in self.plan.sizes.items()}

    def reached(self) -> dict[str, float]:
        """Sparsity by target, counted from the weights themselves."""
        return {name: float(mask.float().mean()) for name, mask in self.plan.pruned().items()}

    def total(self, sparsities: Mapping[str, float]) -> float:
        """Sparsities by target as one number."""
        return sum(sparsities[name] * size for name, size in self.plan.sizes.items()) / sum(self.plan.sizes.values())

    def release(self) -> None:
        """Take the criterion's buffers off the model."""
        for parameter in self.plan.scored:
            module = self.model.get_submodule(parameter.rpartition(".")[0])
            for key in [key for key in module._buffers if key.startswith(_BUFFER)]:
                del module._buffers[key]
                module._non_persistent_buffers_set.discard(key)
        self.state = {name: {} for name in self.plan.scored}

    def gathered(self) -> bool:
        """Whether the criterion has seen any gradient."""
        return any(bool(tensor.any()) for state in self.state.values() for tensor in state.values())

    def _make_buffers(self) -> None:
        for name, parameter in self.plan.scored.items():
            module = self.model.get_submodule(name.rpartition(".")[0])
            for key, tensor in self.criterion.new_state(parameter.detach()).items():
                module.register_buffer(_BUFFER + key, tensor)
        self.bind()

    def _hold(self, pruned: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        # A product with a mask of the weight's own dtype is a tenth of the time of masked_fill_.
        self._multipliers = [(parameters[name], (~mask).to(parameters[name].dtype)) for name, mask in masks.items()]
        self._counts = {name: int(mask.count_nonzero()) for name, mask in pruned.items()}
        self.plan.settle(self.model, pruned)
        self.apply()


def _finals(final: float | Mapping[str, float], names: Mapping[str, int]) -> dict[str, float]:
    if not isinstance(final, Mapping):
        return dict.fromkeys(names, final)
    require_matches("final_sparsity", list(final), names)
    return {
        name: next((goal for pattern, goal in final.items() if fnmatch.fnmatchcase(name, pattern)), 0.0)
        for name in names
    }


def _parts(structure: Structure) -> str:
    return {"unstructured": "weights", "head": "heads", "neuron": "neurons", "layer": "layers"}.get(
        structure.name, f"parts of {structure.name}"
    )
