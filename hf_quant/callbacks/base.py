"""Where in training we are: steps, phases, and how a callback joins a Trainer that exists already."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerState


def check_step(name: str, value: int | float) -> None:
    """Refuse a step that is neither a count nor a share.

    Args:
        name (`str`): the argument's name, for the message.
        value (`int` or `float`): an `int` counts optimizer steps, a `float` in [0, 1) is a share of all of them.

    Raises:
        `TypeError`, `ValueError`: if it is neither.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be an int (steps) or a float in [0, 1) (share of training), got {value!r}")
    if isinstance(value, int) and value < 0:
        raise ValueError(f"`{name}` counts optimizer steps, so it cannot be {value}. Use 0 or more.")
    if isinstance(value, float) and not 0 <= value < 1:
        raise ValueError(
            f"`{name}`={value} is a float, so it is a share of all training steps and must lie in [0, 1). "
            f"Write {int(value) if math.isfinite(value) else 1} without a point to count steps."
        )


def resolve_step(value: int | float, max_steps: int) -> int:
    """The optimizer step that a count or a share of training stands for; shares round up, as warm-up does."""
    return value if isinstance(value, int) else math.ceil(value * max_steps)


def run_notes(state: TrainerState) -> dict[str, Any]:
    """What the callbacks of one run tell each other; it lives as long as the run, and is never saved."""
    notes: dict[str, Any] = state.__dict__.setdefault("_hf_quant", {})
    return notes


def before_conversion(state: TrainerState) -> list[Callable[[], None]]:
    """What has to be done before a model becomes int8, whichever callback comes first. Each may be called twice."""
    finishers: list[Callable[[], None]] = run_notes(state).setdefault("before_conversion", [])
    return finishers


def add_to_logs(logs: dict[str, Any], extra: dict[str, float], state: TrainerState) -> None:
    """Add values to what reporters get, and to the history, which has its own copy by now."""
    logs.update(extra)
    if state.log_history:
        state.log_history[-1].update(extra)


def join_trainer(trainer: Any, callback: Any, prepare: Callable[[nn.Module], None]) -> None:
    """Add a callback to a Trainer that exists already, as if it had been there from the start.

    The callback goes first, so that what it adds to the logs reaches TensorBoard and its kind too; a `model_init`
    is wrapped, so that each new model is prepared before a checkpoint is loaded into it.

    Args:
        trainer (`transformers.Trainer`): the trainer.
        callback (`TrainerCallback`): the callback.
        prepare (callable): changes a model in place; may be called again on the same model.
    """
    handler = trainer.callback_handler
    if callback in handler.callbacks:
        handler.callbacks.remove(callback)
    handler.callbacks.insert(0, callback)
    if trainer.model_init is not None:
        make = trainer.model_init

        @functools.wraps(make)
        def prepared(*args: Any) -> nn.Module:
            model: nn.Module = make(*args)
            prepare(model)
            return model

        trainer.model_init = prepared
    if trainer.model is not None:
        prepare(trainer.model)
