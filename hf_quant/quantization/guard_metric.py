"""The metric that the accuracy guard goes by: what `evaluate` returned, and how much worse than float it is."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import did_you_mean

_LIKELIHOOD = ("loss", "logloss", "nll", "entropy", "perplexity", "ppl", "bpb", "bpc")
_ERRORS = ("error", "err", "mse", "rmse", "mae", "mape", "wer", "cer", "ter", "mer", "fid", "ece", "brier")
LOWER_IS_BETTER = frozenset((*_LIKELIHOOD, *_ERRORS))
# What a Trainer's `evaluate` returns besides metrics.
_NO_METRICS = re.compile(r"runtime|.*_per_second|.*_time|epoch|num_input_tokens_seen|(init_)?mem_.*")


class Judge:
    """Calls the user's `evaluate`, and holds what it returns against the target."""

    def __init__(
        self,
        evaluate: Callable[[Any], Any],
        max_drop: float,
        relative: bool,
        metric: str | None,
        higher_is_better: bool | None,
    ) -> None:
        self.evaluate = evaluate
        self.max_drop, self.relative = float(max_drop), relative
        self.metric, self.higher_is_better = metric, bool(higher_is_better)
        self._given_direction = higher_is_better
        self.float_value = float("nan")
        self.calls = 0

    def start(self, float_model: nn.Module) -> None:
        """Evaluate the float model, which settles the metric and its direction."""
        self.metric, value = self._call(float_model)
        if not math.isfinite(value):
            raise ValueError(f"{self.metric} of the float model is {value}: nothing can be held against it.")
        if self.relative and value == 0:
            raise ValueError(
                f"{self.metric} of the float model is 0, of which max_drop={self.max_drop:g} is no share. Use "
                "relative=False, with `max_drop` in the metric's own unit."
            )
        self.float_value = value
        if self._given_direction is None:
            words = re.split(r"[^a-z]+", self.metric.lower())
            self.higher_is_better = not LOWER_IS_BETTER.intersection(words)

    def value(self, model: nn.Module, which: str) -> float:
        """The metric of a model.

        Raises:
            `ValueError`: if it is NaN. A loss of infinity is a bad loss.
        """
        value = self._call(model)[1]
        if not math.isfinite(value) and self.drop(value) != math.inf:
            raise ValueError(
                f"{self.metric} of {which} is {value} ({self.float_value:g} of the float model), so nothing can be "
                "said of its accuracy. Look for NaN in its outputs, or use a metric that is defined for any outputs."
            )
        return value

    def drop(self, value: float) -> float:
        """How much worse than the float model that is."""
        loss = self.float_value - value if self.higher_is_better else value - self.float_value
        return loss / abs(self.float_value) if self.relative else loss

    def meets(self, value: float) -> bool:
        """Whether the drop is within the target. 0.9 - 0.89 is more than 0.01 by rounding alone."""
        return self.drop(value) <= self.max_drop + 1e-12 * (1.0 if self.relative else abs(self.float_value))

    def _call(self, model: nn.Module) -> tuple[str, float]:
        self.calls += 1
        model.eval()
        # The same random draws for each model, and the caller's go on from where they were.
        with torch.random.fork_rng(), torch.no_grad():
            returned = self.evaluate(model)
        name, value = _pick(returned, self.metric)
        if hasattr(value, "item") and math.prod(value.shape) == 1:  # of numpy or torch
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(
                f"`evaluate` returned {value!r} as {name}; needed: a number, or a dict of numbers by name."
            )
        return name, float(value)


def _pick(returned: Any, metric: str | None) -> tuple[str, Any]:
    """Name and value of the metric among what `evaluate` returned."""
    if not isinstance(returned, Mapping):
        return metric or "metric", returned
    values = {str(name).removeprefix("eval_"): value for name, value in returned.items()}
    names = [name for name in values if not _NO_METRICS.fullmatch(name)]
    wanted = names[0] if metric is None and len(names) == 1 else (metric or "").removeprefix("eval_")
    if wanted in values:
        return wanted, values[wanted]
    found = ", ".join(names) or "nothing"
    if metric is None:
        raise ValueError(
            f"`evaluate` returned {found}. Say which of them counts: metric={(names or ['accuracy'])[0]!r}."
        )
    raise ValueError(
        f"metric {metric!r} is not among what `evaluate` returned{did_you_mean(wanted, names) or ':'} It returned: "
        f"{found}. Name one of them, or have `evaluate` return it."
    )
