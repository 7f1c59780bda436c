"""`hf-quant plan`: what a recipe is going to do, and what in it does not go together."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from .common import OverwriteOption, console, quiet, require_new


def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe (.yaml); recipes/README.md describes its keys.")],
    html: Annotated[Path | None, typer.Option("--html", help="Write the plan as a page with a picture.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the plan as JSON.")] = None,
    measured: Annotated[
        bool, typer.Option("--measure", help="Train a few steps of each phase, and throw them away, for the time.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="KEY=VALUE in the place of the recipe's, as training.learning_rate=3e-5; repeatable."
        ),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Show steps, phases, size and conflicts of a recipe, without training and without loading weights."""
    from ..recipe.resolve import parse_settings
    from ..recipe.schema import Recipe

    require_new([html, json], overwrite)
    parsed = Recipe.from_yaml(recipe, parse_settings(settings or ()))
    quiet()
    from ..planning.plan import make_plan

    made = make_plan(parsed)
    if measured and not made.has_errors:
        from ..planning.measure import measure

        made = dataclasses.replace(made, timing=measure(made))
    if html is not None:
        made.to_html(html)
    if json is not None:
        made.to_json(json)
    output = console()
    if not output.is_terminal:
        output.width = max(output.width, 140)
    output.print(made)
    if made.has_errors:
        raise typer.Exit(2)
