"""The command line: `hf-quant run`, `hf-quant quantize`, `hf-quant compare`.

Nothing heavy is imported until a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from .evaluation.tasks import Task

USER_ERROR = 2
TRACEBACK_VARIABLE = "HF_QUANT_TRACEBACK"

app = typer.Typer(
    name="hf-quant",
    help="Quantization inside the Hugging Face Trainer: small, fast, measured int8 models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output folder.")]
TaskOption = Annotated[str | None, typer.Option("--task", "-t", help="A GLUE task, such as mrpc.")]
DataDirOption = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Folder of <task>/validation.parquet; without it the data come from the hub."),
]
BatchSizeOption = Annotated[
    int | None, typer.Option("--batch-size", min=1, help="A batch: 32 examples, or 4 windows of --texts.")
]
MaxSamplesOption = Annotated[
    int | None, typer.Option("--max-samples", min=1, help="Examples or windows to draw; all of them.")
]
MaxLengthOption = Annotated[
    int | None, typer.Option("--max-length", min=1, help="Tokens at which examples are cut, or tokens a window.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the code an error arose.")] = False,
) -> None:
    if traceback:
        os.environ[TRACEBACK_VARIABLE] = "1"


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe (.yaml); recipes/README.md describes its keys.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write to, in the place of the recipe's `output`.")
    ] = None,
    overwrite: OverwriteOption = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an earlier run of the same recipe in the output folder.")
    ] = False,
) -> None:
    """Train, convert to int8, save, compare with float, report: as a recipe says."""
    import dataclasses

    from .recipe.schema import Recipe

    if overwrite and resume:
        raise ValueError("--overwrite starts anew and --resume goes on; give one of them.")
    parsed = Recipe.from_yaml(recipe)
    if output is not None:
        parsed = dataclasses.replace(parsed, output=str(output))
    _quiet()
    from .recipe.run import run as run_recipe

    run_recipe(parsed, overwrite=overwrite, resume=resume, console=_console())


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a float model.")],
    output: OutputOption,
    scheme: Annotated[str, typer.Option("--scheme", "-s", help="int8_dynamic or int8_weight_only.")] = "int8_dynamic",
    task: TaskOption = None,
    data_dir: DataDirOption = None,
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
    from .checkpoint import require_free_folder, save_quantized
    from .quantization.float_models import load_float
    from .quantization.post_training import quantize_dynamic
    from .schemes import get_scheme
    from .tables import selection_table
    from .targets import select_modules

    require_free_folder(output, overwrite)
    _find_task_data(task, data_dir)
    _quiet()
    chosen = get_scheme(scheme)
    float_model = load_float(model)
    selection = select_modules(float_model, targets, ignore, embeddings)
    int8 = quantize_dynamic(float_model, chosen, targets=targets, ignore=ignore, embeddings=embeddings, inplace=True)
    _console().print(selection_table(chosen, selection))
    save_quantized(int8, output, processing_class=_processing_class(model), overwrite=overwrite)
    typer.echo(f"saved the int8 model to {output}")
    if task is not None:
        from .evaluation.compare import compare as compare_models

        comparison = compare_models(model, str(output), task=task)
        comparison.save(output)
        _console().print(comparison)
        typer.echo(f"report: {output / 'report.html'}")


@app.command()
def compare(
    float_model: Annotated[str, typer.Argument(metavar="FLOAT", help="Folder or hub id of the float model.")],
    int8_model: Annotated[
        str | None, typer.Argument(metavar="INT8", help="Folder or hub id of the int8 model; or use --schemes.")
    ] = None,
    schemes: Annotated[
        str | None,
        typer.Option("--schemes", "-s", help="In place of INT8: make a model with each of these schemes (a,b,c)."),
    ] = None,
    task: TaskOption = None,
    data_dir: DataDirOption = None,
    data: Annotated[
        Path | None, typer.Option("--data", "-d", help="Labelled examples: .parquet, .csv, .tsv, .json or .jsonl.")
    ] = None,
    text_column: Annotated[
        list[str] | None, typer.Option("--text-column", help="With --data: column of text; twice for pairs.")
    ] = None,
    label_column: Annotated[str, typer.Option("--label-column", help="With --text-column: the labels.")] = "label",
    metric: Annotated[list[str] | None, typer.Option("--metric", help="In place of the task's; repeatable.")] = None,
    texts: Annotated[
        Path | None, typer.Option("--texts", help="For causal language models: .txt, or a table with a column text.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="With --schemes: texts or rows for static ranges.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Rows or windows to calibrate on.")] = 128,
    batch_size: BatchSizeOption = None,
    max_length: MaxLengthOption = None,
    max_samples: MaxSamplesOption = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the report as JSON.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Write the report as Markdown.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write the report as HTML, with plots.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for report.json, report.md and report.html.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace reports that are there.")] = False,
) -> None:
    """Measure an int8 model, or a model under several schemes, against float: quality with intervals, size, speed."""
    files = {"json": json, "markdown": markdown, "html": html}
    names = ("report.json", "report.md", "report.html")
    _require_new([*files.values(), *(output / name for name in names if output)], overwrite)
    if (int8_model is None) is (schemes is None):
        raise ValueError(
            "Give the INT8 model to measure, or --schemes to make models with, such as "
            "--schemes int8_dynamic,int4_weight_only" + ("." if schemes is None else "; not both.")
        )
    if texts and (task or data or text_column or data_dir or metric):
        raise ValueError(
            "--texts measures the perplexity of a causal language model; leave out --task, --data, --data-dir, "
            "--text-column and --metric."
        )
    if calibration and not schemes:
        raise ValueError("--calibration is for models that are made here; it needs --schemes.")
    if text_column and (task or not data):
        raise ValueError("--text-column names columns of --data; it needs --data and no --task.")
    if data_dir and data:
        raise ValueError("--data-dir is where the files of --task lie; with --data, leave it out.")
    _find_task_data(None if data else task, data_dir)
    _quiet()
    shared: dict[str, Any] = {"batch_size": batch_size, "max_samples": max_samples}
    if texts is None:
        chosen = _own_task(float_model, text_column, label_column) if text_column else task
        shared |= {"task": chosen, "data": data, "metrics": metric}
    comparison = _compared(float_model, int8_model, schemes, texts, calibration, samples, max_length, shared)
    for kind, path in files.items():
        if path is not None:
            getattr(comparison, f"to_{kind}")(path)
    _console().print(comparison)
    if output is not None:
        comparison.save(output)
        typer.echo(f"report: {output / 'report.html'}")


def _compared(
    float_model: str,
    int8_model: str | None,
    schemes: str | None,
    texts: Path | None,
    calibration: Path | None,
    samples: int,
    max_length: int | None,
    shared: dict[str, Any],
) -> Any:
    """The report that the arguments of `compare` ask for."""
    from .evaluation.tasks import load_data
    from .evaluation.windows import read_texts

    if int8_model is not None and texts is None:
        from .evaluation.compare import compare as compare_models

        batch_size = shared.pop("batch_size") or 32
        return compare_models(float_model, int8_model, batch_size=batch_size, max_length=max_length, **shared)
    from .evaluation.sweep import compare_perplexity, compare_schemes

    if int8_model is not None and texts is not None:
        return compare_perplexity(float_model, int8_model, None, read_texts(texts), length=max_length, **shared)
    given: Any = None
    if calibration is not None and (texts is not None or calibration.suffix.lower() == ".txt"):
        given = read_texts(calibration)
        if texts is None:
            given = [line for line in given[0].splitlines() if line.strip()]
    elif calibration is not None:
        given = load_data(calibration)
    return compare_schemes(
        float_model,
        [name.strip() for name in (schemes or "").split(",") if name.strip()],
        texts=None if texts is None else read_texts(texts),
        calibration=given,
        samples=samples,
        max_length=max_length,
        **shared,
    )


def _console() -> Console:
    """Standard output; as wide as a report's tables want where that is no terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 100)
    return console


def _quiet() -> None:
    """Only errors from transformers and datasets: a new head and the like are this program's own to report."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _find_task_data(task: str | None, data_dir: Path | None) -> None:
    """Makes sure that a task's data are to be had, before any work; `data_dir` holds for the whole command."""
    from .evaluation.tasks import GLUE_DIR_VARIABLE, get_task, load_task_data

    if data_dir is not None:
        if task is None:
            raise ValueError("--data-dir is where the files of a task lie; name the task with --task.")
        os.environ[GLUE_DIR_VARIABLE] = str(data_dir)
    if task is not None:
        for split in get_task(task).splits:
            load_task_data(task, split)


def _own_task(model: str, text_columns: list[str], label_column: str) -> Task:
    """A task for the columns that the user named, with the labels that the model has."""
    from transformers import AutoConfig

    from .evaluation.tasks import CLASSIFICATION, REGRESSION, Task

    labels = AutoConfig.from_pretrained(model).num_labels
    kind = REGRESSION if labels == 1 else CLASSIFICATION
    return Task("data", tuple(text_columns), label_column, problem_type=kind, num_labels=labels)


def _processing_class(model: str) -> Any:
    """The tokenizer or processor that lies with a model, to be saved along; `None` where there is none."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor

    from .texts import find_tokenizer

    # Only where such a file lies there: without one, AutoProcessor makes up a tokenizer that knows no word.
    if any((Path(model) / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        for kind in (AutoProcessor, AutoImageProcessor, AutoFeatureExtractor):
            try:
                return kind.from_pretrained(model)
            except (OSError, ValueError, TypeError, ImportError):
                continue  # the folder holds another kind
    try:
        return find_tokenizer(None, [model])
    except ValueError:
        typer.echo(f"{model} has no tokenizer or processor beside it; none is saved", err=True)
        return None


def _require_new(paths: list[Path | None], overwrite: bool) -> None:
    there = [str(path) for path in paths if path is not None and path.exists()]
    if there and not overwrite:
        raise FileExistsError(f"{', '.join(there)} exists already. Choose another path, or pass --overwrite.")


def main() -> None:
    """Runs the command line; a user's mistake ends in one message and exit code 2."""
    try:
        app()
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        message = str(error)
        typer.echo(f"error: {message}" if "\n" not in message else f"errors:\n{message}", err=True)
        typer.echo("(hf-quant --traceback ... shows where in the code)", err=True)
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()
