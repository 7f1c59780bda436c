"""The picture of a schedule against what was reached."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_quant.evaluation import plots
from hf_quant.evaluation.pruning_plot import schedule_page, schedule_plot

from ..evaluation import EVIL

SVG = "{http://www.w3.org/2000/svg}"
POINTS = [(100, 0.0, 0.0), (200, 0.5, 0.493), (300, 0.8, 0.8)]


def goals(svg: ElementTree.Element) -> list[tuple[float, float]]:
    line = svg.find(f"{SVG}polyline")
    assert line is not None
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in str(line.get("points")).split())]


def dots(svg: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(dot.get("cx") or 0), float(dot.get("cy") or 0)) for dot in svg.iter(f"{SVG}circle")]


def test_places_are_in_proportion() -> None:
    svg = ElementTree.fromstring(schedule_plot(POINTS))
    line, reached = goals(svg), dots(svg)
    assert [x for x, _ in line] == [x for x, _ in reached] == [plots.NARROW_LEFT, 335.0, plots.RIGHT]
    zero, half, whole = (y for _, y in line)
    assert zero - half == pytest.approx((zero - whole) * 0.5 / 0.8, abs=0.1)
    assert reached[0] == line[0]
    assert reached[2] == line[2]
    assert half < reached[1][1] < zero, "below the goal"
    hints = [title.text for title in svg.iter(f"{SVG}title")]
    assert hints[1] == "step 200: 49.30 % reached, 50.00 % wanted"
    labels = [text.text for text in svg.iter(f"{SVG}text")]
    assert {"0 %", "80 %", "100", "300", "steps"} <= set(labels)


def test_the_order_does_not_matter() -> None:
    assert schedule_plot(POINTS[::-1]) == schedule_plot(POINTS)


shares = st.floats(0, 1) | st.just(math.nan)


@given(st.lists(st.tuples(st.integers(0, 10**6), shares, shares), min_size=1, max_size=80))
def test_the_picture_stays_inside_its_frame(points: list[tuple[int, float, float]]) -> None:
    svg = ElementTree.fromstring(schedule_plot(points))
    _, _, width, height = map(float, str(svg.get("viewBox")).split())
    assert len(dots(svg)) == sum(not math.isnan(reached) for _, _, reached in points)
    for x, y in [*dots(svg), *(goals(svg) if any(not math.isnan(goal) for _, goal, _ in points) else [])]:
        assert plots.NARROW_LEFT - 0.1 <= x <= plots.RIGHT + 0.1
        assert 4 < y < height - 24
    for text in svg.iter(f"{SVG}text"):
        assert 0 < float(text.get("x") or 0) < width
        assert 0 < float(text.get("y") or 0) < height


def test_the_page_is_one_file_that_fetches_nothing() -> None:
    text = schedule_page(POINTS, EVIL)
    doctype, _, rest = text.partition("\n")
    assert doctype == "<!DOCTYPE html>"
    root = ElementTree.fromstring(rest)  # well-formed, whatever the title
    assert root.find(".//h1").text == EVIL  # type: ignore[union-attr]
    assert root.find(".//title").text == EVIL  # type: ignore[union-attr]
    assert len(root.findall(f".//{SVG}svg")) == 1
    assert not re.search(r"(src|href)=|url\(|@import|<script", text)
    assert "prefers-color-scheme:dark" in text
    assert ".hfq svg .goal" in text
    words = "At step 300: 80.00 % reached, 80.00 % wanted. The largest distance was 0.70 points, at step 200."
    assert root.find(".//p").text == words  # type: ignore[union-attr]
    cells = [[cell.text for cell in row] for row in root.findall(".//tbody/tr")]
    assert cells == [["100", "0.00 %", "0.00 %"], ["200", "50.00 %", "49.30 %"], ["300", "80.00 %", "80.00 %"]]


def test_figures_that_are_missing() -> None:
    text = schedule_page([(7, 0.5, math.nan)])
    assert "At step 7: - reached, 50.00 % wanted." in text
    assert "distance" not in text


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match=r"there is no point to draw: no mask was updated yet\. Train up to"):
        schedule_page([])
    with pytest.raises(ValueError, match=r"step 3 has the sparsities 50 and 0\.5; both are shares in \[0, 1\]"):
        schedule_plot([(3, 50, 0.5)])


def test_one_update_shows_its_goal_from_there_on() -> None:
    svg = ElementTree.fromstring(schedule_plot([(120, 0.5, 0.5)]))
    (left, one), (right, other) = goals(svg)
    assert (left, right, one) == (plots.NARROW_LEFT, plots.RIGHT, other)
    assert "121" not in [text.text for text in svg.iter(f"{SVG}text")]
