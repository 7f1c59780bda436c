"""The words and figures that all renderings of a sweep share, so that they cannot disagree."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median

from . import wording as w
from .sweep_results import PERPLEXITY, Change, SchemeResult, SweepFigures

# Table headers are narrow.
_SHORT_NAMES = {"matthews_correlation": "Matthews", "pearsonr": "Pearson", "spearmanr": "Spearman"}

METRIC_HEADER = ("scheme", "metric", "float", "quantized", "change", "interval")
SIZE_HEADER = ("MB", "embeddings", "linear", "rest", "total", "layers", "made in, s")


def key_change(row: SchemeResult, headline: str) -> Change:
    """The change of the metric to quote."""
    return next(change for change in row.changes if change.metric == headline)


def title(sweep: SweepFigures) -> str:
    """`mrpc: float against 3 schemes`."""
    count = len(sweep.rows)
    return f"{sweep.task}: float against {sweep.rows[0].label if count == 1 else f'{count} schemes'}"


def metric_name(metric: str, short: bool = False) -> str:
    """`F1`; `Matthews correlation`, or `Matthews` in short."""
    return (
        _SHORT_NAMES.get(metric, w.METRIC_NAMES.get(metric, metric)) if short else w.METRIC_NAMES.get(metric, metric)
    )


def unit(metric: str) -> str:
    """Of a change: `points` of 100, or `%` of a perplexity."""
    return "%" if metric == PERPLEXITY else "points"


def value_words(metric: str, value: float, samples: int) -> str:
    """`89.46`, in points of 100; or a perplexity."""
    return w.significant(value, 5) if metric == PERPLEXITY else w.points(value, samples)


def change_words(metric: str, change: float, samples: int) -> str:
    """`-0.36`, in points or percent."""
    if metric != PERPLEXITY:
        return w.signed_points(change, samples)
    if abs(change) >= 1e4:
        return f"{change * 100:+.0e}"
    return f"{change * 100:+,.0f}" if abs(change) >= 1.0 else w.signed_points(change, 10_000)


def interval_words(change: Change, samples: int) -> str:
    """`[-1.72, +0.98]`, in points or percent."""
    low, high = change.interval.low, change.interval.high
    if math.isnan(low):
        return "undefined"
    return f"[{change_words(change.metric, low, samples)}, {change_words(change.metric, high, samples)}]"


def outcome(change: Change) -> str:
    """`"undefined"`, `"worse"`, `"better"`, or `"none"` where the interval includes zero."""
    low, high = change.interval.low, change.interval.high
    if math.isnan(change.change) or math.isnan(low):
        return "undefined"
    if low <= 0.0 <= high:
        return "none"
    return "worse" if (low > 0.0) is (change.metric == PERPLEXITY) else "better"


def table_header(sweep: SweepFigures) -> list[str]:
    """Of `table_rows`; columns that no row fills are absent."""
    columns = [
        metric_name(sweep.headline, short=True),
        unit(sweep.headline),
        f"{w.percent(sweep.confidence)} interval",
    ]
    if any(row.agreement is not None for row in sweep.rows):
        columns.append("flips")
    columns += ["MB", "smaller"]
    if any(row.latency is not None for row in sweep.rows):
        columns += ["ms", "speed-up"]
    return ["scheme", *columns]


def table_rows(sweep: SweepFigures) -> list[tuple[list[str], str]]:
    """The cells and the outcome of the float model and of each scheme; the third and fourth cell are the change."""
    header, samples = table_header(sweep), sweep.samples
    float_times = [row.latency.float_p50 for row in sweep.rows if row.latency is not None]
    first = {
        "scheme": "float",
        header[1]: value_words(sweep.headline, key_change(sweep.rows[0], sweep.headline).float_value, samples),
        "MB": w.megabytes(sweep.float_model.size.total),
        "ms": w.significant(median(float_times)) if float_times else "",
    }
    found = [([first.get(column, "") for column in header], "none")]
    for row in sweep.rows:
        change = key_change(row, sweep.headline)
        cells = {
            "scheme": row.label,
            header[1]: value_words(change.metric, change.value, samples),
            header[2]: change_words(change.metric, change.change, samples),
            header[3]: interval_words(change, samples),
            "flips": "" if row.agreement is None else f"{row.agreement.flip_rate * 100:.2g} %",
            "MB": w.megabytes(row.size.total),
            "smaller": w.ratio(sweep.float_model.size.total, row.size.total),
            "ms": "" if row.latency is None else w.significant(row.latency.int8_p50),
            "speed-up": "" if row.latency is None else f"{row.latency.speedup:.2f}x",
        }
        found.append(([cells[column] for column in header], outcome(change)))
    return found


def metric_rows(sweep: SweepFigures) -> Iterable[tuple[list[str], str]]:
    """Scheme, metric, float value, value, change and interval of every metric, with the outcome."""
    for row in sweep.rows:
        for change in row.changes:
            values = [value_words(change.metric, v, sweep.samples) for v in (change.float_value, change.value)]
            words = [change_words(change.metric, change.change, sweep.samples), interval_words(change, sweep.samples)]
            yield [row.label, metric_name(change.metric), *values, *words], outcome(change)


def size_rows(sweep: SweepFigures) -> Iterable[list[str]]:
    """Size by kind of layer, the number of quantized layers, and the time that quantizing took."""
    sizes = [("float", sweep.float_model.size, "", "")]
    for row in sweep.rows:
        seconds = "" if row.seconds is None else w.significant(row.seconds, 2)
        sizes.append((row.label, row.size, str(row.layers), seconds))
    for label, size, layers, seconds in sizes:
        kinds = (size.embeddings, size.linear, size.rest, size.total)
        yield [label, *map(w.megabytes, kinds), layers, seconds]


def point_note(row: SchemeResult, headline: str, samples: int) -> str:
    """`-0.36 points, 1.83x faster`, for the picture."""
    change = key_change(row, headline)
    words = f"{change_words(headline, change.change, samples)} {unit(headline)}"
    return words if row.latency is None else f"{words}, {w.faster(row.latency)}"


def headline_words(sweep: SweepFigures) -> str:
    """The whole report in a sentence or two."""
    metric, rows = sweep.headline, sweep.rows
    name = metric_name(metric)

    def moved(row: SchemeResult) -> str:
        change = key_change(row, metric)
        return f"{change_words(metric, change.change, sweep.samples)} {unit(metric)}"

    def loss(row: SchemeResult) -> float:
        change = key_change(row, metric).change
        # What cannot be told is worse than any loss.
        return math.inf if math.isnan(change) else change if metric == PERPLEXITY else -change

    def smaller(row: SchemeResult) -> str:
        before, after = sweep.float_model.size.total, row.size.total
        return f"{before / after:.2f}x smaller" if after <= before else f"{after / before:.2f}x larger"

    best, smallest = min(rows, key=loss), min(rows, key=lambda row: row.size.total)
    if len(rows) == 1:
        interval = interval_words(key_change(best, metric), sweep.samples)
        words = f"{best.label} changes {name} by {moved(best)} {interval} and is {smaller(best)}"
        return words + ("." if best.latency is None else f" and {w.faster(best.latency)}.")
    words = f"{best.label} keeps {name} best ({moved(best)}); {smallest.label} is the smallest ({smaller(smallest)}"
    words += ")" if smallest is best else f", {moved(smallest)})"
    timed = [(row.latency, row) for row in rows if row.latency is not None]
    if timed:
        latency, fastest = max(timed, key=lambda item: item[0].speedup)
        more = "" if fastest in (best, smallest) else f", {moved(fastest)}"
        if latency.speedup < 1.0:
            words += f"; none is faster than float, {fastest.label} comes nearest ({w.faster(latency)}{more})"
        else:
            words += f"; {fastest.label} is the fastest ({w.faster(latency)}{more})"
    return words + "."


def method_words(sweep: SweepFigures) -> list[str]:
    """How the figures came about, and what they do not show, one sentence each."""
    percent = w.percent(sweep.confidence)
    if sweep.headline == PERPLEXITY:
        lines = [
            f"Perplexity of {sweep.split}: {sweep.tokens or 0:,} tokens predicted in {sweep.samples:,} windows of up "
            f"to {sweep.max_length} tokens that do not overlap; lower is better, and all models saw the same windows."
        ]
    else:
        drawn = (
            ""
            if sweep.samples == sweep.rows_in_split
            else f" of {sweep.rows_in_split:,}, drawn with seed {sweep.seed}"
        )
        cut = "not cut" if sweep.max_length is None else f"cut at {sweep.max_length} tokens"
        lines = [
            f"Metrics in points of 100 on {sweep.split}, {sweep.samples:,} examples{drawn}; all models saw the same "
            f"batches, texts {cut}."
        ]
    what = "windows" if sweep.headline == PERPLEXITY else "examples"
    lines.append(
        f"Intervals: {percent} percentiles of a paired bootstrap over {what} ({sweep.resamples:,} resamples, seed "
        f"{sweep.seed}). They cover the choice of the {what}, not that of the calibration data."
    )
    wide = [key_change(row, sweep.headline).interval for row in sweep.rows]
    if sweep.headline != PERPLEXITY and any((i.high - i.low) * 100 > w.WIDE_POINTS for i in wide):
        lines.append(f"Some intervals are wide: {sweep.samples:,} examples cannot show a change of one point.")
    if any(row.agreement is not None for row in sweep.rows):
        lines.append("Flips: share of the examples whose predicted class changed, right or wrong.")
    if sweep.calibration:
        lines.append(f"Calibrated on {sweep.calibration}.")
    lines += [f"{row.label}: {row.scheme} with {row.options}." for row in sweep.rows if row.options]
    lines.append("Sizes: bytes of weights, biases and scales in memory, tied weights once; 1 MB is 10^6 bytes.")
    latency = next((row.latency for row in sweep.rows if row.latency is not None), None)
    if latency is not None:
        threads = f"{latency.threads} thread" + ("s" if latency.threads != 1 else "")
        lines.append(
            f"Latency: median of one forward pass on random tokens (batch {latency.batch_size}, {latency.length} "
            f"tokens, {threads}), float and each scheme in turn after a warm-up; the speed-up is the median over pairs"
            " of calls, so that it need not be the ratio of the medians."
        )
    machine = sweep.machine
    lines.append(
        f"Machine: {machine.cpu}; device {machine.device}, {machine.threads} "
        f"thread{'s' if machine.threads != 1 else ''}."
    )
    lines.append("Versions: " + ", ".join(f"{name} {version}" for name, version in sweep.versions.items()) + ".")
    return lines
