"""How long a recipe's training will take, from a few real steps in each of its phases."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import SequentialSampler
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..recipe.prepare import prepare
from ..recipe.training import training_arguments

if TYPE_CHECKING:
    from datasets import Dataset

    from ..recipe.prepare import Prepared
    from .plan import Plan

_PLAIN, _UPDATES = 4, 2  # steps measured in each phase: without and with an update of masks; one more to warm up
_EVALUATED = 128  # rows
# What has nothing to do with the time of a step, or would write or ask for something.
_QUIET: dict[str, Any] = {
    "train_sampling_strategy": "sequential",
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_strategy": "no",
    "load_best_model_at_end": False,
    "eval_on_start": False,
    "report_to": "none",
    "push_to_hub": False,
    "disable_tqdm": True,
    "auto_find_batch_size": False,
}


@dataclass(frozen=True)
class MeasuredPhase:
    """The time of one phase.

    Args:
        name (`str`): what goes on in it.
        start, end (`int`): its steps, `end` not among them.
        step_seconds (`float`): of one optimizer step.
        updates (`int`): how often masks change.
        update_seconds (`float`): what one such change adds to its step.
    """

    name: str
    start: int
    end: int
    step_seconds: float
    updates: int
    update_seconds: float

    @property
    def seconds(self) -> float:
        """Of the whole phase."""
        return (self.end - self.start) * self.step_seconds + self.updates * self.update_seconds


@dataclass(frozen=True)
class Timing:
    """The time of a run, as this machine would take it now.

    Args:
        device (`str`): what was measured on.
        phases (`tuple[MeasuredPhase, ...]`): of the training.
        evaluations (`int`): how often the Trainer evaluates.
        evaluation_seconds (`float`): one evaluation.
        float_seconds (`float`): the training of the float twin, which may be the teacher; 0 where there is none, or
            where it is the model that is quantized after training.
    """

    device: str
    phases: tuple[MeasuredPhase, ...]
    evaluations: int
    evaluation_seconds: float
    float_seconds: float

    @property
    def total(self) -> float:
        """Seconds of all training and evaluation; loading, conversion and the comparison are not in it."""
        trained = sum(phase.seconds for phase in self.phases) + self.float_seconds
        return trained + self.evaluations * self.evaluation_seconds


@dataclass(frozen=True)
class _Step:
    """A step to measure: in which phase, pretending which step number, on which rows."""

    phase: int
    number: int
    kind: str  # "warm-up", "plain" or "update"
    rows: list[int]


class _Finished(Exception):
    """All steps are measured."""


def measure(plan: Plan) -> Timing:
    """Trains a few steps in each phase of a recipe, on real batches of typical lengths, and throws them away.

    Nothing is written, and random numbers go on as if nothing had been drawn.

    Args:
        plan ([`Plan`]): without errors.

    Raises:
        [`RecipeError`], `ValueError`: what a run would raise before its first step.
    """
    # A cache of the teacher's outputs would be written.
    recipe = plan.recipe
    if recipe.distillation is not None:
        recipe = dataclasses.replace(recipe, distillation=dataclasses.replace(recipe.distillation, cache=None))
    segments = phase_segments(plan)
    with _untouched_random_state(), tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        prepared = prepare(recipe)
        values = {**recipe.training, **_QUIET, "max_steps": plan.steps.total}
        args, _ = training_arguments(values, folder, recipe.seed, recipe.source)
        batches = _typical_steps(plan, prepared, folder)
        float_seconds = 0.0
        if len(recipe.trainings()) > 1:
            steps = _choose(plan, [("float", 0, plan.steps.total)], batches, pruning=False)
            driver, _ = _drive(prepared, args, [], steps)
            float_seconds = plan.steps.total * driver.plain(0)
        steps = _choose(plan, segments, batches)
        driver, trainer = _drive(prepared, args, recipe.callbacks(), steps)
        evaluation = 0.0
        if plan.steps.evaluations:
            evaluation = _time_evaluation(trainer, prepared.encoded["validation"])
    phases = tuple(
        MeasuredPhase(name, start, end, driver.plain(index), len(_updates(plan, start, end)), driver.extra(index))
        for index, (name, start, end) in enumerate(segments)
    )
    return Timing(_device(args), phases, len(plan.steps.evaluations), evaluation, float_seconds)


def phase_segments(plan: Plan) -> list[tuple[str, int, int]]:
    """The parts of a training in which every step does the same: name, first step, and the first step after it."""
    phases, total = plan.phases, plan.steps.total
    prunings, qat, distillation = phases.prunings.values(), phases.quantization, phases.distillation
    bounds = {0, total}
    for phase in prunings:
        bounds |= {max(phase.start - 1, 0), phase.end} if phase.goals else set()
    if distillation is not None:
        bounds |= {distillation.start, distillation.end}
    if qat is not None:
        bounds |= {qat.start} | ({qat.freeze} if qat.freeze is not None else set())
    marks = sorted(bound for bound in bounds if 0 <= bound <= total)
    found = []
    for start, end in itertools.pairwise(marks):
        parts = ["pruning"] if any(phase.goals and phase.start - 1 <= start < phase.end for phase in prunings) else []
        if qat is not None and start >= qat.start:
            parts.append("QAT" if qat.freeze is None or start < qat.freeze else "QAT with frozen ranges")
        if distillation is not None and distillation.start <= start < distillation.end:
            parts.append("distillation")
        found.append((" + ".join(parts) or "float", start, end))
    return found


def _updates(plan: Plan, start: int, end: int) -> list[int]:
    """The steps, by the number that they begin with, after which masks change."""
    found = {step - 1 for phase in plan.phases.prunings.values() for step, _ in phase.goals}
    return sorted(step for step in found if start <= step < end)


def _choose(
    plan: Plan, segments: Sequence[tuple[str, int, int]], batches: Sequence[list[int]], pruning: bool = True
) -> list[_Step]:
    """The steps to measure. Those of one phase have batches of all lengths, so that their mean is a typical step's."""
    steps = []
    for phase, (_, start, end) in enumerate(segments):
        updates = _updates(plan, start, end) if pruning else []
        few = updates[:: max(1, -(-len(updates) // _UPDATES))]
        known, plain = set(updates), []
        for number in range(start, end):
            if number not in known:
                plain.append(number)
            if len(plain) == _PLAIN:
                break
        middle = batches[len(batches) // 2]
        chosen = [_Step(phase, number, "update", middle) for number in few]
        for place, number in enumerate(plain):
            rows = batches[int((place + 0.5) / len(plain) * len(batches))]
            chosen.append(_Step(phase, number, "plain", rows))
        chosen.sort(key=lambda step: step.number)
        steps += [dataclasses.replace(chosen[0], kind="warm-up", rows=middle), *chosen]
    return steps


def _typical_steps(plan: Plan, prepared: Prepared, folder: str) -> list[list[int]]:
    """Rows of each whole step of an epoch as the recipe's own sampler draws them, shortest first."""
    sampling = {key: value for key, value in prepared.recipe.training.items() if key == "train_sampling_strategy"}
    values = {**prepared.recipe.training, **_QUIET, "train_sampling_strategy": "random", **sampling}
    args, _ = training_arguments(values, folder, prepared.recipe.seed, prepared.recipe.source)
    trainer = _trainer(Trainer, prepared, args, prepared.encoded["train"], [])
    drawn: list[list[int]] = list(trainer.get_train_dataloader().batch_sampler)
    lengths = [len(row) for row in prepared.encoded["train"]["input_ids"]]
    count, size = plan.steps.accumulation, plan.steps.batch_size
    groups = [drawn[place : place + count] for place in range(0, len(drawn), count)]
    flat = [[row for batch in group for row in batch] for group in groups]
    whole = [rows for rows in flat if len(rows) == count * size] or flat

    def padded(rows: list[int]) -> int:
        parts = [rows[place : place + size] for place in range(0, len(rows), size)]
        return sum(len(part) * max(lengths[row] for row in part) for part in parts)

    return sorted(whole, key=padded)


class _Sequential(Trainer):
    """Takes the rows in the order in which they stand."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


def _trainer(
    kind: type[Trainer], prepared: Prepared, args: TrainingArguments, rows: Dataset, callbacks: list[TrainerCallback]
) -> Trainer:
    trainer = kind(
        model=prepared.model,
        args=args,
        train_dataset=rows,
        processing_class=prepared.tokenizer,
        # Its metrics are those of all of the validation data.
        data_collator=prepared.trainer_options["data_collator"],
        callbacks=callbacks,
    )
    for shipped in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(shipped)
    return trainer


class _Driver(TrainerCallback):
    """Sets the number of each step before other callbacks see it, and stops the clock."""

    def __init__(self, steps: list[_Step]) -> None:
        self.steps = steps
        self.place = 0
        self.begun = self.stepping = _now()
        self.times: list[tuple[_Step, float, float]] = []  # whole step, and from the optimizer on

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.global_step = self.steps[self.place].number

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stepping = _now()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        now = _now()
        self.times.append((self.steps[self.place], now - self.begun, now - self.stepping))
        self.place += 1
        if self.place == len(self.steps):
            raise _Finished
        control.should_training_stop = False
        self.begun = _now()  # a step begins with fetching its rows

    def plain(self, phase: int) -> float:
        """Seconds of a step of a phase; of one with an update of masks where all have one."""
        found = {
            kind: [t for step, t, _ in self.times if step.phase == phase and step.kind == kind] for kind in _KINDS
        }
        return statistics.fmean(found["plain"] or found["update"])

    def extra(self, phase: int) -> float:
        """Seconds that an update of masks adds."""
        found = {
            kind: [t for step, _, t in self.times if step.phase == phase and step.kind == kind] for kind in _KINDS
        }
        if not (found["plain"] and found["update"]):
            return 0.0
        return max(0.0, statistics.fmean(found["update"]) - statistics.fmean(found["plain"]))


_KINDS = ("plain", "update")


def _drive(
    prepared: Prepared, args: TrainingArguments, callbacks: list[TrainerCallback], steps: list[_Step]
) -> tuple[_Driver, Trainer]:
    driver = _Driver(steps)
    rows = prepared.encoded["train"].select([row for step in steps for row in step.rows])
    trainer = _trainer(_Sequential, prepared, args, rows, [driver, *callbacks])
    with contextlib.suppress(_Finished):
        trainer.train()
    return driver, trainer


def _time_evaluation(trainer: Trainer, rows: Dataset) -> float:
    gap = max(1, len(rows) // _EVALUATED)
    some = rows.select(range(0, len(rows), gap))
    begun = _now()
    trainer.evaluate(some)
    return (_now() - begun) * len(rows) / len(some)


@contextlib.contextmanager
def _untouched_random_state() -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _device(args: TrainingArguments) -> str:
    if args.device.type == "cuda":
        return str(torch.cuda.get_device_name(args.device))
    return f"{args.device.type}, {torch.get_num_threads()} threads"
