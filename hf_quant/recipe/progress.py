"""A rich progress bar for a Trainer, in the place of its own."""

from __future__ import annotations

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


class TrainingProgress(TrainerCallback):
    """Shows the phase, steps, times and logs of a training run; the bars heed `disable_tqdm`.

    Pass it after the callbacks that add to the logs. Call [`~TrainingProgress.stop`] when training fails.

    Args:
        phase (`str`): what is being trained, such as `"int8"`.
        console (`rich.console.Console`): where to print.
    """

    def __init__(self, phase: str, console: Console) -> None:
        self.phase = phase
        self.console = console
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
                f"training {self.phase}", total=state.max_steps, completed=state.global_step
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar; after the last step it goes, so that a conversion can show its own."""
        if self._progress is not None and self._training is not None:
            self._progress.update(self._training, completed=state.global_step)
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
            shown = "  ".join(f"{name} {_short(value)}" for name, value in logs.items() if name != "total_flos")
            line = f"{self.phase} step {state.global_step}/{state.max_steps}  {shown}"
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


def _shown(args: TrainingArguments, state: TrainerState) -> bool:
    return bool(state.is_world_process_zero and not args.disable_tqdm)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
