"""The tables that say what became of each layer."""

from __future__ import annotations

from rich.console import Console

from hf_quant.quantization.convert import Conversion
from hf_quant.schemes import get_scheme
from hf_quant.tables import conversion_table, selection_line, selection_table
from hf_quant.targets import Selection

SELECTION = Selection(
    {"embed": "embedding", "layers.0.up": "linear", "layers.1.up": "linear", "layers.10.conv": "conv1d"},
    {"layers.0.gate": "ignored", "layers.1.gate": "ignored", "head": "head"},
)


def rows(table: object) -> list[list[str]]:
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(table)
    lines = [line for line in capture.get().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_layers_that_differ_by_their_number_share_a_row() -> None:
    assert rows(selection_table(get_scheme("int8_static"), SELECTION)) == [
        ["embed", "1", "int8 embedding"],
        ["layers.*.up", "2", "int8 linear, static inputs"],
        ["layers.*.conv", "1", "int8 conv1d, static inputs"],
        ["layers.*.gate", "2", "float: ignored"],
        ["head", "1", "float: head"],
    ]


def test_a_conversion_shows_the_worst_of_each_row() -> None:
    conversion = Conversion(
        get_scheme("int8_weight_only"),
        SELECTION.quantized,
        SELECTION.left,
        layer_sqnr={"layers.0.up": 130.26, "layers.1.up": 120.0},
        logits_sqnr=57.4,
        error_sqnr={"layers.0.up": 40.0, "layers.1.up": 41.0},
    )
    table = conversion_table(conversion)
    assert ["layers.*.up", "2", "int8 linear, float inputs", "40.0", "120.0"] in rows(table)
    assert ["head", "1", "float: head", "-", "-"] in rows(table)
    assert "57 dB" in str(table.caption)


def test_one_line_names_what_stays_in_float_and_why() -> None:
    line = selection_line(get_scheme("int8_dynamic"), SELECTION)
    assert line == ("int8_dynamic: 1 embedding, 2 linear, 1 conv1d; in float: layers.*.gate (ignored), head (head)")
    assert selection_line(get_scheme("int8_dynamic"), Selection({"a": "linear"}, {})).endswith("in float: none")
