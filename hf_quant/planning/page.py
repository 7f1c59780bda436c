"""A plan as one HTML file: its timeline as a picture, findings and tables; light and dark, nothing fetched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING

from ..evaluation.html import STYLE, html_cells, html_row, html_table
from ..evaluation.plots import svg, svg_text, ticks
from ..evaluation.sweep_report import page
from . import wording as w

if TYPE_CHECKING:
    from .plan import Plan

LEFT = 132.0  # labels end before
RIGHT = 740.0
_CURVE, _BAND, _GAP = 54.0, 16.0, 18.0
_DIGIT = 7.7  # at most, of a tick's text
_STYLE = """
.hfq svg .curve { fill:none; stroke:var(--int8); stroke-width:2; stroke-linejoin:round; }
.hfq svg .area { fill:var(--int8); opacity:.14; }
.hfq svg .observing { fill:var(--rest); } .hfq svg .frozen { fill:var(--int8); }
.hfq svg .teacher { fill:var(--linear); } .hfq svg .off { fill:var(--line); }
.hfq svg .epoch { stroke:var(--soft); opacity:.6; }
.hfq svg .event { stroke:var(--even); stroke-width:1.5; }
.hfq td { white-space:normal; overflow-wrap:anywhere; }
.hfq .error { color:var(--bad); font-weight:600; } .hfq .warning { color:var(--rest); font-weight:600; }
.hfq .note { color:var(--soft); font-weight:600; }
"""


def plan_page(plan: Plan) -> str:
    """The page."""
    name = plan.recipe.source.file or plan.recipe.output
    sections = [
        '<section><h2>Timeline</h2><p class="soft">Over the optimizer steps; epochs begin at the dotted lines.</p>'
        f"<figure>{timeline_plot(plan)}"
        '<figcaption class="legend"><span><i style="background:var(--line)"></i>not active</span>'
        '<span><i style="background:var(--linear)"></i>learns from the teacher</span>'
        '<span><i style="background:var(--rest)"></i>fake-quant, ranges observed</span>'
        '<span><i style="background:var(--int8)"></i>fake-quant, ranges frozen or none</span></figcaption></figure>'
        f"{_rows(_timeline_rows(plan))}</section>"
    ]
    if plan.findings:
        rows = [
            html_row(
                f'<td class="{finding.level}">{finding.level}</td>{html_cells((str(finding.problem),), slice(0))}'
            )
            for finding in plan.findings
        ]
        sections.insert(0, f"<section><h2>Findings</h2><table><tbody>{''.join(rows)}</tbody></table></section>")
    for title, table in (
        ("Targets", [(chosen.section, w.chosen_words(chosen)) for chosen in plan.chosen]),
        ("Result", w.size_rows(plan)),
        ("Memory of the training", w.memory_rows(plan)),
        ("Time", w.timing_rows(plan)),
    ):
        if table:
            sections.append(f"<section><h2>{title}</h2>{_rows(table)}</section>")
    if plan.matches:
        matches = [html_row(html_cells(w.match_row(match), slice(0))) for match in plan.matches]
        table_of = html_table(("where", "pattern", "matches"), matches, slice(0))
        sections.append(f"<section><h2>Patterns</h2>{table_of}</section>")
    return page(
        f"Plan: {name}",
        f'<div class="hfq"><style>{STYLE}{_STYLE}</style><main>\n<h1>Plan: {escape(name)}</h1>\n'
        f"<p>{escape(w.headline(plan))}</p>\n<p>{escape(w.model_words(plan))}</p>\n"
        + "\n".join(sections)
        + "\n</main></div>",
    )


def timeline_plot(plan: Plan) -> str:
    """Inline SVG: learning rate and sparsity as curves, distillation and QAT as bands, evaluations as strokes."""
    steps, phases = plan.steps, plan.phases
    parts: list[str] = []
    y = 12.0

    def across(step: float) -> float:
        return LEFT + step / steps.total * (RIGHT - LEFT)

    def curve(
        label: str, highest: str, points: Sequence[tuple[float, float]], top: float, words: str, stairs: bool
    ) -> None:
        nonlocal y
        bottom = y + _CURVE
        places = _stairs(points, steps.total) if stairs else [*points, (float(steps.total), points[-1][1])]
        line = " ".join(f"{across(x):.1f},{bottom - value / top * _CURVE:.1f}" for x, value in places)
        first, last = across(places[0][0]), across(places[-1][0])
        parts.append(svg_text(LEFT - 12, bottom - _CURVE / 2 - 8, label, "label", "end"))
        parts.append(svg_text(LEFT - 12, bottom - _CURVE / 2 + 9, highest, "tick", "end"))
        parts.append(f'<line class="zero" x1="{LEFT}" x2="{RIGHT}" y1="{bottom}" y2="{bottom}"/>')
        area = f'<polygon class="area" points="{first:.1f},{bottom:.1f} {line} {last:.1f},{bottom:.1f}"/>'
        parts.append(f"<g><title>{escape(words)}</title>{area}")
        parts.append(f'<polyline class="curve" points="{line}"/></g>')
        y = bottom + _GAP

    def band(label: str, spans: Sequence[tuple[float, float, str, str]]) -> None:
        nonlocal y
        parts.append(svg_text(LEFT - 12, y + _BAND / 2, label, "label", "end"))
        for start, end, kind, words in [(0.0, float(steps.total), "off", f"{label}: not active"), *spans]:
            x, width = across(start), across(end) - across(start)
            hint = f"<title>{escape(words)}</title>"
            parts.append(
                f'<rect class="{kind}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAND}">{hint}</rect>'
            )
        y += _BAND + _GAP

    if plan.rates:
        top = max(rate for _, rate in plan.rates) or 1.0
        curve("learning rate", f"{top:g} at most", plan.rates, top, w.rate_words(plan), False)
    for phase in phases.prunings.values():
        if phase.goals:
            part = phase.what.split(" by ")[0]
            highest = f"{max(goal for _, goal in phase.goals):.0%} {part}"
            curve(phase.section, highest, phase.goals, 1.0, w.pruning_words(phase), True)
    if phases.distillation is not None:
        one = phases.distillation
        band("distillation", [(one.start, one.end, "teacher", w.distillation_words(plan))])
    if (qat := phases.quantization) is not None:
        freeze = qat.start if qat.freeze is None else qat.freeze
        spans = [(freeze, steps.total, "frozen", w.qat_words(plan))]
        if freeze > qat.start:
            spans.insert(0, (qat.start, freeze, "observing", w.qat_words(plan)))
        band("QAT", spans)
    if phases.after_training is not None:
        band("quantization", [(0.0, float(steps.total), "off", w.after_training_words(plan))])
    for label, events in (("evaluations", steps.evaluations), ("checkpoints", steps.saves)):
        if events:
            parts.append(svg_text(LEFT - 12, y + _BAND / 2, label, "label", "end"))
            strokes = "".join(f"M{across(step):.1f} {y} v{_BAND}" for step in events)
            hint = f"<title>{escape(w.event_words(events))}</title>"
            parts.append(f'<path class="event" fill="none" d="{strokes}">{hint}</path>')
            y += _BAND + _GAP
    return svg(y + 26, "Timeline of the training", [*_axis(plan, across, y), *parts])


def _axis(plan: Plan, across: Callable[[float], float], bottom: float) -> list[str]:
    """Round numbers of steps below, and a dotted line where an epoch begins."""
    total, per_epoch = plan.steps.total, plan.steps.per_epoch
    end = f"{total:,} steps"
    free = RIGHT - _DIGIT * (len(end) + 1)  # where the last label begins
    parts = [
        svg_text(across(tick), bottom + 8, f"{tick:,.0f}", "tick", "middle")
        for tick in ticks(0.0, float(total))
        if tick == int(tick) and across(tick) + _DIGIT * len(f"{tick:,.0f}") / 2 < free
    ]
    parts.append(svg_text(RIGHT, bottom + 8, end, "tick", "end"))
    every = max(1, round(total / per_epoch / 20))
    for epoch in range(0, -(-total // per_epoch), every):
        x = across(epoch * per_epoch)
        parts.append(
            f'<line class="epoch" stroke-dasharray="2 4" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{bottom - 6:.1f}"/>'
        )
    return parts


def _stairs(points: Sequence[tuple[float, float]], total: float) -> list[tuple[float, float]]:
    """A curve that holds each value until the next point, from 0 on to the end."""
    places, now = [(0.0, 0.0)], 0.0
    for step, value in points:
        places += [(step, now), (step, value)]
        now = value
    return [*places, (total, now)]


def _timeline_rows(plan: Plan) -> list[tuple[str, str]]:
    phases = plan.phases
    rows = [("learning rate", w.rate_words(plan))]
    rows += [(phase.section, w.pruning_words(phase)) for phase in phases.prunings.values()]
    if phases.distillation is not None:
        rows.append(("distillation", w.distillation_words(plan)))
    if phases.quantization is not None:
        rows.append(("QAT", w.qat_words(plan)))
    if phases.after_training is not None:
        rows.append(("quantization", w.after_training_words(plan)))
    return [
        *rows,
        ("evaluations", w.event_words(plan.steps.evaluations)),
        ("checkpoints", w.event_words(plan.steps.saves)),
    ]


def _rows(rows: Sequence[Sequence[str]]) -> str:
    return f"<table><tbody>{''.join(html_row(html_cells(row, slice(0))) for row in rows)}</tbody></table>"
