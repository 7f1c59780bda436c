"""A rich progress bar for a Trainer, in the place of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..callbacks.base import resolve_step
from ..callbacks.distillation import DistillationCallback
from ..callbacks.pruning import PruningCallback
from ..callbacks.qat import QATCallback


class TrainingProgress(TrainerCallback):
    """Shows the phase, steps, times and logs of a training run; the bars heed `disable_tqdm`.

    A phase is what the recipe's callbacks do at the step: pruning, QAT, QAT with frozen ranges, distillation.

    Pass it after the callbacks that add to the logs. Call [`~TrainingProgress.stop`] when training fails.

    Args:
        phase (`str`): what is being trained, such as `"int8"`.
        console (`rich.console.Console`): where to print.
        callbacks (sequence of `TrainerCallback`, *optional*): of the same training, to name the phases by.
    """

    def __init__(self, phase: str, console: Console, callbacks: Sequence[TrainerCallback] = ()) -> None:
        self.phase = phase
        self.console = console
        self.callbacks = callbacks
        self._progress: Progress | None = None
        self._training: TaskID | None = None
        self._evaluation: TaskID | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar; a resumed run starts where it stopped."""
        self.stop()  # auto_find_batch_size begins again
        if _shown(args, state):
            self._training = self._start().add_task(
                self._description(state), total=state.max_steps, completed=state.global_step
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar; after the last step it goes, so that a conversion can show its own."""
        if self._progress is not None and self._training is not None:
            description = self._description(state)
            self._progress.update(self._training, completed=state.global_step, description=description)
            if state.global_step >= state.max_steps:
                self.stop()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show a second bar while the Trainer evaluates."""
        if not _shown(args, state):
            return
        progress = self._progress or self._start()
        if self._evaluation is None:
            self._evaluation = progress.add_task("  evaluating", total=len(kwargs["eval_dataloader"]))
        progress.advance(self._evaluation)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the second bar."""
        if self._training is None:
            self.stop()
        elif self._progress is not None and self._evaluation is not None:
            self._progress.remove_task(self._evaluation)
            self._evaluation = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the logs as one line."""
        if logs and state.is_world_process_zero:
            shown = "  ".join(f"{name} {_short(value)}" for name, value in logs.items() if name not in _UNTOLD)
            # A model that was quantized after training is evaluated by a Trainer that takes no steps.
            step = f" step {state.global_step}/{state.max_steps}" if state.max_steps else ""
            line = f"{self.phase}{step}  {shown}"
            self.console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the bar of a run that ended early."""
        self.stop()

    def stop(self) -> None:
        """End the display; safe to call at any time."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._training = self._evaluation = None

    def _description(self, state: TrainerState) -> str:
        names = phase_names(self.callbacks, state.global_step, state.max_steps)
        return f"training {self.phase}" + (f": {' + '.join(names)}" if names else "")

    def _start(self) -> Progress:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._progress.start()
        return self._progress


# Says nothing about the model; the second one comes where a model is evaluated that was not trained.
_UNTOLD = ("total_flos", "eval_model_preparation_time")


def phase_names(callbacks: Sequence[TrainerCallback], step: int, max_steps: int) -> list[str]:
    """What the callbacks of a training do in one step, in words.

    Args:
        callbacks (sequence of `TrainerCallback`): pruning, distillation and QAT are named, others are not.
        step (`int`): optimizer steps that are done.
        max_steps (`int`): of the whole training.
    """
    names = []
    for callback in callbacks:
        if isinstance(callback, PruningCallback) and not callback.settings.constant:
            # Masks change after the step.
            timeline = callback.settings.timeline(max_steps, resolve_step)
            if timeline.start <= step + 1 <= timeline.end:
                names.append("pruning")
        elif isinstance(callback, DistillationCallback):
            start, end = callback.check_steps(max_steps)
            if start <= step < end:
                names.append("distillation")
        elif isinstance(callback, QATCallback) and step >= resolve_step(callback.start_step, max_steps):
            static = callback.scheme.activations == "static"
            frozen = static and step >= resolve_step(callback.freeze_step, max_steps)
            names.append("QAT with frozen ranges" if frozen else "QAT")
    return list(dict.fromkeys(names))


def _shown(args: TrainingArguments, state: TrainerState) -> bool:
    return bool(state.is_world_process_zero and not args.disable_tqdm)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
