"""What an accuracy guard found, as Markdown and as one HTML file with plots."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from ..quantization.guard_results import signed
from . import plots
from . import wording as w
from .html import STYLE, html_cells, html_row, html_table
from .markdown import escape_markdown, markdown_code, markdown_table
from .sweep_report import PLOT_STYLE, page

if TYPE_CHECKING:
    from ..quantization.guard_report import GuardResult

MOST_LAYERS = 30  # in the plot

_CURVE_TITLE = "Layers kept in float"
_LAYERS_TITLE = "Each layer quantized alone"
_LAYERS_WORDS = (
    "Signal over error of the model's output where one layer alone is quantized, in decibels; higher is closer to "
    "float. The change is that of the metric, in its own unit."
)


def guard_markdown(result: GuardResult) -> str:
    """The trade-off and the sensitivities as GitHub-flavoured Markdown.

    Args:
        result ([`GuardResult`]): what [`meet_accuracy`] returned, or the `best` of its error.
    """
    parts = [f"# {escape_markdown(_title(result))}", escape_markdown(_headline(result))]
    parts += [f"## {_CURVE_TITLE}", markdown_table(_curve_header(result), _curve_rows(result), slice(0, 3))]
    if result.sensitivity:
        rows = [(markdown_code(values[0]), *values[1:]) for values in _layer_rows(result)]
        parts += [f"## {_LAYERS_TITLE}", _LAYERS_WORDS, markdown_table(_LAYER_HEADER, rows, slice(1, 4))]
    return "\n\n".join(parts) + "\n"


def guard_html(result: GuardResult) -> str:
    """The trade-off and the sensitivities as one HTML page with plots, which needs nothing else; see above."""
    curve = [html_row(html_cells(values, slice(0, 3))) for values in _curve_rows(result)]
    sections = [
        f'<section><h2>{_CURVE_TITLE}</h2><p class="soft">The best model that was found with each number of layers in '
        f"float. The line is what was asked for.</p><figure>{plots.trade_off_plot(result.curve, _target(result))}"
        f"</figure>{html_table(_curve_header(result), curve, slice(0, 3))}</section>"
    ]
    if result.sensitivity:
        layers = [
            html_row(f"<td><code>{escape(values[0])}</code></td>{html_cells(values[1:], slice(0, 3))}")
            for values in _layer_rows(result)
        ]
        sections.append(
            f'<section><h2>{_LAYERS_TITLE}</h2><p class="soft">{escape(_LAYERS_WORDS)}</p>'
            f"<figure>{plots.sensitivity_plot(result.sensitivity[:MOST_LAYERS])}</figure><details><summary>All "
            f"{len(layers)} layers</summary>{html_table(_LAYER_HEADER, layers, slice(1, 4))}</details></section>"
        )
    body = "\n".join(sections)
    return page(
        _title(result),
        f'<div class="hfq"><style>{STYLE}{PLOT_STYLE}</style><main>\n<h1>{escape(_title(result))}</h1>\n'
        f"<p>{escape(_headline(result))}</p>\n{body}\n</main></div>",
    )


_LAYER_HEADER = ("layer", "SQNR, dB", "change", "MB saved", "is now")


def _layer_rows(result: GuardResult) -> list[tuple[str, ...]]:
    kept = set(result.kept)
    return [
        (
            layer.name,
            w.decibels(layer.sqnr),
            "" if layer.change is None else signed(layer.change),
            w.megabytes(layer.bytes_saved),
            "quantized" if kept.isdisjoint(layer.name.split(" + ")) else "float",
        )
        for layer in result.sensitivity
    ]


def _curve_header(result: GuardResult) -> tuple[str, ...]:
    return ("layers in float", result.metric, "MB", "")


def _curve_rows(result: GuardResult) -> list[tuple[str, ...]]:
    target = _target(result)
    return [
        (
            str(point.float_layers),
            f"{point.value:.5g}",
            w.megabytes(point.size),
            "meets the target" if _meets(point.value, target, result.higher_is_better) else "",
        )
        for point in sorted(result.curve, key=lambda point: point.float_layers)
    ]


def _target(result: GuardResult) -> float:
    """The value of the metric that was asked for."""
    allowed = result.target * (abs(result.float_value) if result.relative else 1.0)
    return result.float_value - allowed if result.higher_is_better else result.float_value + allowed


def _meets(value: float, target: float, higher_is_better: bool) -> bool:
    return value >= target if higher_is_better else value <= target


def _title(result: GuardResult) -> str:
    return f"{result.metric}: the accuracy guard"


def _headline(result: GuardResult) -> str:
    share = " of it" if result.relative else ""
    kept = f"{len(result.kept)} of {result.layers}" if result.kept else "none"
    drop = "undefined" if math.isnan(result.drop) else f"{result.drop:.4g}"
    return (
        f"Float {result.float_value:.5g}, now {result.value:.5g}: worse by {drop}{share}, where {result.target:g} was "
        f"allowed. Layers back in float: {kept}."
    )
