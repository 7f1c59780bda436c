"""The sparsity that a schedule wanted against the one that was reached, over the steps, as a picture and a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from .html import STYLE, html_cells, html_row, html_table
from .plots import NARROW_LEFT, RIGHT, svg, svg_text, ticks
from .sweep_report import page

SchedulePoint = tuple[int, float, float]

_BOTTOM = 250.0
_TOP = 14.0
_STYLE = """
.hfq svg .goal { fill:none; stroke:var(--int8); stroke-width:8; stroke-linejoin:round; opacity:.45; }
.hfq svg .reached { stroke:none; }
.hfq .legend .line { width:18px; height:8px; border-radius:0; opacity:.45; }
.hfq .legend .dot { width:7px; height:7px; border-radius:50%; }
"""


def schedule_plot(points: Sequence[SchedulePoint]) -> str:
    """Inline SVG: the goal as a broad line, what was reached as dots on it, over optimizer steps.

    Args:
        points (list of `tuple[int, float, float]`): step, goal and reached sparsity as shares in [0, 1], in any order;
            a `nan` is not drawn.

    Returns:
        `str`: an `<svg>` element, well-formed as XML; its colours are variables of the page.

    Raises:
        `ValueError`: if there is no point, or a sparsity outside of [0, 1].
    """
    ordered = _ordered(points)
    first, last = ordered[0][0], max(ordered[-1][0], ordered[0][0] + 1)
    shares = [share for _, goal, reached in ordered for share in (goal, reached) if math.isfinite(share)]
    highest = min(100.0, max([1.0, *(share * 100 for share in shares)]) * 1.06)

    def across(step: float) -> float:
        return NARROW_LEFT + (step - first) / (last - first) * (RIGHT - NARROW_LEFT)

    def down(share: float) -> float:
        return _BOTTOM - share * 100 / highest * (_BOTTOM - _TOP)

    parts = []
    for tick in ticks(0.0, highest):
        kind, y = ("grid" if tick else "zero"), down(tick / 100)
        parts.append(f'<line class="{kind}" x1="{NARROW_LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(svg_text(NARROW_LEFT - 10, y, f"{tick:g} %", "tick", "end"))
    for tick in ticks(first, last):
        if tick == int(tick) and tick <= ordered[-1][0]:
            parts.append(svg_text(across(tick), _BOTTOM + 18, f"{tick:,.0f}", "tick", "middle"))
    parts.append(svg_text(RIGHT + 38, _BOTTOM + 18, "steps", "tick"))
    goals = [(step, goal) for step, goal, _ in ordered if math.isfinite(goal)]
    goals += [(last, goal) for _, goal in goals if first == ordered[-1][0]]  # of one step: it holds from there on
    line = " ".join(f"{across(step):.1f},{down(goal):.1f}" for step, goal in goals)
    parts.append(f'<polyline class="goal" points="{line}"/>')
    radius = 3.5 if len(ordered) <= 60 else 1.5
    for step, goal, reached in ordered:
        if math.isfinite(reached):
            hint = f"step {step}: {_percent(reached)} reached, {_percent(goal)} wanted"
            dot = f'<circle class="reached" cx="{across(step):.1f}" cy="{down(reached):.1f}" r="{radius}"/>'
            parts.append(f"<g><title>{hint}</title>{dot}</g>")
    return svg(_BOTTOM + 32, "Sparsity wanted and reached over the steps", parts)


def schedule_page(points: Sequence[SchedulePoint], title: str = "Pruning: wanted and reached") -> str:
    """The picture as one HTML file with a table of its figures, light and dark, nothing fetched.

    Args:
        points (list of `tuple[int, float, float]`): as for [`schedule_plot`].
        title (`str`, *optional*): heading of the page.

    Raises:
        `ValueError`: as [`schedule_plot`].
    """
    ordered = _ordered(points)
    rows = [
        html_row(html_cells((f"{step:,}", _percent(goal), _percent(reached)), slice(0, 3)))
        for step, goal, reached in ordered
    ]
    legend = (
        '<span><i class="line" style="background:var(--int8)"></i>wanted by the schedule</span>'
        '<span><i class="dot" style="background:var(--even)"></i>reached, counted in the weights</span>'
    )
    return page(
        title,
        f'<div class="hfq"><style>{STYLE}{_STYLE}</style><main>\n<h1>{escape(title)}</h1>\n'
        f"<p>{_headline(ordered)}</p>\n"
        '<section><h2>Sparsity over the steps</h2><p class="soft">Share of the pruned layers\' weights that are '
        f"exactly zero, after each update of the masks.</p><figure>{schedule_plot(ordered)}"
        f'<figcaption class="legend">{legend}</figcaption></figure>'
        f"<details><summary>All {len(rows)} updates</summary>"
        f"{html_table(('step', 'wanted', 'reached'), rows, slice(0, 3))}</details></section>\n</main></div>",
    )


def _ordered(points: Sequence[SchedulePoint]) -> list[SchedulePoint]:
    if not points:
        raise ValueError("there is no point to draw: no mask was updated yet. Train up to the schedule's start first.")
    for step, goal, reached in points:
        if not all(math.isnan(share) or 0 <= share <= 1 for share in (goal, reached)):
            raise ValueError(
                f"step {step} has the sparsities {goal!r} and {reached!r}; both are shares in [0, 1], not percent"
            )
    return sorted(points, key=lambda point: point[0])


def _headline(ordered: Sequence[SchedulePoint]) -> str:
    step, goal, reached = ordered[-1]
    gaps = [(abs(a - b) * 100, step) for step, a, b in ordered if math.isfinite(a - b)]
    words = f"At step {step:,}: {_percent(reached)} reached, {_percent(goal)} wanted."
    if gaps:
        gap, where = max(gaps, key=lambda pair: pair[0])
        words += f" The largest distance was {gap:.2f} points, at step {where:,}."
    return words


def _percent(share: float) -> str:
    return f"{share * 100:.2f} %" if math.isfinite(share) else "-"
