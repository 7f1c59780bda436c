"""What a recipe is going to do, without doing it: nothing is trained, written, or loaded but data and configs."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel, TrainingArguments

from ..callbacks.pruning import PruningCallback
from ..checkpoint import architecture
from ..evaluation.tasks import CAUSAL, CLASSIFICATION, REGRESSION
from ..evaluation.windows import check_length, default_length
from ..pruning.structures import get_structure
from ..recipe.data import load_labels
from ..recipe.data_kinds import auto_class, load_config, trainer_data
from ..recipe.prepare import at, read_files
from ..schemes import get_scheme
from ..texts import find_tokenizer, length_limit
from .conflicts import find_conflicts
from .phases import Finding, Phases, find_phases
from .sizes import (
    Memory,
    Size,
    count_zeros,
    file_bytes,
    result_tensors,
    stored_tensors,
    training_memory,
)
from .steps import Steps, count_steps, learning_rates
from .targets import Chosen, Match, Targets, build_model, find_targets

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..recipe.schema import Recipe
    from .measure import Timing

_POINTS = 240  # of the learning rate, for the picture


@dataclass(frozen=True)
class Plan:
    """What a recipe is going to do.

    Args:
        recipe ([`Recipe`]): the recipe.
        model (`str`): class of its model.
        precision (`str`): of the training, and why.
        steps ([`Steps`]): of one training in one process.
        rates (`tuple[tuple[int, float], ...]`): step and learning rate; empty where it depends on evaluations.
        matches (`tuple[Match, ...]`): what the patterns match.
        chosen (`tuple[Chosen, ...]`): what is pruned and quantized.
        phases ([`Phases`]): when.
        size ([`Size`], *optional*): of the result; `None` where errors leave it open.
        memory ([`Memory`], *optional*): of the training; the same.
        findings (`tuple[Finding, ...]`): errors, warnings and notes, errors first.
        timing ([`Timing`], *optional*): measured, where that was asked for.
    """

    recipe: Recipe
    model: str
    precision: str
    steps: Steps
    rates: tuple[tuple[int, float], ...]
    matches: tuple[Match, ...]
    chosen: tuple[Chosen, ...]
    phases: Phases
    size: Size | None
    memory: Memory | None
    findings: tuple[Finding, ...]
    timing: Timing | None = None

    @property
    def has_errors(self) -> bool:
        """Whether a run would fail, or not give what the recipe says."""
        return any(finding.level == "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values."""
        return {
            "recipe": self.recipe.to_dict(),
            "model": self.model,
            "precision": self.precision,
            "trainings": self.recipe.trainings(),
            "steps": dataclasses.asdict(self.steps),
            "learning_rates": [list(point) for point in self.rates],
            "matches": [dataclasses.asdict(match) for match in self.matches],
            "chosen": [dataclasses.asdict(chosen) for chosen in self.chosen],
            "pruning": [dataclasses.asdict(phase) for phase in self.phases.prunings.values()],
            "quantization": _as_dict(self.phases.quantization),
            "after_training": _as_dict(self.phases.after_training),
            "distillation": _as_dict(self.phases.distillation),
            "size": self.size and {**dataclasses.asdict(self.size), "sparsity": self.size.sparsity},
            "memory": self.memory and {**dataclasses.asdict(self.memory), "total": self.memory.total},
            "findings": [{"level": finding.level, **dataclasses.asdict(finding.problem)} for finding in self.findings],
            "timing": self.timing and {**dataclasses.asdict(self.timing), "total": self.timing.total},
        }

    def to_json(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def to_html(self, path: str | Path) -> None:
        """Write the plan as one page with a picture of its timeline."""
        from .page import plan_page

        Path(path).write_text(plan_page(self), encoding="utf-8")

    def __rich__(self) -> RenderableType:
        from .text import plan_text

        return plan_text(self)


def make_plan(recipe: Recipe) -> Plan:
    """Works out what a run of the recipe would do.

    The data files are read and the model is built from its config; weights are not loaded.

    Args:
        recipe ([`Recipe`]): the recipe.

    Returns:
        [`Plan`]: conflicts are among its `findings`.

    Raises:
        [`RecipeError`]: if a file, column, label or model is not as the recipe says, so that there is nothing to plan.
    """
    args, precision, examples, model = _read(recipe)
    with at(recipe, ("training",)):
        steps = count_steps(args, examples)
        peak = min(steps.warmup, steps.total - 1)
        points = sorted({peak, *(step * (steps.total - 1) // _POINTS for step in range(_POINTS + 1))})
        try:
            rates = learning_rates(args, steps.total, points)
        except TypeError as error:  # a wrong `lr_scheduler_kwargs`
            raise ValueError(str(error)) from error
    prunings = {index: PruningCallback(**dataclasses.asdict(one)) for index, one in enumerate(recipe.pruning)}
    targets = find_targets(recipe, model, prunings)
    phases = find_phases(recipe, model, steps.total, steps.examples, prunings, targets.pruners)
    findings = [Finding("error", problem) for problem in targets.problems] + phases.findings
    findings += find_conflicts(recipe, args, steps, phases, prunings, targets.pruners)
    size: Size | None = None
    memory: Memory | None = None
    if not targets.problems:
        teacher = _teacher_bytes(recipe, targets)
        memory = training_memory(args, model, targets.pruners, teacher)
        try:
            size = _size(recipe, targets)
        except ValueError as error:
            findings.append(Finding("error", recipe.source.problem(("quantization",), f"`quantization`: {error}")))
    levels = ("error", "warning", "note")
    return Plan(
        recipe=recipe,
        model=type(model).__name__,
        precision=precision,
        steps=steps,
        rates=() if rates is None else tuple(zip(points, rates, strict=True)),
        matches=tuple(targets.matches),
        chosen=tuple(targets.chosen),
        phases=phases,
        size=size,
        memory=memory,
        findings=tuple(sorted(findings, key=lambda finding: levels.index(finding.level))),
    )


def _read(recipe: Recipe) -> tuple[TrainingArguments, str, int, PreTrainedModel]:
    """The training's arguments, its precision, how many examples it has, and the model without its weights."""
    task = recipe.to_task()
    args, precision, rows = read_files(recipe, task)
    with at(recipe, ("model",)):
        config, task = load_config(recipe, task, rows)
        method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
        if method is not None:
            raise ValueError(f"{recipe.model} is quantized already ({method}). Start from the float model")
        tokenizer = find_tokenizer(None, [recipe.model])
        running = any(get_structure(one.structure).in_units for one in recipe.pruning)
        model = build_model(auto_class(task), config, running)
    with at(recipe, ("data", "max_length")):
        max_length = recipe.data.max_length
        if task.problem_type == CAUSAL:
            max_length = max_length or default_length(tokenizer, model)
            check_length(model, max_length)
        else:
            max_length = length_limit(tokenizer, [model], max_length)
    if task.problem_type in (CLASSIFICATION, REGRESSION):
        load_labels(recipe, task, rows, config)
        return args, precision, len(rows["train"]), model
    # How many windows texts make is known once they are tokens.
    encoded, _ = trainer_data(recipe, task, rows, config, tokenizer, max_length)
    return args, precision, len(encoded["train"]), model


def _size(recipe: Recipe, targets: Targets) -> Size:
    pruners, model = targets.pruners, targets.model
    shrinking = {index for index in pruners if recipe.pruning[index].shrink}
    before = stored_tensors(model)
    if recipe.quantization is None:
        after = result_tensors(model, pruners, shrinking, None, get_scheme("int8_static"))
    else:
        scheme = get_scheme(recipe.quantization.scheme)
        after = result_tensors(model, pruners, shrinking, targets.selection, scheme)
    float_after = result_tensors(model, pruners, shrinking, None, get_scheme("int8_static"))
    unknown = any(one.schedule == "constant" for one in recipe.pruning)
    zeros = sum(count_zeros(pruner) for index, pruner in pruners.items() if index not in shrinking)
    return Size(
        float_bytes=file_bytes(before),
        result_bytes=file_bytes(after),
        parameters=sum(tensor.numel() for tensor in before.values()),
        kept=sum(tensor.numel() for tensor in float_after.values()),
        zeros=None if unknown else zeros,
    )


def _teacher_bytes(recipe: Recipe, targets: Targets) -> int | None:
    """Bytes of the teacher's weights: another copy of the model, or of the model that the recipe names."""
    if recipe.distillation is None:
        return 0
    model: torch.nn.Module = targets.model
    name = recipe.distillation.teacher
    if name is not None:
        try:
            config = AutoConfig.from_pretrained(name)
            kind = architecture(config, name) if config.architectures else AutoModel
            build = getattr(kind, "_from_config", None) or kind.from_config
            with torch.random.fork_rng(), torch.device("meta"):
                model = build(config)
        except (OSError, ValueError):
            return None
    return sum(4 * parameter.numel() for parameter in model.parameters())


def _as_dict(phase: Any) -> dict[str, Any] | None:
    return None if phase is None else dataclasses.asdict(phase)
