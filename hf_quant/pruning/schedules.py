"""How much is pruned when: pure functions of the step. No torch here."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import did_you_mean

SCHEDULES = {
    "cubic": "fast at first, then slower: 1 - (1 - x)^3 of the way (Zhu & Gupta, 2017, eq. 1)",
    "linear": "the same share at each update",
    "cosine": "slow, fast, slow: half a wave",
    "polynomial_2": "1 - (1 - x)^2 of the way; any power, such as polynomial_4",
    "one_shot": "all at once, at start_step",
    "constant": "keeps the zeros that the weights have (sparse transfer)",
}


def share_of_way(schedule: str, x: float) -> float:
    """How much of the way from the initial to the final sparsity is gone.

    Args:
        schedule (`str`): a name that [`check_schedule`] accepts, but `"constant"`.
        x (`float`): the share of the pruning phase that is over, in [0, 1].

    Returns:
        `float`: in [0, 1], never falling in `x`: `x` for linear, `(1 - cos(pi x)) / 2` for cosine, and
        `1 - (1 - x)^p` for polynomials, of which cubic (Zhu & Gupta, 2017, eq. 1) is that with `p = 3`.
    """
    if schedule == "one_shot" or x >= 1:
        return 1.0
    if schedule == "linear":
        return x
    if schedule == "cosine":
        return (1 - math.cos(math.pi * x)) / 2
    return 1 - (1 - x) ** _power(schedule)


def check_schedule(schedule: str) -> None:
    """Refuse a name that is no schedule.

    Raises:
        `ValueError`: naming those there are.
    """
    if schedule in SCHEDULES:
        return
    head, _, power = schedule.partition("_") if isinstance(schedule, str) else ("", "", "")
    if head == "polynomial" and _is_positive(power):
        return
    raise ValueError(
        f"unknown schedule {schedule!r}{did_you_mean(str(schedule), SCHEDULES) or '.'} There are: "
        f"{', '.join(SCHEDULES)}, and a list of (step, sparsity) pairs."
    )


@dataclass(frozen=True)
class Timeline:
    """A schedule laid onto the optimizer steps of one training.

    Args:
        schedule (`str` or tuple of `(int, float)`): its name, or steps with the sparsity that holds from each on.
        start (`int`): step at which `initial` holds, and the first at which anything is pruned.
        end (`int`): step from which on `final` holds and nothing more is pruned.
        frequency (`int`): steps between updates of the masks.
    """

    schedule: str | tuple[tuple[int, float], ...]
    start: int
    end: int
    frequency: int

    def goal(self, step: int, initial: float, final: float) -> float:
        """The sparsity that holds after `step` optimizer steps, in [0, 1]; 0 before `start`."""
        if step < self.start:
            return 0.0
        if not isinstance(self.schedule, str):
            at = bisect.bisect_right([first for first, _ in self.schedule], step) - 1
            return self.schedule[at][1]
        if step >= self.end:
            return final  # to the last bit
        done = (self.last_update(step) - self.start) / (self.end - self.start)
        return initial + (final - initial) * share_of_way(self.schedule, done)

    def is_update(self, step: int) -> bool:
        """Whether masks change after `step` optimizer steps."""
        return self.start <= step <= self.end and self.last_update(step) == step

    def last_update(self, step: int) -> int:
        """The last update that is not after `step`; `start - 1` where there was none yet."""
        if step < self.start:
            return self.start - 1
        if not isinstance(self.schedule, str):
            return max(first for first, _ in self.schedule if first <= step)
        if step >= self.end:
            return self.end
        return step - (step - self.start) % self.frequency

    def gathers(self, step: int, lasting: bool = False) -> bool:
        """Whether the gradient of the step that ends as number `step` counts for the scores of a coming update.

        From one `frequency` before `start` on, or, for lasting scores, from the first step on, to the last update.
        """
        return (lasting or self.start - self.frequency < step) and step <= self.end


def check_pairs(pairs: Sequence[Sequence[float]]) -> None:
    """Refuse a list of steps that is not in order, or whose sparsities fall.

    Args:
        pairs (sequence of `(step, sparsity)`): steps as counts or shares of training, all of one kind.

    Raises:
        `ValueError`, `TypeError`: naming the pair.
    """
    if not pairs or any(isinstance(pair, str) or len(pair) != 2 for pair in pairs):
        raise ValueError(f"a schedule of steps is a list of (step, sparsity) pairs, got {pairs!r}")
    if len({isinstance(step, int) for step, _ in pairs}) > 1:
        raise TypeError(
            f"the steps of `schedule` mix counts and shares of training: {[step for step, _ in pairs]}. Use one kind."
        )
    for step, sparsity in pairs:
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity {sparsity} at step {step} of `schedule` must lie in [0, 1)")
    for (step, sparsity), (later, more) in itertools.pairwise(pairs):
        if later <= step:
            raise ValueError(f"step {later} of `schedule` comes after step {step}, so it must be greater")
        if more < sparsity:
            raise ValueError(
                f"the sparsity of `schedule` falls from {sparsity} to {more} at step {later}: pruned weights do not "
                "return. Let it rise."
            )


def _power(schedule: str) -> float:
    return 3.0 if schedule == "cubic" else float(schedule.partition("_")[2])


def _is_positive(number: str) -> bool:
    try:
        return math.isfinite(float(number)) and float(number) > 0
    except ValueError:
        return False
