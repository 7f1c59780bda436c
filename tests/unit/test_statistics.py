"""Paired bootstrap and McNemar: against definitions, scikit-learn, scipy, a textbook and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from sklearn import metrics as sk

from hf_quant.evaluation.statistics import agreement, mcnemar_exact, paired_bootstrap
from hf_quant.evaluation.vectorized_metrics import class_metrics, number_metrics

CLASS_METRICS = ("accuracy", "f1", "matthews_correlation")
NUMBER_METRICS = ("pearsonr", "spearmanr")


@st.composite
def resampled(draw: st.DrawFn, high: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions, references, and the rows of three resamples."""
    n = draw(st.integers(2, 25))
    values = hnp.arrays(np.int64, n, elements=st.integers(0, high))
    rows = hnp.arrays(np.int64, (3, n), elements=st.integers(0, n - 1))
    return draw(values), draw(values), draw(rows)


def counts_of(rows: np.ndarray) -> np.ndarray:
    return np.stack([np.bincount(row, minlength=rows.shape[1]) for row in rows])


@given(resampled(high=1), st.booleans())
@pytest.mark.filterwarnings("ignore:A single label was found")
def test_class_metrics_equal_scikit_learn_on_every_resample(
    sample: tuple[np.ndarray, np.ndarray, np.ndarray], more_classes: bool
) -> None:
    predictions, references, rows = sample
    if more_classes:
        predictions, references = predictions + 2 * (rows[0] % 2), references + 2 * (rows[1] % 2)
    found = class_metrics(CLASS_METRICS, counts_of(rows), predictions, references)
    for i, row in enumerate(rows):
        p, r = predictions[row], references[row]
        assert found["accuracy"][i] == pytest.approx(sk.accuracy_score(r, p))
        expected = sk.f1_score(r, p, labels=[1], average="micro", zero_division=0.0)
        assert found["f1"][i] == pytest.approx(expected)
        assert found["matthews_correlation"][i] == pytest.approx(sk.matthews_corrcoef(r, p), abs=1e-12)


@given(resampled(high=6), st.sampled_from([0.0, 1e6]))
@pytest.mark.filterwarnings("ignore:.*constant")
def test_number_metrics_equal_scipy_on_every_resample(
    sample: tuple[np.ndarray, np.ndarray, np.ndarray], offset: float
) -> None:
    predictions, references, rows = sample[0] * 0.37 + offset, sample[1] * 1.0, sample[2]
    found = number_metrics(NUMBER_METRICS, counts_of(rows), predictions, references)
    for i, row in enumerate(rows):
        p, r = predictions[row], references[row]
        assert found["pearsonr"][i] == pytest.approx(stats.pearsonr(p, r)[0], abs=1e-7, nan_ok=True)
        assert found["spearmanr"][i] == pytest.approx(stats.spearmanr(p, r)[0], abs=1e-9, nan_ok=True)


def test_pearson_of_a_resample_without_its_outlier_does_not_cancel() -> None:
    predictions, references = np.array([1e9, 1.0, 2.0, 4.0]), np.array([0.0, 1.0, 2.0, 3.0])
    found = number_metrics(["pearsonr"], np.array([[0, 1, 1, 2]]), predictions, references)
    expected = np.corrcoef([1, 2, 4, 4], [1, 2, 3, 3])[0, 1]
    assert found["pearsonr"][0] == pytest.approx(expected, abs=1e-12)


def test_unknown_metrics_are_refused() -> None:
    one = np.ones((1, 1)), np.ones(1), np.ones(1)
    with pytest.raises(ValueError, match=r"Unknown metric 'auc' of class ids\. Allowed: 'accuracy'"):
        class_metrics(["auc"], *one)
    with pytest.raises(ValueError, match=r"Unknown metric 'rmse' of real numbers\. Allowed: 'pearsonr'"):
        number_metrics(["rmse"], *one)


def classifiers(n: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    references = rng.integers(0, 2, n)
    before = np.where(rng.random(n) < 0.15, 1 - references, references)
    after = np.where(rng.random(n) < 0.06, 1 - before, before)
    return before, after, references


def test_interval_equals_that_of_a_plain_loop_over_resampled_rows() -> None:
    before, after, references = classifiers()
    rng = np.random.default_rng(3)
    plain = []
    for _ in range(4000):
        rows = rng.integers(0, len(references), len(references))
        f1 = [
            2 * np.sum(references[rows] & p[rows]) / (references[rows].sum() + p[rows].sum()) for p in (before, after)
        ]
        plain.append(f1[1] - f1[0])
    found = paired_bootstrap(["f1"], before, after, references)["f1"]
    # Two Monte Carlo estimates of the same percentiles: equal within a twentieth of the interval.
    tolerance = (found.high - found.low) / 20
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(plain, [0.025, 0.975])), abs=tolerance)


def test_interval_of_numbers_equals_that_of_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    references = rng.normal(size=80)
    before = references + rng.normal(size=80)
    after = before + 0.5 * rng.normal(size=80)
    plain = []
    for _ in range(3000):
        rows = rng.integers(0, 80, 80)
        rho = [stats.pearsonr(p[rows], references[rows])[0] for p in (before, after)]
        plain.append(rho[1] - rho[0])
    found = paired_bootstrap(["pearsonr"], before, after, references)["pearsonr"]
    tolerance = (found.high - found.low) / 20
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(plain, [0.025, 0.975])), abs=tolerance)


def test_interval_of_accuracy_has_the_width_of_theory() -> None:
    # The accuracy difference is a mean of values in {-1, 0, 1}: its standard error is known.
    before, after, references = classifiers(2000)
    change = (after == references).astype(int) - (before == references).astype(int)
    found = paired_bootstrap(["accuracy"], before, after, references)["accuracy"]
    assert found.high - found.low == pytest.approx(2 * 1.96 * change.std() / math.sqrt(2000), rel=0.05)
    assert (found.low + found.high) / 2 == pytest.approx(change.mean(), abs=1e-3)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    # True accuracies: 0.85, and 0.85 - 0.85 * 0.06 + 0.15 * 0.06 = 0.808.
    truth, covered, runs = -0.042, 0, 300
    for seed in range(runs):
        found = paired_bootstrap(["accuracy"], *classifiers(seed=seed), resamples=1000, seed=seed)["accuracy"]
        covered += found.low <= truth <= found.high
    assert 0.92 <= covered / runs <= 0.98


def test_the_interval_of_a_correlation_covers_the_truth_too() -> None:
    # references + noise of variance 1, then of variance 2: correlations 1/sqrt(2) and 1/sqrt(3).
    truth, covered, runs = 1 / math.sqrt(3) - 1 / math.sqrt(2), 0, 200
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        references = rng.normal(size=150)
        before = references + rng.normal(size=150)
        after = before + rng.normal(size=150)
        found = paired_bootstrap(["pearsonr"], before, after, references, resamples=400, seed=seed)["pearsonr"]
        covered += found.low <= truth <= found.high
    assert 0.90 <= covered / runs <= 0.99


def test_same_seed_same_interval_and_all_examples_jointly() -> None:
    data = classifiers()
    first, again = (paired_bootstrap(CLASS_METRICS, *data, seed=5) for _ in range(2))
    assert first == again
    assert first != paired_bootstrap(CLASS_METRICS, *data, seed=6)
    # Equal predictions differ in no resample: were the two resampled apart, they would.
    same = paired_bootstrap(CLASS_METRICS, data[0], data[0], data[2])
    assert all((interval.low, interval.high) == (0.0, 0.0) for interval in same.values())


def test_resamples_without_a_value_are_counted() -> None:
    references, before, after = np.arange(3.0), np.array([0.0, 1.0, 1.5]), np.array([0.0, 1.0, 0.5])
    found = paired_bootstrap(["pearsonr"], before, after, references, resamples=5000)["pearsonr"]
    # All three draws the same row: 3 of 27.
    assert found.undefined / 5000 == pytest.approx(1 / 9, abs=0.02)
    assert math.isfinite(found.low)
    never = paired_bootstrap(NUMBER_METRICS, np.zeros(3), after, references, resamples=100)
    assert all(math.isnan(interval.low) and interval.undefined == 100 for interval in never.values())


@pytest.mark.parametrize("metrics", [CLASS_METRICS, NUMBER_METRICS])
def test_progress_counts_every_resample_once(metrics: tuple[str, ...]) -> None:
    done: list[int] = []
    paired_bootstrap(metrics, *classifiers(500), resamples=1234, progress=done.append)
    assert sum(done) == 1234


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resamples": 99}, "`resamples` is 99; a percentile interval needs 100 or more"),
        ({"confidence": 1.0}, "`confidence` is 1.0; allowed: between 0 and 1"),
        ({"metrics": ["accuracy", "pearsonr"]}, "do not mix: accuracy, pearsonr"),
        ({"references": np.zeros(3)}, r"same shape .* got \(2,\), \(2,\), \(3,\)"),
    ],
)
def test_bootstrap_refuses(changes: dict[str, object], message: str) -> None:
    arguments = {
        "metrics": ["accuracy"],
        "float_predictions": np.zeros(2),
        "int8_predictions": np.zeros(2),
        "references": np.zeros(2),
    }
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(**{**arguments, **changes})  # type: ignore[arg-type]


@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemar_equals_the_binomial_test(wins: int, losses: int) -> None:
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert mcnemar_exact(wins, losses) == pytest.approx(expected, rel=1e-9)
    assert mcnemar_exact(wins, losses) == mcnemar_exact(losses, wins)


def test_mcnemar_by_hand_and_by_the_book() -> None:
    assert mcnemar_exact(1, 9) == 2 * (1 + 10) / 2**10
    assert mcnemar_exact(0, 5) == 2 / 2**5
    assert mcnemar_exact(0, 0) == mcnemar_exact(4, 4) == 1.0
    # Agresti, 1990, "Categorical Data Analysis", p. 350: of those asked twice about the president, 150 changed
    # their minds to the worse and 86 to the better. The corrected chi-squared (16.82) gives p = 4.1e-05.
    assert mcnemar_exact(86, 150) == pytest.approx(3.716e-05, rel=1e-4)
    chi_squared = (abs(86 - 150) - 1) ** 2 / (86 + 150)
    assert mcnemar_exact(86, 150) == pytest.approx(stats.chi2.sf(chi_squared, 1), rel=0.15)
    with pytest.raises(ValueError, match=r"`wins` \(-1\)"):
        mcnemar_exact(-1, 2)


def test_agreement_counts_flips_wins_and_losses() -> None:
    references = np.array([0, 0, 1, 1, 2, 2, 2, 0])
    before = np.array([0, 0, 1, 0, 0, 2, 2, 1])
    after_ = np.array([0, 1, 1, 1, 1, 2, 0, 1])
    found = agreement(before, after_, references)
    # Row 1 lost, 3 won, 4 wrong either way, 6 lost.
    assert (found.flips, found.wins, found.losses) == (4, 1, 2)
    assert found.flip_rate == 0.5
    assert found.mcnemar_p == 1.0
    assert agreement(before, before, references).flips == 0
