"""When a recipe prunes, distils, observes ranges and computes as int8: its phases in optimizer steps."""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import nn

from ..callbacks.base import resolve_step
from ..callbacks.distillation import DistillationCallback
from ..callbacks.pruning import PruningCallback
from ..pruning.pruner import Pruner
from ..recipe.source import KeyPath, Problem
from ..recipe.values import dotted
from ..schemes import get_scheme
from .sizes import predicted_sparsity
from .targets import pruning_place

if TYPE_CHECKING:
    from ..recipe.schema import Recipe

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """Something about a recipe that its user should know.

    Args:
        level (`str`): `"error"`: it cannot run, or cannot give what it says; `"warning"`; `"note"`.
        problem ([`Problem`]): what, and where in the file.
    """

    level: Level
    problem: Problem

    def __str__(self) -> str:
        return f"{self.level}: {self.problem}"


@dataclass(frozen=True)
class PruningPhase:
    """One pruning.

    Args:
        section (`str`): `"pruning"`, or `"pruning[1]"`.
        what (`str`): structure and criterion.
        start (`int`): first step with pruning.
        end (`int`): step from which on the masks stay.
        goals (`tuple[tuple[int, float], ...]`): step and sparsity of the targets after each update of the masks; the
            step is the number of optimizer steps that are over.
        wanted, reached (`float`, *optional*): final sparsity of the targets as asked for, and as whole parts allow;
            unknown where present zeros are kept.
        shrink (`bool`): whether what is pruned is taken out at the end.
    """

    section: str
    what: str
    start: int
    end: int
    goals: tuple[tuple[int, float], ...]
    wanted: float | None
    reached: float | None
    shrink: bool


@dataclass(frozen=True)
class QATPhase:
    """Fake-quant: from `start` on ranges are observed, from `freeze` on they stay; `None`: there are no ranges."""

    scheme: str
    start: int
    freeze: int | None


@dataclass(frozen=True)
class AfterTraining:
    """Quantization once the float model is trained; of a static scheme with ranges found on so many examples."""

    scheme: str
    calibration_samples: int | None


@dataclass(frozen=True)
class DistillationPhase:
    """Steps `start` to `end` learn from a teacher, `None`: a copy of the float model."""

    start: int
    end: int
    teacher: str | None


@dataclass
class Phases:
    """All phases of a recipe that could be laid onto its steps, and what is wrong with the others."""

    prunings: dict[int, PruningPhase] = field(default_factory=dict)
    quantization: QATPhase | None = None
    after_training: AfterTraining | None = None
    distillation: DistillationPhase | None = None
    findings: list[Finding] = field(default_factory=list)


def find_phases(
    recipe: Recipe,
    model: nn.Module,
    total: int,
    examples: int,
    prunings: Mapping[int, PruningCallback],
    pruners: Mapping[int, Pruner],
) -> Phases:
    """The phases of a recipe by the rules of its callbacks.

    Args:
        recipe ([`Recipe`]): the recipe.
        model (`torch.nn.Module`): its model; the meta device will do.
        total (`int`): all optimizer steps.
        examples (`int`): rows of the training data, or windows of its texts.
        prunings (`dict[int, PruningCallback]`): new ones of its pruning sections, by number.
        pruners (`dict[int, Pruner]`): what they prune; one may be missing.
    """
    phases = Phases()
    for index, callback in prunings.items():
        place = pruning_place(recipe, index)
        try:
            phases.prunings[index] = _pruning(callback, pruners.get(index), total, dotted(place))
        except ValueError as error:
            key = next((key for key in ("end_step", "start_step", "schedule") if f"`{key}`" in str(error)), "schedule")
            _error(recipe, phases, (*place, key), error)
    if recipe.distillation is not None:
        wanted = recipe.distillation
        try:
            distillation = DistillationCallback(**dataclasses.asdict(wanted))
            start, end = distillation.check_steps(total)
            if wanted.teacher is None:  # another one would have to be loaded
                distillation.check(model)
            phases.distillation = DistillationPhase(start, min(end, total), wanted.teacher)
        except ValueError as error:
            named = [key for key in re.findall(r"`(\w+)`", str(error)) if hasattr(wanted, key)]
            _error(recipe, phases, ("distillation", *(named[:1] or ["start_step"])), error)
    if (quantization := recipe.quantization) is not None:
        static = get_scheme(quantization.scheme).activations == "static"
        if recipe.quantizes_after_training:
            samples = min(quantization.calibration_samples, examples) if static else None
            phases.after_training = AfterTraining(quantization.scheme, samples)
            return phases
        start = resolve_step(quantization.start_step, total)
        freeze = resolve_step(quantization.freeze_step, total)
        if start >= total:
            message = (
                f"`start_step` ({quantization.start_step}, step {start}) is not before the end of training ({total} "
                "steps): no QAT phase is left. Lower `start_step` or train longer"
            )
            _error(recipe, phases, ("quantization", "start_step"), message)
        elif static and freeze <= start:
            message = (
                f"`freeze_step` ({quantization.freeze_step}, step {freeze}) must come after `start_step` "
                f"({quantization.start_step}, step {start}): ranges are observed between them. Lower `start_step` or "
                "raise `freeze_step`"
            )
            _error(recipe, phases, ("quantization", "freeze_step"), message)
        else:
            phases.quantization = QATPhase(quantization.scheme, start, min(freeze, total) if static else None)
    return phases


def _pruning(callback: PruningCallback, pruner: Pruner | None, total: int, section: str) -> PruningPhase:
    settings = callback.settings
    line = settings.timeline(total, resolve_step)
    if settings.constant:
        return PruningPhase(section, f"{settings.what}: keeps present zeros", 0, 0, (), None, None, settings.shrink)
    goal = settings.goal
    finals = goal if isinstance(goal, Mapping) else {"": goal}
    wanted = reached = statistics.fmean(finals.values())
    if pruner is not None:
        finals = pruner.final
        wanted, reached = predicted_sparsity(pruner)
    goals = []
    for step in range(line.start, line.end + 1):
        if line.is_update(step):
            now = settings.goals(finals, line, step)
            goals.append((step, statistics.fmean(now.values()) if pruner is None else pruner.total(now)))
    return PruningPhase(section, settings.what, line.start, line.end, tuple(goals), wanted, reached, settings.shrink)


def _error(recipe: Recipe, phases: Phases, place: KeyPath, what: Exception | str) -> None:
    message = f"`{dotted(place[:-1])}`: {what}"
    phases.findings.append(Finding("error", recipe.source.problem(place, message)))
