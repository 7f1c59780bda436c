"""The plots of the HTML report: inline SVG made by hand, so that the file needs no library and no network.

Colours are CSS variables of the page, which is how the plots follow its light and dark modes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

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
    for tick in _ticks(low, high):
        kind = "zero" if tick == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{at(tick):.1f}" x2="{at(tick):.1f}" y1="4" y2="{bottom}"/>')
        parts.append(_text(at(tick), bottom + 16, f"{tick:+g}" if tick else "0", "tick", "middle"))
    parts.append(_text(RIGHT + 14, bottom + 16, "points", "tick"))
    for i, (split, metric) in enumerate(rows):
        y = 4 + ROW * i + ROW / 2
        label = w.METRIC_NAMES.get(metric.name, metric.name)
        parts.append(_text(LEFT - 14, y, f"{label}, {split.split}" if len(splits) > 1 else label, "label", "end"))
        delta = w.signed_points(metric.delta, split.samples)
        if w.outcome(metric) == "undefined":
            parts.append(_text(RIGHT + 14, y, "undefined", "value"))
            continue
        ends_at = at(metric.interval.low * 100), at(metric.interval.high * 100)
        hint = f"{label}: {delta} points, {w.interval(metric, split.samples)}; {w.verdict(metric, confidence)}"
        parts.append(
            f'<g class="{w.outcome(metric)}"><title>{escape(hint)}</title>'
            f'<line class="whisker" x1="{ends_at[0]:.1f}" x2="{ends_at[1]:.1f}" y1="{y}" y2="{y}"/>'
            + "".join(f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 6}" y2="{y + 6}"/>' for x in ends_at)
            + f'<circle cx="{at(metric.delta * 100):.1f}" cy="{y}" r="5"/></g>'
        )
        parts.append(_text(RIGHT + 14, y, f"{delta} {w.interval(metric, split.samples)}", "value"))
    return _svg(bottom + 26, f"Change of each metric with its {w.percent(confidence)} interval", parts)


def size_plot(float_size: ModelSize, int8_size: ModelSize) -> str:
    """Bytes by kind, float above int8."""
    longest = max(float_size.total, int8_size.total, 1)
    parts = []
    for i, (name, size) in enumerate((("float", float_size), ("int8", int8_size))):
        y, x = 6 + ROW * i + ROW / 2, float(NARROW_LEFT)
        parts.append(_text(NARROW_LEFT - 14, y, name, "label", "end"))
        for kind in KINDS:
            count = getattr(size, kind)
            width = count / longest * (RIGHT - NARROW_LEFT)
            # Two units of surface between neighbours keep them apart without an outline.
            shown = max(width - 2, min(width, 1.0))
            if count:
                hint = f"{name}, {kind}: {w.megabytes(count)} MB"
                parts.append(_bar(x, y, shown, kind, hint))
            x += width
        parts.append(_text(x + 10, y, f"{w.megabytes(size.total)} MB", "value"))
    return _svg(ROW * 2 + 12, "Size by kind of layer", parts)


def latency_plot(latency: Latency) -> str:
    """Median and 95th percentile, float above int8."""
    longest = max(latency.float_p95, latency.int8_p95)
    rows = (("float", latency.float_p50, latency.float_p95), ("int8", latency.int8_p50, latency.int8_p95))
    parts = []
    for i, (name, p50, p95) in enumerate(rows):
        y = 6 + ROW * i + ROW / 2
        width, end = (value / longest * (RIGHT - NARROW_LEFT) for value in (p50, p95))
        hint = f"{name}: p50 {w.significant(p50)} ms, p95 {w.significant(p95)} ms"
        parts.append(_text(NARROW_LEFT - 14, y, name, "label", "end"))
        parts.append(_bar(NARROW_LEFT, y, width, f"{name}-model", hint))
        x = NARROW_LEFT + end
        parts.append(f'<line class="p95" x1="{NARROW_LEFT + width:.1f}" x2="{x:.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<line class="p95" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 6}" y2="{y + 6}"/>')
        parts.append(_text(x + 10, y, f"{w.significant(p50)} ms, p95 {w.significant(p95)}", "value"))
    return _svg(ROW * 2 + 12, "Latency of one forward pass", parts)


def sqnr_plot(layers: Sequence[tuple[str, float]]) -> str:
    """Decibels of each layer, in the order given."""
    row, bar, left = 20, 11, 330
    finite = [value for _, value in layers if math.isfinite(value)]
    longest = max([*finite, 1.0])
    bottom = row * len(layers) + 8
    parts = []
    for tick in _ticks(0.0, longest):
        x = left + tick / longest * (RIGHT - left)
        parts.append(f'<line class="{"grid" if tick else "zero"}" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{bottom}"/>')
        parts.append(_text(x, bottom + 14, f"{tick:g}", "tick", "middle"))
    parts.append(_text(RIGHT + 14, bottom + 14, "dB", "tick"))
    for i, (name, value) in enumerate(layers):
        y = 4 + row * i + row / 2
        share = 1.0 if value == math.inf else max(0.0, value) / longest if math.isfinite(value) else 0.0
        short = name if len(name) <= 46 else "…" + name[-45:]
        parts.append(_text(left - 12, y, short, "layer", "end"))
        parts.append(_bar(left, y, share * (RIGHT - left), "int8-model", f"{name}: {w.decibels(value)} dB", bar))
        parts.append(_text(left + share * (RIGHT - left) + 8, y, w.decibels(value), "layer-value"))
    return _svg(bottom + 24, "Signal to quantization noise of each layer", parts)


def _svg(height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" dominant-baseline="central">'
        f"{escape(text)}</text>"
    )


def _bar(x: float, y: float, width: float, kind: str, hint: str, height: float = BAR) -> str:
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y - height / 2:.1f}" width="{max(width, 0.0):.1f}" '
        f'height="{height}" rx="2"><title>{escape(hint)}</title></rect>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers in [low, high]."""
    span = high - low
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 8)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(i * step, 10) for i in range(first, last + 1)]
