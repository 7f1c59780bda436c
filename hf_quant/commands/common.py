"""What the commands share: options, the console, and checks that come before any work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ..evaluation.tasks import Task

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


def console() -> Console:
    """Standard output; as wide as a report's tables want where that is no terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 100)
    return console


def quiet() -> None:
    """Only errors from transformers and datasets: a new head and the like are this program's own to report."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def find_task_data(task: str | None, data_dir: Path | None) -> None:
    """Makes sure that a task's data are to be had, before any work; `data_dir` holds for the whole command."""
    from ..evaluation.tasks import GLUE_DIR_VARIABLE, get_task, load_task_data

    if data_dir is not None:
        if task is None:
            raise ValueError("--data-dir is where the files of a task lie; name the task with --task.")
        os.environ[GLUE_DIR_VARIABLE] = str(data_dir)
    if task is not None:
        for split in get_task(task).splits:
            load_task_data(task, split)


def own_task(model: str, text_columns: list[str], label_column: str) -> Task:
    """A task for the columns that the user named, with the labels that the model has."""
    from transformers import AutoConfig

    from ..evaluation.tasks import CLASSIFICATION, REGRESSION, Task

    labels = AutoConfig.from_pretrained(model).num_labels
    kind = REGRESSION if labels == 1 else CLASSIFICATION
    return Task("data", tuple(text_columns), label_column, problem_type=kind, num_labels=labels)


def processing_class(model: str) -> Any:
    """The tokenizer or processor that lies with a model, to be saved along; `None` where there is none."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor

    from ..texts import find_tokenizer

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


def require_new(paths: list[Path | None], overwrite: bool) -> None:
    """Refuse to replace files unless `overwrite`."""
    there = [str(path) for path in paths if path is not None and path.exists()]
    if there and not overwrite:
        raise FileExistsError(f"{', '.join(there)} exists already. Choose another path, or pass --overwrite.")


def read_calibration(path: Path | None, whole: bool) -> Any:
    """Calibration data from a file.

    Args:
        path (`Path`, *optional*): a `.txt` of texts, one a line, or a table as `--data` takes.
        whole (`bool`): whether the file is one long text, as language models read it.
    """
    from ..evaluation.tasks import load_data
    from ..evaluation.windows import read_texts

    if path is None:
        return None
    if whole:
        return read_texts(path)
    if path.suffix.lower() == ".txt":
        return [line for line in read_texts(path)[0].splitlines() if line.strip()]
    return load_data(path)
