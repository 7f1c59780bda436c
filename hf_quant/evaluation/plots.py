"""The plots of the HTML report: inline SVG made by hand, so that the file needs no library and no network.

Colours are CSS variables of the page, which is how the plots follow its light and dark modes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from ..quantization.guard_results import LayerSensitivity, TradeOff, signed
from . import wording as w
from .results import Latency, ModelSize, SplitResult

WIDTH = 760
LEFT = 190  # where the scale begins; labels end a little before
NARROW_LEFT = 60  # the same where labels are short
RIGHT = 610  # where the scale ends; values follow
ROW = 34
BAR = 16

KINDS = ("embeddings", "linear", "rest")


def delta_plot(splits: Sequence[SplitResult], confidence: float) -> str:
    """Change of each metric with its interval, on one scale that reaches to one point on each side at least."""
    rows = [(split, metric) for split in splits for metric in split.metrics]
    ends = [end * 100 for _, m in rows for end in (m.interval.low, m.interval.high, m.delta) if math.isfinite(end)]
    low, high = min([*ends, -1.0]), max([*ends, 1.0])
    margin = (high - low) * 0.04
    low, high = low - margin, high + margin

    def at(points: float) -> float:
        return LEFT + (points - low) / (high - low) * (RIGHT - LEFT)

    bottom = ROW * len(rows) + 10
    parts = []
    for tick in ticks(low, high):
        kind = "zero" if tick == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{at(tick):.1f}" x2="{at(tick):.1f}" y1="4" y2="{bottom}"/>')
        parts.append(svg_text(at(tick), bottom + 16, f"{tick:+g}" if tick else "0", "tick", "middle"))
    parts.append(svg_text(RIGHT + 14, bottom + 16, "points", "tick"))
    for i, (split, metric) in enumerate(rows):
        y = 4 + ROW * i + ROW / 2
        label = w.METRIC_NAMES.get(metric.name, metric.name)
        parts.append(svg_text(LEFT - 14, y, f"{label}, {split.split}" if len(splits) > 1 else label, "label", "end"))
        delta = w.signed_points(metric.delta, split.samples)
        if w.outcome(metric) == "undefined":
            parts.append(svg_text(RIGHT + 14, y, "undefined", "value"))
            continue
        ends_at = at(metric.interval.low * 100), at(metric.interval.high * 100)
        hint = f"{label}: {delta} points, {w.interval(metric, split.samples)}; {w.verdict(metric, confidence)}"
        parts.append(
            f'<g class="{w.outcome(metric)}"><title>{escape(hint)}</title>'
            f'<line class="whisker" x1="{ends_at[0]:.1f}" x2="{ends_at[1]:.1f}" y1="{y}" y2="{y}"/>'
            + "".join(f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 6}" y2="{y + 6}"/>' for x in ends_at)
            + f'<circle cx="{at(metric.delta * 100):.1f}" cy="{y}" r="5"/></g>'
        )
        parts.append(svg_text(RIGHT + 14, y, f"{delta} {w.interval(metric, split.samples)}", "value"))
    return svg(bottom + 26, f"Change of each metric with its {w.percent(confidence)} interval", parts)


def size_plot(float_size: ModelSize, int8_size: ModelSize) -> str:
    """Bytes by kind, float above quantized."""
    longest = max(float_size.total, int8_size.total, 1)
    parts = []
    for i, (name, size) in enumerate((("float", float_size), ("quantized", int8_size))):
        y, x = 6 + ROW * i + ROW / 2, float(NARROW_LEFT)
        parts.append(svg_text(NARROW_LEFT - 14, y, name, "label", "end"))
        for kind in KINDS:
            count = getattr(size, kind)
            width = count / longest * (RIGHT - NARROW_LEFT)
            # Two units of surface between neighbours keep them apart without an outline.
            shown = max(width - 2, min(width, 1.0))
            if count:
                hint = f"{name}, {kind}: {w.megabytes(count)} MB"
                parts.append(_bar(x, y, shown, kind, hint))
            x += width
        parts.append(svg_text(x + 10, y, f"{w.megabytes(size.total)} MB", "value"))
    return svg(ROW * 2 + 12, "Size by kind of layer", parts)


def latency_plot(latency: Latency) -> str:
    """Median and 95th percentile, float above quantized."""
    longest = max(latency.float_p95, latency.int8_p95)
    rows = (("float", latency.float_p50, latency.float_p95), ("quantized", latency.int8_p50, latency.int8_p95))
    parts = []
    for i, (name, p50, p95) in enumerate(rows):
        y = 6 + ROW * i + ROW / 2
        width, end = (value / longest * (RIGHT - NARROW_LEFT) for value in (p50, p95))
        hint = f"{name}: p50 {w.significant(p50)} ms, p95 {w.significant(p95)} ms"
        parts.append(svg_text(NARROW_LEFT - 14, y, name, "label", "end"))
        parts.append(_bar(NARROW_LEFT, y, width, f"{name}-model", hint))
        x = NARROW_LEFT + end
        parts.append(f'<line class="p95" x1="{NARROW_LEFT + width:.1f}" x2="{x:.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<line class="p95" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 6}" y2="{y + 6}"/>')
        parts.append(svg_text(x + 10, y, f"{w.significant(p50)} ms, p95 {w.significant(p95)}", "value"))
    return svg(ROW * 2 + 12, "Latency of one forward pass", parts)


def sqnr_plot(layers: Sequence[tuple[str, float]]) -> str:
    """Decibels of each layer, in the order given."""
    row, bar, left = 20, 11, 330
    finite = [value for _, value in layers if math.isfinite(value)]
    longest = max([*finite, 1.0])
    bottom = row * len(layers) + 8
    parts = []
    for tick in ticks(0.0, longest):
        x = left + tick / longest * (RIGHT - left)
        parts.append(f'<line class="{"grid" if tick else "zero"}" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{bottom}"/>')
        parts.append(svg_text(x, bottom + 14, f"{tick:g}", "tick", "middle"))
    parts.append(svg_text(RIGHT + 14, bottom + 14, "dB", "tick"))
    for i, (name, value) in enumerate(layers):
        y = 4 + row * i + row / 2
        share = 1.0 if value == math.inf else max(0.0, value) / longest if math.isfinite(value) else 0.0
        short = name if len(name) <= 46 else "…" + name[-45:]
        parts.append(svg_text(left - 12, y, short, "layer", "end"))
        parts.append(_bar(left, y, share * (RIGHT - left), "int8-model", f"{name}: {w.decibels(value)} dB", bar))
        parts.append(svg_text(left + share * (RIGHT - left) + 8, y, w.decibels(value), "layer-value"))
    return svg(bottom + 24, "Signal to quantization noise of each layer", parts)


class SchemePoint(NamedTuple):
    """One model in the picture over schemes.

    Args:
        label (`str`): its name.
        note (`str`): a second line under the name.
        size (`int`): its bytes.
        change (`float`): of the metric, in points or percent.
        low (`float`): lower end of the interval of the change; `nan` where there is none.
        high (`float`): its upper end.
        kind (`str`): `"worse"`, `"better"`, `"none"`, or `"float-model"`.
    """

    label: str
    note: str
    size: int
    change: float
    low: float
    high: float
    kind: str


def scheme_plot(points: Sequence[SchemePoint], unit: str, confidence: float) -> str:
    """Size to the right, change of the metric upwards with its interval, and a label for every point.

    Changes beyond 100 points or percent are drawn at the edge; their labels say how much they are. Points of nearly
    equal size stand side by side.
    """
    left, right, labels = NARROW_LEFT, 468, 500
    bottom = 10 + max(250.0, 36.0 * len(points))
    inside = [[min(max(v, -100.0), 100.0) for v in (p.change, p.low, p.high) if math.isfinite(v)] for p in points]
    low = min([-1.0, *(value for values in inside for value in values)])
    high = max([1.0, *(value for values in inside for value in values)])
    margin = (high - low) * 0.06
    low, high = low - margin, high + margin
    largest = max(p.size for p in points) / 1e6 * 1.06

    def down(change: float) -> float:
        # Infinite where the model is broken.
        return 10 + (high - min(max(change, low), high)) / (high - low) * (bottom - 10)

    parts = []
    for tick in ticks(low, high):
        kind = "zero" if tick == 0 else "grid"
        y = down(tick)
        parts.append(f'<line class="{kind}" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(svg_text(left - 10, y, f"{tick:+g}" if tick else "0", "tick", "end"))
    for tick in ticks(0.0, largest):
        parts.append(svg_text(left + tick / largest * (right - left), bottom + 16, f"{tick:g}", "tick", "middle"))
    parts.append(svg_text(labels, bottom + 16, f"MB; upwards: {unit}", "tick"))
    drawn = [p for p in points if not math.isnan(p.change)]
    across = _spread([left + p.size / 1e6 / largest * (right - left) for p in drawn], 14.0, left + 8, right - 8)
    heights = _spread([down(p.change) for p in drawn], 36.0, 26.0, bottom - 18)
    for point, x, y in zip(drawn, across, heights, strict=True):
        parts.append(f'<path class="leader" d="M{x:.1f} {down(point.change):.1f} L{labels - 8} {y:.1f}"/>')
    for point, x, y in zip(drawn, across, heights, strict=True):
        ends = [down(end) for end in (point.low, point.high) if not math.isnan(end)]
        whisker = [
            f'<line class="whisker" x1="{x - 5:.1f}" x2="{x + 5:.1f}" y1="{e:.1f}" y2="{e:.1f}"/>' for e in ends
        ]
        if ends:
            whisker.append(f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{ends[0]:.1f}" y2="{ends[-1]:.1f}"/>')
        hint = f"{point.label}: {point.note}"
        parts.append(
            f'<g class="{point.kind}"><title>{escape(hint)}</title>{"".join(whisker)}'
            f'<circle cx="{x:.1f}" cy="{down(point.change):.1f}" r="5"/></g>'
        )
        parts.append(svg_text(labels, y - 8, _short(point.label, 36), "layer"))
        parts.append(svg_text(labels, y + 8, point.note, "tick"))
    title = f"Size and change of the metric with its {w.percent(confidence)} interval, by scheme"
    return svg(bottom + 26, title, parts)


def sensitivity_plot(rows: Sequence[LayerSensitivity]) -> str:
    """Decibels of the model's output where one layer alone is quantized, in the order given; then the change."""
    row, bar, left, right, change = 20, 11, 330, 590, 750
    longest = max([*(r.sqnr for r in rows if math.isfinite(r.sqnr)), 1.0])
    measured = any(r.change is not None for r in rows)
    bottom = row * len(rows) + 8
    parts = []
    for tick in ticks(0.0, longest):
        x = left + tick / longest * (right - left)
        parts.append(f'<line class="{"grid" if tick else "zero"}" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{bottom}"/>')
        parts.append(svg_text(x, bottom + 14, f"{tick:g}", "tick", "middle"))
    parts.append(svg_text(right + 14, bottom + 14, "dB", "tick"))
    if measured:
        parts.append(svg_text(change, bottom + 14, "change", "tick", "end"))
    for i, layer in enumerate(rows):
        y = 4 + row * i + row / 2
        share = 1.0 if layer.sqnr == math.inf else max(0.0, layer.sqnr) / longest if math.isfinite(layer.sqnr) else 0.0
        words = w.decibels(layer.sqnr)
        hint = f"{layer.name}: {words} dB, {w.megabytes(layer.bytes_saved)} MB saved"
        parts.append(svg_text(left - 12, y, _short(layer.name, 46), "layer", "end"))
        parts.append(_bar(left, y, share * (right - left), "int8-model", hint, bar))
        parts.append(svg_text(left + share * (right - left) + 8, y, words, "layer-value"))
        if layer.change is not None:
            parts.append(svg_text(change, y, signed(layer.change), "layer-value", "end"))
    return svg(bottom + 24, "Error of the model's output by layer quantized alone", parts)


def trade_off_plot(points: Sequence[TradeOff], target: float | None = None) -> str:
    """Layers kept in float to the right, the metric upwards, sizes below, and the target as a line."""
    points = sorted(points, key=lambda point: point.float_layers)
    left, right, top, bottom = 80, 620, 10, 240
    values = [p.value for p in points if math.isfinite(p.value)] + ([] if target is None else [target])
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = (high - low) * 0.1 or max(abs(high) * 0.01, 1e-6)
    low, high = low - margin, high + margin
    most = max(1, max((p.float_layers for p in points), default=1))

    def down(value: float) -> float:
        return top + (high - min(max(value, low), high)) / (high - low) * (bottom - top)

    def across(layers: float) -> float:
        return left + layers / most * (right - left)

    parts = []
    for tick in ticks(low, high):
        y = down(tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(svg_text(left - 14, y, f"{tick:.6g}", "tick", "end"))
    for tick in ticks(0.0, float(most)):
        if tick == int(tick):
            parts.append(svg_text(across(tick), bottom + 18, f"{tick:g}", "tick", "middle"))
    parts.append(svg_text(right + 20, bottom + 18, "layers in float", "tick"))
    parts.append(svg_text(right + 20, bottom + 36, "MB", "tick"))
    if target is not None:
        y = down(target)
        parts.append(f'<line class="target" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(svg_text(right + 14, y, f"target {target:.5g}", "value"))
    shown = [p for p in points if not math.isnan(p.value)]
    line = " ".join(f"{across(p.float_layers):.1f},{down(p.value):.1f}" for p in shown)
    parts.append(f'<polyline class="curve" points="{line}"/>')
    free = -math.inf  # where the last size ends
    for point in shown:
        x, y = across(point.float_layers), down(point.value)
        words = f"{w.megabytes(point.size)} MB"
        hint = f"{point.float_layers} layers in float: {point.value:.5g}, {words}"
        parts.append(f'<g class="none"><title>{escape(hint)}</title><circle cx="{x:.1f}" cy="{y:.1f}" r="5"/></g>')
        if x - 18 >= free:
            parts.append(svg_text(x, bottom + 36, w.megabytes(point.size), "tick", "middle"))
            free = x + 18
    return svg(bottom + 48, "Metric and size by the number of layers kept in float", parts)


def _spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places moved apart to a distance of `gap`, no further than that takes, in their order and within [low, high].

    Without the gaps this is an isotonic regression, which pooling neighbours solves.
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    pools: list[list[float]] = []  # mean and number
    for rank, i in enumerate(order):
        pools.append([places[i] - rank * gap, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, m), (b, n) = pools[-2:]
            pools[-2:] = [[(a * m + b * n) / (m + n), m + n]]
    flat = [mean for mean, number in pools for _ in range(int(number))]
    found = [0.0] * len(places)
    for rank, i in enumerate(order):
        place = max(flat[rank] + rank * gap, low + rank * gap)
        found[i] = min(place, high - (len(order) - 1 - rank) * gap)
    return found


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else "…" + name[-most + 1 :]


def svg(height: float, title: str, parts: Sequence[str]) -> str:
    """A drawing `WIDTH` wide, with a title for those who cannot see it."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def svg_text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    """A text at a place, escaped; `kind` is its class of style."""
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" dominant-baseline="central">'
        f"{escape(text)}</text>"
    )


def _bar(x: float, y: float, width: float, kind: str, hint: str, height: float = BAR) -> str:
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y - height / 2:.1f}" width="{max(width, 0.0):.1f}" '
        f'height="{height}" rx="2"><title>{escape(hint)}</title></rect>'
    )


def ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers in [low, high]."""
    span = high - low
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 8)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(i * step, 10) for i in range(first, last + 1)]
