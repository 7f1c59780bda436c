"""The HTML report and its plots."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

from hypothesis import given
from hypothesis import strategies as st

from hf_quant.evaluation import plots
from hf_quant.evaluation.report import Comparison
from hf_quant.evaluation.results import SplitResult

from ..evaluation import EVIL, comparison, metric


def page(found: Comparison) -> ElementTree.Element:
    doctype, _, rest = found.to_html().partition("\n")
    assert doctype == "<!DOCTYPE html>"
    return ElementTree.fromstring(rest)  # the page is well-formed XML too


def test_html_is_one_file_that_fetches_nothing() -> None:
    text = comparison().to_html()
    assert not re.search(r"(src|href)=|url\(|@import|<script", text)
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "prefers-color-scheme:dark" in text


def test_html_has_every_plot_and_names_cannot_break_it() -> None:
    found = comparison(task=EVIL, layer_sqnr={EVIL: 20.0, "b": math.inf, "c": -3.0, "d": math.nan})
    root = page(found)
    svgs = root.findall(".//{http://www.w3.org/2000/svg}svg")
    assert [svg.get("aria-label") for svg in svgs] == [
        "Change of each metric with its 95 % interval",
        "Size by kind of layer",
        "Latency of one forward pass",
        "Signal to quantization noise of each layer",
    ]
    assert root.find(".//h1").text == f"{EVIL}: float against quantized"  # type: ignore[union-attr]
    assert not root.findall(".//script")
    assert EVIL in [code.text for code in root.findall(".//code")]


@given(
    st.lists(
        st.tuples(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1), st.integers(1, 20_000)), min_size=1, max_size=4
    )
)
def test_the_delta_plot_stays_inside_its_frame_whatever_the_figures(
    rows: list[tuple[float, float, float, int]],
) -> None:
    splits = [
        SplitResult(f"s{i}", n, n, (metric("accuracy", 0.5, 0.5 + d, d - below, d + above),))
        for i, (d, below, above, n) in enumerate(rows)
    ]
    svg = ElementTree.fromstring(plots.delta_plot(splits, 0.95))
    for line in svg.iter("{http://www.w3.org/2000/svg}line"):
        assert all(plots.LEFT - 0.1 <= float(line.get(x) or 0) <= plots.RIGHT + 0.1 for x in ("x1", "x2"))
    # Zero is drawn, and the scale is not blown up: it spans one point to each side at least.
    ticks = [t.text for t in svg.iter("{http://www.w3.org/2000/svg}text") if t.get("class") == "tick"]
    assert "0" in ticks


def test_small_changes_look_small() -> None:
    split = SplitResult("v", 10_000, 10_000, (metric("accuracy", 0.5, 0.5001, 0.00005, 0.00015),))
    svg = ElementTree.fromstring(plots.delta_plot([split], 0.95))
    whisker = next(line for line in svg.iter("{http://www.w3.org/2000/svg}line") if line.get("class") == "whisker")
    assert float(whisker.get("x2") or 0) - float(whisker.get("x1") or 0) < 5  # of 420
