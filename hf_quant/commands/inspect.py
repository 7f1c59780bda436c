"""`hf-quant inspect`: what lies in a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import OverwriteOption, console, require_new


def inspect(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A local model folder, float or quantized.")],
    json: Annotated[Path | None, typer.Option("--json", help="Write everything as JSON, module by module.")] = None,
    modules: Annotated[bool, typer.Option("--modules", help="A row for every module, not for each family.")] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Also the kernels of each shape on this CPU, measured where not known.")
    ] = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Show scheme, zeros and size of every weight in a model folder, without building the model."""
    require_new([json], overwrite)
    from ..inspection import TEXT_WIDTH, inspect_folder

    found = inspect_folder(folder, kernels)
    if json is not None:
        found.to_json(json)
    output = console()
    if not output.is_terminal:
        output.width = max(output.width, TEXT_WIDTH)
    output.print(found.table(every_module=modules))
