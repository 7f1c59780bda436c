"""What a recipe holds, and the rules between its values. Importing this module does not import torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .resolve import EXTENDS, resolve
from .rules import (
    check_data,
    check_distillation,
    check_fields,
    check_hub,
    check_pruning,
    check_quantization,
    foreign_keys,
    hints_of,
    own_task,
)
from .sections import Data, Distillation, Evaluation, Hub, Pruning, Quantization
from .source import KeyPath, Problem, RecipeError, Source
from .training import check_training
from .values import check_keys, check_type

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from ..evaluation.tasks import Task


@dataclass
class Recipe:
    """One training run that ends in a measured model: pruned, distilled, int8, or all of it.

    ```python
    recipe = Recipe.from_yaml("recipes/mrpc-qat.yaml")
    trainer = Trainer(model=model, args=args, train_dataset=train, callbacks=recipe.callbacks())
    ```

    Args:
        model (`str`): folder or hub id of the float model to start from.
        output (`str`): folder for the model, the float twin, checkpoints and the report.
        quantization ([`Quantization`], *optional*): arguments of [`QATCallback`], or of [`quantize`] after training;
            without it the model stays in float.
        task (`str`, *optional*): a GLUE task; it names the columns, labels and metrics. Either `task` or `data`.
        data ([`Data`], *optional*): your own files, or where the task's files are.
        training (`dict[str, Any]`, *optional*): any fields of `TrainingArguments`; `bf16` may be `"auto"`.
        evaluation ([`Evaluation`], *optional*): what to compare with.
        seed (`int`, *optional*, defaults to 42): of the new head, the order of the data, and dropout.
        pruning (list of [`Pruning`], *optional*): arguments of [`PruningCallback`]s, each for other weights.
        distillation ([`Distillation`], *optional*): arguments of [`DistillationCallback`].
        hub ([`Hub`], *optional*): where the finished model is uploaded.
        source ([`Source`], *optional*): where each value stands in the file, for messages.

    Raises:
        [`RecipeError`]: with everything that is wrong, each with its place in the file.
    """

    model: str
    output: str
    quantization: Quantization | None = None
    task: str | None = None
    data: Data = field(default_factory=Data)
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: Evaluation = field(default_factory=Evaluation)
    seed: int = field(default=42, metadata={"minimum": 0, "maximum": 2**32 - 1})
    pruning: list[Pruning] = field(default_factory=list)
    distillation: Distillation | None = None
    hub: Hub | None = None
    source: Source = field(default_factory=Source, repr=False, compare=False)

    def __post_init__(self) -> None:
        problems = _check(self.to_dict(), self.source)
        if problems:
            raise RecipeError(problems)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Mapping[str, str] | None = None) -> Recipe:
        """Reads and checks a recipe, with what it extends.

        Args:
            path (`str` or `Path`): a YAML file; recipes/README.md describes its keys.
            overrides (`Mapping[str, str]`, *optional*):
                Values in the place of the file's, as YAML text by key: `{"training.learning_rate": "3e-5"}`. `null`
                removes a key. What `hf-quant run --set` does.

        Raises:
            `FileNotFoundError`: if there is no such file.
            [`RecipeError`]: with everything that is wrong, as `file:line:column: message`.
        """
        source = resolve(path, overrides)
        seen = {problem.place for problem in source.problems}
        found = [problem for problem in _check(source.tree, source) if problem.place not in seen]
        if source.problems or found:
            raise RecipeError(source.problems + found)
        values = dict(source.tree)
        for name, section in _SECTIONS.items():
            if name in values or name not in _OPTIONAL:
                values[name] = section(**(values.get(name) or {}))
        values["pruning"] = [Pruning(**section) for _, section in _prunings(values.get("pruning"))]
        values["training"] = values.get("training") or {}
        return cls(**values, source=source)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, without those that are not set."""
        tree: dict[str, Any] = {name: getattr(self, name) for name in _ORDER}
        tree["training"] = dict(self.training)
        for name in _SECTIONS:
            tree[name] = _plain(tree[name])
        tree["pruning"] = [_plain(one) for one in self.pruning]
        return {key: value for key, value in tree.items() if value is not None and value not in ({}, [])}

    def to_yaml(self) -> str:
        """The recipe as YAML, defaults written out; `from_yaml` of it gives an equal recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def to_task(self) -> Task:
        """The columns, labels and metrics of the recipe's `task`, or of its `data`."""
        from ..evaluation.tasks import get_task

        return get_task(self.task) if self.task else own_task(dataclasses.asdict(self.data))

    def callbacks(self) -> list[TrainerCallback]:
        """New callbacks for a `Trainer` of your own, in the order in which to pass them.

        With `method: post_training` none of them quantizes. After `trainer.train()`, call
        `quantize(trainer.model, recipe.quantization.scheme, calibration, inplace=True)`; a static scheme needs
        calibration data.
        """
        from ..callbacks.pruning import PruningCallback

        made: list[TrainerCallback] = [PruningCallback(**dataclasses.asdict(one)) for one in self.pruning]
        if self.distillation is not None:
            from ..callbacks.distillation import DistillationCallback

            made.append(DistillationCallback(**dataclasses.asdict(self.distillation)))
        if self.quantization is not None and not self.quantizes_after_training:
            from ..callbacks.qat import QATCallback

            values = dataclasses.asdict(self.quantization)
            made.append(QATCallback(**{key: value for key, value in values.items() if key not in _NOT_OF_QAT}))
        return made

    def trainings(self) -> list[str]:
        """The trainings of a run in their order, by the names of their folders in `checkpoints/`.

        `"float"` is plain fine-tuning, `"int8"` has QAT, `"model"` prunes or distils a model that stays in float, or
        is quantized after training.
        """
        after = self.quantizes_after_training
        if after and not self.pruning and self.distillation is None:
            return ["float"]  # what is quantized is the float twin itself
        name = "model" if self.quantization is None or after else "int8"
        if self.distillation is not None and self.distillation.teacher is None:
            return ["float", name]
        return [name, "float"] if self.evaluation.baseline == "train" else [name]

    @property
    def quantizes_after_training(self) -> bool:
        """Whether the model is quantized once it is trained, not by QAT."""
        return self.quantization is not None and self.quantization.method == "post_training"


_SECTIONS: dict[str, type] = {
    "data": Data,
    "distillation": Distillation,
    "quantization": Quantization,
    "evaluation": Evaluation,
    "hub": Hub,
}
_OPTIONAL = ("distillation", "quantization", "hub")  # not the same as empty
_COMPRESSION = ("pruning", "distillation", "quantization")
_NOT_OF_QAT = ("method", "calibration_samples")
# As a reader wants them: what, on what, how, and where to.
_ORDER = ("model", "task", "data", "training", *_COMPRESSION, "evaluation", "output", "hub", "seed")


def _check(tree: Mapping[str, Any], source: Source) -> list[Problem]:
    """All problems of a recipe's plain values: keys, types, and the rules between them."""
    problems = check_keys(tree, (), [EXTENDS, *_ORDER], source)
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
    if source.whole:  # else what is missing may stand in a recipe that could not be read
        problems += _check_rules(tree, sections, prunings, source)
    return problems


def _check_rules(
    tree: Mapping[str, Any],
    sections: dict[str, dict[str, Any]],
    prunings: list[tuple[KeyPath, Any]],
    source: Source,
) -> list[Problem]:
    """What is missing, and what does not fit together."""
    problems = [source.problem((), f"`{name}` is missing") for name in ("model", "output") if name not in tree]
    compresses = tree.get("pruning") not in (None, []) or "quantization" in tree
    if not compresses and "distillation" not in tree:
        message = (
            f"nothing to do: a recipe has at least one of {', '.join(f'`{name}`' for name in _COMPRESSION)}; write "
            "`quantization: {}` for int8 with the defaults"
        )
        problems.append(source.problem((), message))
    problems += check_data(tree.get("task"), sections["data"], source)
    for path, section in prunings:
        if isinstance(section, dict):
            problems += check_pruning(section, path, sections["training"], source)
    if "distillation" in tree:
        trains_int8 = "quantization" in tree and sections["quantization"].get("method") != "post_training"
        learns = trains_int8 or tree.get("pruning") not in (None, [])
        problems += check_distillation(sections["distillation"], sections["training"], learns, source)
    if "quantization" in tree:
        problems += check_quantization(sections["quantization"], sections["training"], source)
    if "hub" in tree:
        problems += check_hub(sections["hub"], source)
    return problems


def _prunings(value: Any) -> list[tuple[KeyPath, Any]]:
    """The pruning sections of a recipe with their places: one alone, or a list of them."""
    if isinstance(value, dict):
        return [(("pruning",), value)]
    return [(("pruning", index), one) for index, one in enumerate(value)] if isinstance(value, list) else []


def _plain(section: Any) -> dict[str, Any] | None:
    """A section as a mapping without what is not set; `None` for a section that is not there."""
    if section is None:
        return None
    values = {key: value for key, value in dataclasses.asdict(section).items() if value is not None}
    if isinstance(section, Quantization):
        # Of what belongs to the other method only a value that somebody set is left, to be refused.
        others = foreign_keys(values)
        values = {
            key: value for key, value in values.items() if key not in others or value != getattr(Quantization, key)
        }
    return values
