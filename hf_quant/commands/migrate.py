"""`hf-quant migrate`: a configuration of another project as a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import OverwriteOption, console, require_new

_WIDTH = 160


def migrate(
    file: Annotated[
        Path,
        typer.Argument(help="A SparseML recipe, a Neural Compressor or NNCF configuration, or Python with torch.ao."),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The recipe to write; without it, it is printed.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Folder or hub id of the float model.")] = None,
    task: Annotated[str | None, typer.Option("--task", "-t", help="A GLUE task, such as mrpc.")] = None,
    epochs: Annotated[
        float | None,
        typer.Option("--epochs", help="Of the whole training, where the file does not say or says other."),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Make a recipe of another project's configuration, and list what has no equivalent. Nothing in FILE is run."""
    from rich.console import Console

    from ..migration import migrate as migrate_file

    if output is not None and output.exists() and file.exists() and output.samefile(file):
        raise ValueError(f"{output} is the file to be read. Write the recipe to another path.")
    require_new([output], overwrite)
    made = migrate_file(file, model=model, task=task, epochs=epochs)
    # With --output the table is the result; without it the recipe is, and may go into a pipe.
    shown = console() if output is not None else Console(stderr=True)
    if not shown.is_terminal:
        shown.width = max(shown.width, _WIDTH)
    shown.print(made.table())
    if made.missing:
        shown.out(f"warning: {len(made.missing)} without an equivalent; the recipe lists them too", highlight=False)
    if output is None:
        typer.echo(made.text, nl=False)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(made.text, encoding="utf-8")
    shown.out(f"recipe: {output}", highlight=False)
