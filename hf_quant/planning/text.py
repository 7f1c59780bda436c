"""A plan in the terminal, with its timeline in block characters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from . import wording as w

if TYPE_CHECKING:
    from .plan import Plan

CELLS = 48
_BARS = " ▁▂▃▄▅▆▇█"
_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def plan_text(plan: Plan) -> RenderableType:
    """The plan as rich shows it."""
    parts: list[RenderableType] = [Text(w.headline(plan), style="bold"), Text(w.model_words(plan)), Text("")]
    for finding in plan.findings:
        style = _STYLES[finding.level]
        parts.append(Text.assemble((f"{finding.level}: ", style), str(finding.problem)))
    if plan.findings:
        parts.append(Text(""))
    parts.append(_timeline(plan))
    for title, rows in (
        ("Targets", [(chosen.section, w.chosen_words(chosen)) for chosen in plan.chosen]),
        ("Result", w.size_rows(plan)),
        ("Memory of the training", w.memory_rows(plan)),
        ("Time", w.timing_rows(plan)),
    ):
        if rows:
            parts.append(_table(title, rows))
    if plan.matches:
        parts.append(_table("Patterns", [w.match_row(match) for match in plan.matches]))
    return Group(*parts)


def timeline_rows(plan: Plan) -> list[tuple[str, str, str]]:
    """The timeline: name, one character for each of `CELLS` parts of the training, and words."""
    steps, phases = plan.steps, plan.phases
    middles = [(cell + 0.5) * steps.total / CELLS for cell in range(CELLS)]
    rows = [("epoch", _axis(plan), f"{steps.total:,} steps")]
    if plan.rates:
        top = max(rate for _, rate in plan.rates)
        rows.append(("learning rate", _bars(middles, _latest(plan.rates), top), w.rate_words(plan)))
    else:
        rows.append(("learning rate", "?" * CELLS, w.rate_words(plan)))
    for phase in phases.prunings.values():
        line = "=" * CELLS if not phase.goals else _bars(middles, _latest(phase.goals), 1.0)
        rows.append((phase.section, line, w.pruning_words(phase)))
    if phases.distillation is not None:
        start, end = phases.distillation.start, phases.distillation.end
        line = "".join("█" if start <= step < end else "·" for step in middles)
        rows.append(("distillation", line, w.distillation_words(plan)))
    if (qat := phases.quantization) is not None:
        frozen = qat.start if qat.freeze is None else qat.freeze
        line = "".join("·" if step < qat.start else "▒" if step < frozen else "█" for step in middles)
        rows.append(("QAT", line, w.qat_words(plan)))
    if phases.after_training is not None:
        rows.append(("quantization", "·" * CELLS, w.after_training_words(plan)))
    for name, events in (("evaluations", steps.evaluations), ("checkpoints", steps.saves)):
        hit = {min(CELLS - 1, max(0, step - 1) * CELLS // steps.total) for step in events}
        words = w.event_words(events) + (
            ", if the best so far" if name == "checkpoints" and steps.saves_best_only else ""
        )
        rows.append((name, "".join("|" if cell in hit else "·" for cell in range(CELLS)), words))
    return rows


def _timeline(plan: Plan) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, width=CELLS)
    table.add_column(overflow="fold")
    for name, line, words in timeline_rows(plan):
        table.add_row(Text(name), Text(line, style="blue"), Text(words))
    return table


def _table(title: str, rows: Sequence[Sequence[str]]) -> Table:
    table = Table(
        box=box.SIMPLE, show_header=False, title=title, title_justify="left", title_style="bold", pad_edge=False
    )
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _axis(plan: Plan) -> str:
    """The numbers of the epochs where they begin, as many as there is room for."""
    line, free = [" "] * CELLS, 0
    epoch = 0
    while epoch * plan.steps.per_epoch < plan.steps.total:
        cell, text = epoch * plan.steps.per_epoch * CELLS // plan.steps.total, str(epoch)
        if cell >= free and cell + len(text) <= CELLS:
            line[cell : cell + len(text)] = text
            free = cell + len(text) + 1
        epoch += 1
    return "".join(line)


def _latest(points: Sequence[tuple[int, float]]) -> Callable[[float], float]:
    """What holds at a step: the value of the last point before it, 0 before the first."""

    def value(step: float) -> float:
        return next((value for at, value in reversed(points) if at <= step), 0.0)

    return value


def _bars(middles: Sequence[float], value: Callable[[float], float], top: float) -> str:
    return "".join(_BARS[round(min(1.0, value(step) / top) * (len(_BARS) - 1))] if top else " " for step in middles)
