"""Is a difference between two models more than chance? Paired bootstrap intervals and McNemar's test.

Which test suits which metric: Dror et al., 2018, "The Hitchhiker's Guide to Testing Statistical Significance in
Natural Language Processing" (ACL).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from .results import Agreement, Interval
from .tasks import CLASSIFICATION, METRICS_BY_PROBLEM_TYPE
from .vectorized_metrics import class_metrics, number_metrics

# Resamples are worked through in chunks of about this many numbers: half a MiB of float64 stays in the caches.
_CHUNK_CELLS = 1 << 16


def paired_bootstrap(
    metrics: Sequence[str],
    float_predictions: np.ndarray,
    int8_predictions: np.ndarray,
    references: np.ndarray,
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Interval]:
    """Percentile intervals of `metric(int8) - metric(float)`, resampling examples.

    An example is drawn with its reference and both predictions (hence paired), n of n with replacement, and the
    interval reaches from the 2.5th to the 97.5th percentile of the differences (Efron & Tibshirani, 1993, "An
    Introduction to the Bootstrap", chapter 13). It covers the choice of the examples, and nothing else: not the
    seed of the training, for one.

    Args:
        metrics (sequence of `str`): names of one problem type; see `Task`.
        float_predictions (`numpy.ndarray` of shape `(n,)`): class ids, or real numbers for correlations.
        int8_predictions (`numpy.ndarray` of shape `(n,)`): the same, of the quantized model.
        references (`numpy.ndarray` of shape `(n,)`): the labels.
        resamples (`int`, *optional*, defaults to 10000): how many.
        confidence (`float`, *optional*, defaults to 0.95): share of the differences inside the interval.
        seed (`int`, *optional*, defaults to 0): the same seed gives the same interval.
        progress (callable, *optional*): called with the number of resamples just done.

    Returns:
        `dict[str, Interval]`: by metric; both ends `nan` where the metric is undefined in every resample.

    Raises:
        `ValueError`: for unequal lengths, fewer than 100 resamples, a confidence outside (0, 1), an unknown
        metric, or metrics of both problem types.
    """
    arrays = [np.asarray(a) for a in (float_predictions, int8_predictions, references)]
    if len({a.shape for a in arrays}) != 1 or arrays[0].ndim != 1 or not arrays[0].size:
        raise ValueError(
            "Predictions and references must have the same shape `(n,)` with n > 0, got "
            + ", ".join(str(a.shape) for a in arrays)
        )
    check_bootstrap(resamples, confidence)
    of_classes = [name in METRICS_BY_PROBLEM_TYPE[CLASSIFICATION] for name in metrics]
    if any(of_classes) != all(of_classes):
        raise ValueError(f"Metrics of classes and of real numbers do not mix: {', '.join(metrics)}.")
    sample = _resample_classes if all(of_classes) else _resample_numbers
    deltas: dict[str, list[np.ndarray]] = {name: [] for name in metrics}
    for chunk in sample(metrics, *arrays, resamples=resamples, rng=np.random.default_rng(seed)):
        for name in metrics:
            deltas[name].append(chunk[name])
        if progress is not None:
            progress(len(chunk[metrics[0]]))
    return {name: percentile_interval(np.concatenate(deltas[name]), confidence) for name in metrics}


def check_bootstrap(resamples: int, confidence: float) -> None:
    """Refuse a number of resamples or a confidence that gives no interval.

    Raises:
        `ValueError`: naming the value and the allowed ones.
    """
    if resamples < 100:
        raise ValueError(f"`resamples` is {resamples}; a percentile interval needs 100 or more (default 10000).")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"`confidence` is {confidence}; allowed: between 0 and 1, such as 0.95.")


def percentile_interval(deltas: np.ndarray, confidence: float) -> Interval:
    """The interval between two percentiles of resampled differences, without undefined ones."""
    defined = deltas[~np.isnan(deltas)]
    if not defined.size:
        return Interval(math.nan, math.nan, undefined=deltas.size)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(defined, [tail, 1.0 - tail])
    return Interval(float(low), float(high), undefined=deltas.size - defined.size)


def resample_chunks(resamples: int, width: int) -> Iterator[int]:
    """How many resamples to draw at a time, so that memory stays small."""
    size = max(1, min(resamples, _CHUNK_CELLS // max(1, width)))
    for start in range(0, resamples, size):
        yield min(size, resamples - start)


def _resample_classes(
    metrics: Sequence[str],
    float_predictions: np.ndarray,
    int8_predictions: np.ndarray,
    references: np.ndarray,
    *,
    resamples: int,
    rng: np.random.Generator,
) -> Iterator[dict[str, np.ndarray]]:
    """Differences for class ids. The metrics depend on the examples only through how many there are of each
    (reference, float prediction, int8 prediction), and under resampling those counts are multinomial."""
    triples = np.stack([references, float_predictions, int8_predictions], axis=1)
    kinds, counts = np.unique(triples, axis=0, return_counts=True)
    n = len(references)
    for size in resample_chunks(resamples, len(kinds)):
        drawn = rng.multinomial(n, counts / n, size=size)
        before = class_metrics(metrics, drawn, kinds[:, 1], kinds[:, 0])
        after = class_metrics(metrics, drawn, kinds[:, 2], kinds[:, 0])
        yield {name: after[name] - before[name] for name in metrics}


def _resample_numbers(
    metrics: Sequence[str],
    float_predictions: np.ndarray,
    int8_predictions: np.ndarray,
    references: np.ndarray,
    *,
    resamples: int,
    rng: np.random.Generator,
) -> Iterator[dict[str, np.ndarray]]:
    n = len(references)
    for size in resample_chunks(resamples, n):
        drawn = rng.integers(0, n, size=(size, n), dtype=np.int64)
        drawn += np.arange(size)[:, None] * n  # one row of bins a resample
        counts = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        before = number_metrics(metrics, counts, float_predictions, references)
        after = number_metrics(metrics, counts, int8_predictions, references)
        yield {name: after[name] - before[name] for name in metrics}


def agreement(float_predictions: np.ndarray, int8_predictions: np.ndarray, references: np.ndarray) -> Agreement:
    """Flips, wins, losses and McNemar's p of two classifiers.

    Args:
        float_predictions (`numpy.ndarray` of shape `(n,)`): class ids of the float model.
        int8_predictions (`numpy.ndarray` of shape `(n,)`): those of the quantized one.
        references (`numpy.ndarray` of shape `(n,)`): the true ones.
    """
    changed = float_predictions != int8_predictions
    return agreement_of(changed, float_predictions == references, int8_predictions == references)


def agreement_of(changed: np.ndarray, float_right: np.ndarray, int8_right: np.ndarray) -> Agreement:
    """The same, of answers that are no class ids.

    Args:
        changed (`numpy.ndarray` of shape `(n,)`): whether the two models answer differently.
        float_right (`numpy.ndarray` of shape `(n,)`): whether the float model is right.
        int8_right (`numpy.ndarray` of shape `(n,)`): whether the quantized one is.
    """
    wins = int(np.count_nonzero(changed & int8_right & ~float_right))
    losses = int(np.count_nonzero(changed & float_right & ~int8_right))
    flips = int(np.count_nonzero(changed))
    return Agreement(flips, flips / len(changed), wins, losses, mcnemar_exact(wins, losses))


def mcnemar_exact(wins: int, losses: int) -> float:
    """The exact McNemar test: is it as likely that a change helps as that it hurts?

    The two-sided binomial p of `min(wins, losses)` of `wins + losses` at one half (McNemar, 1947, "Note on the
    sampling error of the difference between correlated proportions or percentages", Psychometrika 12):

    `p = min(1, 2 sum_{k <= min(wins, losses)} C(wins + losses, k) / 2^(wins + losses))`.

    Args:
        wins (`int`): examples that only one of two classifiers gets right.
        losses (`int`): examples that only the other gets right.

    Returns:
        `float`: p in (0, 1]; 1 where there is no such example.

    Raises:
        `ValueError`: for negative counts.
    """
    if wins < 0 or losses < 0:
        raise ValueError(f"`wins` ({wins}) and `losses` ({losses}) are counts and cannot be negative.")
    changed = wins + losses
    term = tail = 1  # C(n, 0); whole numbers, so the division at the end is the only rounding
    for k in range(min(wins, losses)):
        term = term * (changed - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**changed)
