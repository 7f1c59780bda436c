"""Labels of the data in the numbering of the model, and refusals where the two cannot fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import did_you_mean
from .tasks import CLASSIFICATION, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig


def check_models_agree(float_config: PretrainedConfig, int8_config: PretrainedConfig) -> None:
    """Refuse two models that do not predict the same labels.

    Raises:
        `ValueError`: if their numbers of labels or their label names differ.
    """
    if float_config.num_labels != int8_config.num_labels:
        raise ValueError(
            f"The float model has {float_config.num_labels} labels and the int8 model {int8_config.num_labels}: "
            "they were not trained for the same task. Compare a model with its own quantized version."
        )
    ours, theirs = label_names(float_config), label_names(int8_config)
    if ours and theirs and ours != theirs:
        raise ValueError(
            f"The models name their labels differently: float {ours}, int8 {theirs}. Compare a model with its own "
            "quantized version, or make `config.id2label` equal."
        )


def label_names(config: PretrainedConfig) -> list[str]:
    """The model's label names in order; empty where it has only the placeholders `LABEL_0` ..."""
    names = [str(name) for _, name in sorted((int(i), name) for i, name in (config.id2label or {}).items())]
    return [] if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names


def read_labels(dataset: Dataset, task: Task, config: PretrainedConfig) -> tuple[np.ndarray, np.ndarray | None]:
    """The references of a data set, and how to read the model's class ids.

    A model may number its classes in another order than the data (common with MNLI). Where both name the same
    classes, the names decide; where either has no names, equal numbers mean equal classes.

    Args:
        dataset (`datasets.Dataset`): with the task's label column.
        task ([`Task`]): the task.
        config (`transformers.PretrainedConfig`): of the model.

    Returns:
        `tuple[numpy.ndarray, numpy.ndarray | None]`: references of shape `(n,)`, int64 class ids or float64
        numbers; and the data's class id for each class id of the model, where the two differ.

    Raises:
        `ValueError`: if the model does not fit the task, or a label is missing, -1 (unlabelled), or unknown.
    """
    _check_model_fits(task, config)
    column = dataset[task.label_column][:]
    _refuse(column, [row for row, value in enumerate(column) if value is None], task, "is missing")
    if task.problem_type != CLASSIFICATION:
        return _numbers(column, task), None
    names = label_names(config)
    if isinstance(column[0], str):
        return _ids_of_names(column, names, task), None
    ids = _class_ids(column, task, config.num_labels)
    data_names = getattr(dataset.features[task.label_column], "names", None)
    return ids, _reorder(data_names, names)


def _check_model_fits(task: Task, config: PretrainedConfig) -> None:
    if getattr(config, "problem_type", None) == "multi_label_classification":
        raise ValueError(
            "The model's `problem_type` is 'multi_label_classification'; one label an example is what can be "
            f"compared: {CLASSIFICATION!r} or 'regression'."
        )
    if config.num_labels != task.num_labels:
        raise ValueError(
            f"Task {task.name!r} ({task.problem_type}) has {task.num_labels} label(s), the model "
            f"{config.num_labels}. Give a model that was fine-tuned for it, or a Task with "
            f"`num_labels={config.num_labels}`."
        )


def _numbers(column: list[Any], task: Task) -> np.ndarray:
    try:
        values = np.asarray(column, dtype=np.float64)
    except (TypeError, ValueError):
        first = next(value for value in column if not isinstance(value, (int, float)))
        raise ValueError(
            f"Task {task.name!r} is a regression, but the column {task.label_column!r} holds {first!r}. Give "
            f"numbers, or a Task with `problem_type={CLASSIFICATION!r}`."
        ) from None
    _refuse(column, np.flatnonzero(~np.isfinite(values)), task, "is not a finite number")
    # -1 may be a rating; a column of nothing else is how GLUE marks its test sets.
    if (values == -1).all():
        _refuse(column, np.arange(len(values)), task, "is -1: these rows are unlabelled")
    return values


def _class_ids(column: list[Any], task: Task, num_labels: int) -> np.ndarray:
    values = np.asarray(column)
    if values.dtype.kind not in "iubf" or values.ndim != 1:
        raise ValueError(
            f"Task {task.name!r}: the column {task.label_column!r} must hold class ids or class names, one a row; "
            f"it begins with {column[0]!r}."
        )
    _refuse(column, np.flatnonzero(values == -1), task, "is -1: these rows are unlabelled")
    allowed = np.isin(values, np.arange(num_labels))
    _refuse(column, np.flatnonzero(~allowed), task, f"is no class id of 0 to {num_labels - 1}")
    return values.astype(np.int64)


def _ids_of_names(column: list[Any], names: list[str], task: Task) -> np.ndarray:
    numbers = {name.casefold(): i for i, name in enumerate(names)}
    ids = [numbers.get(str(value).casefold(), -1) for value in column]
    unknown = sorted({str(value) for value, i in zip(column, ids, strict=True) if i < 0})
    if unknown:
        raise ValueError(
            f"Task {task.name!r}: the column {task.label_column!r} holds the class name {unknown[0]!r}"
            f"{did_you_mean(unknown[0].casefold(), numbers) or '.'} The model's classes: {names or 'it names none'}. "
            "Set `config.id2label` to the names of the data, or put class ids into the column."
        )
    return np.asarray(ids, dtype=np.int64)


def _reorder(data_names: list[str] | None, names: list[str]) -> np.ndarray | None:
    """The data's class id for each of the model's, where both name the same classes in different orders."""
    if not data_names:
        return None
    ours, theirs = [n.casefold() for n in data_names], [n.casefold() for n in names]
    if ours == theirs or sorted(ours) != sorted(theirs):
        return None
    return np.asarray([ours.index(name) for name in theirs], dtype=np.int64)


def _refuse(column: list[Any], rows: Any, task: Task, reason: str) -> None:
    if len(rows):
        raise ValueError(
            f"Task {task.name!r}: the label in row {rows[0]} ({column[int(rows[0])]!r}) {reason}; {len(rows)} of "
            f"{len(column)} rows. GLUE's test splits carry no labels; use a labelled split or remove the rows."
        )
