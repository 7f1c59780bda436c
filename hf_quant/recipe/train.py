"""One training of a recipe, with its checkpoints; and the evaluation of a model that is not trained."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from .checkpoints import last_whole_checkpoint
from .prepare import Prepared
from .stopping import StopOnSignal
from .training import training_arguments

if TYPE_CHECKING:
    from accelerate import PartialState
    from transformers import PreTrainedModel, Trainer, TrainerCallback


def train(
    prepared: Prepared,
    model: PreTrainedModel,
    name: str,
    callbacks: list[TrainerCallback],
    *,
    resume: bool,
    console: Console,
    stop: StopOnSignal,
) -> Trainer:
    """Trains a model; the callbacks are all in which the compressed model's training differs from the float twin's.

    Args:
        prepared ([`Prepared`]): the recipe and its data.
        model (`PreTrainedModel`): in float32.
        name (`str`): of the training, and of its folder in `checkpoints/`.
        callbacks (list of `TrainerCallback`): of the recipe.
        resume (`bool`): whether to go on from the last checkpoint that was written to its end; others are removed.
        console (`rich.console.Console`): where to print.
        stop ([`StopOnSignal`]): of the run.
    """
    from accelerate import PartialState
    from transformers import set_seed

    from .progress import TrainingProgress

    recipe = prepared.recipe
    checkpoints = Path(recipe.output) / "checkpoints" / name
    progress = TrainingProgress(name, console, callbacks)
    # A signal is heeded before a model is converted at the end of its training.
    trainer = _trainer(prepared, model, checkpoints, [stop, *callbacks, progress])
    last = _last_checkpoint(checkpoints, PartialState(), console) if resume else None
    console.out(f"training {name} on {len(prepared.encoded['train']):,} examples", highlight=False)
    # Preparing a model for QAT may have drawn random numbers; the twin has to draw the same ones from here on.
    set_seed(recipe.seed)
    if last:
        console.out(f"resuming from {last}", highlight=False)
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    finally:
        progress.stop()
    return trainer


def evaluate(prepared: Prepared, model: PreTrainedModel, name: str, console: Console) -> None:
    """Prints the metrics of a model that no Trainer trained, as the end of a training does.

    Args:
        prepared ([`Prepared`]): the recipe and its data.
        model (`PreTrainedModel`): float or quantized.
        name (`str`): what it is called.
        console (`rich.console.Console`): where to print.
    """
    from .progress import TrainingProgress

    progress = TrainingProgress(name, console)
    # A Trainer makes its folder: one that is there.
    trainer = _trainer(prepared, model, Path(prepared.recipe.output), [progress])
    try:
        trainer.evaluate()
    finally:
        progress.stop()


def _trainer(prepared: Prepared, model: PreTrainedModel, folder: Path, callbacks: list[TrainerCallback]) -> Trainer:
    from transformers import PrinterCallback, ProgressCallback, Trainer

    from ..evaluation.tasks import CAUSAL

    recipe = prepared.recipe
    args, _ = training_arguments(recipe.training, str(folder), recipe.seed, recipe.source)
    if prepared.task.problem_type == CAUSAL:
        args.prediction_loss_only = True  # the logits of a whole text fit into no memory
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=prepared.encoded["train"],
        eval_dataset=prepared.encoded["validation"],
        processing_class=prepared.tokenizer,
        callbacks=callbacks,
        **prepared.trainer_options,
    )
    for shipped in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(shipped)
    return trainer


def _last_checkpoint(folder: Path, processes: PartialState, console: Console) -> Path | None:
    """Where a killed training goes on; checkpoints that were not written to their end are removed."""
    last, broken = last_whole_checkpoint(folder, processes.num_processes)
    processes.wait_for_everyone()  # all have looked before anything goes
    for path in broken:
        console.out(f"removed {path}: it was not written to its end", highlight=False)
        if processes.is_main_process:
            shutil.rmtree(path, ignore_errors=True)
    processes.wait_for_everyone()
    return last
