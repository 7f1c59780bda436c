"""What a recipe holds, and the rules between its values. Importing this module does not import torch."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from .source import Problem, RecipeError, Source, read_source
from .values import check_keys, check_type, fits

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from ..evaluation.tasks import Task


@dataclass
class Data:
    """Where the sentences and labels are.

    With `task` in the recipe, only `data_dir` and `max_length` may be set; without it, `train`, `validation` and
    `text_columns` must be. Paths are relative to the folder where the recipe is run.

    Args:
        train (`str`, *optional*): file to train on: `.parquet`, `.csv`, `.tsv`, `.json` or `.jsonl`.
        validation (`str`, *optional*): file to measure on, of the same kinds.
        text_columns (`list[str]`, *optional*): one column of text, or two for pairs.
        label_column (`str`, *optional*, defaults to `"label"`): class ids, class names, or real numbers.
        problem_type (`str`, *optional*): `"single_label_classification"` (the default) or `"regression"`.
        num_labels (`int`, *optional*): number of classes; defaults to 2, and is 1 for regression.
        metrics (`list[str]`, *optional*): defaults to those of the problem type; the first is the headline.
        name (`str`, *optional*): what reports call the data; defaults to `"data"`.
        data_dir (`str`, *optional*): with `task`: folder of `<task>/train.parquet` and `<task>/validation.parquet`.
            Without it the task's data come from the hub.
        max_length (`int`, *optional*): tokens at which a text is cut; defaults to what the model can take.
    """

    train: str | None = None
    validation: str | None = None
    text_columns: list[str] | None = None
    label_column: str | None = None
    problem_type: Literal["single_label_classification", "regression"] | None = None
    num_labels: int | None = field(default=None, metadata={"minimum": 1})
    metrics: list[str] | None = None
    name: str | None = None
    data_dir: str | None = None
    max_length: int | None = field(default=None, metadata={"minimum": 1})


@dataclass
class Quantization:
    """The arguments of [`QATCallback`].

    Args:
        scheme (`str`, *optional*, defaults to `"int8_static"`):
            `"int8_dynamic"`, `"int8_static"`, `"int4_weight_only"` ...; see [`get_scheme`].
        start_step (`int` or `float`, *optional*, defaults to 0):
            First step with fake-quant. An `int` counts optimizer steps, a `float` in [0, 1) is a share of all.
        freeze_step (`int` or `float`, *optional*, defaults to 0.9): first step with frozen ranges; the same units.
        targets (`list[str]`, *optional*): patterns of the modules to quantize; all that can be, by default.
        ignore (`list[str]`, *optional*): patterns of the modules to leave; the classifier head, by default.
        embeddings (`bool`, *optional*, defaults to `True`): whether embeddings become int8 too.
    """

    scheme: str = "int8_static"
    start_step: int | float = 0
    freeze_step: int | float = 0.9
    targets: list[str] | None = None
    ignore: list[str] | None = None
    embeddings: bool = True


@dataclass
class Evaluation:
    """How the int8 model is measured against a float one.

    Args:
        baseline (`str`, *optional*, defaults to `"train"`):
            `"train"`: train a float twin first, with the same seed, data and arguments but without quantization;
            `"none"`: compare with nothing; otherwise the folder of a float model.
        batch_size (`int`, *optional*, defaults to 32): sentences a batch in evaluation.
        max_samples (`int`, *optional*): rows of the validation data to use; all, by default.
    """

    baseline: str = "train"
    batch_size: int = field(default=32, metadata={"minimum": 1})
    max_samples: int | None = field(default=None, metadata={"minimum": 1})


@dataclass
class Recipe:
    """One training run that ends in a measured int8 model.

    ```python
    recipe = Recipe.from_yaml("recipes/mrpc-qat.yaml")
    trainer = Trainer(model=model, args=args, train_dataset=train, callbacks=recipe.callbacks())
    ```

    Args:
        model (`str`): folder or hub id of the float model to start from.
        output (`str`): folder for the int8 model, the float twin, checkpoints and the report.
        quantization ([`Quantization`]): arguments of [`QATCallback`].
        task (`str`, *optional*): a GLUE task; it names the columns, labels and metrics. Either `task` or `data`.
        data ([`Data`], *optional*): your own files, or where the task's files are.
        training (`dict[str, Any]`, *optional*): any fields of `TrainingArguments`; `bf16` may be `"auto"`.
        evaluation ([`Evaluation`], *optional*): what to compare with.
        seed (`int`, *optional*, defaults to 42): of the new head, the order of the data, and dropout.
        source ([`Source`], *optional*): where each value stands in the file, for messages.

    Raises:
        [`RecipeError`]: with everything that is wrong, each with its place in the file.
    """

    model: str
    output: str
    quantization: Quantization
    task: str | None = None
    data: Data = field(default_factory=Data)
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: Evaluation = field(default_factory=Evaluation)
    seed: int = field(default=42, metadata={"minimum": 0})
    source: Source = field(default_factory=Source, repr=False, compare=False)

    def __post_init__(self) -> None:
        problems = _check(self.to_dict(), self.source)
        if problems:
            raise RecipeError(problems)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Reads and checks a recipe.

        Args:
            path (`str` or `Path`): a YAML file; recipes/README.md describes its keys.

        Raises:
            `FileNotFoundError`: if there is no such file.
            [`RecipeError`]: with everything that is wrong, as `file:line:column: message`.
        """
        source = read_source(path)
        seen = {(problem.line, problem.column) for problem in source.problems}
        found = [p for p in _check(source.tree, source) if (p.line, p.column) not in seen]
        if source.problems or found:
            raise RecipeError(source.problems + found)
        values = dict(source.tree)
        for name, section in _SECTIONS.items():
            values[name] = section(**(values.get(name) or {}))
        values["training"] = values.get("training") or {}
        return cls(**values, source=source)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, without those that are not set."""
        tree: dict[str, Any] = {"model": self.model, "task": self.task, "data": dataclasses.asdict(self.data)}
        tree |= {"training": dict(self.training), "quantization": dataclasses.asdict(self.quantization)}
        tree |= {"evaluation": dataclasses.asdict(self.evaluation), "output": self.output, "seed": self.seed}
        for name in _SECTIONS:
            tree[name] = {key: value for key, value in tree[name].items() if value is not None}
        return {key: value for key, value in tree.items() if value is not None and value != {}}

    def to_yaml(self) -> str:
        """The recipe as YAML, defaults written out; `from_yaml` of it gives an equal recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def to_task(self) -> Task:
        """The columns, labels and metrics of the recipe's `task`, or of its `data`."""
        from ..evaluation.tasks import get_task

        return get_task(self.task) if self.task else _own_task(dataclasses.asdict(self.data))

    def callbacks(self) -> list[TrainerCallback]:
        """New callbacks for a `Trainer` of your own, in the order in which to pass them."""
        from ..callbacks.qat import QATCallback

        return [QATCallback(**dataclasses.asdict(self.quantization))]


_SECTIONS: dict[str, type] = {"data": Data, "quantization": Quantization, "evaluation": Evaluation}
_TOP_LEVEL = [f.name for f in dataclasses.fields(Recipe) if f.name != "source"]


def _check(tree: Mapping[str, Any], source: Source) -> list[Problem]:
    """All problems of a recipe's plain values: keys, types, and the rules between them."""
    from .training import check_training

    problems = check_keys(tree, (), _TOP_LEVEL, source)
    for name in ("model", "output", "quantization"):
        if name not in tree:
            hint = "; write `quantization: {}` for the defaults" if name == "quantization" else ""
            problems.append(source.problem((), f"`{name}` is missing{hint}"))
    problems += _check_fields(tree, Recipe, (), source, skip={*_SECTIONS, "training", "source"})
    sections: dict[str, dict[str, Any]] = {"training": {}, **{name: {} for name in _SECTIONS}}
    for name in sections:
        value = tree.get(name)
        if isinstance(value, dict):
            sections[name] = value
        elif value is not None:  # a bare `data:` is an empty section
            problems += check_type(value, dict, (name,), source)
    for name, section in _SECTIONS.items():
        problems += check_keys(sections[name], (name,), _hints(section), source)
        problems += _check_fields(sections[name], section, (name,), source)
    problems += check_training(sections["training"], source)
    problems += _check_data(tree.get("task"), sections["data"], source)
    problems += _check_quantization(sections["quantization"], sections["training"], source)
    return problems


def _check_fields(
    values: Mapping[str, Any], kind: type, path: tuple[str, ...], source: Source, skip: set[str] | None = None
) -> list[Problem]:
    hints, problems = _hints(kind), []
    for f in dataclasses.fields(kind):
        if f.name not in values or f.name in (skip or ()):
            continue
        value, where = values[f.name], (*path, f.name)
        wrong = check_type(value, hints[f.name], where, source)
        minimum = f.metadata.get("minimum")
        if not wrong and value is not None and minimum is not None and value < minimum:
            wrong = [source.problem(where, f"`{'.'.join(where)}` must be {minimum} or more, but is {value}")]
        if not wrong and (value == "" or value == []):
            wrong = [source.problem(where, f"`{'.'.join(where)}` is empty; give a value or remove the key")]
        problems += wrong
    return problems


def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _well_typed(values: Mapping[str, Any], kind: type) -> bool:
    hints = _hints(kind)
    return all(key in hints and fits(value, hints[key]) for key, value in values.items())


def _check_data(task: Any, data: dict[str, Any], source: Source) -> list[Problem]:
    """The task, or the files and columns that stand in its place."""
    problems: list[Problem] = []
    if task is not None:
        from ..evaluation.tasks import get_task

        try:
            get_task(str(task))
        except ValueError as error:
            problems.append(source.problem(("task",), str(error)))
        for key in data:
            if key in _hints(Data) and key not in ("data_dir", "max_length"):
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
                _own_task(data if key else {**data, "metrics": None})
            except ValueError as error:
                return [source.problem(("data", key) if key else ("data",), str(error), at_key=not key)]
    return problems


def _own_task(data: Mapping[str, Any]) -> Task:
    from ..evaluation.tasks import Task

    fields = ("label_column", "problem_type", "num_labels", "metrics")
    values = {key: data[key] for key in fields if data.get(key) is not None}
    return Task(name=data.get("name") or "data", text_columns=tuple(data["text_columns"]), **values)


def _check_quantization(section: dict[str, Any], training: dict[str, Any], source: Source) -> list[Problem]:
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
