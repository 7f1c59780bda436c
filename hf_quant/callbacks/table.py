"""The table that says what was quantized, what was left, and why."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING

from ..quantization.convert import Conversion

if TYPE_CHECKING:
    from rich.table import Table


def conversion_table(conversion: Conversion) -> Table:
    """One row for each family of layers that differ only by their number: `encoder.layer.*.output.dense`."""
    from rich.table import Table

    table = Table(title=f"Converted to {conversion.scheme.name}", title_justify="left")
    table.add_column("module")
    table.add_column("count", justify="right")
    table.add_column("became")
    table.add_column("weight SQNR, dB", justify="right")
    table.add_column("parity, dB", justify="right")
    families: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, kind in conversion.quantized.items():
        became = f"int8 {kind}" + ("" if kind == "embedding" else f", {_activations(conversion)}")
        families[_pattern(name), became].append(name)
    for name, reason in conversion.left.items():
        families[_pattern(name), f"float: {reason}"].append(name)
    for (pattern, became), names in families.items():
        table.add_row(
            pattern,
            str(len(names)),
            became,
            _least(conversion.error_sqnr, names),
            _least(conversion.layer_sqnr, names),
        )
    if conversion.logits_sqnr is not None:
        table.caption = f"Model output, int8 against fake-quant: {conversion.logits_sqnr:.0f} dB"
    return table


def print_table(table: Table) -> None:
    """Print to standard output; as wide as the table wants where that is no terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 140)
    console.print(table)


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _activations(conversion: Conversion) -> str:
    return {"static": "static inputs", "dynamic": "dynamic inputs", None: "float inputs"}[
        conversion.scheme.activations
    ]


def _least(values: dict[str, float], names: list[str]) -> str:
    known = [values[name] for name in names if name in values]
    return f"{min(known):.1f}" if known else "-"
