"""Metrics against their published formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import EvalPrediction

from hf_quant.evaluation import metrics as m
from hf_quant.evaluation.tasks import Task

binary = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=60)
classes = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60)
# Few values, so that there are ties.
numbers = st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=2, max_size=40)


def columns(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    predictions, references = np.array(pairs).T
    return predictions, references


def confusion(predictions: np.ndarray, references: np.ndarray) -> tuple[int, int, int, int]:
    """TP, FP, FN, TN of class 1."""
    return (
        int(((predictions == 1) & (references == 1)).sum()),
        int(((predictions == 1) & (references != 1)).sum()),
        int(((predictions != 1) & (references == 1)).sum()),
        int(((predictions != 1) & (references != 1)).sum()),
    )


@given(classes)
def test_accuracy_is_the_share_of_equal_ids(pairs: list[tuple[int, int]]) -> None:
    predictions, references = columns(pairs)
    assert m.accuracy(predictions, references) == pytest.approx(sum(p == r for p, r in pairs) / len(pairs))


@given(binary)
def test_f1_closed_form(pairs: list[tuple[int, int]]) -> None:
    predictions, references = columns(pairs)
    tp, fp, fn, _ = confusion(predictions, references)
    expected = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0
    assert m.f1(predictions, references) == pytest.approx(expected)


@given(binary)
@pytest.mark.filterwarnings("ignore:A single label was found")
def test_matthews_closed_form(pairs: list[tuple[int, int]]) -> None:
    predictions, references = columns(pairs)
    tp, fp, fn, tn = confusion(predictions, references)
    spread = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    expected = (tp * tn - fp * fn) / math.sqrt(spread) if spread else 0.0
    assert m.matthews_correlation(predictions, references) == pytest.approx(expected)


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """sum((x - mean)(y - mean)) / sqrt(sum((x - mean)^2) sum((y - mean)^2))"""
    dx, dy = x - x.mean(), y - y.mean()
    return float((dx * dy).sum() / math.sqrt((dx**2).sum() * (dy**2).sum()))


def mid_ranks(x: np.ndarray) -> np.ndarray:
    """1 + the number of smaller values + half the number of other equal ones."""
    return np.array([1 + (x < value).sum() + ((x == value).sum() - 1) / 2 for value in x])


@given(numbers)
def test_correlations_closed_form(pairs: list[tuple[int, int]]) -> None:
    x, y = (column.astype(float) for column in columns(pairs))
    if x.min() == x.max() or y.min() == y.max():
        return
    assert m.pearsonr(x, y) == pytest.approx(pearson(x, y), abs=1e-12)
    assert m.spearmanr(x, y) == pytest.approx(pearson(mid_ranks(x), mid_ranks(y)), abs=1e-12)


def test_worked_examples() -> None:
    # Chicco & Jurman, 2020, "The advantages of the Matthews correlation coefficient", use case A1: TP = 90,
    # FN = 1, FP = 9, TN = 0 gives accuracy 0.90, F1 0.95 and MCC -0.03.
    references = np.array([1] * 91 + [0] * 9)
    predictions = np.array([1] * 90 + [0] + [1] * 9)
    assert m.matthews_correlation(predictions, references) == pytest.approx(-0.0316, abs=1e-3)
    assert m.f1(predictions, references) == pytest.approx(0.947, abs=1e-3)
    assert m.accuracy(predictions, references) == 0.90
    # Spearman without ties: 1 - 6 sum d^2 / (n (n^2 - 1)); here sum d^2 = 194, n = 10.
    iq = np.array([106, 100, 86, 101, 99, 103, 97, 113, 112, 110])
    hours = np.array([7, 27, 2, 50, 28, 29, 20, 12, 6, 17])
    assert m.spearmanr(iq, hours) == pytest.approx(1 - 6 * 194 / 990)


def test_constant_predictions() -> None:
    references, ones = np.array([0, 1, 1]), np.ones(3, int)
    assert m.matthews_correlation(ones, references) == 0.0
    assert m.f1(np.zeros(3, int), np.zeros(3, int)) == 0.0
    for metric in (m.pearsonr, m.spearmanr):
        with pytest.warns(match="constant"):
            assert math.isnan(metric(ones.astype(float), np.array([0.1, 0.2, 0.3])))


def test_compute_metrics_gives_the_metrics_of_the_task() -> None:
    assert m.compute_metrics("mrpc", [1, 1, 0, 0], [1, 0, 0, 0]) == {"accuracy": 0.75, "f1": pytest.approx(2 / 3)}
    found = m.compute_metrics("stsb", [1.0, 2.0, 4.0], [1.0, 2.0, 3.0])
    assert found["spearmanr"] == pytest.approx(1.0)
    assert found["pearsonr"] == pytest.approx(0.9819805)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([0, 1], [0, 1, 1], r"same shape `\(n,\)` with n > 0, got \(2,\) and \(3,\)"),
        ([], [], r"n > 0, got \(0,\)"),
        ([[0], [1]], [[0], [1]], r"got \(2, 1\)"),
        ([0.0, math.nan], [0, 1], "`predictions` hold NaN or infinite values: 1 of 2"),
        ([0, 1], [0, -1], "label -1, which means unlabelled.*Use a labelled split of 'mrpc': validation"),
    ],
)
def test_compute_metrics_refuses(predictions: Any, references: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        m.compute_metrics("mrpc", predictions, references)


@pytest.mark.parametrize("wrapped", [False, True])
def test_trainer_metrics(wrapped: bool) -> None:
    logits = np.array([[0.1, 2.0], [3.0, 0.0], [0.0, 1.0]])
    predictions = (logits, np.zeros(1)) if wrapped else logits
    found = m.trainer_metrics("sst2")(EvalPrediction(predictions, np.array([1, 0, 0])))
    assert found == {"accuracy": pytest.approx(2 / 3)}


def test_trainer_metrics_of_a_regression() -> None:
    compute = m.trainer_metrics("stsb")
    labels = np.array([1.0, 2.0, 3.0])
    for shape in ((3, 1), (3,)):
        found = compute(EvalPrediction(np.array([1.0, 2.0, 4.0]).reshape(shape), labels))
        assert found["spearmanr"] == pytest.approx(1.0)


def test_trainer_metrics_refuses_logits_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"'mnli' needs logits of shape \(n, 3\), got \(2, 2\).*num_labels=3"):
        m.trainer_metrics("mnli")(EvalPrediction(np.zeros((2, 2)), np.zeros(2, int)))


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (m.Accuracy(), {"accuracy": 0.75}),
        (m.F1(), {"f1": 2 / 3}),
        (m.MatthewsCorrelation(), {"matthews_correlation": 2 / math.sqrt(12)}),
        (m.PearsonR(), {"pearsonr": 2 / math.sqrt(12)}),
        (m.SpearmanR(), {"spearmanr": 2 / math.sqrt(12)}),
        (m.GlueMetric("mrpc"), {"accuracy": 0.75, "f1": 2 / 3}),
        (m.GlueMetric(Task("mine", ("text",), metrics=("accuracy",))), {"accuracy": 0.75}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_evaluate_metrics_work_at_once_and_in_batches(metric: Any, expected: dict[str, float]) -> None:
    predictions, references = [1, 1, 0, 0], [1, 0, 0, 0]
    # TP 1, FP 1, FN 0, TN 2: (1*2 - 1*0) / sqrt(2 * 1 * 3 * 2), which for two values is Pearson's too.
    assert metric.compute(predictions=predictions, references=references) == pytest.approx(expected)
    metric.add_batch(predictions=predictions[:3], references=references[:3])
    metric.add_batch(predictions=predictions[3:], references=references[3:])
    assert metric.compute() == pytest.approx(expected)
    assert metric.info.description
