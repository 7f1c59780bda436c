"""The command line: `hf-quant run`, `quantize`, `compare`, `inspect`, `schema`.

Nothing heavy is imported until a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from .commands.common import OverwriteOption, console, quiet
from .commands.compare import compare
from .commands.inspect import inspect
from .commands.migrate import migrate
from .commands.plan import plan
from .commands.quantize import quantize
from .commands.schema import schema

USER_ERROR = 2
TRACEBACK_VARIABLE = "HF_QUANT_TRACEBACK"

app = typer.Typer(
    name="hf-quant",
    help="Quantization inside the Hugging Face Trainer: small, fast, measured int8 models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="KEY=VALUE in the place of the recipe's, as training.learning_rate=3e-5; repeatable."
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an earlier run of the same recipe in the output folder.")
    ] = False,
) -> None:
    """Train, prune, distil, convert to int8, save, compare with float, report: as a recipe says."""
    import dataclasses

    from .recipe.resolve import parse_settings
    from .recipe.schema import Recipe

    if overwrite and resume:
        raise ValueError("--overwrite starts anew and --resume goes on; give one of them.")
    parsed = Recipe.from_yaml(recipe, parse_settings(settings or ()))
    if output is not None:
        parsed = dataclasses.replace(parsed, output=str(output))
    quiet()
    from .recipe.run import run as run_recipe

    run_recipe(parsed, overwrite=overwrite, resume=resume, console=console())


app.command()(plan)
app.command()(quantize)
app.command()(compare)
app.command()(inspect)
app.command()(migrate)
app.command()(schema)


def main() -> None:
    """Runs the command line; a user's mistake ends in one message and exit code 2."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        message = str(error)
        typer.echo(f"error: {message}" if "\n" not in message else f"errors:\n{message}", err=True)
        typer.echo("(hf-quant --traceback ... shows where in the code)", err=True)
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()
