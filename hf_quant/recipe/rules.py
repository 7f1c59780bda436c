"""The rules of a recipe's sections, beyond the types of single values."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from .sections import Data, Distillation, Pruning, Quantization
from .source import KeyPath, Problem, Source
from .values import check_type, dotted, fits, show

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
        if not wrong and value is not None and (bounds := _outside(value, f.metadata)):
            wrong = [source.problem(where, f"`{dotted(where)}` must be {bounds}, but is {value}")]
        if not wrong and (value == "" or value == []):
            wrong = [source.problem(where, f"`{dotted(where)}` is empty; give a value or remove the key")]
        problems += wrong
    return problems


def _outside(value: Any, metadata: Mapping[str, Any]) -> str:
    """The bounds of a field in words where `value` is outside of them, else nothing."""
    low, above, high = (metadata.get(key) for key in ("minimum", "exclusiveMinimum", "maximum"))  # as in JSON Schema
    if (low is None or value >= low) and (above is None or value > above) and (high is None or value <= high):
        return ""
    words = [f"{low} or more"] if low is not None else [f"more than {above}"] if above is not None else []
    return " and ".join([*words, f"{high} at most"] if high is not None else words)


@functools.cache
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
    from ..evaluation.tasks import CAUSAL, Task

    if data.get("problem_type") == CAUSAL and data.get("label_column") is not None:
        raise ValueError("a causal language model is trained on the text alone; remove `label_column`")
    fields = ("label_column", "problem_type", "num_labels", "metrics")
    values = {key: data[key] for key in fields if data.get(key) is not None}
    return Task(name=data.get("name") or "data", text_columns=tuple(data["text_columns"]), **values)


def foreign_keys(section: Mapping[str, Any]) -> dict[str, str]:
    """The keys of `quantization` that do not go with its method and scheme, and why not."""
    from ..schemes import get_scheme

    if section.get("method", Quantization.method) != "post_training":
        return {"calibration_samples": "goes with `method: post_training`: QAT observes ranges while it trains"}
    why = "is a step of QAT, and `method: post_training` quantizes after training"
    found = {"start_step": why, "freeze_step": why}
    scheme = section.get("scheme", Quantization.scheme)
    with contextlib.suppress(ValueError):  # said elsewhere
        if isinstance(scheme, str) and get_scheme(scheme).activations != "static":
            found["calibration_samples"] = f"goes with a static scheme, and {scheme} needs no data"
    return found


def check_quantization(section: dict[str, Any], training: dict[str, Any], source: Source) -> list[Problem]:
    """The scheme's name, what goes with the method, and the order of the steps."""
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
    for key, why in foreign_keys(section).items():
        if key in section:
            message = f"`{key}` {why}; remove it, or write null where it comes from the recipe that this one extends"
            problems.append(source.problem(("quantization", key), message, at_key=True))
    if section.get("method") == "post_training":
        return problems
    wrong = _check_steps(section, Quantization, ("start_step", "freeze_step"), "quantization", source)
    problems += wrong
    steps = {key: section.get(key, getattr(Quantization, key)) for key in ("start_step", "freeze_step")}
    if wrong or not all(fits(value, int | float) for value in steps.values()):
        return problems

    total = _max_steps(training)
    start, freeze = (_in_steps(steps[key], total) for key in ("start_step", "freeze_step"))
    comparable = total is not None or type(steps["start_step"]) is type(steps["freeze_step"])
    static = known is not None and known.activations == "static"
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


def _check_steps(
    section: Mapping[str, Any], kind: type, keys: tuple[str, ...], name: str, source: Source
) -> list[Problem]:
    """Each step by itself: a count from 0, or a share in [0, 1)."""
    problems = []
    for key in keys:
        value = section.get(key, getattr(kind, key))
        if fits(value, int | float) and (value < 0 or (isinstance(value, float) and value >= 1)):
            message = (
                f"`{key}` must be a whole number of steps from 0, or a share of all steps in [0, 1), but is {value}"
            )
            problems.append(source.problem((name, key), message))
    return problems


def _max_steps(training: Mapping[str, Any]) -> int | None:
    """The number of optimizer steps, where the recipe itself says it."""
    total = training.get("max_steps")
    return total if isinstance(total, int) and total > 0 else None


def _in_steps(step: int | float, total: int | None) -> float:
    # Shares round up, as in callbacks.base.resolve_step (not imported: it would bring torch).
    return math.ceil(step * total) if isinstance(step, float) and total is not None else step


def check_pruning(section: dict[str, Any], path: KeyPath, training: dict[str, Any], source: Source) -> list[Problem]:
    """The names and steps of one pruning, by the rules of [`PruningCallback`]."""
    if not _well_typed(section, Pruning):
        return []  # said already
    from ..callbacks.base import check_step
    from ..callbacks.pruning import PruningCallback
    from ..pruning.criteria import get_criterion
    from ..pruning.schedules import check_pairs, check_schedule
    from ..pruning.structures import get_structure

    values = {key: value for key, value in section.items() if value is not None}
    checks: dict[str, Callable[[Any], object]] = {"structure": get_structure, "criterion": get_criterion}
    checks["schedule"] = check_schedule if isinstance(values.get("schedule"), str) else check_pairs
    checks |= {key: functools.partial(check_step, key) for key in ("start_step", "end_step", "frequency")}
    problems: list[Problem] = []
    for key in checks.keys() & values.keys():  # one by one, so that all of them are told
        problems += _refused(functools.partial(checks[key], values[key]), (*path, key), {}, source)
    if problems:
        return problems
    return _refused(lambda: _check_callback(PruningCallback(**values), training), path, section, source)


def check_distillation(
    section: dict[str, Any], training: dict[str, Any], learns: bool, source: Source
) -> list[Problem]:
    """The teacher, the maps of layers and the steps, by the rules of [`DistillationCallback`].

    Args:
        section (`dict[str, Any]`): the recipe's `distillation`.
        training (`dict[str, Any]`): its `training`.
        learns (`bool`): whether the recipe prunes, or trains int8: there is something to learn from the float model.
        source ([`Source`]): for the positions in the file.
    """
    path = ("distillation",)
    problems: list[Problem] = []
    if section.get("teacher") is None and not learns:
        message = (
            "`teacher` is missing in `distillation`: without `pruning` or `quantization` by QAT the model would learn "
            "from itself. Name the folder or hub id of a teacher"
        )
        problems.append(source.problem(path, message, at_key=True))
    if any(check_fields(section, Distillation, path, source)) or not _well_typed(section, Distillation):
        return problems  # said already
    from ..callbacks.distillation import DistillationCallback

    wrong = _check_steps(section, Distillation, ("start_step", "end_step"), "distillation", source)
    if not wrong:
        values = dataclasses.asdict(Distillation(**section))
        wrong = _refused(lambda: _check_callback(DistillationCallback(**values), training), path, section, source)
    return problems + wrong


def _check_callback(callback: Any, training: Mapping[str, Any]) -> None:
    if total := _max_steps(training):
        callback.check_steps(total)


def _refused(make: Callable[[], object], path: KeyPath, section: Mapping[str, Any], source: Source) -> list[Problem]:
    """The error that `make` raises, as a problem at the key of `section` that it names first, or at `path`."""
    try:
        make()
    except (ValueError, TypeError) as error:
        named = [key for key in re.findall(r"\w+", str(error)) if key in section]
        return [source.problem((*path, named[0]) if named else path, str(error).rstrip("."))]
    return []


def check_hub(section: dict[str, Any], source: Source) -> list[Problem]:
    """The repository's name, and that no secret stands in the recipe."""
    if "repo_id" not in section or section["repo_id"] is None:
        return [source.problem(("hub",), "`repo_id` is missing in `hub`: write user/name", at_key=True)]
    repo_id = section["repo_id"]
    if not isinstance(repo_id, str) or not repo_id:
        return []  # said already
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        message = (
            f"`hub.repo_id` is {show(repo_id)}, but must be `name` or `user/name` of letters, digits, `-`, `_` and "
            "`.`, 96 characters at most"
        )
        return [source.problem(("hub", "repo_id"), message)]
    return []
