"""The words and figures that all renderings of a report share, so that they cannot disagree."""

from __future__ import annotations

import math

from .results import Agreement, Figures, Latency, MetricResult, ModelInfo, SplitResult

METRIC_NAMES = {
    "accuracy": "accuracy",
    "f1": "F1",
    "matthews_correlation": "Matthews correlation",
    "pearsonr": "Pearson correlation",
    "spearmanr": "Spearman correlation",
    "token_accuracy": "token accuracy",
    "entity_f1": "entity F1",
    "exact_match": "exact match",
    "token_f1": "token F1",
}

# An interval wider than this many points cannot tell a loss of one point, the usual tolerance, from none.
WIDE_POINTS = 2.0


def points(value: float, samples: int) -> str:
    """A fraction in points of 100, with the digits that the sample supports: `89.46`, or `90.1` of 71 examples."""
    return "undefined" if math.isnan(value) else f"{value * 100:.{_decimals(samples)}f}"


def signed_points(value: float, samples: int) -> str:
    """A difference in points of 100, with its sign: `-0.36`."""
    if math.isnan(value):
        return "undefined"
    text = f"{value * 100:+.{_decimals(samples)}f}"
    return text if text.strip("+-0.") else text[1:]  # neither +0.00 nor -0.00


def _decimals(samples: int) -> int:
    # One example weighs 100 / n points; show its first two digits, and never more than two decimals.
    return min(2, max(0, 1 - math.floor(math.log10(100 / samples))))


def interval(metric: MetricResult, samples: int) -> str:
    """`[-1.72, +0.98]`."""
    low, high = metric.interval.low, metric.interval.high
    if math.isnan(low):
        return "undefined"
    return f"[{signed_points(low, samples)}, {signed_points(high, samples)}]"


def outcome(metric: MetricResult) -> str:
    """`"undefined"`, `"worse"`, `"better"`, or `"none"` where the interval includes zero."""
    if math.isnan(metric.delta) or math.isnan(metric.interval.low):
        return "undefined"
    if metric.interval.high < 0.0:
        return "worse"
    return "better" if metric.interval.low > 0.0 else "none"


def is_wide(metric: MetricResult) -> bool:
    """Whether the interval is too wide to see a change of one point."""
    return (metric.interval.high - metric.interval.low) * 100 > WIDE_POINTS


def verdict(metric: MetricResult, confidence: float) -> str:
    """A few words: `no difference seen at 95 %`, with `(wide)` where the sample could hardly have shown one."""
    words = {
        "undefined": "undefined",
        "worse": f"quantized is worse at {percent(confidence)}",
        "better": f"quantized is better at {percent(confidence)}",
        "none": f"no difference seen at {percent(confidence)}",
    }[outcome(metric)]
    return words + (" (wide)" if is_wide(metric) else "")


def readings(split: SplitResult, confidence: float) -> list[str]:
    """What the figures of a split do and do not show, one sentence each."""
    found = []
    for metric in split.metrics:
        found.append(f"{METRIC_NAMES.get(metric.name, metric.name)}: {_reading(metric, split.samples, confidence)}")
        if metric.interval.undefined and not math.isnan(metric.interval.low):
            found[-1] += f" {metric.interval.undefined} resamples without a value of the metric were left out."
    if split.agreement is not None and split.agreement.flips == 0:
        found.append(
            f"No prediction changed. Of {split.samples} examples that still leaves room for a flip rate of up to "
            f"{100 * rule_of_three(split.samples):.2g} % (at 95 %)."
        )
    return found


def _reading(metric: MetricResult, samples: int, confidence: float) -> str:
    low, high = (abs(end) * 100 for end in (metric.interval.low, metric.interval.high))
    digits = _decimals(samples)
    found = outcome(metric)
    if found == "undefined":
        return "undefined, because predictions or labels are constant."
    if found == "worse":
        return f"quantized is worse at {percent(confidence)}, by {high:.{digits}f} to {low:.{digits}f} points."
    if found == "better":
        return f"quantized is better at {percent(confidence)}, by {low:.{digits}f} to {high:.{digits}f} points."
    sentence = f"no difference seen at {percent(confidence)}"
    if low:
        sentence += f"; a loss of up to {low:.{digits}f} points is not ruled out"
    if is_wide(metric):
        sentence += f" (the interval is wide: {samples} examples cannot show a change of one point)"
    return sentence + "."


def rule_of_three(samples: int) -> float:
    """The exact upper 95 % bound of a rate that was never seen in n examples, `1 - 0.05^(1/n)`, about 3 / n."""
    return float(1.0 - 0.05 ** (1.0 / samples))


def sample_count(split: SplitResult, seed: int) -> str:
    """`408 examples`, or `200 of 408 examples, drawn with seed 0`."""
    if split.samples == split.rows:
        return f"{split.samples:,} examples"
    return f"{split.samples:,} of {split.rows:,} examples, drawn with seed {seed}"


def agreement_words(agreement: Agreement, samples: int) -> str:
    """Flips, wins, losses and p in one sentence."""
    if not agreement.flips:
        return f"Predictions changed: none of {samples:,}."
    other = agreement.flips - agreement.wins - agreement.losses
    parts = [f"{agreement.wins} now right", f"{agreement.losses} now wrong"]
    if other:
        parts.append(f"{other} wrong either way")
    return (
        f"Predictions changed: {agreement.flips} of {samples:,} ({agreement.flip_rate * 100:.2g} %): "
        f"{', '.join(parts)}; McNemar {p_value(agreement.mcnemar_p)}."
    )


def deviation_words(split: SplitResult) -> str:
    """Mean and largest absolute difference of the predictions of a regression."""
    if split.deviation is None:
        return ""
    return (
        f"Predictions changed by {significant(split.deviation.mean_absolute)} on average and "
        f"{significant(split.deviation.max_absolute)} at most, in the unit of the labels."
    )


def p_value(p: float) -> str:
    """`p=0.63`, or `p<0.001`."""
    return "p<0.001" if p < 0.001 else f"p={p:.2g}" if p < 0.995 else "p=1.0"


def percent(share: float) -> str:
    """`95 %`."""
    return f"{share * 100:g} %"


def significant(value: float, digits: int = 3) -> str:
    """That many significant digits, without exponents: `438`, `0.0834`, `1,340`."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def megabytes(count: int | None) -> str:
    """Bytes in MB (10^6 bytes), three digits."""
    return "" if count is None else significant(count / 1e6)


def ratio(before: float | None, after: float | None) -> str:
    """`3.98x`; empty where it has no meaning."""
    return f"{before / after:.2f}x" if before and after else ""


def decibels(value: float) -> str:
    """`31.4`; `exact` where nothing differs."""
    return "exact" if value == math.inf else f"{value:.1f}"


def smaller(comparison: Figures) -> str:
    """`3.98x smaller`."""
    before, after = comparison.float_model.size.total, comparison.int8_model.size.total
    return f"{before / after:.2f}x smaller" if after <= before else f"{after / before:.2f}x larger"


def faster(latency: Latency) -> str:
    """`1.83x faster`, `1.20x slower`, or `as fast` within five percent."""
    if 1 / 1.05 < latency.speedup < 1.05:
        return "as fast"
    return f"{latency.speedup:.2f}x faster" if latency.speedup > 1 else f"{1 / latency.speedup:.2f}x slower"


def latency_conditions(latency: Latency) -> str:
    """Batch, length, threads and calls."""
    threads = f"{latency.threads} thread" + ("s" if latency.threads != 1 else "")
    return f"batch {latency.batch_size}, {latency.length} tokens, {threads}, {latency.calls} calls each"


def model_words(model: ModelInfo) -> str:
    """Class, dtype and number of quantized layers."""
    layers = f"{model.int8_layers} quantized layers" if model.int8_layers else "no quantized layers"
    return f"{model.architecture}, {model.dtype}, {layers}"


def headline(comparison: Figures) -> str:
    """The whole report in two sentences."""
    split = comparison.splits[0]
    metric = next(m for m in split.metrics if m.name == comparison.headline)
    where = f" on {split.split}" if len(comparison.splits) > 1 else ""
    words = (
        f"{METRIC_NAMES.get(metric.name, metric.name)}{where} {points(metric.float_value, split.samples)} to "
        f"{points(metric.int8_value, split.samples)} ({signed_points(metric.delta, split.samples)} points, "
        f"{percent(comparison.confidence)} interval {interval(metric, split.samples)}): "
        f"{verdict(metric, comparison.confidence)}. The quantized model is {smaller(comparison)}"
    )
    if comparison.latency is not None:
        words += f" and {faster(comparison.latency)}"
        words += " as float" if faster(comparison.latency) == "as fast" else ""
    return words + "."


def method(comparison: Figures) -> list[str]:
    """How the figures came about, one sentence each."""
    cut = "not cut" if comparison.max_length is None else f"cut at {comparison.max_length} tokens"
    lines = [
        f"Metrics in points of 100; both models saw the same batches, texts {cut}.",
        f"Intervals: {percent(comparison.confidence)} percentiles of a paired bootstrap over examples "
        f"({comparison.resamples:,} resamples, seed {comparison.seed}). They cover the choice of the examples, not "
        "the seed of the training.",
        "Sizes: bytes of weights, biases and scales in memory, tied weights once; 1 MB is 10^6 bytes.",
    ]
    if comparison.latency is not None:
        lines.append(
            "Latency: one forward pass on random tokens without padding, float and quantized in turn after a warm-up; "
            "the speed-up is the median over pairs of calls."
        )
    if comparison.layer_sqnr:
        lines.append(
            "SQNR: 10 log10 of signal over error of a layer's output, each model on its own activations, so that "
            "a layer carries the errors below it."
        )
    elif comparison.int8_model.int8_layers:
        lines.append(
            "No SQNR by layer: the two models were trained apart, so their layers differ by more than rounding."
        )
    machine = comparison.machine
    lines.append(
        f"Machine: {machine.cpu}; device {machine.device}, {machine.threads} "
        f"thread{'s' if machine.threads != 1 else ''}."
    )
    lines.append("Versions: " + ", ".join(f"{name} {version}" for name, version in comparison.versions.items()) + ".")
    return lines
