"""`hf-quant quantize`: a trained model, without training it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import (
    DataDirOption,
    OutputOption,
    OverwriteOption,
    TaskOption,
    console,
    find_task_data,
    processing_class,
    quiet,
    read_calibration,
)


def quantize(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a float model.")],
    output: OutputOption,
    scheme: Annotated[
        str, typer.Option("--scheme", "-s", help="int8_dynamic, int8_static, int4_weight_only, int4_dynamic ...")
    ] = "int8_dynamic",
    task: TaskOption = None,
    data_dir: DataDirOption = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="Texts or rows to calibrate on; --task's train split if none.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Texts or rows to calibrate on.")] = 128,
    observer: Annotated[
        str, typer.Option("--observer", help="Static ranges: minmax, ema, percentile, mse or entropy.")
    ] = "minmax",
    rounding: Annotated[str, typer.Option("--rounding", help="Of weights: nearest, mse or gptq.")] = "nearest",
    equalize: Annotated[str | None, typer.Option("--equalize", help="smoothquant or awq.")] = None,
    correct_bias: Annotated[bool, typer.Option("--correct-bias", help="Biases make up for the mean error.")] = False,
    max_drop: Annotated[
        float | None,
        typer.Option("--max-drop", help="Put layers back into float until --task's metric loses no more, e.g. 0.01."),
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", help="With --max-drop: which; the task's headline.")
    ] = None,
    relative: Annotated[bool, typer.Option("--relative", help="--max-drop is a share of the float metric.")] = False,
    override: Annotated[
        list[str] | None, typer.Option("--override", help="PATTERN=SCHEME, or PATTERN=float; may be repeated.")
    ] = None,
    targets: Annotated[
        list[str] | None, typer.Option("--targets", help="Pattern of modules to quantize; may be repeated.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", help="Pattern of modules to leave in float; may be repeated.")
    ] = None,
    embeddings: Annotated[bool, typer.Option(help="Whether embeddings become int8 too.")] = True,
    overwrite: OverwriteOption = False,
) -> None:
    """Quantize a trained model without training it, and save it; with --task, compare it with the float model."""
    from ..checkpoint import require_free_folder, save_quantized
    from ..quantization.calibration import Calibration
    from ..quantization.float_models import load_float
    from ..quantization.post_training import quantize as quantize_model
    from ..runtime.base import quantized_modules
    from ..schemes import get_scheme
    from ..tables import selection_table
    from ..targets import Selection, select_modules

    require_free_folder(output, overwrite)
    if max_drop is not None and task is None:
        raise ValueError("--max-drop holds the metric of a task; name the task with --task.")
    if (metric or relative) and max_drop is None:
        raise ValueError("--metric and --relative say what --max-drop means; give --max-drop.")
    find_task_data(task, data_dir)
    quiet()
    chosen = get_scheme(scheme)
    options: dict[str, Any] = {"targets": targets, "ignore": ignore, "embeddings": embeddings}
    options["overrides"] = _overrides(override)
    float_model = load_float(model)
    selection = select_modules(float_model, targets, ignore, embeddings, chosen, options["overrides"])
    data = read_calibration(calibration, whole=False)
    wanted = [chosen, *selection.schemes.values()]
    needed = rounding == "gptq" or equalize or correct_bias or any(one.activations == "static" for one in wanted)
    if data is None and task is not None and needed:
        data = _train_texts(task, samples)
    if data is not None:
        options["calibration"] = Calibration(data, samples, processing_class=processing_class(model))
    if max_drop is not None and task is not None:
        from ..evaluation.evaluator import task_evaluator
        from ..evaluation.tasks import get_task

        options |= {"max_drop": max_drop, "relative": relative, "metric": metric or get_task(task).headline}
        options["evaluate"] = task_evaluator(float_model, task)
    quantized = quantize_model(
        float_model,
        chosen,
        observer=observer,
        rounding=rounding,  # type: ignore[arg-type]
        equalize=equalize,  # type: ignore[arg-type]
        correct_bias=correct_bias,
        inplace=max_drop is None,
        **options,
    )
    now = quantized_modules(quantized)
    back = {name: "back in float" for name in selection.quantized if name not in now}
    kinds = {name: kind for name, kind in selection.quantized.items() if name in now}
    console().print(selection_table(chosen, Selection(kinds, {**selection.left, **back}, selection.schemes)))
    save_quantized(quantized, output, processing_class=processing_class(model), overwrite=overwrite)
    typer.echo(f"saved the {chosen.name} model to {output}")
    if max_drop is not None:
        from ..evaluation.guard_pages import guard_html, guard_markdown

        (output / "guard.md").write_text(guard_markdown(quantized.guard_result), encoding="utf-8")
        (output / "guard.html").write_text(guard_html(quantized.guard_result), encoding="utf-8")
        typer.echo(f"what each layer costs: {output / 'guard.html'}")
    if task is not None:
        from ..evaluation.compare import compare as compare_models

        comparison = compare_models(model, str(output), task=task)
        comparison.save(output)
        console().print(comparison)
        typer.echo(f"report: {output / 'report.html'}")


def _overrides(given: list[str] | None) -> dict[str, str | None] | None:
    result: dict[str, str | None] = {}
    for one in given or ():
        pattern, equals, scheme = one.partition("=")
        if not (pattern and equals and scheme):
            raise ValueError(f"--override {one!r} is not PATTERN=SCHEME. Write, for example, '*.query=int8_dynamic'.")
        result[pattern] = None if scheme == "float" else scheme
    return result or None


def _train_texts(task: str, samples: int) -> Any:
    """Rows of the task's train split, drawn with a fixed seed: texts without their labels."""
    from ..evaluation.tasks import get_task, load_task_data

    try:
        train = load_task_data(task, "train")
    except OSError as error:
        raise ValueError(
            f"calibration needs data, and no train split of {task!r} was found ({error}). Pass --calibration."
        ) from error
    return (
        train.select_columns(list(get_task(task).text_columns)).shuffle(seed=0).select(range(min(samples, len(train))))
    )
