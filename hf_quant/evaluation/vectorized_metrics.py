"""The metrics of many resamples at once: what makes ten thousand bootstrap resamples take a second or two."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .tasks import CLASSIFICATION, METRICS_BY_PROBLEM_TYPE, REGRESSION


def class_metrics(
    metrics: Sequence[str], counts: np.ndarray, predictions: np.ndarray, references: np.ndarray
) -> dict[str, np.ndarray]:
    """Accuracy, F1 and Matthews correlation of many weighted samples at once.

    Args:
        metrics (sequence of `str`): of `"accuracy"`, `"f1"`, `"matthews_correlation"`.
        counts (`numpy.ndarray` of shape `(samples, kinds)`): how often each kind of example is in each sample.
        predictions (`numpy.ndarray` of shape `(kinds,)`): the class id predicted for each kind.
        references (`numpy.ndarray` of shape `(kinds,)`): its true class id.

    Returns:
        `dict[str, numpy.ndarray]` of shape `(samples,)`: equal to those of `hf_quant.evaluation.metrics`.

    Raises:
        `ValueError`: for any other metric.
    """
    weights = counts.astype(np.float64)
    total = weights.sum(axis=1)
    right = weights @ (predictions == references)
    values: dict[str, np.ndarray] = {}
    for name in metrics:
        if name == "accuracy":
            values[name] = right / total
        elif name == "f1":
            true_positive = weights @ ((predictions == 1) & (references == 1))
            # TP + FP + TP + FN: everything predicted positive, and everything that is.
            positives = weights @ (predictions == 1) + weights @ (references == 1)
            values[name] = _divide(2.0 * true_positive, positives)
        elif name == "matthews_correlation":
            # Gorodkin (2004), eq. 8, in counts: p_k predictions and t_k references of class k.
            classes = np.union1d(predictions, references)
            predicted = weights @ (predictions[:, None] == classes)
            true = weights @ (references[:, None] == classes)
            covariance = right * total - (predicted * true).sum(axis=1)
            spread = (total**2 - (predicted**2).sum(axis=1)) * (total**2 - (true**2).sum(axis=1))
            values[name] = _divide(covariance, np.sqrt(spread))
        else:
            raise ValueError(f"Unknown metric {name!r} of class ids. Allowed: {_allowed(CLASSIFICATION)}.")
    return values


def number_metrics(
    metrics: Sequence[str], counts: np.ndarray, predictions: np.ndarray, references: np.ndarray
) -> dict[str, np.ndarray]:
    """Pearson's and Spearman's correlations of many weighted samples at once.

    Args:
        metrics (sequence of `str`): of `"pearsonr"`, `"spearmanr"`.
        counts (`numpy.ndarray` of shape `(samples, n)`): how often each example is in each sample.
        predictions (`numpy.ndarray` of shape `(n,)`): real numbers.
        references (`numpy.ndarray` of shape `(n,)`): real numbers.

    Returns:
        `dict[str, numpy.ndarray]` of shape `(samples,)`: `nan` where a sample is constant on either side.

    Raises:
        `ValueError`: for any other metric.
    """
    values: dict[str, np.ndarray] = {}
    for name in metrics:
        if name == "pearsonr":
            values[name] = _pearson(counts, predictions, references)
        elif name == "spearmanr":
            values[name] = _spearman(counts, predictions, references)
        else:
            raise ValueError(f"Unknown metric {name!r} of real numbers. Allowed: {_allowed(REGRESSION)}.")
    return values


def _pearson(counts: np.ndarray, predictions: np.ndarray, references: np.ndarray) -> np.ndarray:
    # Centred on the full sample first: the sums below would cancel badly for values far from zero.
    x, y = (np.asarray(a, dtype=np.float64) - np.mean(a, dtype=np.float64) for a in (predictions, references))
    columns = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)
    n, sum_x, sum_y, sum_xx, sum_yy, sum_xy = (counts.astype(np.float64) @ columns).T
    spread_x, spread_y = n * sum_xx - sum_x**2, n * sum_yy - sum_y**2
    correlation = _divide(n * sum_xy - sum_x * sum_y, np.sqrt(np.clip(spread_x * spread_y, 0.0, None)), math.nan)
    # Samples without the spread of the whole (constant ones, or all but an outlier) do cancel: count those plainly.
    for row in np.flatnonzero((spread_x <= 1e-6 * n * sum_xx) | (spread_y <= 1e-6 * n * sum_yy)):
        drawn = np.repeat(np.arange(len(x)), counts[row])
        correlation[row] = _plain_pearson(predictions[drawn], references[drawn])
    return correlation


def _plain_pearson(x: np.ndarray, y: np.ndarray) -> float:
    if (x == x[0]).all() or (y == y[0]).all():
        return math.nan
    return float(np.corrcoef(x.astype(np.float64), y.astype(np.float64))[0, 1])


def _spearman(counts: np.ndarray, predictions: np.ndarray, references: np.ndarray) -> np.ndarray:
    weights = counts.astype(np.float64)
    x, y = _centred_ranks(weights, predictions), _centred_ranks(weights, references)
    weighted_x = weights * x
    covariance = np.einsum("sn,sn->s", weighted_x, y)
    spread = np.einsum("sn,sn->s", weighted_x, x) * np.einsum("sn,sn->s", weights * y, y)
    # Ranks are whole or half numbers, so a constant sample has a spread of exactly 0.
    return _divide(covariance, np.sqrt(spread), math.nan)


def _centred_ranks(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mid-ranks of weighted samples minus their mean, `(n + 1) / 2`, without sorting each: `(samples, n)`."""
    order = np.argsort(values, kind="stable")
    _, first, group = np.unique(values[order], return_index=True, return_inverse=True)
    sizes = np.add.reduceat(weights[:, order], first, axis=1)  # how many of each value
    ranks = np.cumsum(sizes, axis=1) - (sizes - 1.0) / 2.0
    ranks -= (weights.sum(axis=1, keepdims=True) + 1.0) / 2.0
    back = np.empty_like(group)
    back[order] = group
    return ranks[:, back]


def _divide(numerator: np.ndarray, denominator: np.ndarray, otherwise: float = 0.0) -> np.ndarray:
    out = np.full(numerator.shape, otherwise, dtype=np.float64)
    return np.divide(numerator, denominator, out=out, where=denominator > 0.0)


def _allowed(problem_type: str) -> str:
    return ", ".join(repr(name) for name in METRICS_BY_PROBLEM_TYPE[problem_type])
