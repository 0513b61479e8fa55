"""Charts as SVG images, drawn by matplotlib for light and for dark pages."""

from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from threading import Lock
from typing import Any, Literal

from msense.text import clean

_INK, _FAINT = {False: "#1a1a1a", True: "#e8e8e8"}, "#8a8f94"
_COLOURS = {  # Okabe and Ito 2008, darker on white and lighter on black
    False: ("#0062a3", "#b34a00", "#00745a", "#9a3d78", "#7d5500", "#3b5b73"),
    True: ("#56b4e9", "#ff9f5c", "#3fd0a4", "#e5a3c9", "#e69f00", "#c3d3df"),
}
_STYLES, _MARKERS = ("-", "--", ":", "-."), "osD^vPX"
_LONGEST = 36  # characters of a name; its end says most
_LOCK = Lock()  # matplotlib's settings are those of the process


@dataclass(frozen=True)
class Series:
    """What has one colour and one marker."""

    name: str
    points: tuple[tuple[float, float], ...]
    interval: tuple[float, float] | None = None  # of y, of a single point


@dataclass(frozen=True)
class Chart:
    """Lines over x, points over a logarithmic x, or a horizontal bar per series, as long as the y of its point."""

    kind: Literal["lines", "points", "bars"]
    title: str
    x: str
    y: str
    series: tuple[Series, ...]


@lru_cache(256)
def draw(chart: Chart, *, dark: bool) -> bytes:
    """Return a chart as SVG on a transparent ground, with text as text."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 2.8), layout="constrained")  # without pyplot: no window, no global state
    plot = figure.add_subplot()
    for number, own in enumerate(chart.series):
        _add(plot, chart.kind, own, number, dark=dark)
    plot.set(xlabel=chart.x, ylabel=chart.y, axisbelow=True)
    across = chart.kind == "bars"
    if chart.kind == "points":
        plot.set(xscale="log")
        plot.xaxis.set_major_formatter("{x:,g}")
        plot.xaxis.set_minor_formatter("")
    else:
        plot.set_xlim(left=0)
        plot.locator_params(axis="x", nbins=5)  # more numbers would overlap on narrow screens
        plot.xaxis.set_major_formatter("{x:,g}")
    if across:
        plot.invert_yaxis()
        plot.margins(x=0.1)
    plot.grid(visible=True, color=_FAINT, alpha=0.3, axis="x" if across else "y")
    plot.tick_params(colors=_INK[dark])
    plot.spines[["top", "right"]].set_visible(False)
    plot.spines[["left", "bottom"]].set_color(_FAINT)
    for label in (plot.xaxis.label, plot.yaxis.label):
        label.set_color(_INK[dark])
    if chart.kind == "points" or (chart.kind == "lines" and len(chart.series) > 1):
        figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=_INK[dark], fontsize=9)
    file = BytesIO()
    with _LOCK, rc_context({"svg.fonttype": "none", "svg.hashsalt": "msense"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()


def _add(plot: Any, kind: str, own: Series, number: int, *, dark: bool) -> None:
    """Add a series to a plot."""
    x, y = zip(*own.points, strict=True)
    name = clean(own.name).replace("$", r"\$")
    name = name if len(name) <= _LONGEST else "…" + name[1 - _LONGEST :]
    colours = _COLOURS[dark]
    look: dict[str, Any] = {"color": colours[number % len(colours)], "label": name}
    marker = _MARKERS[number % len(_MARKERS)]
    if kind == "bars":
        plot.bar_label(plot.barh([name], y, color=colours[0]), [f"{y[0]:,g}"], color=_INK[dark], padding=2, fontsize=8)
    elif kind == "points":
        low, high = own.interval or (y[0], y[0])
        plot.errorbar(x, y, yerr=[[y[0] - low], [high - y[0]]], fmt=marker, capsize=3, **look)
    else:
        plot.plot(x, y, _STYLES[number % len(_STYLES)], marker=marker, markersize=4, **look)
