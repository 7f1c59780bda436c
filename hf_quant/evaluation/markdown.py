"""A comparison as GitHub-flavoured Markdown, for model cards and pull requests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from . import wording as w
from .text import size_rows

if TYPE_CHECKING:
    from .results import Figures

LOWEST_LAYERS = 10


def document(comparison: Figures) -> str:
    """The whole report."""
    models = (("float", comparison.float_model), ("quantized", comparison.int8_model))
    parts = [
        f"# {escape_markdown(comparison.task)}: float against quantized",
        escape_markdown(w.headline(comparison)),
        "\n".join(
            f"- {role}: {markdown_code(model.name)} ({escape_markdown(w.model_words(model))})"
            for role, model in models
        ),
    ]
    for split in comparison.splits:
        parts += [
            f"## Quality on {escape_markdown(split.split)}",
            f"{w.sample_count(split, comparison.seed)}; points of 100.",
            markdown_table(
                ("metric", "float", "quantized", "delta", f"{w.percent(comparison.confidence)} interval", ""),
                (
                    (
                        w.METRIC_NAMES.get(metric.name, metric.name),
                        w.points(metric.float_value, split.samples),
                        w.points(metric.int8_value, split.samples),
                        w.signed_points(metric.delta, split.samples),
                        w.interval(metric, split.samples),
                        w.verdict(metric, comparison.confidence),
                    )
                    for metric in split.metrics
                ),
                numbers=slice(1, 5),
            ),
        ]
        lines = w.readings(split, comparison.confidence)
        if split.agreement is not None:
            lines.insert(0, w.agreement_words(split.agreement, split.samples))
        elif split.deviation is not None:
            lines.insert(0, w.deviation_words(split))
        parts.append("\n".join(f"- {escape_markdown(line)}" for line in lines))
    sizes = ((n, w.megabytes(a), w.megabytes(b), w.ratio(a, b)) for n, a, b in size_rows(comparison))
    parts += ["## Size", markdown_table(("MB", "float", "quantized", "float / quantized"), sizes, numbers=slice(1, 4))]
    latency = comparison.latency
    if latency is not None:
        times = (
            ("p50", w.significant(latency.float_p50), w.significant(latency.int8_p50), w.faster(latency)),
            ("p95", w.significant(latency.float_p95), w.significant(latency.int8_p95), ""),
        )
        conditions = w.latency_conditions(latency).capitalize() + "."
        parts += [
            "## Latency",
            conditions,
            markdown_table(("ms", "float", "quantized", ""), times, numbers=slice(1, 3)),
        ]
    if comparison.layer_sqnr:
        lowest = sorted(comparison.layer_sqnr.items(), key=lambda item: item[1])[:LOWEST_LAYERS]
        parts += [
            "## Error by layer",
            f"The {len(lowest)} least exact of {len(comparison.layer_sqnr)} quantized layers.",
            markdown_table(
                ("layer", "SQNR, dB"), ((markdown_code(n), w.decibels(v)) for n, v in lowest), numbers=slice(1, 2)
            ),
        ]
    parts += ["## How it was measured", "\n".join(f"- {escape_markdown(line)}" for line in w.method(comparison))]
    return "\n\n".join(parts) + "\n"


def markdown_table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]], numbers: slice) -> str:
    """A table; `numbers` are the columns set to the right."""
    right = set(range(len(header))[numbers])
    rule = ["---:" if column in right else "---" for column in range(len(header))]
    cells = [header, rule, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)


def markdown_code(name: str) -> str:
    """A name set as code."""
    return f"`{name.replace('`', '')}`"


def escape_markdown(text: str) -> str:
    """A text that Markdown leaves as it is."""
    for character in "\\`*_<>#":
        text = text.replace(character, "\\" + character)
    return text
