"""`hf-quant compare`: an int8 model, or a model under several schemes, against float."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import (
    BatchSizeOption,
    DataDirOption,
    MaxLengthOption,
    MaxSamplesOption,
    TaskOption,
    console,
    find_task_data,
    own_task,
    quiet,
    read_calibration,
    require_new,
)


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
    require_new([*files.values(), *(output / name for name in names if output)], overwrite)
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
    find_task_data(None if data else task, data_dir)
    quiet()
    shared: dict[str, Any] = {"batch_size": batch_size, "max_samples": max_samples}
    if texts is None:
        chosen = own_task(float_model, text_column, label_column) if text_column else task
        shared |= {"task": chosen, "data": data, "metrics": metric}
    comparison = _compared(float_model, int8_model, schemes, texts, calibration, samples, max_length, shared)
    for kind, path in files.items():
        if path is not None:
            getattr(comparison, f"to_{kind}")(path)
    console().print(comparison)
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
    from ..evaluation.windows import read_texts

    if int8_model is not None and texts is None:
        from ..evaluation.compare import compare as compare_models

        batch_size = shared.pop("batch_size") or 32
        return compare_models(float_model, int8_model, batch_size=batch_size, max_length=max_length, **shared)
    from ..evaluation.sweep import compare_perplexity, compare_schemes

    if int8_model is not None and texts is not None:
        return compare_perplexity(float_model, int8_model, None, read_texts(texts), length=max_length, **shared)
    return compare_schemes(
        float_model,
        [name.strip() for name in (schemes or "").split(",") if name.strip()],
        texts=None if texts is None else read_texts(texts),
        calibration=read_calibration(calibration, whole=texts is not None),
        samples=samples,
        max_length=max_length,
        **shared,
    )
