"""The recipe's sentences and labels: read, checked against the task and the model, tokenized."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..evaluation.labels import label_names, read_labels
from ..evaluation.tasks import CLASSIFICATION, Task, load_data, load_task_data
from .source import KeyPath, Problem, RecipeError
from .values import nearest

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from .schema import Recipe

SPLITS = ("train", "validation")


def load_rows(recipe: Recipe, task: Task) -> dict[str, Dataset]:
    """Reads the recipe's files and checks that the task's columns are there.

    Args:
        recipe ([`Recipe`]): the recipe.
        task ([`Task`]): of `recipe.to_task()`.

    Returns:
        `dict[str, datasets.Dataset]`: the rows by `"train"` and `"validation"`.

    Raises:
        [`RecipeError`]: with everything that is wrong in both files.
    """
    problems: list[Problem] = []
    splits: dict[str, Dataset] = {}
    for split in SPLITS:
        try:
            if recipe.task:
                splits[split] = load_task_data(task, split, data_dir=recipe.data.data_dir)
            else:
                splits[split] = load_data(getattr(recipe.data, split))
        except (OSError, ValueError) as error:
            message = f"{error} (Relative paths start from the folder where hf-quant runs.)"
            problems.append(recipe.source.problem(place_of(recipe, split), message))
            continue
        problems += _check_columns(splits[split], split, task, recipe)
    if problems:
        raise RecipeError(problems)
    return splits


def load_labels(
    recipe: Recipe, task: Task, splits: dict[str, Dataset], config: PretrainedConfig
) -> dict[str, np.ndarray]:
    """The labels of both splits in the numbering of the model; gives the model the class names of the data.

    Args:
        recipe ([`Recipe`]): the recipe.
        task ([`Task`]): of `recipe.to_task()`.
        splits (`dict[str, datasets.Dataset]`): of [`load_rows`].
        config (`transformers.PretrainedConfig`): of the model; where it has no class names, it gets the data's.

    Returns:
        `dict[str, numpy.ndarray]`: class ids (int64) or numbers (float64) of shape `(rows,)`, by split.

    Raises:
        [`RecipeError`]: if a label is missing or unknown, or the data do not have `num_labels` classes.
    """
    problems: list[Problem] = []
    name_classes(recipe, task, splits["train"], config)
    labels: dict[str, np.ndarray] = {}
    for split, rows in splits.items():
        try:
            labels[split], order = read_labels(rows, task, config)
        except ValueError as error:
            problems.append(recipe.source.problem(place_of(recipe, split), f"{split} data: {error}"))
            continue
        if order is not None:  # the data's id of each of the model's classes: here the other way round
            labels[split] = order.argsort()[labels[split]]
    if problems:
        raise RecipeError(problems)
    return labels


def name_classes(recipe: Recipe, task: Task, train: Dataset, config: PretrainedConfig) -> None:
    """Gives a model without names for its classes those of the training data.

    Raises:
        [`RecipeError`]: if the data do not have `num_labels` classes.
    """
    names = _class_names(train, task)
    if names and len(names) != task.num_labels:
        message = f"the data have {len(names)} classes ({', '.join(names)}), but `num_labels` is {task.num_labels}"
        place = ("data", "num_labels") if recipe.data.num_labels else place_of(recipe, "train")
        raise RecipeError([recipe.source.problem(place, message)])
    if names and not label_names(config):
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}


def tokenize(
    recipe: Recipe,
    task: Task,
    splits: dict[str, Dataset],
    labels: dict[str, np.ndarray],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
) -> dict[str, Dataset]:
    """Both splits as a Trainer takes them: token ids, not padded, and a column `labels`.

    Args:
        recipe ([`Recipe`]): the recipe.
        task ([`Task`]): names the text columns.
        splits (`dict[str, datasets.Dataset]`): of [`load_rows`].
        labels (`dict[str, numpy.ndarray]`): of [`load_labels`].
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        max_length (`int` or `None`): tokens at which a text, or a pair together, is cut.

    Raises:
        [`RecipeError`]: if a cell of a text column holds no text.
    """
    from datasets import Dataset

    from ..evaluation.predict import encode_texts

    encoded: dict[str, Dataset] = {}
    problems: list[Problem] = []
    for split, rows in splits.items():
        try:
            tokens = encode_texts(rows, task, tokenizer, max_length)
        except ValueError as error:
            problems.append(recipe.source.problem(place_of(recipe, split), f"{split} data: {error}"))
            continue
        columns = {name: [row[name] for row in tokens] for name in tokens[0]}
        encoded[split] = Dataset.from_dict({**columns, "labels": labels[split].tolist()})
    if problems:
        raise RecipeError(problems)
    return encoded


def place_of(recipe: Recipe, split: str) -> KeyPath:
    """The key that names a split's file."""
    if not recipe.task:
        return ("data", split)
    return ("data", "data_dir") if recipe.data.data_dir else ("task",)


def _check_columns(rows: Dataset, split: str, task: Task, recipe: Recipe) -> list[Problem]:
    problems = []
    places: list[KeyPath] = [("data", "text_columns", index) for index in range(len(task.text_columns))]
    for column, place in zip(task.columns, [*places, ("data", "label_column")], strict=False):
        if column not in rows.column_names:
            message = f"the {split} data have no column `{column}`{nearest(column, rows.column_names)}"
            problems.append(recipe.source.problem(place, message))
    return problems


def _class_names(rows: Dataset, task: Task) -> list[str]:
    """Names from a `ClassLabel` feature, else the sorted words of the label column; empty where there are none."""
    if task.problem_type != CLASSIFICATION:
        return []
    names = getattr(rows.features[task.label_column], "names", None)
    if names:
        return list(names)
    return sorted({label for label in rows[task.label_column] if isinstance(label, str)})
