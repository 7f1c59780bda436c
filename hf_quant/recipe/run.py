"""A recipe carried out: train, convert, save, train the float twin, compare, report."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ..checkpoint import require_free_folder, save_quantized, whole_folder
from .prepare import Prepared, load_model, prepare
from .schema import Recipe
from .training import training_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer, TrainerCallback

    from ..evaluation.report import Comparison

RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Args:
        int8_model (`Path`): folder of the int8 model.
        float_model (`Path` or `None`): folder of the float model that it was compared with.
        report (`Path` or `None`): the HTML report; the same lies beside it as JSON and Markdown.
        comparison ([`Comparison`] or `None`): the figures.
    """

    int8_model: Path
    float_model: Path | None = None
    report: Path | None = None
    comparison: Comparison | None = None


def run(recipe: Recipe, *, overwrite: bool = False, resume: bool = False, console: Console | None = None) -> RunResult:
    """Carries out a recipe.

    The output folder then holds `int8/` (the model, its tokenizer and the recipe), `float/` (the twin, where the
    baseline is `train`), `checkpoints/`, `recipe.yaml`, and `report.json`, `report.md` and `report.html`; where the
    recipe prunes, `pruning.html`, the sparsity wanted and reached.

    Args:
        recipe ([`Recipe`]): what to do.
        overwrite (`bool`, *optional*, defaults to `False`): whether to replace what an earlier run left there.
        resume (`bool`, *optional*, defaults to `False`):
            Whether to go on with an earlier run of the same recipe: finished models are kept, an unfinished
            training starts from its last checkpoint.
        console (`rich.console.Console`, *optional*): where to print.

    Returns:
        [`RunResult`]: the folders and the figures.

    Raises:
        [`RecipeError`]: if a file, column, label or model is not as the recipe says; nothing is written then.
        `FileExistsError`: if the output folder is not empty and neither `overwrite` nor `resume` is set.
        `ValueError`: if `resume` finds the run of another recipe.
    """
    console = console or Console()
    output = Path(recipe.output)
    if resume:
        _require_same_recipe(recipe, output)
    require_free_folder(output, overwrite or resume)
    prepared = prepare(recipe)
    console.out(f"training in {prepared.precision}", highlight=False)
    console.out(f"new weights, to be trained: {', '.join(prepared.new_weights) or 'none'}", highlight=False)

    if not resume:
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    (output / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")

    int8 = output / "int8"
    if resume and _finished(int8, recipe):
        console.out(f"kept the int8 model in {int8}", highlight=False)
    else:
        callbacks = recipe.callbacks()
        trainer = _train(prepared, prepared.model, "int8", callbacks, resume, console)
        for path, callback in zip(pruning_pages(output, len(recipe.pruning)), callbacks, strict=False):
            callback.save_plot(path)
        save_quantized(trainer.model, int8, processing_class=prepared.tokenizer, overwrite=True)
        if recipe.evaluation.baseline == "none":
            trainer.evaluate()  # prints what a comparison would otherwise say
        _finish(int8, recipe)
        console.out(f"saved the int8 model to {int8}", highlight=False)
    baseline = _baseline(prepared, resume, console)
    if baseline is None:
        return RunResult(int8)

    from ..evaluation.compare import compare

    comparison = compare(
        str(baseline),
        str(int8),
        task=prepared.task,
        data=_validation(recipe),
        processing_class=prepared.tokenizer,
        batch_size=recipe.evaluation.batch_size,
        max_length=prepared.max_length,
        max_samples=recipe.evaluation.max_samples,
    )
    comparison.save(output)
    console.print(comparison)
    report = output / "report.html"
    console.out(f"report: {report}", highlight=False)
    return RunResult(int8, baseline, report, comparison)


def pruning_pages(output: Path, count: int) -> list[Path]:
    """Where the pictures of `count` pruning schedules go."""
    return [output / ("pruning.html" if count == 1 else f"pruning-{index + 1}.html") for index in range(count)]


def _baseline(prepared: Prepared, resume: bool, console: Console) -> Path | None:
    """The folder of the float model to compare with, trained where the recipe says so."""
    recipe = prepared.recipe
    if recipe.evaluation.baseline == "none":
        return None
    if recipe.evaluation.baseline != "train":
        return Path(recipe.evaluation.baseline)
    folder = Path(recipe.output) / "float"
    if resume and _finished(folder, recipe):
        console.out(f"kept the float model in {folder}", highlight=False)
        return folder
    model, _ = load_model(recipe, prepared.config)
    model = _train(prepared, model, "float", [], resume, console).model
    with whole_folder(folder) as beside:
        model.save_pretrained(beside)
        prepared.tokenizer.save_pretrained(beside)
    _finish(folder, recipe)
    console.out(f"saved the float model to {folder}", highlight=False)
    return folder


def _train(
    prepared: Prepared,
    model: PreTrainedModel,
    name: str,
    callbacks: list[TrainerCallback],
    resume: bool,
    console: Console,
) -> Trainer:
    """Trains a model; the callbacks are all in which the int8 model's training differs from the float twin's."""
    from transformers import DataCollatorWithPadding, PrinterCallback, ProgressCallback, Trainer, set_seed
    from transformers.trainer_utils import get_last_checkpoint

    from ..evaluation.metrics import trainer_metrics
    from .progress import TrainingProgress

    recipe = prepared.recipe
    checkpoints = Path(recipe.output) / "checkpoints" / name
    args, _ = training_arguments(recipe.training, str(checkpoints), recipe.seed, recipe.source)
    progress = TrainingProgress(name, console)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=prepared.encoded["train"],
        eval_dataset=prepared.encoded["validation"],
        processing_class=prepared.tokenizer,
        data_collator=DataCollatorWithPadding(prepared.tokenizer),
        compute_metrics=trainer_metrics(prepared.task),
        callbacks=[*callbacks, progress],
    )
    for shipped in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(shipped)
    console.out(f"training {name} on {len(prepared.encoded['train']):,} examples", highlight=False)
    # Preparing a model for QAT may have drawn random numbers; the twin has to draw the same ones from here on.
    set_seed(recipe.seed)
    last = get_last_checkpoint(str(checkpoints)) if resume and checkpoints.is_dir() else None
    if last:
        console.out(f"resuming from {last}", highlight=False)
    try:
        trainer.train(resume_from_checkpoint=last)
    finally:
        progress.stop()
    return trainer


def _validation(recipe: Recipe) -> str | None:
    """The file that `compare` measures on; `None`: the task's own data from the hub."""
    if not recipe.task:
        return recipe.data.validation
    if not recipe.data.data_dir:
        return None
    split = recipe.to_task().splits[0]
    return str(Path(recipe.data.data_dir) / recipe.task / f"{split}.parquet")


def _finish(folder: Path, recipe: Recipe) -> None:
    """Puts the recipe beside the weights: the last file that is written, so it also says that the rest is there."""
    (folder / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")


def _finished(folder: Path, recipe: Recipe) -> bool:
    return (folder / RECIPE_FILE).is_file() and _same(Recipe.from_yaml(folder / RECIPE_FILE), recipe)


def _require_same_recipe(recipe: Recipe, output: Path) -> None:
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not (output / RECIPE_FILE).is_file():
        raise ValueError(f"{output} holds no {RECIPE_FILE}, so there is no run to resume; choose another `output`")
    earlier = Recipe.from_yaml(output / RECIPE_FILE)
    if not _same(earlier, recipe):
        old, new = earlier.to_dict(), recipe.to_dict()
        changed = [key for key in new.keys() | old.keys() if key != "output" and old.get(key) != new.get(key)]
        raise ValueError(
            f"{output} holds the run of another recipe: {', '.join(f'`{key}`' for key in sorted(changed))} differ. "
            "Give the same recipe, another `output`, or --overwrite instead of --resume."
        )


def _same(one: Recipe, other: Recipe) -> bool:
    """Equal but for the folder, which may have been moved."""
    return dataclasses.replace(one, output=other.output) == other
