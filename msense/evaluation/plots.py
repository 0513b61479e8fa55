"""Plots of an evaluation as PNG: quality against speed, quality against dictionary size."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

from msense.errors import InputError
from msense.text import clean

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B6914")  # Okabe and Ito 2008
MARKERS = "osD^vPXh"
SIZE, DPI = (9.6, 5.0), 150
TITLE = 90  # characters per line of a title


class Point(NamedTuple):
    """A model in a plot."""

    name: str
    x: float
    y: float
    deviation: float


class Line(NamedTuple):
    """A horizontal reference line."""

    name: str
    y: float


def draw_points(file: Path, title: str, axes: tuple[str, str], points: Sequence[Point]) -> None:
    """Draw one marker per model on a logarithmic x axis into a PNG; the legend is sorted by y."""
    figure, plot = _figure(title, axes)
    _markers(plot, sorted(points, key=lambda p: -p.y))
    _finish(figure, plot, file, rms_distance=any(point.deviation for point in points))


def draw_lines(file: Path, title: str, axes: tuple[str, str], points: Sequence[Point], level: Line | None) -> None:
    """Draw models of one kind connected by a line on a logarithmic x axis into a PNG, with an optional reference line."""
    figure, plot = _figure(title, axes)
    row = sorted(points, key=lambda p: p.x)
    plot.plot([p.x for p in row], [p.y for p in row], color=COLOURS[0], linewidth=1, zorder=1)
    _markers(plot, row)
    if level is not None:
        label = f"{_short(level.name)}  {level.y:.3f}"
        plot.axhline(level.y, linestyle="--", color="#555555", linewidth=1, label=label)
    _finish(figure, plot, file, rms_distance=any(point.deviation for point in points))


def check_matplotlib() -> None:
    """Raise InputError if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise InputError("plots need matplotlib, which is not installed: pip install msense[evaluation]")


def _figure(title: str, axes: tuple[str, str]) -> tuple[Any, Any]:
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")  # without pyplot: no window, no global state
    plot = figure.add_subplot()
    plot.set_title(fill(clean(title), TITLE).replace("$", r"\$"), loc="left")
    plot.set_xlabel(axes[0])
    plot.set_ylabel(axes[1])
    plot.grid(True, which="major", color="#dddddd", linewidth=0.8)
    plot.set_axisbelow(True)
    return figure, plot


def _markers(plot: Any, points: Sequence[Point]) -> None:
    for number, point in enumerate(points):
        bar = {"yerr": point.deviation} if point.deviation else {}
        plot.errorbar(
            point.x,
            point.y,
            **bar,
            fmt=MARKERS[(number + number // len(COLOURS)) % len(MARKERS)],  # unique pairs of marker and colour
            color=COLOURS[number % len(COLOURS)],
            markersize=8,
            capsize=3,
            elinewidth=1,
            label=f"{_short(point.name)}  {point.y:.3f}",
        )


def _finish(figure: Any, plot: Any, file: Path, *, rms_distance: bool) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    plot.set_xscale("log")
    plain = FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}")
    some = FuncFormatter(lambda x, _: plain(x) if f"{x:e}"[0] in "25" else "")  # all nine labels would overlap
    plot.xaxis.set_major_formatter(plain)
    low, high = plot.get_xlim()
    few = some if high > 4 * low else plain
    plot.xaxis.set_minor_formatter(few if high < 100 * low else NullFormatter())
    if rms_distance:
        plot.set_ylabel(f"{plot.get_ylabel()} (± standard deviation over draws)")
    for side in ("top", "right"):
        plot.spines[side].set_visible(False)
    # next to the plot and below its title, which may be as wide as both
    plot.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, frameon=False, fontsize=9)
    figure.savefig(file, format="png")


def _short(name: str) -> str:
    text = clean(name).replace("$", r"\$")
    return text if len(text) <= 44 else "…" + text[-43:]
