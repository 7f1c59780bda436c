"""What in a recipe does not go together, known before a step is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ..callbacks.base import resolve_step
from ..callbacks.pruning import PruningCallback
from ..pruning.pruner import Pruner
from ..recipe.source import KeyPath
from .phases import Finding, Level, Phases, PruningPhase
from .steps import Steps, learning_rates
from .targets import pruning_place

if TYPE_CHECKING:
    from ..recipe.schema import Recipe

_TOLERANCE = 0.01  # of sparsity: what rounding to whole units may cost without a word
_SAMPLES = 200  # learning rates looked at in a phase


def find_conflicts(
    recipe: Recipe,
    args: TrainingArguments,
    steps: Steps,
    phases: Phases,
    prunings: Mapping[int, PruningCallback],
    pruners: Mapping[int, Pruner],
) -> list[Finding]:
    """All findings about phases that stand in each other's way.

    Args:
        recipe ([`Recipe`]): the recipe.
        args (`transformers.TrainingArguments`): of its training.
        steps ([`Steps`]): of its training.
        phases ([`Phases`]): that could be laid onto the steps.
        prunings (`dict[int, PruningCallback]`): of the recipe, by number.
        pruners (`dict[int, Pruner]`): what they prune; one may be missing.
    """
    found = _Findings(recipe)
    for index, phase in phases.prunings.items():
        _check_pruning(found, index, phase, steps, phases, prunings[index], pruners.get(index))
    _check_rates(found, args, steps, phases)
    _check_distillation(found, steps, phases)
    _check_best(found, args, steps, phases)
    _check_frequencies(found, args, steps)
    return found.found


class _Findings:
    """Collects findings at places of a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.found: list[Finding] = []

    def add(self, level: Level, place: KeyPath, message: str) -> None:
        self.found.append(Finding(level, self.recipe.source.problem(place, message)))


def _check_pruning(
    found: _Findings,
    index: int,
    phase: PruningPhase,
    steps: Steps,
    phases: Phases,
    callback: PruningCallback,
    pruner: Pruner | None,
) -> None:
    place, name, settings = pruning_place(found.recipe, index), phase.section, callback.settings
    if settings.constant:
        found.add("note", place, f"`{name}` keeps the zeros of the weights; whether there are any is seen by `run`")
        return
    if settings.criterion.needs_gradients and phase.start == 0 and phase.goals and phase.goals[0][1] > 0:
        message = (
            f"`{name}`: criterion {settings.criterion.name!r} needs gradients, and before step 0 there are none. "
            "Raise `start_step`, or begin with an `initial_sparsity` of 0"
        )
        found.add("error", (*place, "start_step"), message)
    if phase.end == steps.total:
        message = (
            f"`{name}` reaches its final sparsity at step {phase.end}, the last of all: no step is left to recover. "
            "Lower `end_step`"
        )
        found.add("warning", (*place, "end_step"), message)
    frequency = max(1, callback.settings.timeline(steps.total, resolve_step).frequency)
    if settings.gradual and frequency > phase.end - phase.start:
        message = (
            f"`{name}` updates its masks every {frequency} steps, but its phase has {phase.end - phase.start} (steps "
            f"{phase.start} to {phase.end}): all is pruned at once at its end. Lower `frequency`"
        )
        found.add("warning", (*place, "frequency"), message)
    wanted, reached = phase.wanted, phase.reached
    if pruner is not None and wanted is not None and reached is not None and abs(wanted - reached) > _TOLERANCE:
        parts = sum(pruner.plan.blocks.values())
        message = f"`{name}` asks for a final sparsity of {wanted:.1%}, but {parts} parts can only make {reached:.1%}"
        found.add("warning", (*place, "final_sparsity"), message)
    qat = phases.quantization
    if qat is None or qat.freeze is None:
        return
    if phase.end > qat.freeze:
        message = (
            f"`{name}` goes on until step {phase.end}, but activation ranges are frozen at step {qat.freeze}: they "
            "would be those of another model than the result. Lower `end_step`, or raise `quantization.freeze_step`"
        )
        found.add("error", (*place, "end_step"), message)
    elif qat.start < phase.end:
        message = (
            f"QAT begins at step {qat.start}, before `{name}` ends at step {phase.end}: ranges are observed on a "
            f"model that still changes. Raise `quantization.start_step` to {phase.end} or later"
        )
        found.add("warning", ("quantization", "start_step"), message)


def _check_rates(found: _Findings, args: TrainingArguments, steps: Steps, phases: Phases) -> None:
    if steps.warmup >= steps.total:
        message = (
            f"warm-up takes {steps.warmup} steps, but training has {steps.total}: the learning rate never reaches "
            f"{steps.peak:g}. Lower `warmup_steps`"
        )
        found.add("warning", ("training", "warmup_steps"), message)
    if phases.quantization is None:
        return
    start = phases.quantization.start
    gap = max(1, (steps.total - start) // _SAMPLES)
    rates = learning_rates(args, steps.total, range(start, steps.total, gap))
    if rates is not None and max(rates) == 0:
        message = (
            f"the learning rate is 0 from step {start} to the end ({steps.scheduler} from {steps.peak:g}): the "
            "weights do not learn to be int8. Change `learning_rate` or `lr_scheduler_type`, or begin QAT earlier"
        )
        place = ("training", "learning_rate" if steps.peak == 0 else "lr_scheduler_type")
        found.add("warning", place, message)


def _check_distillation(found: _Findings, steps: Steps, phases: Phases) -> None:
    distillation, qat = phases.distillation, phases.quantization
    if distillation is not None and qat is not None and distillation.end <= qat.start:
        message = (
            f"distillation ends at step {distillation.end}, before QAT begins at step {qat.start}: the teacher does "
            "not teach the int8 model"
        )
        found.add("note", ("distillation", "end_step"), message)


def _check_best(found: _Findings, args: TrainingArguments, steps: Steps, phases: Phases) -> None:
    """Which evaluations the best checkpoint is chosen from: callbacks forget those of an earlier phase."""
    if not args.load_best_model_at_end:
        return
    place, qat = ("training", "load_best_model_at_end"), phases.quantization
    ends = [phase.end for phase in phases.prunings.values() if phase.goals]
    first = max([1, *ends, *([qat.start + 1] if qat is not None else [])])
    saved = set(steps.saves)
    counted = [step for step in steps.evaluations if step >= first and step in saved]
    if not counted:
        what = "QAT begins" if qat is not None and first == qat.start + 1 else "pruning ends"
        message = (
            f"`load_best_model_at_end` finds no checkpoint: {what} at step {first - (what == 'QAT begins')}, and what "
            f"was evaluated before does not count; after it no checkpoint is both evaluated and saved (evaluations at "
            f"{_list(steps.evaluations)}; checkpoints at {_list(steps.saves)}). Lower `eval_delay`, "
            "`eval_steps` or `save_steps`"
        )
        found.add("error", place, message)
    elif qat is not None and qat.freeze is not None:
        early = [step for step in counted if step < qat.freeze]
        if early:
            message = (
                f"the best checkpoint may be one from before step {qat.freeze}, where ranges are frozen: after step "
                f"{early[0]} they have seen {early[0] - qat.start} of {qat.freeze - qat.start} steps. If that "
                "matters, lower `quantization.freeze_step`, or set `eval_delay`"
            )
            found.add("warning", place, message)


def _check_frequencies(found: _Findings, args: TrainingArguments, steps: Steps) -> None:
    if args.auto_find_batch_size:
        message = (
            f"`auto_find_batch_size` makes batches smaller than {steps.batch_size} where memory is short, and then "
            f"there are more steps than the {steps.total} planned"
        )
        found.add("note", ("training", "auto_find_batch_size"), message)
    pairs = (
        ("eval_steps", args.eval_strategy, "the model is evaluated at the end only"),
        ("save_steps", args.save_strategy, "a checkpoint is saved at the end only"),
        ("logging_steps", args.logging_strategy, "nothing is logged before the end"),
    )
    for key, strategy, means in pairs:
        every = getattr(args, key)
        # Only what the recipe itself asks for: the default of 500 says nothing about a short training.
        asked = key in found.recipe.training and strategy == IntervalStrategy.STEPS
        if asked and every is not None and every > steps.total:
            message = f"`{key}` is {every:g}, but training has {steps.total} steps: {means}. Lower it"
            found.add("warning", ("training", key), message)


def _list(steps: tuple[int, ...]) -> str:
    if not steps:
        return "no step"
    shown = ", ".join(str(step) for step in steps[-5:])
    return f"steps {'... ' if len(steps) > 5 else ''}{shown}" if len(steps) > 1 else f"step {shown}"
