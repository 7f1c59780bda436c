"""What the accuracy guard did: its result, as a table and curve in a terminal, and its error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .guard_results import LayerSensitivity, TradeOff, signed

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_ROWS = 10
_TEXT_WIDTH = 100


@dataclass(frozen=True)
class GuardResult:
    """What [`meet_accuracy`] did. `print` it for the sensitive layers and the trade-off curve.

    Args:
        metric (`str`): its name.
        float_value (`float`): of the float model.
        value (`float`): of the model that was returned.
        drop (`float`): how much worse that is: in the metric's unit, or as a share of `float_value` if `relative`.
        target (`float`): the largest drop that was allowed, in the same unit.
        kept (`tuple[str, ...]`): modules put back to float, the most sensitive first.
        sensitivity (`tuple[LayerSensitivity, ...]`): the most sensitive first; empty where the fully quantized model
            met the target.
        curve (`tuple[TradeOff, ...]`): the best model that was evaluated of each number of layers in float, from
            fully quantized to float.
        evaluations (`int`): how often `evaluate` was called.
        layers (`int`): modules that were quantized at first.
        relative (`bool`): whether `drop` and `target` are shares.
        higher_is_better (`bool`): the metric's direction.
    """

    metric: str
    float_value: float
    value: float
    drop: float
    target: float
    kept: tuple[str, ...]
    sensitivity: tuple[LayerSensitivity, ...]
    curve: tuple[TradeOff, ...]
    evaluations: int
    layers: int
    relative: bool = False
    higher_is_better: bool = True

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        unit = " of it" if self.relative else ""
        kept = "all layers stay quantized"
        if self.kept:
            kept = f"{len(self.kept)} of {self.layers} quantized layers are back in float"
        line = Text(
            f"{self.metric}: float {self.float_value:.6g}, now {self.value:.6g}; worse by {self.drop:.4g}{unit}, "
            f"allowed {self.target:g}; {kept} ({self.evaluations} evaluations)."
        )
        return Group(line, *([_layers(self)] if self.sensitivity else []), _curve(self))

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=_TEXT_WIDTH, color_system=None, force_terminal=False, force_jupyter=False)
        with console.capture() as capture:
            console.print(self.__rich__())
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


class AccuracyError(ValueError):
    """No model was found that keeps the accuracy; the quantized model was left fully quantized.

    Args:
        message (`str`): target, float value, best found, and the change to make.
        best ([`GuardResult`]): what the best model found would have been.
    """

    def __init__(self, message: str, best: GuardResult) -> None:
        super().__init__(message)
        self.best = best


def unmet(best: GuardResult, names: Sequence[str], max_float_layers: int | None) -> AccuracyError:
    """The error for a target that no model met.

    Args:
        best ([`GuardResult`]): the best of those that were evaluated.
        names (list of `str`): of all quantized modules.
        max_float_layers (`int`, *optional*): how many of them could be in float.
    """
    within = "at least one layer quantized"
    advice = ["quantize with more bits, smaller groups or calibration"]
    if max_float_layers is not None:
        within = f"at most {max_float_layers} layers in float"
        advice.insert(0, f"raise max_float_layers={max_float_layers}")
    if math.isfinite(best.drop):
        advice.insert(0, f"allow max_drop={_rounded_up(best.drop)}")
    return AccuracyError(
        f"{_target(best)}, and no model that meets this was found with {within}. The best has {best.metric} "
        f"{best.value:.6g}, a drop of {best.drop:.4g}, with {_in_float(best.kept, names)}. To go on, "
        f"{', or '.join(advice)}. The model was left fully quantized.",
        best,
    )


def unsteady(found: GuardResult, first: float) -> AccuracyError:
    """The error for a model that met the target with the value `first`, but not when it was evaluated again."""
    return AccuracyError(
        f"{_target(found)}. The search found a model with {found.metric} {first:.6g}, but evaluated once more it has "
        f"{found.value:.6g}: `evaluate` does not give the same model the same value. Let it draw nothing at random "
        "and judge the same examples each time. The model was left fully quantized.",
        found,
    )


def _target(result: GuardResult) -> str:
    unit = " of that" if result.relative else ""
    return (
        f"{result.metric} of the float model is {result.float_value:.6g} and may get worse by {result.target:g}{unit}"
    )


def _in_float(kept: Sequence[str], names: Sequence[str]) -> str:
    """How many layers are in float, and which, in as few names as serve."""
    if not kept:
        return "no layer in float"
    rest = [name for name in names if name not in kept]
    listed, but = (kept, "") if len(kept) <= len(rest) else (rest, "all but ")
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return f"{len(kept)} of {len(names)} layers in float: {but}{', '.join(listed[:5])}{more}"


def _rounded_up(value: float) -> str:
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / unit - 1e-9) * unit:.3g}"


def _layers(result: GuardResult) -> Table:
    """The layers that stay in float, and the most sensitive of the others."""
    from rich.text import Text

    def is_kept(layer: LayerSensitivity) -> bool:
        return not set(result.kept).isdisjoint(layer.name.split(" + "))

    table = _table(
        "What each layer alone costs", "layer", "SQNR, dB", f"change of {result.metric}", "MB saved", "is now"
    )
    others = sum(not is_kept(layer) for layer in result.sensitivity)
    room = max(0, _ROWS - (len(result.sensitivity) - others))
    for layer in result.sensitivity:
        if not is_kept(layer):
            if room == 0:
                continue
            room, others = room - 1, others - 1
        change = "" if layer.change is None else signed(layer.change)
        now = "float" if is_kept(layer) else "quantized"
        table.add_row(Text(layer.name), f"{layer.sqnr:.1f}", change, f"{layer.bytes_saved / 1e6:.2f}", now)
    table.caption = f"and {others} less sensitive ones, quantized" if others else None
    return table


def _curve(result: GuardResult) -> Table:
    """The best model of each number of layers in float."""
    table = _table("Trade-off: the best of each number", "layers in float", "MB", result.metric)
    for point in result.curve:
        table.add_row(str(point.float_layers), f"{point.size / 1e6:.2f}", f"{point.value:.6g}")
    return table


def _table(title: str, first: str, *others: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(first, box=box.SIMPLE_HEAD, title=title, title_justify="left", caption_justify="left")
    for name in others:
        table.add_column(name, justify="right")
    return table
