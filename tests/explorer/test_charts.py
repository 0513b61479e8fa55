"""Charts: what is drawn, names as text and never as markup, colours of light and dark pages."""

import re
from xml.etree import ElementTree

import pytest

from msense.explorer.charts import Chart, Series, draw

HOSTILE = "<script>$\\frac{$ ‮نص 🙂"


@pytest.mark.parametrize("kind", ["lines", "points", "bars"])
@pytest.mark.parametrize("dark", [False, True])
def test_every_name_is_text(kind: str, dark: bool) -> None:
    points = ((1.0, 0.5), (1000.0, 0.75)) if kind == "lines" else ((1000.0, 0.75),)
    series = (Series(HOSTILE, points, (0.7, 0.8) if kind == "points" else None), Series("b" * 500, points))
    image = draw(Chart(kind, "t", "steps & <b>", "accuracy", series), dark=dark)
    every = list(ElementTree.fromstring(image).iter())
    texts = ["".join(element.itertext()) for element in every if element.tag.endswith("}text")]
    assert not [element for element in every if element.tag.endswith(("}script", "}b", "}a", "}image"))]
    assert any(text.startswith("<script>$\\frac{$") for text in texts)
    assert "steps & <b>" in texts
    assert "…" + "b" * 35 in texts
    assert "1,000" in texts or kind == "bars"
    assert (b"#e8e8e8" in image) == dark


def test_a_chart_has_its_lines_intervals_and_bars() -> None:
    lines = draw(Chart("lines", "t", "x", "y", (Series("a", ((0, 1), (1, 2))), Series("b", ((0, 2),)))), dark=False)
    assert lines.count(b"stroke: #0062a3") >= 2, "the line and its key"
    assert lines.count(b"stroke: #b34a00") >= 2
    bars = draw(Chart("bars", "t", "x", "y", tuple(Series(f"{n}", ((0.0, n),)) for n in (3, 50))), dark=False)
    assert b">50<" in bars
    one = Chart("points", "t", "x", "y", (Series("a", ((10.0, 0.5),), (0.4, 0.6)),))
    assert draw(one, dark=False) != draw(Chart("points", "t", "x", "y", (Series("a", ((10.0, 0.5),)),)), dark=False)


def test_large_numbers_below_a_chart_are_few_enough_to_be_read() -> None:
    points = tuple((float(x), 1 / x) for x in (8000, 20_000, 70_000, 139_060))
    image = draw(Chart("lines", "t", "senses", "y", (Series("a", points),)), dark=False)
    assert 2 <= len(re.findall(rb">[0-9]+,000<", image)) <= 6
