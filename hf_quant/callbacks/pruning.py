"""Pruning as a callback: sparsity on a schedule while a Trainer fine-tunes, real shrinking when it ends."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..pruning.masks import UnitMasks
from ..pruning.pruner import Pruner
from ..pruning.schedules import Timeline
from ..pruning.settings import Goal, Pairs, PruningSettings, Step
from ..pruning.shrink import shrink
from ..runtime.base import quantized_modules
from .base import add_to_logs, before_conversion, check_step, join_trainer, resolve_step
from .pruning_checks import announcement, check_begun, check_owner, check_resumed, check_shape, check_trainable

logger = logging.getLogger(__name__)

_RECORD = "hf_quant.pruning"
_TOLERANCE = 0.001  # of the goal; units and blocks may be coarser than that


class PruningCallback(TrainerCallback):
    """Prunes a model while it is fine-tuned.

    ```python
    trainer = Trainer(model=model, args=args, ..., callbacks=[PruningCallback(0.8), QATCallback(start_step=0.6)])
    trainer.train()                  # prune, then train with fake-quant; int8 with 80 % zeros at the end
    ```

    From `start_step` to `end_step` the weights with the lowest scores are set to 0, more at each update; they are
    held at 0 after each optimizer step, so every checkpoint has true zeros in plain weights. What is pruned does not
    return, but by movement until `end_step`. A resumed run goes on to the same bytes as one left alone.

    A checkpoint whose metric came before `end_step` is not sparse enough and is never loaded as the best one.

    With `shrink=True`, pruned units are taken out when training ends: the model is smaller and faster, computes
    the same, and loads with plain `from_pretrained`. Zeros alone make nothing faster.

    Args:
        final_sparsity (`float` or `dict[str, float]`, *optional*):
            Share of the targets' weights (or units) that is pruned from `end_step` on, in (0, 1); or one by pattern:
            `{"*.query": 0.9, "*.dense": 0.7}`. N:M fixes it; `schedule="constant"` and a list of steps have none.
        initial_sparsity (`float`, *optional*, defaults to 0.0):
            Share that is pruned at once at `start_step`.
        start_step (`int` or `float`, *optional*, defaults to 0.1):
            First step with pruning. An `int` counts optimizer steps, a `float` in [0, 1) is a share of all.
        end_step (`int` or `float`, *optional*, defaults to 0.6):
            Step from which on the masks stay as they are.
        frequency (`int` or `float`, *optional*, defaults to 0.02):
            Steps from one update of the masks to the next.
        schedule (`str` or list, *optional*, defaults to `"cubic"`):
            `"cubic"` (Zhu & Gupta, 2017, eq. 1), `"linear"`, `"cosine"`, `"polynomial_2"` and other powers,
            `"one_shot"` (all at `start_step`), `"constant"` (keep the zeros that are there), or a list of
            `(step, sparsity)`.
        criterion (`str`, *optional*, defaults to `"magnitude"`):
            `"magnitude"`, `"l2"`, `"random"`, `"movement"`, `"soft_movement"`, `"first_order"`, `"fisher"`,
            `"block_fisher"`; see [`get_criterion`].
        structure (`str`, *optional*, defaults to `"unstructured"`):
            `"unstructured"`, `"2:4"` and other N:M, `"4x1"` and other blocks (outputs x inputs), `"row"`, `"column"`,
            `"head"`, `"neuron"`, `"layer"`.
        scope (`str`, *optional*, defaults to `"global"`):
            `"global"`: all targets compete, some lose more than others; `"layer"`: each meets the goal by itself.
        uniform (`bool`, *optional*, defaults to `False`):
            Whether all layers lose the same number of heads or neurons, which a config can say.
        shrink (`bool`, *optional*, defaults to `False`):
            Whether pruned heads, neurons or layers are removed at the end.
        targets (list of `str`, *optional*):
            Patterns of modules to prune. By default all Linear and Conv1D modules but the head.
        ignore (list of `str`, *optional*):
            Patterns of modules to leave dense.
        log_modules (`bool`, *optional*, defaults to `False`):
            Whether the training logs hold the sparsity of each target too, as `sparsity/<name>`.

    Attributes:
        history (list of `(int, float, float)`): step, goal and sparsity reached at each update.
        sparsities (`dict[str, float]`): reached, by target, after training; counted from the weights.

    Raises:
        `ValueError`: for an unknown name, steps that leave no pruning phase, a goal below the present sparsity, a
            structure that the model lacks or that does not divide a weight, a shape that no config can say, and two
            callbacks on one weight.
    """

    def __init__(
        self,
        final_sparsity: Goal | None = None,
        *,
        initial_sparsity: float = 0.0,
        start_step: Step = 0.1,
        end_step: Step = 0.6,
        frequency: Step = 0.02,
        schedule: str | Pairs = "cubic",
        criterion: str = "magnitude",
        structure: str = "unstructured",
        scope: str = "global",
        uniform: bool = False,
        shrink: bool = False,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] | None = None,
        log_modules: bool = False,
    ) -> None:
        for name, step in (("start_step", start_step), ("end_step", end_step), ("frequency", frequency)):
            check_step(name, step)
        self.settings = PruningSettings(
            final_sparsity,
            initial_sparsity,
            start_step,
            end_step,
            frequency,
            schedule,
            criterion,
            structure,
            scope,
            uniform,
            shrink,
        )
        for step, _ in () if isinstance(schedule, str) else schedule:
            check_step("schedule", step)
        self.targets = targets
        self.ignore = ignore
        self.log_modules = log_modules
        self.history: list[tuple[int, float, float]] = []
        self.sparsities: dict[str, float] = {}
        self._pruner: Pruner | None = None
        self._shrunk = False

    def attach(self, trainer: Any) -> PruningCallback:
        """Add this callback to a Trainer that exists already, or that has a `model_init`.

        Use it instead of `callbacks=[...]` to have sparsity in TensorBoard and other reporters, which see the logs
        before callbacks passed to the Trainer do, and to resume a run with `model_init`.

        Args:
            trainer (`transformers.Trainer`): a trainer that is not training.

        Returns:
            [`PruningCallback`]: itself.
        """
        join_trainer(trainer, self, self._prepare)
        return self

    def check(self, model: nn.Module) -> None:
        """Refuse a model that cannot be pruned as this callback is told to; changes nothing.

        Args:
            model (`torch.nn.Module`): a float model.

        Raises:
            `ValueError`: as the Trainer would on being made.
        """
        self.pruner_for(model).release()

    def check_steps(self, max_steps: int) -> None:
        """Refuse a number of optimizer steps in which the schedule would not come to its end.

        Raises:
            `ValueError`: as `train()` would.
        """
        self.settings.timeline(max_steps, resolve_step)

    @property
    def memory(self) -> int:
        """Bytes that masks and gathered scores take while training; 0 before and after."""
        return 0 if self._pruner is None else self._pruner.memory

    def save_plot(self, path: str | Path) -> None:
        """Write a page with the sparsity wanted and reached at each update.

        Args:
            path (`str`): an `.html` file to write.
        """
        from ..evaluation.pruning_plot import schedule_page

        Path(path).write_text(schedule_page(self.history, f"Pruning: {self.settings.what}"), encoding="utf-8")

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Find what can be pruned, and make room for scores before a checkpoint is loaded."""
        if model is not None:
            self._prepare(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Check the schedule against the number of steps, and the weights against the schedule."""
        if model is None:
            return
        if self._shrunk:
            raise RuntimeError("this model was shrunk when training ended. To train on, make a new Trainer from it.")
        line = self._timeline(state)
        self._prepare(model)
        pruner = self._pruner
        assert pruner is not None
        pruner.bind()
        if self.settings.shrink:
            check_shape(model, pruner, self.settings)  # again: QAT has come since, with groups of its own
        key = f"{self.settings.structure.name} {pruner.names[0]} +{len(pruner.names) - 1}"
        check_owner(self, pruner, state)
        check_trainable(pruner, self.settings)
        records = state.stateful_callbacks.setdefault(_RECORD, {})
        self.history = [tuple(point) for point in records.get(key, {}).get("history", [])]
        if state.global_step > 0:
            check_resumed(pruner, self.settings, line, state.global_step)
        else:
            self.history.clear()
            check_begun(pruner, self.settings, line)
            if line.start == 0 and not self.settings.constant:
                self._update(pruner, line, 0, args.seed)
        records[key] = {"start_step": line.start, "end_step": line.end, "history": self.history}
        before_conversion(state).append(functools.partial(self._finish, model, state))
        if state.is_world_process_zero:
            print(announcement(pruner, self.settings, line))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the criterion see the gradients, if they count."""
        if self._pruner is None or not self.settings.criterion.needs_gradients or self.settings.constant:
            return
        if self._timeline(state).gathers(state.global_step + 1, self.settings.criterion.lasting):
            self._pruner.accumulate()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update the masks if it is time to, and hold them."""
        if self._pruner is None:
            return
        step, line = state.global_step + 1, self._timeline(state)  # the step is counted after this event
        if line.is_update(step) and not self.settings.constant:
            self._update(self._pruner, line, step, args.seed)
        else:
            self._pruner.apply()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the best checkpoint when the masks are complete: it is not sparse enough."""
        end = self._timeline(state).end
        if self._pruner is None or self.settings.constant or state.global_step != end:
            return
        if state.best_model_checkpoint and state.is_world_process_zero:
            print(
                f"pruning is complete at step {end}: the best checkpoint so far, {state.best_model_checkpoint} "
                f"({args.metric_for_best_model} {state.best_metric}), is less sparse and no longer counts as the best"
            )
        state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the masks from what was saved, as a resumed run will: a weight may have become 0 by itself."""
        if self._pruner is not None and state.global_step >= self._timeline(state).start:
            self._pruner.read()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add goal and sparsity to the training logs."""
        if logs is None or "loss" not in logs or self._pruner is None:
            return
        prefix = "" if "sparsity" not in logs else f"{self.settings.structure.name}_"  # a second callback's
        extra = {f"{prefix}sparsity": round(self._pruner.sparsity(), 5)}
        if not self.settings.constant:
            goals = self.settings.goals(self._pruner.final, self._timeline(state), state.global_step)
            extra[f"{prefix}sparsity_goal"] = round(self._pruner.total(goals), 5)
        if self.log_modules:
            extra |= {f"{prefix}sparsity/{name}": round(x, 5) for name, x in self._pruner.sparsities().items()}
        add_to_logs(logs, extra, state)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Count the zeros of the final weights, and remove pruned units."""
        if model is not None:
            self._finish(model, state)

    def _finish(self, model: nn.Module, state: TrainerState) -> None:
        """The end of training, once: a QATCallback that comes first calls it before it converts."""
        pruner, self._pruner = self._pruner, None
        if pruner is None:
            return
        pruner.release()
        self.sparsities = pruner.reached()
        line, main = self._timeline(state), state.is_world_process_zero
        finished = state.global_step >= line.end
        reached = pruner.total(self.sparsities)
        wanted = 0.0 if self.settings.constant else pruner.total(self.settings.goals(pruner.final, line, line.end))
        if main:
            print(f"pruned {self.settings.what}: {reached:.2%} of {pruner.extent}")
        if not finished:
            logger.warning(
                f"training ended at step {state.global_step}, before `end_step` (step {line.end}), at a sparsity of "
                f"{reached:.2%} instead of {wanted:.2%}." + " The model is not shrunk." * self.settings.shrink
            )
        elif reached < wanted - max(_TOLERANCE, pruner.grain):
            logger.warning(
                f"the sparsity goal of {wanted:.2%} was not reached ({reached:.2%}): some modules kept their last "
                "weights. Lower the goal, or widen `targets`."
            )
        if self.settings.shrink and finished and isinstance(pruner.plan, UnitMasks):
            keep = {name: ~mask for name, mask in pruner.plan.pruned().items()}
            before = sum(parameter.numel() for parameter in model.parameters())
            shrink(model, pruner.plan.groups, keep)
            self._shrunk = True
            if main:
                after = sum(parameter.numel() for parameter in model.parameters())
                print(f"shrunk from {before:,} to {after:,} parameters; its outputs are the same")

    def _prepare(self, model: nn.Module) -> None:
        if self._pruner is None or self._pruner.model is not model:
            self._pruner = self.pruner_for(model)

    def pruner_for(self, model: nn.Module) -> Pruner:
        """A new pruner of a model, which gets the criterion's buffers."""
        if quantized_modules(model):
            raise RuntimeError(
                f"this {type(model).__name__} is int8 already; its weights cannot be pruned. Start from a float model."
            )
        wanted = self.settings
        pruner = Pruner(
            model, wanted.structure, wanted.criterion, wanted.effective_scope, wanted.goal, self.targets, self.ignore
        )
        if wanted.shrink:
            check_shape(model, pruner, wanted)
        return pruner

    def _timeline(self, state: TrainerState) -> Timeline:
        return self.settings.timeline(state.max_steps, resolve_step)

    def _update(self, pruner: Pruner, line: Timeline, step: int, seed: int) -> None:
        goals = self.settings.goals(pruner.final, line, step)
        pruner.update(goals, seed + step)
        self.history.append((step, round(pruner.total(goals), 6), round(pruner.sparsity(), 6)))
