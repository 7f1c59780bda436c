"""Metrics that need no network: `evaluate.Metric` subclasses over scikit-learn and scipy.

`evaluate.load("glue", "mrpc")` downloads a script before it can count. `GlueMetric("mrpc")` gives the same
figures offline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import datasets
import evaluate
import numpy as np

from .tasks import CLASSIFICATION, Task, get_task

if TYPE_CHECKING:
    from transformers import EvalPrediction


def accuracy(predictions: Any, references: Any) -> float:
    """Share of equal class ids, in [0, 1]."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(references, predictions))


def f1(predictions: Any, references: Any) -> float:
    """F1 of class 1: `2 TP / (2 TP + FP + FN)`, in [0, 1] (van Rijsbergen, 1979).

    0 where neither predictions nor references hold class 1, as in scikit-learn with `zero_division=0`.
    """
    from sklearn.metrics import f1_score

    # One label, micro-averaged, is the binary F1; unlike average="binary" it also takes arrays of one class.
    return float(f1_score(references, predictions, labels=[1], average="micro", zero_division=0.0))


def matthews_correlation(predictions: Any, references: Any) -> float:
    """Matthews correlation coefficient, in [-1, 1]; for two classes (Matthews, 1975)

    `(TP TN - FP FN) / sqrt((TP + FP)(TP + FN)(TN + FP)(TN + FN))`,

    and its generalization to more (Gorodkin, 2004). 0 where predictions or references are constant.
    """
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(references, predictions))


def pearsonr(predictions: Any, references: Any) -> float:
    """Pearson's correlation, in [-1, 1]. `nan`, with scipy's warning, where one side is constant: undefined."""
    from scipy import stats

    return float(stats.pearsonr(predictions, references)[0])


def spearmanr(predictions: Any, references: Any) -> float:
    """Spearman's correlation: Pearson's of the ranks, ties at their mean rank (Spearman, 1904). `nan` if constant."""
    from scipy import stats

    return float(stats.spearmanr(predictions, references)[0])


METRICS: dict[str, Callable[[Any, Any], float]] = {
    function.__name__: function for function in (accuracy, f1, matthews_correlation, pearsonr, spearmanr)
}


def compute_metrics(task: str | Task, predictions: Any, references: Any) -> dict[str, float]:
    """Every metric of a task.

    Args:
        task (`str` or `Task`): the task.
        predictions (`numpy.ndarray` of shape `(n,)`): class ids, or real numbers for regression.
        references (`numpy.ndarray` of shape `(n,)`): the labels, the same.

    Returns:
        `dict[str, float]`: metric by name, as fractions (0.8946, not 89.46).

    Raises:
        `ValueError`: if the shapes differ, there is nothing to count, a value is NaN, or a label is -1 (GLUE
        publishes no test labels).
    """
    task = get_task(task)
    predictions, references = np.asarray(predictions), np.asarray(references)
    if predictions.shape != references.shape or predictions.ndim != 1 or not predictions.size:
        raise ValueError(
            "`predictions` and `references` must have the same shape `(n,)` with n > 0, got "
            f"{predictions.shape} and {references.shape}."
        )
    for name, values in (("predictions", predictions), ("references", references)):
        bad = int(np.count_nonzero(~np.isfinite(values)))
        if bad:
            raise ValueError(f"`{name}` hold NaN or infinite values: {bad} of {values.size}.")
    if task.problem_type == CLASSIFICATION and (references < 0).any():
        raise ValueError(
            f"`references` hold the label {references.min()}, which means unlabelled: GLUE publishes no test "
            f"labels. Use a labelled split of {task.name!r}: {', '.join(task.splits)}."
        )
    return {name: METRICS[name](predictions, references) for name in task.metrics}


def trainer_metrics(task: str | Task) -> Callable[[EvalPrediction], dict[str, float]]:
    """A `compute_metrics` for `transformers.Trainer`.

    ```python
    Trainer(..., compute_metrics=trainer_metrics("mrpc"))
    ```

    Args:
        task (`str` or `Task`): the task.

    Returns:
        callable: takes an `EvalPrediction` whose predictions are logits of shape `(n, num_labels)`, or a tuple
        that starts with them, and returns every metric of the task.
    """
    task = get_task(task)

    def compute(evaluation: EvalPrediction) -> dict[str, float]:
        logits = evaluation.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        return compute_metrics(task, predictions_from_logits(task, logits), np.asarray(evaluation.label_ids))

    return compute


def predictions_from_logits(task: Task, logits: np.ndarray) -> np.ndarray:
    """Class ids (argmax) or real numbers (the one column) from logits of shape `(n, num_labels)`.

    Raises:
        `ValueError`: if the shape does not fit the task.
    """
    logits = np.asarray(logits)
    if task.problem_type != CLASSIFICATION and logits.ndim == 1:
        return logits
    if logits.ndim != 2 or logits.shape[1] != task.num_labels:
        raise ValueError(
            f"Task {task.name!r} needs logits of shape (n, {task.num_labels}), got {logits.shape}. Give the model "
            f"`num_labels={task.num_labels}`."
        )
    return logits.argmax(axis=1) if task.problem_type == CLASSIFICATION else logits[:, 0]


class _OfflineMetric(evaluate.Metric):
    """What the metrics below share: the names, the dtype of their columns, and no file on disk."""

    names: Sequence[str]
    dtype: str

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("keep_in_memory", kwargs.get("num_process", 1) == 1)
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        column = datasets.Value(self.dtype)
        return evaluate.MetricInfo(
            description="; ".join((METRICS[name].__doc__ or "").split("\n")[0] for name in self.names),
            citation="",
            inputs_description="predictions and references: one value an example",
            features=datasets.Features({"predictions": column, "references": column}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {name: METRICS[name](predictions, references) for name in self.names}


class Accuracy(_OfflineMetric):
    """`{"accuracy": ...}` of class ids."""

    names = ("accuracy",)
    dtype = "int64"


class F1(_OfflineMetric):
    """`{"f1": ...}` of binary class ids; class 1 is the positive one."""

    names = ("f1",)
    dtype = "int64"


class MatthewsCorrelation(_OfflineMetric):
    """`{"matthews_correlation": ...}` of class ids."""

    names = ("matthews_correlation",)
    dtype = "int64"


class PearsonR(_OfflineMetric):
    """`{"pearsonr": ...}` of real numbers."""

    names = ("pearsonr",)
    dtype = "float64"


class SpearmanR(_OfflineMetric):
    """`{"spearmanr": ...}` of real numbers."""

    names = ("spearmanr",)
    dtype = "float64"


class GlueMetric(_OfflineMetric):
    """Every metric of a task, as `evaluate.load("glue", task)` would give them.

    Args:
        task (`str` or `Task`): a GLUE task or one of your own.
    """

    def __init__(self, task: str | Task, **kwargs: Any) -> None:
        self.task = get_task(task)
        self.names = self.task.metrics
        self.dtype = "int64" if self.task.problem_type == CLASSIFICATION else "float64"
        super().__init__(config_name=self.task.name, **kwargs)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return compute_metrics(self.task, predictions, references)
