"""A recipe carried out: train, convert, save, train the float twin, compare, report."""

from __future__ import annotations

import dataclasses
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..checkpoint import require_free_folder, save_quantized, whole_folder
from .checkpoints import remove_leftovers
from .post_training import load_trained, quantize_trained
from .prepare import Prepared, load_model, prepare
from .provenance import write_provenance
from .schema import Recipe
from .stopping import StopOnSignal, Stopped
from .train import evaluate, train
from .upload import upload

if TYPE_CHECKING:
    from ..evaluation.report import Comparison
    from ..evaluation.sweep_report import Sweep

RECIPE_FILE = "recipe.yaml"
_FREE = ("output", "hub")  # may differ between a run and its resumption
_MODELS = ("int8", "model", "float")
_MAX_WINDOWS = 4  # a batch: their logits are held, the vocabulary for each token


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Args:
        int8_model (`Path`): folder of the int8 model; of the float one where the recipe does not quantize.
        float_model (`Path` or `None`): folder of the float model that it was compared with.
        report (`Path` or `None`): the HTML report; the same lies beside it as JSON and Markdown.
        comparison ([`Comparison`], [`Sweep`] or `None`): the figures; a [`Sweep`] for language models.
    """

    int8_model: Path
    float_model: Path | None = None
    report: Path | None = None
    comparison: Comparison | Sweep | None = None


def run(recipe: Recipe, *, overwrite: bool = False, resume: bool = False, console: Console | None = None) -> RunResult:
    """Carries out a recipe.

    The output folder then holds `int8/` (the model, its tokenizer, the recipe and its provenance), or `model/` where
    the recipe does not quantize; `float/` (the twin, where the baseline is `train`, the teacher is the model itself,
    or `method: post_training` without pruning and distillation quantizes it), `checkpoints/`, `recipe.yaml`, and
    `report.json`, `report.md` and `report.html`; where the recipe prunes, `pruning.html`, the sparsity wanted and
    reached.

    SIGINT and SIGTERM end it with a checkpoint, see [`StopOnSignal`]. Started by torchrun or accelerate launch, all
    processes train, and the first one writes and prints.

    Args:
        recipe ([`Recipe`]): what to do.
        overwrite (`bool`, *optional*, defaults to `False`): whether to replace what an earlier run left there.
        resume (`bool`, *optional*, defaults to `False`):
            Whether to go on with an earlier run of the same recipe: finished models are kept, an unfinished
            training starts from its last checkpoint that is whole.
        console (`rich.console.Console`, *optional*): where to print.

    Returns:
        [`RunResult`]: the folders and the figures.

    Raises:
        [`RecipeError`]: if a file, column, label or model is not as the recipe says; nothing is written then.
        `FileExistsError`: if the output folder is not empty and neither `overwrite` nor `resume` is set.
        `ValueError`: if `resume` finds the run of another recipe.
        [`Stopped`]: a `SystemExit` with code 130 or 143, after a signal.
    """
    output = Path(recipe.output)
    with StopOnSignal() as stop:
        try:
            return _run(recipe, output, overwrite, resume, console, stop)
        except Stopped as stopped:
            if os.environ.get("RANK", "0") == "0":
                where = f" after step {stop.step}, with a checkpoint" if stop.step is not None else ""
                again = f"hf-quant run {output / RECIPE_FILE} --resume"
                how = f"go on with: {again}" if (output / RECIPE_FILE).is_file() else "nothing was written"
                (console or Console()).out(f"stopped by {stopped.signal}{where}; {how}", highlight=False)
            raise


def _run(
    recipe: Recipe, output: Path, overwrite: bool, resume: bool, console: Console | None, stop: StopOnSignal
) -> RunResult:
    from accelerate import PartialState

    if resume:
        _require_same_recipe(recipe, output)
    require_free_folder(output, overwrite or resume)
    prepared = prepare(recipe)
    processes = PartialState()  # that of the training arguments, which were made by now
    main = processes.is_main_process
    console = (console or Console()) if main else Console(quiet=True)
    console.out(f"training in {prepared.precision}", highlight=False)
    console.out(f"new weights, to be trained: {', '.join(prepared.new_weights) or 'none'}", highlight=False)

    processes.wait_for_everyone()  # all have looked at the folder before the first one writes
    if main:
        _begin(recipe, output, resume)
    processes.wait_for_everyone()

    how: dict[str, Any] = {"resume": resume, "console": console, "stop": stop}
    name = "int8" if recipe.quantization is not None else "model"
    folder = output / name
    before, *after = recipe.trainings()
    if before == "float":
        _train_float(prepared, **how)
    if resume and _finished(folder, recipe):
        console.out(f"kept the {name} model in {folder}" if name == "int8" else f"kept {folder}", highlight=False)
    elif recipe.trainings() == ["float"]:
        _quantize_float(prepared, folder, console)
    else:
        _train_compressed(prepared, folder, **how)
    if "float" in after:
        _train_float(prepared, **how)
    baseline = recipe.evaluation.baseline
    if baseline == "none" or not main:
        if main:
            upload(recipe, folder, console)
        return RunResult(folder)
    float_folder = output / "float" if baseline == "train" else Path(baseline)
    comparison = _compare(prepared, float_folder, folder)
    comparison.save(output)
    console.print(comparison)
    report = output / "report.html"
    console.out(f"report: {report}", highlight=False)
    upload(recipe, folder, console)
    return RunResult(folder, float_folder, report, comparison)


def _begin(recipe: Recipe, output: Path, resume: bool) -> None:
    """Leaves in the output folder what goes on from an earlier run, and the recipe."""
    if not resume:
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
        for name in _MODELS:  # what is there is no longer the result of a finished run
            (output / name / RECIPE_FILE).unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output, _MODELS)
    _write_recipe(output, recipe)


def _train_compressed(prepared: Prepared, folder: Path, **how: Any) -> None:
    """Trains, converts and saves the model that the recipe is about."""
    from accelerate import PartialState

    recipe, console = prepared.recipe, how["console"]
    callbacks: list[Any] = recipe.callbacks()
    if recipe.distillation is not None and recipe.distillation.teacher is None:
        callbacks[len(recipe.pruning)].teacher = str(Path(recipe.output) / "float")
    name = next(name for name in recipe.trainings() if name != "float")
    trainer = train(prepared, prepared.model, name, callbacks, **how)
    if recipe.quantizes_after_training:
        # Without autocast, which the Trainer puts around `forward` for bfloat16.
        quantize_trained(prepared, trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False), console)
    if PartialState().is_main_process:
        for path, callback in zip(pruning_pages(folder.parent, len(recipe.pruning)), callbacks, strict=False):
            callback.save_plot(path)
        if recipe.quantization is not None:
            save_quantized(trainer.model, folder, processing_class=prepared.tokenizer, overwrite=True)
        else:
            _save_float(trainer.model, folder, prepared)
    if recipe.evaluation.baseline == "none":  # print what a comparison would otherwise say
        if recipe.quantizes_after_training:
            evaluate(prepared, trainer.model, folder.name, console)
        else:
            trainer.evaluate()
    _finish(folder, recipe)
    said = f"saved the int8 model to {folder}" if recipe.quantization is not None else f"saved {folder}"
    console.out(said, highlight=False)


def _quantize_float(prepared: Prepared, folder: Path, console: Console) -> None:
    """Quantizes the float model that was trained and saved, and saves the result."""
    from accelerate import PartialState

    recipe = prepared.recipe
    model = load_trained(prepared, folder.parent / "float")
    quantize_trained(prepared, model, console)
    if PartialState().is_main_process:
        save_quantized(model, folder, processing_class=prepared.tokenizer, overwrite=True)
    if recipe.evaluation.baseline == "none":
        evaluate(prepared, model, folder.name, console)
    _finish(folder, recipe)
    console.out(f"saved the int8 model to {folder}", highlight=False)


def _train_float(prepared: Prepared, **how: Any) -> None:
    """Trains and saves the float twin, where that was not done before."""
    from accelerate import PartialState

    recipe, console = prepared.recipe, how["console"]
    folder = Path(recipe.output) / "float"
    if how["resume"] and _finished(folder, recipe):
        console.out(f"kept the float model in {folder}", highlight=False)
        return
    model, _ = load_model(recipe, prepared.task, prepared.config)
    model = train(prepared, model, "float", [], **how).model
    if PartialState().is_main_process:
        _save_float(model, folder, prepared)
    _finish(folder, recipe)
    console.out(f"saved the float model to {folder}", highlight=False)


def _save_float(model: Any, folder: Path, prepared: Prepared) -> None:
    with whole_folder(folder) as beside:
        model.save_pretrained(beside)
        prepared.tokenizer.save_pretrained(beside)


def _compare(prepared: Prepared, float_folder: Path, folder: Path) -> Comparison | Sweep:
    """The report: metrics of the validation data, or the perplexity of its texts."""
    from ..evaluation.compare import compare
    from ..evaluation.files import load_data
    from ..evaluation.sweep import compare_perplexity
    from ..evaluation.tasks import CAUSAL

    recipe, task = prepared.recipe, prepared.task
    shared: dict[str, Any] = {"max_samples": recipe.evaluation.max_samples}
    if task.problem_type == CAUSAL:
        texts = load_data(recipe.data.validation or "")[task.text_columns[0]][:]
        shared |= {"length": prepared.max_length, "batch_size": min(recipe.evaluation.batch_size, _MAX_WINDOWS)}
        return compare_perplexity(str(float_folder), str(folder), prepared.tokenizer, texts, **shared)
    return compare(
        str(float_folder),
        str(folder),
        task=task,
        data=_validation(recipe),
        processing_class=prepared.tokenizer,
        batch_size=recipe.evaluation.batch_size,
        max_length=prepared.max_length,
        **shared,
    )


def pruning_pages(output: Path, count: int) -> list[Path]:
    """Where the pictures of `count` pruning schedules go."""
    return [output / ("pruning.html" if count == 1 else f"pruning-{index + 1}.html") for index in range(count)]


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
    from accelerate import PartialState

    processes = PartialState()
    if processes.is_main_process:
        write_provenance(folder, recipe)
        _write_recipe(folder, recipe)
    processes.wait_for_everyone()


def _write_recipe(folder: Path, recipe: Recipe) -> None:
    """The recipe as a file that is there as a whole or not at all."""
    beside = folder / f".{RECIPE_FILE}"
    beside.write_text(recipe.to_yaml(), encoding="utf-8")
    os.replace(beside, folder / RECIPE_FILE)


def _finished(folder: Path, recipe: Recipe) -> bool:
    return (folder / RECIPE_FILE).is_file() and _same(Recipe.from_yaml(folder / RECIPE_FILE), recipe)


def _require_same_recipe(recipe: Recipe, output: Path) -> None:
    # A hidden file is what a run leaves that was killed while it wrote its first one.
    if not output.is_dir() or not any(not path.name.startswith(".") for path in output.iterdir()):
        return
    if not (output / RECIPE_FILE).is_file():
        raise ValueError(f"{output} holds no {RECIPE_FILE}, so there is no run to resume; choose another `output`")
    earlier = Recipe.from_yaml(output / RECIPE_FILE)
    if not _same(earlier, recipe):
        old, new = earlier.to_dict(), recipe.to_dict()
        changed = [key for key in new.keys() | old.keys() if key not in _FREE and old.get(key) != new.get(key)]
        raise ValueError(
            f"{output} holds the run of another recipe: {', '.join(f'`{key}`' for key in sorted(changed))} differ. "
            "Give the same recipe, another `output`, or --overwrite instead of --resume."
        )


def _same(one: Recipe, other: Recipe) -> bool:
    """Equal but for where the result goes: the folder may have been moved, and an upload refused."""
    return dataclasses.replace(one, **{key: getattr(other, key) for key in _FREE}) == other
