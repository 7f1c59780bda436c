"""`hf-quant schema`: what editors need to complete and check recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import OverwriteOption, require_new


def schema(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; the terminal.")] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Print the JSON Schema of recipes, by which editors complete and check them."""
    require_new([output], overwrite)
    from ..recipe.json_schema import schema_json

    if output is None:
        typer.echo(schema_json(), nl=False)
    else:
        output.write_text(schema_json(), encoding="utf-8")
        typer.echo(f"wrote {output}")
