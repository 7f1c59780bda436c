"""The report over schemes and the guard's pages: figures, words, plots, and every format."""

from __future__ import annotations

import itertools
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_quant.evaluation import plots
from hf_quant.evaluation import sweep_wording as words
from hf_quant.evaluation.guard_pages import guard_html, guard_markdown
from hf_quant.evaluation.results import Agreement, Interval, Latency, Machine, ModelInfo, ModelSize
from hf_quant.evaluation.sweep_report import Sweep
from hf_quant.evaluation.sweep_results import Change, SchemeResult
from hf_quant.quantization.guard_report import GuardResult
from hf_quant.quantization.guard_results import LayerSensitivity, TradeOff

from ..evaluation import EVIL

SVG = "{http://www.w3.org/2000/svg}"


def change(value: float = 0.8934, low: float = -0.007, high: float = 0.004, metric: str = "f1") -> Change:
    before = 0.8946
    return Change(metric, before, value, value - before, Interval(low, high))


def row(label: str = "int8_dynamic", found: Change | None = None, **fields: Any) -> SchemeResult:
    accuracy = Change("accuracy", 0.8505, 0.848, -0.0025, Interval(-0.0196, 0.0147))
    defaults = {
        "label": label,
        "scheme": label,
        "options": "",
        "layers": 75,
        "seconds": 0.71,
        "changes": (accuracy, found or change()),
        "size": ModelSize(24_100_000, 85_700_000, 2_700_000),
        "latency": Latency(1, 128, 2, 100, 190.3, 221.9, 103.4, 118.0, 1.83),
        "agreement": Agreement(10, 10 / 408, 4, 6, 0.754),
    }
    return SchemeResult(**{**defaults, **fields})  # type: ignore[arg-type]


def sweep(*rows: SchemeResult, **fields: Any) -> Sweep:
    small = ModelSize(24_100_000, 45_000_000, 2_700_000)
    slow = Latency(1, 128, 2, 100, 190.3, 221.9, 250.0, 260.0, 0.76)
    defaults = {
        "task": "mrpc",
        "headline": "f1",
        "split": "validation",
        "samples": 408,
        "rows_in_split": 408,
        "tokens": None,
        "max_length": 512,
        "float_model": ModelInfo("me/bert", "Bert", "float32", 0, ModelSize(95_400_000, 340_000_000, 2_700_000)),
        "rows": rows
        or (
            row(),
            row("int8_static", change(0.88, -0.026, -0.002)),
            row("int4_weight_only", change(0.89, -0.02, 0.01), size=small, latency=slow),
        ),
        "failed": {},
        "calibration": "",
        "confidence": 0.95,
        "resamples": 10_000,
        "seed": 0,
        "machine": Machine("A CPU", "cpu", 2),
        "versions": {"hf_quant": "0.1.0", "python": "3.11"},
    }
    return Sweep(**{**defaults, **fields})  # type: ignore[arg-type]


def language(relative: float, low: float, high: float) -> SchemeResult:
    found = Change("perplexity", 15.234, 15.234 * (1 + relative), relative, Interval(low, high))
    return row("int8_dynamic", changes=(found,), agreement=None)


def of_text(*rows: SchemeResult, **fields: Any) -> Sweep:
    return sweep(*rows, task="perplexity", headline="perplexity", samples=20, tokens=10_220, **fields)


def test_the_table_has_a_row_for_float_and_each_scheme() -> None:
    text = str(sweep())
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    assert ["scheme", "F1", "points", "95 % interval", "flips", "MB", "smaller", "ms", "speed-up"] in lines
    assert ["float", "89.46", "438", "190"] in lines
    assert ["int8_dynamic", "89.34", "-0.12", "[-0.70, +0.40]", "2.5 %", "112", "3.89x", "103", "1.83x"] in lines
    assert ["int4_weight_only", "89.00", "-0.46", "[-2.00, +1.00]", "2.5 %", "71.8", "6.10x", "250", "0.76x"] in lines
    assert max(map(len, text.splitlines())) <= 100
    assert text.startswith("mrpc: float against 3 schemes\n")


def test_the_headline_names_the_best_the_smallest_and_the_fastest() -> None:
    assert words.headline_words(sweep()) == (
        "int8_dynamic keeps F1 best (-0.12 points); int4_weight_only is the smallest (6.10x smaller, -0.46 points); "
        "int8_dynamic is the fastest (1.83x faster)."
    )
    slow = row(latency=Latency(1, 128, 2, 100, 190.3, 221.9, 250.0, 260.0, 0.5))
    assert "none is faster than float, int8_dynamic comes nearest (2.00x slower)" in words.headline_words(
        sweep(slow, slow)
    )
    assert words.headline_words(sweep(row())) == (
        "int8_dynamic changes F1 by -0.12 points [-0.70, +0.40] and is 3.89x smaller and 1.83x faster."
    )
    broken = row("broken", change(math.nan, math.nan, math.nan))
    assert words.headline_words(sweep(broken, row())).startswith("int8_dynamic keeps F1 best")


def test_a_perplexity_is_better_when_it_is_lower() -> None:
    worse, better, same = language(0.0031, 0.002, 0.004), language(-0.01, -0.02, -0.001), language(0, -0.1, 0.1)
    assert [words.outcome(found.changes[0]) for found in (worse, better, same)] == ["worse", "better", "none"]
    assert [words.outcome(found) for found in (change(0.8, -0.1, -0.01), change(0.9, 0.01, 0.1))] == [
        "worse",
        "better",
    ]
    assert words.outcome(change(0.9, math.nan, math.nan)) == "undefined"
    text = str(of_text(worse, better))
    assert re.search(r"int8_dynamic +15.281 +\+0.31 +\[\+0.20, \+0.40\]", text)
    assert "int8_dynamic keeps perplexity best (-1.00 %)" in " ".join(text.split())
    assert "flips" not in text
    assert "10,220 tokens predicted in 20 windows of up to 512 tokens" in " ".join(text.split())


@pytest.mark.parametrize(
    ("relative", "text"),
    [(0.00312, "+0.31"), (-0.2, "-20.00"), (0.0, "0.00"), (2.5, "+250"), (93.4, "+9,340"), (1e300, "+1e+302")],
)
def test_changes_of_a_perplexity_are_percent(relative: float, text: str) -> None:
    assert words.change_words("perplexity", relative, 20) == text
    assert words.change_words("perplexity", math.inf, 20) == "+inf"


def test_what_was_not_measured_takes_no_column() -> None:
    header = words.table_header(sweep(row(latency=None, agreement=None)))
    assert header == ["scheme", "F1", "points", "95 % interval", "MB", "smaller"]
    assert "Latency" not in str(sweep(row(latency=None)))


def test_the_method_says_what_matters() -> None:
    found = sweep(
        row("mine", change(0.8, -0.1, 0.1), scheme="int8_static", options="equalize='smoothquant'"),
        calibration="128 of 3,668 examples of the train split of mrpc, drawn with seed 0",
        samples=100,
    )
    text = " ".join(str(found).split())
    assert "Calibrated on 128 of 3,668 examples" in text
    assert "mine: int8_static with equalize='smoothquant'." in text
    assert "100 examples of 408, drawn with seed 0" in text
    assert "Some intervals are wide: 100 examples cannot show a change of one point." in text
    assert "wide" not in str(sweep(row()))


def test_a_scheme_that_failed_is_named_everywhere() -> None:
    found = sweep(failed={"int6_weight_only": "needs compressed-tensors 0.20"})
    for text in (str(found), found.to_markdown().replace("\\", ""), found.to_html()):
        assert re.search("int6_weight_only.*needs compressed-tensors 0.20", text)


def test_json_comes_back_and_others_are_refused(tmp_path: Path) -> None:
    found = sweep(row(found=change(math.nan, math.nan, math.nan), agreement=None, latency=None, seconds=None))
    again = Sweep.from_json(found.to_json(tmp_path / "report.json"))
    assert again.to_json() == found.to_json()
    assert Sweep.from_json(tmp_path / "report.json").rows[0].changes[0] == found.rows[0].changes[0]
    assert Sweep.from_json(sweep().to_json()) == sweep()
    values = json.loads(found.to_json())
    assert (values["schema"], values["rows"][0]["changes"][1]["value"]) == ("hf_quant.sweep/1", "nan")
    with pytest.raises(ValueError, match=r"`schema` is 'hf_quant.comparison/1'"):
        Sweep.from_json(json.dumps({**values, "schema": "hf_quant.comparison/1"}))
    with pytest.raises(ValueError, match="This is not JSON"):
        Sweep.from_json("{")
    del values["rows"][0]["size"]
    with pytest.raises(ValueError, match=r"report\.rows\[0\]: expected the fields"):
        Sweep.from_json(json.dumps(values))


def test_markdown_tables_are_whole_and_have_every_metric() -> None:
    text = sweep(row(), row(EVIL)).to_markdown()
    assert "| `int8_dynamic` | accuracy | 85.05 | 84.80 | -0.25 | [-1.96, +1.47] |" in text
    assert "| `float` | 95.4 | 340 | 2.70 | 438 |  |  |" in text
    assert "<script" not in text.replace("`" + EVIL.replace("`", "").replace("|", "\\|") + "`", "")
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert "All metrics" not in of_text(language(0.1, 0.0, 0.2)).to_markdown()


def page(text: str) -> ElementTree.Element:
    doctype, _, rest = text.partition("\n")
    assert doctype == "<!DOCTYPE html>"
    assert not re.search(r"(src|href)=|url\(|@import|<script", text)
    return ElementTree.fromstring(rest)  # well-formed XML too


def test_html_is_one_sound_file_with_the_picture() -> None:
    root = page(sweep(row(), row(EVIL), task=EVIL, failed={EVIL: EVIL}).to_html())
    (svg,) = root.iter(f"{SVG}svg")
    assert svg.get("aria-label") == "Size and change of the metric with its 95 % interval, by scheme"
    labels = [text.text for text in svg.iter(f"{SVG}text") if text.get("class") == "layer"]
    assert labels == ["float", "int8_dynamic", EVIL]
    assert [row.findtext("td") for row in root.iter("tr")].count(EVIL) == 4  # picture's table, 2 metrics, size
    assert sweep()._repr_html_() in sweep().to_html()


def test_save_writes_three_files(tmp_path: Path) -> None:
    sweep().save(tmp_path / "new" / "report")
    files = {path.name for path in (tmp_path / "new" / "report").iterdir()}
    assert files == {"report.json", "report.md", "report.html"}


numbers = st.floats(-1e6, 1e6) | st.just(math.inf)


@given(
    st.lists(
        st.tuples(st.integers(1, 10**9), numbers, st.floats(0, 50), st.floats(0, 50), st.booleans()),
        min_size=1,
        max_size=12,
    )
)
def test_the_picture_stays_inside_its_frame_and_its_points_apart(rows: list[tuple[Any, ...]]) -> None:
    points = [
        plots.SchemePoint(
            f"p{i}", "", size, at, math.nan if alone else at - below, math.nan if alone else at + above, "none"
        )
        for i, (size, at, below, above, alone) in enumerate(rows)
    ]
    svg = ElementTree.fromstring(plots.scheme_plot(points, "points", 0.95))
    height = float(str(svg.get("viewBox")).split()[3])
    circles = [(float(c.get("cx") or 0), float(c.get("cy") or 0)) for c in svg.iter(f"{SVG}circle")]
    assert len(circles) == len(points)
    lines = [float(line.get(f"{axis}{end}") or 0) for line in svg.iter(f"{SVG}line") for axis in "y" for end in "12"]
    assert all(0 <= y <= height for y in [*lines, *(y for _, y in circles)])
    across = sorted(x for x, _ in circles)
    assert all(b - a > 13.8 for a, b in itertools.pairwise(across))
    assert across[0] > plots.NARROW_LEFT
    assert across[-1] < 468
    heights = sorted(float(t.get("y") or 0) for t in svg.iter(f"{SVG}text") if t.get("class") == "layer")
    assert all(b - a > 35.8 for a, b in itertools.pairwise(heights))
    assert heights[0] > 0
    assert heights[-1] < height - 26


@given(st.lists(st.floats(0, 400), min_size=1, max_size=12))
def test_places_are_moved_apart_no_more_than_needed(places: list[float]) -> None:
    found = plots._spread(places, 20.0, 0.0, 400.0)
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = [found[i] for i in order]
    assert all(b - a > 19.99 for a, b in itertools.pairwise(moved))
    assert moved[0] >= -0.01
    assert moved[-1] <= 400.01
    assert plots._spread(moved, 20.0, 0.0, 400.0) == pytest.approx(moved)


def guard(**fields: Any) -> GuardResult:
    defaults = {
        "metric": "accuracy",
        "float_value": 0.8946,
        "value": 0.8862,
        "drop": 0.0084,
        "target": 0.01,
        "kept": ("encoder.1.query",),
        "sensitivity": (
            LayerSensitivity("encoder.1.query", 12.34, -0.0212, 2_359_296),
            LayerSensitivity("a + b", math.inf, None, 1000),
            LayerSensitivity(EVIL, math.nan, 0.0, 0),
        ),
        "curve": (
            TradeOff(3, 0.8946, 140_000_000),
            TradeOff(0, 0.8712, 112_000_000),
            TradeOff(1, 0.8862, 119_000_000),
        ),
        "evaluations": 7,
        "layers": 3,
    }
    return GuardResult(**{**defaults, **fields})  # type: ignore[arg-type]


def test_the_guards_markdown() -> None:
    text = guard_markdown(guard())
    assert "worse by 0.0084, where 0.01 was allowed. Layers back in float: 1 of 3." in text
    assert "| 0 | 0.8712 | 112 |  |\n| 1 | 0.8862 | 119 | meets the target |\n| 3 | 0.8946 | 140 | meets" in text
    assert "| `encoder.1.query` | 12.3 | -0.0212 | 2.36 | float |" in text
    assert "| `a + b` | exact |  | 0.00100 | quantized |" in text
    lower = guard(higher_is_better=False, relative=True, float_value=10.0, target=0.1)
    lower = guard_markdown(
        lower.__class__(**{**lower.__dict__, "curve": (TradeOff(0, 11.1, 1), TradeOff(2, 10.9, 2))})
    )
    assert re.search(r"\| 0 \| 11.1 \| \S+ \|  \|\n\| 2 \| 10.9 \| \S+ \| meets the target \|", lower)
    assert "Each layer" not in guard_markdown(guard(sensitivity=(), kept=()))


def test_the_guards_page_has_both_plots() -> None:
    root = page(guard_html(guard(metric=EVIL)))
    curve, layers = root.iter(f"{SVG}svg")
    assert curve.get("aria-label") == "Metric and size by the number of layers kept in float"
    texts = [text.text for text in curve.iter(f"{SVG}text")]
    assert "target 0.8846" in texts
    assert [text for text in texts if text in ("112", "119", "140")] == ["112", "119", "140"]
    assert [text.text for text in layers.iter(f"{SVG}text") if text.get("class") == "layer-value"] == [
        *["12.3", "-0.0212", "exact"],
        *["nan", "0"],
    ]
    assert len(list(page(guard_html(guard(sensitivity=()))).iter(f"{SVG}svg"))) == 1


@given(
    st.lists(
        st.builds(TradeOff, st.integers(0, 300), st.floats(-1e4, 1e4), st.integers(1, 10**10)), min_size=1, max_size=9
    ),
    st.none() | st.floats(-1e4, 1e4),
)
def test_the_trade_off_stays_inside_its_frame(points: list[TradeOff], target: float | None) -> None:
    svg = ElementTree.fromstring(plots.trade_off_plot(points, target))
    height = float(str(svg.get("viewBox")).split()[3])
    for circle in svg.iter(f"{SVG}circle"):
        assert 0 <= float(circle.get("cy") or -1) <= height - 40
        assert 0 <= float(circle.get("cx") or -1) <= plots.WIDTH
    assert len([line for line in svg.iter(f"{SVG}line") if line.get("class") == "target"]) == (target is not None)


def test_sensitivities_are_bars_of_their_decibels() -> None:
    rows = [
        LayerSensitivity("a", 40.0, None, 1),
        LayerSensitivity("b", 10.0, None, 1),
        LayerSensitivity("c", -3, None, 1),
    ]
    svg = ElementTree.fromstring(plots.sensitivity_plot(rows))
    widths = [float(bar.get("width") or 0) for bar in svg.iter(f"{SVG}rect")]
    assert widths == pytest.approx([260.0, 65.0, 0.0])
    assert "change" not in [text.text for text in svg.iter(f"{SVG}text")]
