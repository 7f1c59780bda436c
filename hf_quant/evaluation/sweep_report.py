"""The report of a sweep over schemes: as a table, JSON, Markdown and HTML."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from . import plots
from . import sweep_wording as s
from . import wording as w
from .html import STYLE, html_bullets, html_cells, html_row, html_table
from .markdown import escape_markdown, markdown_code, markdown_table
from .report import TEXT_WIDTH, write_text_file
from .results import decode, encode
from .sweep_results import PERPLEXITY, SweepFigures

if TYPE_CHECKING:
    from rich.console import RenderableType

# Raised when fields change their meaning.
SCHEMA = "hf_quant.sweep/1"

_TEXT_STYLES = {"worse": "red", "better": "green", "none": "", "undefined": "yellow"}


@dataclass(frozen=True)
class Sweep(SweepFigures):
    """What [`compare_schemes`] found. `print` it, or write it with `to_json`, `to_markdown`, `to_html` or `save`."""

    def __rich__(self) -> RenderableType:
        return _renderable(self)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=TEXT_WIDTH, color_system=None, force_terminal=False, force_jupyter=False)
        with console.capture() as capture:
            console.print(self.__rich__())
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def _repr_html_(self) -> str:
        return _fragment(self)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as JSON, metrics as fractions; written to `path` where one is given.

        Numbers that JSON does not have are the strings `"nan"`, `"inf"` and `"-inf"`.
        """
        text = json.dumps({"schema": SCHEMA, **encode(self)}, indent=2, ensure_ascii=False, allow_nan=False)
        return write_text_file(text + "\n", path)

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> Sweep:
        """The report back from `to_json`.

        Args:
            source (`str`): a path, or the JSON itself.

        Raises:
            `FileNotFoundError`: if there is no such file.
            `ValueError`: if it is not such a report, naming the place.
        """
        text = str(source)
        if not text.lstrip().startswith("{"):
            text = Path(source).read_text(encoding="utf-8")
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"This is not JSON: {error}. Expected a report.json of compare_schemes.") from error
        schema = values.pop("schema", None)
        if schema != SCHEMA:
            raise ValueError(f"The report's `schema` is {schema!r}; this version of hf_quant reads {SCHEMA!r} here.")
        report: Sweep = decode(cls, values)
        return report

    def to_markdown(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as GitHub-flavoured Markdown; written to `path` where one is given."""
        return write_text_file(_markdown(self), path)

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as one HTML file with its picture, which needs nothing else; written to `path` if given."""
        return write_text_file(page(s.title(self), _fragment(self)), path)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `report.json`, `report.md` and `report.html` into a folder, which is made if it is not there."""
        directory = Path(folder)
        files = {"report.json": self.to_json(), "report.md": self.to_markdown(), "report.html": self.to_html()}
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_text_file(text, directory / name)


def page(title: str, fragment: str) -> str:
    """A whole HTML page around a fragment; well-formed as XML too."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escape(title)}</title>"
        "<style>body { margin:0; } body .hfq { min-height:100vh; box-sizing:border-box; }</style></head>\n"
        f"<body>{fragment}</body></html>\n"
    )


def _renderable(sweep: SweepFigures) -> RenderableType:
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    header = s.table_header(sweep)
    table.add_column(header[0], no_wrap=True, overflow="ellipsis")
    for name in header[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    for values, outcome in s.table_rows(sweep):
        styles = ["bold", "", *[_TEXT_STYLES[outcome]] * 2] + [""] * len(values)
        table.add_row(*(Text(value, style=style) for value, style in zip(values, styles, strict=False)))
    failed = [Text(f"{label}: {reason}", style="yellow") for label, reason in sweep.failed.items()]
    parts: list[RenderableType] = [
        Text(s.title(sweep), style="bold"),
        Text(s.headline_words(sweep)),
        Text(),
        Text.assemble((sweep.float_model.name, "bold"), f"  {w.model_words(sweep.float_model)}"),
        Text(),
        table,
        Text(),
    ]
    return Group(*parts, *failed, *(Text(line, style="dim") for line in s.method_words(sweep)))


def _markdown(sweep: SweepFigures) -> str:
    header = tuple(s.table_header(sweep))
    lines = [(markdown_code(values[0]), *values[1:]) for values, _ in s.table_rows(sweep)]
    parts = [
        f"# {escape_markdown(s.title(sweep))}",
        escape_markdown(s.headline_words(sweep)),
        f"- float: {markdown_code(sweep.float_model.name)} ({escape_markdown(w.model_words(sweep.float_model))})",
        markdown_table(header, lines, slice(1, None)),
    ]
    if sweep.failed:
        failed = [
            f"- {markdown_code(label)} failed: {escape_markdown(reason)}" for label, reason in sweep.failed.items()
        ]
        parts.append("\n".join(failed))
    if len(sweep.rows[0].changes) > 1:
        rows = ((markdown_code(values[0]), *values[1:]) for values, _ in s.metric_rows(sweep))
        parts += ["## All metrics", markdown_table(s.METRIC_HEADER, rows, slice(2, 6))]
    sizes = ((markdown_code(values[0]), *values[1:]) for values in s.size_rows(sweep))
    parts += ["## Size", markdown_table(s.SIZE_HEADER, sizes, slice(1, 7))]
    parts += ["## How it was measured", "\n".join(f"- {escape_markdown(line)}" for line in s.method_words(sweep))]
    return "\n\n".join(parts) + "\n"


def _fragment(sweep: SweepFigures) -> str:
    """The report as one element with its style, for a notebook."""
    samples, headline = sweep.samples, sweep.headline
    size, nothing = sweep.float_model.size.total, float("nan")
    points = [plots.SchemePoint("float", f"{w.megabytes(size)} MB", size, 0.0, nothing, nothing, "float-model")]
    for row in sweep.rows:
        change = s.key_change(row, headline)
        low, high = change.interval.low * 100, change.interval.high * 100
        note = s.point_note(row, headline, samples)
        kind = s.outcome(change).replace("undefined", "none")
        points.append(plots.SchemePoint(row.label, note, row.size.total, change.change * 100, low, high, kind))
    header = s.table_header(sweep)
    rows = []
    for values, outcome in s.table_rows(sweep):
        marked = f'<td class="n {outcome}">{escape(values[2])}</td><td class="n {outcome}">{escape(values[3])}</td>'
        rows.append(html_row(html_cells(values[:2], slice(1, 2)) + marked + html_cells(values[4:], slice(0, None))))
    lower = "Lower is better. " if headline == PERPLEXITY else ""
    sections = [
        f'<section><h2>Size, quality and speed</h2><p class="soft">Change of {escape(s.metric_name(headline))} '
        f"against float, with its {w.percent(sweep.confidence)} interval, over the size in memory. {lower}Red: worse "
        "beyond chance; green: better.</p>"
        f"<figure>{plots.scheme_plot(points, s.unit(headline), sweep.confidence)}</figure>"
        f"{html_table(header, rows, slice(1, None))}"
        + (html_bullets(f"{label} failed: {reason}" for label, reason in sweep.failed.items()) if sweep.failed else "")
        + "</section>"
    ]
    if len(sweep.rows[0].changes) > 1:
        lines = [html_row(html_cells(values, slice(2, 6))) for values, _ in s.metric_rows(sweep)]
        sections.append(f"<section><h2>All metrics</h2>{html_table(s.METRIC_HEADER, lines, slice(2, 6))}</section>")
    sizes = [html_row(html_cells(values, slice(1, 7))) for values in s.size_rows(sweep)]
    sections.append(
        f"<section><h2>Size by kind of layer</h2>{html_table(s.SIZE_HEADER, sizes, slice(1, 7))}</section>"
    )
    sections.append(f"<section><h2>How it was measured</h2>{html_bullets(s.method_words(sweep))}</section>")
    model = sweep.float_model
    return (
        f'<div class="hfq"><style>{STYLE}{PLOT_STYLE}</style><main>\n<h1>{escape(s.title(sweep))}</h1>\n'
        f"<p>{escape(s.headline_words(sweep))}</p>\n"
        f'<dl class="models"><dt>float</dt><dd><code>{escape(model.name)}</code> '
        f'<span class="soft">{escape(w.model_words(model))}</span></dd></dl>\n'
        + "\n".join(sections)
        + "\n</main></div>"
    )


# What the plots of sweeps and guards need beside the style of all reports.
PLOT_STYLE = """
.hfq svg .leader { fill:none; stroke:var(--line); }
.hfq svg .float-model circle { fill:var(--float); }
.hfq svg .target { stroke:var(--int8); stroke-width:1.5; stroke-dasharray:6 4; }
.hfq svg .curve { fill:none; stroke:var(--even); stroke-width:1.5; }
"""
