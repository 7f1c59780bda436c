"""A comparison in a terminal of 100 columns."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from . import wording as w
from .results import Figures, Latency, SplitResult

LOWEST_LAYERS = 5

_STYLES = {"worse": "red", "better": "green", "none": "", "undefined": "yellow"}


def renderable(comparison: Figures) -> RenderableType:
    """What `rich.print(comparison)` shows."""
    parts: list[RenderableType] = [
        Text(f"{comparison.task}: float against quantized", style="bold"),
        Text(w.headline(comparison)),
        Text(),
        _models(comparison),
    ]
    for split in comparison.splits:
        parts += _titled(f"Quality on {split.split}, {w.sample_count(split, comparison.seed)}")
        parts += [_quality(comparison, split), Text(), *_notes(comparison, split)]
    parts += [*_titled("Size"), _sizes(comparison)]
    if comparison.latency is not None:
        parts += _titled(f"Latency, {w.latency_conditions(comparison.latency)}")
        parts.append(_latency(comparison.latency))
    if comparison.layer_sqnr:
        lowest = sorted(comparison.layer_sqnr.items(), key=lambda item: item[1])[:LOWEST_LAYERS]
        parts += _titled(f"The {len(lowest)} least exact of {len(comparison.layer_sqnr)} quantized layers")
        parts.append(_layers(lowest))
    parts += [Text(), *(Text(line, style="dim") for line in w.method(comparison))]
    return Group(*parts)


def _titled(title: str) -> list[RenderableType]:
    return [Text(), Text(title, style="bold")]


def _table(first: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(first, no_wrap=True, min_width=14)
    return table


def _models(comparison: Figures) -> Table:
    table = Table.grid(padding=(0, 2))
    for role, model in (("float", comparison.float_model), ("quantized", comparison.int8_model)):
        table.add_row(role, Text(model.name, style="bold", overflow="fold"), w.model_words(model))
    return table


def _quality(comparison: Figures, split: SplitResult) -> Table:
    table = _table("points of 100")
    for name in ("float", "quantized", "delta", f"{w.percent(comparison.confidence)} interval"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for metric in split.metrics:
        table.add_row(
            w.METRIC_NAMES.get(metric.name, metric.name),
            w.points(metric.float_value, split.samples),
            w.points(metric.int8_value, split.samples),
            w.signed_points(metric.delta, split.samples),
            w.interval(metric, split.samples),
            Text(w.verdict(metric, comparison.confidence), style=_STYLES[w.outcome(metric)]),
            style="bold" if metric.name == comparison.headline and len(split.metrics) > 1 else "",
        )
    return table


def _notes(comparison: Figures, split: SplitResult) -> list[RenderableType]:
    lines = w.readings(split, comparison.confidence)
    if split.agreement is not None:
        lines.insert(0, w.agreement_words(split.agreement, split.samples))
    elif split.deviation is not None:
        lines.insert(0, w.deviation_words(split))
    return [Text(line) for line in lines]


def _sizes(comparison: Figures) -> Table:
    table = _table("MB")
    for name in ("float", "quantized", "float / quantized"):
        table.add_column(name, justify="right")
    for name, before, after in size_rows(comparison):
        style = "bold" if name == "total" else ""
        table.add_row(name, w.megabytes(before), w.megabytes(after), w.ratio(before, after), style=style)
    return table


def size_rows(comparison: Figures) -> list[tuple[str, int | None, int | None]]:
    """Kind, float bytes and quantized bytes; on disk only where it is known of either."""
    before, after = comparison.float_model.size, comparison.int8_model.size
    kinds = ("embeddings", "linear", "rest", "total", "on_disk")
    rows = [(kind.replace("_", " "), getattr(before, kind), getattr(after, kind)) for kind in kinds]
    return [row for row in rows if row[1] is not None or row[2] is not None]


def _latency(latency: Latency) -> Table:
    table = _table("ms")
    for name in ("float", "quantized"):
        table.add_column(name, justify="right")
    table.add_column("")
    table.add_row("p50", w.significant(latency.float_p50), w.significant(latency.int8_p50), w.faster(latency))
    table.add_row("p95", w.significant(latency.float_p95), w.significant(latency.int8_p95), "")
    return table


def _layers(layers: list[tuple[str, float]]) -> Table:
    table = _table("layer")
    table.add_column("SQNR, dB", justify="right")
    for name, value in layers:
        table.add_row(Text(name), w.decibels(value))
    return table
