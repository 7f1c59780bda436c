"""What a recipe holds, and the rules between its values. Importing this module does not import torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .rules import check_data, check_fields, check_pruning, check_quantization, hints_of, own_task
from .sections import Data, Evaluation, Pruning, Quantization
from .source import KeyPath, Problem, RecipeError, Source, read_source
from .values import check_keys, check_type

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from ..evaluation.tasks import Task


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
        pruning (list of [`Pruning`], *optional*): arguments of [`PruningCallback`]s, each for other weights.
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
    pruning: list[Pruning] = field(default_factory=list)
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
        values["pruning"] = [Pruning(**section) for _, section in _prunings(values.get("pruning"))]
        values["training"] = values.get("training") or {}
        return cls(**values, source=source)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, without those that are not set."""
        tree: dict[str, Any] = {"model": self.model, "task": self.task, "data": dataclasses.asdict(self.data)}
        tree |= {"training": dict(self.training), "quantization": dataclasses.asdict(self.quantization)}
        tree |= {"evaluation": dataclasses.asdict(self.evaluation), "output": self.output, "seed": self.seed}
        for name in _SECTIONS:
            tree[name] = {key: value for key, value in tree[name].items() if value is not None}
        tree["pruning"] = [
            {key: value for key, value in dataclasses.asdict(one).items() if value is not None} for one in self.pruning
        ]
        return {key: value for key, value in tree.items() if value is not None and value not in ({}, [])}

    def to_yaml(self) -> str:
        """The recipe as YAML, defaults written out; `from_yaml` of it gives an equal recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def to_task(self) -> Task:
        """The columns, labels and metrics of the recipe's `task`, or of its `data`."""
        from ..evaluation.tasks import get_task

        return get_task(self.task) if self.task else own_task(dataclasses.asdict(self.data))

    def callbacks(self) -> list[TrainerCallback]:
        """New callbacks for a `Trainer` of your own, in the order in which to pass them."""
        from ..callbacks.pruning import PruningCallback
        from ..callbacks.qat import QATCallback

        pruning = [PruningCallback(**dataclasses.asdict(one)) for one in self.pruning]
        return [*pruning, QATCallback(**dataclasses.asdict(self.quantization))]


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
    problems += check_fields(tree, Recipe, (), source, skip={*_SECTIONS, "pruning", "training", "source"})
    sections: dict[str, dict[str, Any]] = {"training": {}, **{name: {} for name in _SECTIONS}}
    for name in sections:
        value = tree.get(name)
        if isinstance(value, dict):
            sections[name] = value
        elif value is not None:  # a bare `data:` is an empty section
            problems += check_type(value, dict, (name,), source)
    for name, section in _SECTIONS.items():
        problems += check_keys(sections[name], (name,), hints_of(section), source)
        problems += check_fields(sections[name], section, (name,), source)
    prunings = _prunings(tree.get("pruning"))
    if tree.get("pruning") is not None and not isinstance(tree["pruning"], (dict, list)):
        problems += check_type(tree["pruning"], dict, ("pruning",), source)
    for path, section in prunings:
        if not isinstance(section, dict):
            problems += check_type(section, dict, path, source)
            continue
        problems += check_keys(section, path, hints_of(Pruning), source)
        problems += check_fields(section, Pruning, path, source)
    problems += check_training(sections["training"], source)
    problems += check_data(tree.get("task"), sections["data"], source)
    problems += check_quantization(sections["quantization"], sections["training"], source)
    problems += check_pruning(prunings, sections["training"], source)
    return problems


def _prunings(value: Any) -> list[tuple[KeyPath, Any]]:
    """The pruning sections of a recipe with their places: one alone, or a list of them."""
    if isinstance(value, dict):
        return [(("pruning",), value)]
    return [(("pruning", index), one) for index, one in enumerate(value)] if isinstance(value, list) else []
