"""What a user asks of pruning, checked, and laid onto a training's steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import did_you_mean
from .criteria import Criterion, get_criterion
from .schedules import Timeline, check_pairs, check_schedule
from .structures import Structure, get_structure

Step = int | float
Pairs = Sequence[tuple[Step, float]]
Goal = float | Mapping[str, float]


@dataclass
class PruningSettings:
    """The arguments of [`PruningCallback`] that do not name modules, and the rules between them.

    Raises:
        `ValueError`, `TypeError`: naming the argument, its value, what is allowed and the change to make.
    """

    final_sparsity: Goal | None
    initial_sparsity: float
    start_step: Step
    end_step: Step
    frequency: Step
    schedule: str | Pairs
    criterion_name: str
    structure_name: str
    scope: str
    uniform: bool
    shrink: bool

    def __post_init__(self) -> None:
        self.structure: Structure = get_structure(self.structure_name)
        self.criterion: Criterion = get_criterion(self.criterion_name)
        if isinstance(self.schedule, str):
            check_schedule(self.schedule)
        else:
            check_pairs(self.schedule)
            self.start_step, self.end_step = self.schedule[0][0], self.schedule[-1][0]
        if self.schedule == "one_shot":
            self.end_step = self.start_step
        if self.frequency == 0:
            raise ValueError("`frequency` is 0, but from one update to the next there is 1 step at least. Raise it.")
        if self.gradual and type(self.start_step) is type(self.end_step) and self.start_step >= self.end_step:
            self._raise_no_phase()
        if self.scope not in ("global", "layer"):
            hint = did_you_mean(str(self.scope), ("global", "layer"))
            raise ValueError(f"unknown scope {self.scope!r}{hint or '.'} Use 'global' or 'layer'.")
        self.goal: Goal = self._checked_goal()
        self._check_units()

    @property
    def constant(self) -> bool:
        """Whether the present zeros are kept and nothing is pruned."""
        return self.schedule == "constant"

    @property
    def gradual(self) -> bool:
        """Whether sparsity rises between `start_step` and `end_step`."""
        return isinstance(self.schedule, str) and self.schedule not in ("one_shot", "constant")

    @property
    def what(self) -> str:
        """In a few words."""
        return f"{self.structure.name} by {self.criterion.name}"

    @property
    def effective_scope(self) -> str:
        """`"layer"` where each target has to meet the goal by itself, or `"global"`."""
        if self.criterion.name == "soft_movement":
            return "global"  # one threshold for all scores is what makes it soft
        return "layer" if self.uniform else self.scope

    def timeline(self, max_steps: int, resolve: Callable[[Step, int], int]) -> Timeline:
        """The schedule in optimizer steps.

        Args:
            max_steps (`int`): of the whole training.
            resolve (callable): makes a count of steps from a count or a share.

        Raises:
            `ValueError`: if pruning would not be over when training is.
        """
        start, end = resolve(self.start_step, max_steps), resolve(self.end_step, max_steps)
        schedule = self.schedule
        if not isinstance(schedule, str):
            schedule = tuple((resolve(step, max_steps), sparsity) for step, sparsity in schedule)
        if self.constant:
            return Timeline(schedule, 0, 0, 1)
        for name, value, step in (("start_step", self.start_step, start), ("end_step", self.end_step, end)):
            if step > max_steps - (name == "start_step"):
                raise ValueError(
                    f"`{name}` ({value}, step {step}) is not before the end of training ({max_steps} steps). Lower "
                    "it, or train longer."
                )
        if self.gradual and start >= end:
            self._raise_no_phase()
        return Timeline(schedule, start, end, max(1, resolve(self.frequency, max_steps)))

    def goals(self, finals: Mapping[str, float], line: Timeline, step: int) -> dict[str, float]:
        """The sparsity of each target after `step` optimizer steps, where `finals` are its final ones."""
        return {name: line.goal(step, min(self.initial_sparsity, goal), goal) for name, goal in finals.items()}

    def _raise_no_phase(self) -> None:
        raise ValueError(
            f"`end_step` ({self.end_step}) must come after `start_step` ({self.start_step}): no pruning phase is "
            "left. Lower `start_step` or raise `end_step`."
        )

    def _checked_goal(self) -> Goal:
        """The final sparsity, which structure and schedule may say too."""
        final, fixed = self.final_sparsity, self.structure.sparsity
        if self.constant or not isinstance(self.schedule, str):
            if final is not None:
                what = "'constant'" if self.constant else "of steps"
                raise ValueError(
                    f"`final_sparsity` ({final}) has no meaning with a schedule {what}, which says itself what is 0. "
                    "Leave one of them out."
                )
            return 0.0 if self.constant else float(self.schedule[-1][1])
        if final is None:
            final = fixed
        if final is None:
            raise ValueError("`final_sparsity` is missing: the share of the weights to prune, such as 0.8.")
        goals = final if isinstance(final, Mapping) else {"": final}
        if not goals:
            raise ValueError("`final_sparsity` names no module. Write a number, or a number by pattern.")
        for pattern, goal in goals.items():
            where = f" for {pattern!r}" if pattern else ""
            if isinstance(goal, bool) or not isinstance(goal, (int, float)) or not 0 < goal < 1:
                raise ValueError(
                    f"`final_sparsity`{where} is {goal!r}, but must lie between 0 and 1: 0.8 prunes 80 % of the "
                    "weights."
                )
            if fixed is not None and abs(goal - fixed) > 1e-9:
                raise ValueError(
                    f"{self.structure.name} prunes {fixed:.1%}, but `final_sparsity`{where} is {goal}. Write "
                    f"{fixed:g}, or leave it out."
                )
            if not 0 <= self.initial_sparsity <= goal:
                raise ValueError(
                    f"`initial_sparsity` ({self.initial_sparsity}) must lie between 0 and `final_sparsity`{where} "
                    f"({goal}). Lower it."
                )
        return final

    def _check_units(self) -> None:
        name = self.structure.name
        if (self.shrink or self.uniform) and not self.structure.in_units:
            option = "shrink" if self.shrink else "uniform"
            raise ValueError(
                f"`{option}=True` needs whole parts of the model, but structure {name!r} leaves all shapes as they "
                "are. Use structure 'head', 'neuron' or 'layer'."
            )
        if self.structure.kind == "layer" and not self.shrink:
            raise ValueError(
                "structure 'layer' needs `shrink=True`: after a norm, a layer of zeros does not let its input "
                "through, so a pruned layer has to be taken out."
            )
        if self.structure.in_units and self.constant:
            raise ValueError(
                f"schedule 'constant' keeps single zeros, whatever structure they have; leave out structure {name!r}."
            )
        if self.structure.in_units and self.criterion.name.startswith("block_fisher"):
            raise ValueError(
                f"criterion {self.criterion.name!r} compensates single weights; with structure {name!r} use 'fisher'."
            )
