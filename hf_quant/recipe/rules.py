"""The rules of a recipe's sections, beyond the types of single values."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from .sections import Data, Pruning, Quantization
from .source import KeyPath, Problem, Source
from .values import check_type, dotted, fits

if TYPE_CHECKING:
    from ..evaluation.tasks import Task


def check_fields(
    values: Mapping[str, Any], kind: type, path: KeyPath, source: Source, skip: set[str] | None = None
) -> list[Problem]:
    """Problems of the values of a section (or of the top level), each by itself."""
    hints, problems = hints_of(kind), []
    for f in dataclasses.fields(kind):
        if f.name not in values or f.name in (skip or ()):
            continue
        value, where = values[f.name], (*path, f.name)
        wrong = check_type(value, hints[f.name], where, source)
        minimum = f.metadata.get("minimum")
        if not wrong and value is not None and minimum is not None and value < minimum:
            wrong = [source.problem(where, f"`{dotted(where)}` must be {minimum} or more, but is {value}")]
        if not wrong and (value == "" or value == []):
            wrong = [source.problem(where, f"`{dotted(where)}` is empty; give a value or remove the key")]
        problems += wrong
    return problems


def hints_of(kind: type) -> dict[str, Any]:
    """The type hints of a section's fields."""
    return typing.get_type_hints(kind)


def _well_typed(values: Mapping[str, Any], kind: type) -> bool:
    hints = hints_of(kind)
    return all(key in hints and fits(value, hints[key]) for key, value in values.items())


def check_data(task: Any, data: dict[str, Any], source: Source) -> list[Problem]:
    """The task, or the files and columns that stand in its place."""
    problems: list[Problem] = []
    if task is not None:
        from ..evaluation.tasks import get_task

        try:
            get_task(str(task))
        except ValueError as error:
            problems.append(source.problem(("task",), str(error)))
        for key in data:
            if key in hints_of(Data) and key not in ("data_dir", "max_length"):
                message = f"`{key}` cannot stand beside `task: {task}`, which names its own; remove one of them"
                problems.append(source.problem(("data", key), message, at_key=True))
        return problems
    missing = [key for key in ("train", "validation", "text_columns") if data.get(key) is None]
    if missing and not data:
        return [source.problem((), "`task` is missing: name a GLUE task, or give your own files under `data`")]
    problems += [source.problem(("data",), f"`{key}` is missing in `data`", at_key=True) for key in missing]
    if "data_dir" in data:
        message = "`data_dir` goes with `task`; without one, give the files as `train` and `validation`"
        problems.append(source.problem(("data", "data_dir"), message, at_key=True))
    if not problems and _well_typed(data, Data):
        # Without its metrics first, so that a message about them points at them.
        for key in ("", "metrics"):
            try:
                own_task(data if key else {**data, "metrics": None})
            except ValueError as error:
                return [source.problem(("data", key) if key else ("data",), str(error), at_key=not key)]
    return problems


def own_task(data: Mapping[str, Any]) -> Task:
    """The task that a recipe's `data` section describes."""
    from ..evaluation.tasks import Task

    fields = ("label_column", "problem_type", "num_labels", "metrics")
    values = {key: data[key] for key in fields if data.get(key) is not None}
    return Task(name=data.get("name") or "data", text_columns=tuple(data["text_columns"]), **values)


def check_quantization(section: dict[str, Any], training: dict[str, Any], source: Source) -> list[Problem]:
    """The scheme's name, and the order of the steps."""
    from ..schemes import SCHEMES, Scheme, get_scheme

    problems: list[Problem] = []
    scheme = section.get("scheme", Quantization.scheme)
    known: Scheme | None = None
    if isinstance(scheme, str):
        try:
            known = get_scheme(scheme)
        except ValueError:
            literal = Literal[tuple(SCHEMES)]  # type: ignore[valid-type]
            problems += check_type(scheme, literal, ("quantization", "scheme"), source)
    steps = {key: section.get(key, getattr(Quantization, key)) for key in ("start_step", "freeze_step")}
    if not all(fits(value, int | float) for value in steps.values()):
        return problems
    for key, value in steps.items():
        if value < 0 or (isinstance(value, float) and value >= 1):
            message = (
                f"`{key}` must be a whole number of steps from 0, or a share of all steps in [0, 1), but is {value}"
            )
            problems.append(source.problem(("quantization", key), message))
    if problems:
        return problems

    total = training.get("max_steps")
    total = total if isinstance(total, int) and total > 0 else None
    start, freeze = (_in_steps(steps[key], total) for key in ("start_step", "freeze_step"))
    comparable = total is not None or type(steps["start_step"]) is type(steps["freeze_step"])
    static = known is None or known.activations == "static"
    if static and comparable and freeze <= start:
        message = (
            f"`freeze_step` ({steps['freeze_step']}) must come after `start_step` ({steps['start_step']}): ranges are "
            "observed between them. Raise `freeze_step` or lower `start_step`"
        )
        key = "freeze_step" if "freeze_step" in section else "start_step"
        problems.append(source.problem(("quantization", key), message))
    elif total is not None and start >= total:
        message = (
            f"`start_step` ({steps['start_step']}) must come before the end of training ({total} steps). "
            "Lower it or raise `max_steps`"
        )
        problems.append(source.problem(("quantization", "start_step"), message))
    return problems


def _in_steps(step: int | float, total: int | None) -> float:
    # Shares round up, as in callbacks.base.resolve_step (not imported: it would bring torch).
    return math.ceil(step * total) if isinstance(step, float) and total is not None else step


def check_pruning(sections: list[tuple[KeyPath, Any]], training: dict[str, Any], source: Source) -> list[Problem]:
    """The names and steps of each pruning, by the rules of [`PruningCallback`]."""
    problems: list[Problem] = []
    for path, section in sections:
        if not isinstance(section, dict) or not _well_typed(section, Pruning):
            continue  # said already
        from ..callbacks.pruning import PruningCallback

        values = {key: value for key, value in section.items() if value is not None}
        try:
            callback = PruningCallback(**values)
            total = training.get("max_steps")
            if isinstance(total, int) and total > 0:
                callback.check_steps(total)
        except (ValueError, TypeError) as error:
            # Its messages name the argument first; names of criteria and structures are unknown ones.
            named = [key for key in re.findall(r"\w+", str(error)) if key in section]
            problems.append(source.problem((*path, named[0]) if named else path, str(error).rstrip(".")))
    return problems
