"""The report: figures, words, and every format."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from hf_quant.evaluation import wording as w
from hf_quant.evaluation.report import Comparison
from hf_quant.evaluation.results import (
    Agreement,
    Deviation,
    Interval,
    MetricResult,
    SplitResult,
)

from ..evaluation import EVIL, comparison, metric, with_metric

# Figures


@pytest.mark.parametrize(
    ("samples", "text"),
    [
        (5, "90"),
        (10, "90"),
        (11, "90.1"),
        (71, "90.1"),
        (100, "90.1"),
        (101, "90.14"),
        (408, "90.14"),
        (9815, "90.14"),
    ],
)
def test_points_show_the_digits_that_the_sample_supports(samples: int, text: str) -> None:
    assert w.points(0.90141, samples) == text


@given(st.integers(1, 100_000))
def test_the_last_digit_shown_is_never_finer_than_a_hundredth_of_an_example_nor_of_a_point(samples: int) -> None:
    shown = w.points(0.5, samples)
    last_digit = 10.0 ** -len(shown.partition(".")[2])
    assert last_digit >= 0.01
    assert last_digit * 100 >= 100 / samples or last_digit == 1
    # Where two decimals allow it, one example more or less is seen.
    if samples < 10_000:
        assert last_digit <= 100 / samples


def test_signed_points() -> None:
    assert w.signed_points(-0.0036, 408) == "-0.36"
    assert w.signed_points(0.0036, 408) == "+0.36"
    assert w.signed_points(0.0, 408) == w.signed_points(-0.00001, 408) == "0.00"
    assert w.signed_points(math.nan, 408) == "undefined"


@pytest.mark.parametrize(
    ("value", "text"),
    [(438.2, "438"), (0.08344, "0.0834"), (1340.4, "1,340"), (2.7, "2.70"), (0.0, "0"), (109.6, "110")],
)
def test_significant_digits(value: float, text: str) -> None:
    assert w.significant(value) == text


@pytest.mark.parametrize(("p", "text"), [(0.63, "p=0.63"), (0.0213, "p=0.021"), (1.0, "p=1.0"), (2e-4, "p<0.001")])
def test_p_values(p: float, text: str) -> None:
    assert w.p_value(p) == text


def test_speed_and_size_are_named_for_what_they_are() -> None:
    slow = dataclasses.replace(comparison().latency, speedup=0.5)  # type: ignore[type-var]
    even = dataclasses.replace(slow, speedup=1.01)
    assert w.faster(slow) == "2.00x slower"  # type: ignore[arg-type]
    assert w.faster(even) == "as fast"  # type: ignore[arg-type]
    assert w.smaller(comparison()) == "3.89x smaller"
    larger = comparison(float_model=comparison().int8_model, int8_model=comparison().float_model)
    assert w.smaller(larger) == "3.89x larger"


# Words


def test_an_interval_that_includes_zero_is_called_no_difference() -> None:
    found = metric(low=-0.004, high=0.002)
    assert w.verdict(found, 0.95) == "no difference seen at 95 %"
    text = str(with_metric(found, 5000))
    assert "no difference seen at 95 %; a loss of up to 0.40 points is not ruled out." in text
    assert "wide" not in text


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.004), (-0.004, 0.0), (0.0, 0.0)])
def test_zero_at_the_edge_is_included(low: float, high: float) -> None:
    assert w.outcome(metric(low=low, high=high)) == "none"


def test_an_interval_without_zero_is_called_by_its_side() -> None:
    assert w.verdict(metric(low=-0.009, high=-0.002), 0.95) == "quantized is worse at 95 %"
    assert w.verdict(metric(low=0.002, high=0.009), 0.9) == "quantized is better at 90 %"
    text = str(with_metric(metric(low=-0.0086, high=-0.0021)))
    assert "quantized is worse at 95 %, by 0.21 to 0.86 points." in text


def test_a_wide_interval_is_said_to_be_wide_in_every_format() -> None:
    found = with_metric(metric(low=-0.08, high=0.05), 71)
    for text in (str(found), found.to_markdown(), found.to_html()):
        words = " ".join(text.replace("\\", "").split())
        assert "no difference seen at 95 % (wide)" in words
        assert "the interval is wide: 71 examples cannot show a change of one point" in words


def test_undefined_metrics_are_said_to_be_undefined() -> None:
    found = with_metric(MetricResult("pearsonr", 0.8, math.nan, Interval(math.nan, math.nan, 100)))
    for text in (str(found), found.to_markdown(), found.to_html()):
        assert "undefined, because predictions or labels are constant" in " ".join(text.split())
        assert not re.search(r"\bnan\b", text)


def test_left_out_resamples_are_counted() -> None:
    found = MetricResult("pearsonr", 0.8, 0.7, Interval(-0.2, 0.1, 7))
    assert "7 resamples without a value of the metric were left out." in " ".join(str(with_metric(found)).split())


def test_no_flip_is_not_sold_as_proof() -> None:
    split = SplitResult("validation", 408, 408, (metric(low=0.0, high=0.0),), Agreement(0, 0.0, 0, 0, 1.0))
    text = " ".join(str(comparison(splits=(split,))).split())
    assert "Predictions changed: none of 408." in text
    # 1 - 0.05^(1/408)
    assert "leaves room for a flip rate of up to 0.73 % (at 95 %)" in text
    assert (1 - w.rule_of_three(408)) ** 408 == pytest.approx(0.05)


def test_flips_are_split_into_wins_losses_and_the_rest() -> None:
    words = w.agreement_words(Agreement(10, 10 / 408, 3, 6, 0.508), 408)
    assert words == (
        "Predictions changed: 10 of 408 (2.5 %): 3 now right, 6 now wrong, 1 wrong either way; McNemar p=0.51."
    )


def test_a_regression_reports_the_change_of_its_predictions() -> None:
    split = SplitResult("validation", 1500, 1500, (metric("pearsonr"),), deviation=Deviation(0.01234, 0.4))
    found = comparison(headline="pearsonr", problem_type="regression", splits=(split,))
    for text in (str(found), found.to_markdown(), found.to_html()):
        assert "changed by 0.0123 on average and 0.400 at most" in " ".join(text.split())
        assert "McNemar" not in text


def test_drawn_samples_are_said_to_be_drawn() -> None:
    split = dataclasses.replace(comparison().splits[0], samples=200)
    assert "200 of 408 examples, drawn with seed 0" in str(comparison(splits=(split,)))


# Formats


def test_text_fits_100_columns_and_has_every_part() -> None:
    text = str(comparison())
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "\x1b" not in text
    for words in (
        "F1 89.46 to 89.10 (-0.36 points, 95 % interval [-1.72, +0.98]): no difference seen",
        "3.89x smaller and 1.83x faster",
        "Quality on validation, 408 examples",
        "accuracy         85.05       84.80   -0.25   [-1.96, +1.47]",
        "embeddings        95.4        24.1               3.96x",
        "on disk                        113",
        "Latency, batch 1, 128 tokens, 2 threads, 100 calls each",
        "p50                190         103   1.83x faster",
        "The 3 least exact of 3 quantized layers",
        "encoder.1.dense       29.0",
        "embeddings           exact",
        "10,000 resamples, seed 0",
        "not the seed of the training",
        "Machine: A CPU; device cpu, 2 threads.",
        "Versions: hf_quant 0.1.0, python 3.11.",
    ):
        assert words in " ".join(text.split()) or words in text, words


def test_rich_shows_the_same_words_in_colour() -> None:
    console = Console(width=100, force_terminal=True, color_system="truecolor")
    with console.capture() as capture:
        console.print(with_metric(metric(low=-0.02, high=-0.01)))
    shown = capture.get()
    assert "\x1b[" in shown
    assert "quantized is worse at 95 %" in re.sub(r"\x1b\[[0-9;]*m", "", shown)


def test_parts_that_were_not_measured_are_absent() -> None:
    found = comparison(latency=None, layer_sqnr={}, max_length=None)
    for text in (str(found), found.to_markdown(), found.to_html()):
        assert "Latency" not in text
        assert "least exact" not in text
        assert "texts not cut" in " ".join(text.split())
        assert "3.89x smaller." in " ".join(text.split())


def test_json_round_trip(tmp_path: Path) -> None:
    odd = with_metric(MetricResult("pearsonr", 0.8, math.inf, Interval(-math.inf, 0.5, 3)), latency=None)
    for found in (comparison(), odd, comparison(max_length=None)):
        text = found.to_json(tmp_path / "report.json")
        assert Comparison.from_json(text) == found
        assert Comparison.from_json(tmp_path / "report.json") == found
        json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert json.loads(comparison().to_json())["splits"][0]["metrics"][1]["float_value"] == 0.8946


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema="other/1"), r"`schema` is 'other/1'; this version of hf_quant reads 'hf_quant"),
        (lambda d: d.pop("seed"), r"report: expected the fields confidence, float_model"),
        (lambda d: d.update(seed="0"), r"report\.seed: expected int, got '0'"),
        (lambda d: d["splits"][0]["metrics"][0].update(float_value="high"), r"splits\[0\]\.metrics\[0\]\.float_value"),
        (lambda d: d.update(layer_sqnr=[1]), r"report\.layer_sqnr: expected"),
    ],
)
def test_json_of_another_shape_is_refused(change: object, message: str) -> None:
    values = json.loads(comparison().to_json())
    change(values)  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        Comparison.from_json(json.dumps(values))


def test_json_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('{"schema": ')
    with pytest.raises(ValueError, match="This is not JSON"):
        Comparison.from_json(tmp_path / "broken.json")
    with pytest.raises(FileNotFoundError):
        Comparison.from_json(tmp_path / "none.json")


def test_markdown_tables_are_whole_and_names_cannot_break_them() -> None:
    found = comparison(
        task=EVIL, layer_sqnr={EVIL: 20.0}, float_model=dataclasses.replace(comparison().float_model, name=EVIL)
    )
    text = found.to_markdown()
    outside_code = re.sub(r"`[^`]*`", "", re.sub(r"\\[^|]", "", text))  # nor what is escaped
    assert "<" not in outside_code
    lines = text.splitlines()
    tables = [i for i, line in enumerate(lines) if set(line) <= set("|-: ") and line]
    assert len(tables) == 4  # quality, size, latency, layers
    for start in tables:
        columns = [len(re.findall(r"(?<!\\)\|", line)) for line in (lines[start - 1], lines[start], lines[start + 1])]
        assert len(set(columns)) == 1
    assert "| F1 | 89.46 | 89.10 | -0.36 | [-1.72, +0.98] | no difference seen at 95 % (wide) |" in text


def test_save_writes_the_three_files(tmp_path: Path) -> None:
    found = comparison()
    found.save(tmp_path / "a" / "report")
    folder = tmp_path / "a" / "report"
    assert sorted(file.name for file in folder.iterdir()) == ["report.html", "report.json", "report.md"]
    assert Comparison.from_json(folder / "report.json") == found
    assert (folder / "report.md").read_text(encoding="utf-8") == found.to_markdown()
    assert (folder / "report.html").read_text(encoding="utf-8") == found.to_html()


def test_a_notebook_shows_the_page_without_its_frame() -> None:
    fragment = comparison()._repr_html_()
    assert fragment.startswith('<div class="hfq">')
    assert "<html" not in fragment
