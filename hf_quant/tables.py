"""Tables that say what was quantized, what was left, and why."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .schemes import Scheme

if TYPE_CHECKING:
    from rich.table import Table

    from .quantization.convert import Conversion
    from .targets import Kind, Selection


def conversion_table(conversion: Conversion) -> Table:
    """What a conversion did, with its proof: one row for each family of layers that differ only by their number."""
    table = _table(f"Converted to {conversion.scheme.name}")
    table.add_column("weight SQNR, dB", justify="right")
    table.add_column("parity, dB", justify="right")
    for row, names in _families(conversion.scheme, conversion.quantized, conversion.left, conversion.schemes):
        table.add_row(*row, _least(conversion.error_sqnr, names), _least(conversion.layer_sqnr, names))
    if conversion.logits_sqnr is not None:
        table.caption = f"Model output, int8 against fake-quant: {conversion.logits_sqnr:.0f} dB"
    return table


def selection_table(scheme: Scheme, selection: Selection) -> Table:
    """What a selection of modules becomes: one row for each family of layers that differ only by their number."""
    table = _table(f"Quantized to {scheme.name}")
    for row, _ in _families(scheme, selection.quantized, selection.left, selection.schemes):
        table.add_row(*row)
    return table


def selection_line(scheme: Scheme, selection: Selection) -> str:
    """The same in one line: how many modules of each kind, and what stays in float."""
    kinds = list(selection.quantized.values())
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("embedding", "linear", "conv1d") if kind in kinds)
    left: dict[str, None] = {f"{_pattern(name)} ({reason})": None for name, reason in selection.left.items()}
    return f"{scheme.name}: {counts}; in float: {', '.join(left) or 'none'}"


def print_table(table: Table) -> None:
    """Print to standard output; as wide as the table wants where that is no terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 140)
    console.print(table)


def _table(title: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("module")
    table.add_column("count", justify="right")
    table.add_column("became")
    return table


def _families(
    scheme: Scheme, quantized: Mapping[str, Kind], left: Mapping[str, str], schemes: Mapping[str, Scheme]
) -> list[tuple[tuple[str, str, str], list[str]]]:
    families: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, kind in quantized.items():
        own = schemes.get(name, scheme)
        became = f"int{own.bits} {kind}, {own.activations or 'float'} inputs"
        families[_pattern(name), "int8 embedding" if kind == "embedding" else became].append(name)
    for name, reason in left.items():
        families[_pattern(name), f"float: {reason}"].append(name)
    return [((pattern, str(len(names)), became), names) for (pattern, became), names in families.items()]


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _least(values: Mapping[str, float], names: list[str]) -> str:
    known = [values[name] for name in names if name in values]
    return f"{min(known):.1f}" if known else "-"
