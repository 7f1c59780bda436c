"""What a PruningCallback makes sure of before it prunes."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerState

from ..pruning.masks import UnitMasks
from ..pruning.pruner import Pruner
from ..pruning.schedules import Timeline
from ..pruning.settings import PruningSettings
from ..pruning.shrink import check_shrinkable
from .base import run_notes

_TOLERANCE = 0.001


def check_shape(model: nn.Module, pruner: Pruner, settings: PruningSettings) -> None:
    """Refuse to shrink to a shape that the model's config cannot say; nothing was trained yet.

    Raises:
        `ValueError`: naming the nearest shape that it can say.
    """
    assert isinstance(pruner.plan, UnitMasks)
    groups, kind = pruner.plan.groups, settings.structure.kind
    if pruner.scope == "global" and len(groups) > 1:
        least = min(group.count for group in groups)
        kept = least - round(min(pruner.final.values()) * least)
        raise ValueError(
            f"`shrink=True` with scope 'global' leaves each layer another number of {kind}s, which the config of "
            f"{type(model).__name__} cannot say. With `uniform=True` each keeps {kept} of {least}; or leave out "
            "`shrink`."
        )
    check_shrinkable(model, groups, {g.name: g.count - round(pruner.final[g.name] * g.count) for g in groups})


def check_owner(callback: Any, pruner: Pruner, state: TrainerState) -> None:
    """Refuse a weight that another callback of this run prunes."""
    owners: dict[int, set[str]] = run_notes(state).setdefault("pruned", {})
    mine = set(pruner.plan.scored)
    for other, names in owners.items():
        if other != id(callback) and names & mine:
            raise ValueError(
                f"two PruningCallbacks prune {min(names & mine)}. Give each weight to one of them, with `targets` "
                "and `ignore`."
            )
    owners[id(callback)] = mine


def check_trainable(pruner: Pruner, settings: PruningSettings) -> None:
    """Refuse a criterion that needs gradients of frozen weights."""
    frozen = [name for name, parameter in pruner.plan.scored.items() if not parameter.requires_grad]
    if frozen and settings.criterion.needs_gradients and not settings.constant:
        raise ValueError(
            f"criterion {settings.criterion.name!r} needs gradients, but {len(frozen)} of the weights are frozen, "
            f"such as {frozen[0]}. Use 'magnitude', or put them into `ignore`."
        )


def check_begun(pruner: Pruner, settings: PruningSettings, line: Timeline) -> None:
    """The first step of a run: compare the zeros that are there with the goal.

    Raises:
        `ValueError`: if there are more than the goal wants, or, for sparse transfer, none.
    """
    if settings.constant:
        pruner.read()
        if pruner.sparsity() == 0:
            raise ValueError(
                f"schedule 'constant' keeps the zeros that the weights have, but there are none in {pruner.extent}. "
                "Load a pruned model, or use another schedule."
            )
        return
    present, wanted = (pruner.total(sparsity) for sparsity in (pruner.reached(), pruner.final))
    if present > wanted + _TOLERANCE:
        raise ValueError(
            f"{present:.1%} of {pruner.extent} is 0 already, more than the goal of {wanted:.1%}. Raise "
            "`final_sparsity`, or keep the zeros with schedule 'constant'."
        )
    if line.start == 0 and settings.criterion.needs_gradients and pruner.total(settings.goals(pruner.final, line, 0)):
        raise ValueError(
            f"criterion {settings.criterion.name!r} needs gradients, and before step 0 there are none. Raise "
            "`start_step`, or begin with an `initial_sparsity` of 0."
        )


def check_resumed(pruner: Pruner, settings: PruningSettings, line: Timeline, step: int) -> None:
    """A resumed run: take the zeros of the checkpoint for the masks.

    Raises:
        `ValueError`: if they are not those of such a run, or gathered scores were lost.
    """
    if step >= line.start:
        pruner.read()
    wanted = 0.0 if settings.constant else pruner.total(settings.goals(pruner.final, line, step))
    if pruner.sparsity() < wanted - max(0.01, pruner.grain):
        raise ValueError(
            f"training resumes at step {step}, where {wanted:.1%} of {pruner.extent} should be 0, but in the "
            f"checkpoint it is {pruner.sparsity():.1%}: it was saved by another run. Start a new run from its weights."
        )
    criterion = settings.criterion
    expected = criterion.needs_gradients and not settings.constant and line.gathers(step, criterion.lasting)
    renewed = line.is_update(step) and not criterion.lasting
    if expected and step < line.end and not renewed and not pruner.gathered():
        raise ValueError(
            f"training resumes at step {step}, but the scores that criterion {settings.criterion.name!r} had gathered "
            "were not loaded. If the checkpoint has them, the callback came too late: pass it to "
            "Trainer(callbacks=[...]), or call .attach(trainer) before train() if the Trainer has a `model_init`."
        )


def announcement(pruner: Pruner, settings: PruningSettings, line: Timeline) -> str:
    """One line on what is going to be done."""
    if settings.constant:
        return f"pruning: keeps the zeros of {pruner.sparsity():.1%} of {pruner.extent}"
    name = settings.schedule if isinstance(settings.schedule, str) else "in steps"
    when = f"at step {line.start}" if line.start == line.end else f"{name} from step {line.start} to {line.end}"
    return (
        f"pruning {settings.what}: {pruner.total(pruner.final):.1%} of {pruner.extent}, {when}; keeps "
        f"{pruner.memory / 1e6:.1f} MB while training"
    )
