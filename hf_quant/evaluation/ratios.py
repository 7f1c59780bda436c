"""Metrics that are a sum over examples divided by another: their values, and intervals of their changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from .results import Interval
from .statistics import check_bootstrap, percentile_interval, resample_chunks


@dataclass(frozen=True)
class Ratios:
    """What each example adds to a metric.

    The metric is `sum(numerators) / sum(denominators)`, which holds for accuracies of tokens (right ones of all), for
    F1 (`2 TP` of what is predicted and what is there), and for means (denominators of 1).

    Args:
        numerators (`numpy.ndarray` of shape `(n,)`): float64.
        denominators (`numpy.ndarray` of shape `(n,)`): float64.
    """

    numerators: np.ndarray
    denominators: np.ndarray

    @property
    def value(self) -> float:
        """The metric; 0 where the denominators sum to 0, as F1 has it."""
        below = float(self.denominators.sum())
        return float(self.numerators.sum()) / below if below else 0.0


def ratio_bootstrap(
    before: Mapping[str, Ratios],
    after: Mapping[str, Ratios],
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Interval]:
    """Percentile intervals of `after - before`, resampling examples with what both models make of them.

    What [`paired_bootstrap`] is for class ids: an example, here a sentence with all its tags or a question, is drawn
    n of n times with replacement (Efron & Tibshirani, 1993, chapter 13).

    Args:
        before (`dict[str, Ratios]`): of the float model, by metric; all of the same n examples.
        after (`dict[str, Ratios]`): of the quantized one.
        resamples (`int`, *optional*, defaults to 10000): how many.
        confidence (`float`, *optional*, defaults to 0.95): share of the differences inside the interval.
        seed (`int`, *optional*, defaults to 0): the same seed gives the same interval.
        progress (callable, *optional*): called with the number of resamples just done.

    Returns:
        `dict[str, Interval]`: by metric, as fractions.

    Raises:
        `ValueError`: if the numbers of examples differ, or there are none.
    """
    check_bootstrap(resamples, confidence)
    parts = [
        part
        for name in before
        for side in (before, after)
        for part in (side[name].numerators, side[name].denominators)
    ]
    if len({len(part) for part in parts}) != 1 or not len(parts[0]):
        raise ValueError(f"Each metric needs the same examples, one or more; got {[len(part) for part in parts]}.")
    n = len(parts[0])
    # Examples that add the same are one kind, and under resampling the counts of kinds are multinomial.
    kinds, counts = np.unique(np.stack(parts, axis=1), axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    deltas: dict[str, list[np.ndarray]] = {name: [] for name in before}
    for size in resample_chunks(resamples, len(kinds)):
        sums = rng.multinomial(n, counts / n, size=size) @ kinds
        for index, name in enumerate(before):
            over, under, over_after, under_after = sums[:, 4 * index : 4 * index + 4].T
            deltas[name].append(_divide(over_after, under_after) - _divide(over, under))
        if progress is not None:
            progress(size)
    return {name: percentile_interval(np.concatenate(found), confidence) for name, found in deltas.items()}


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0.0)
