"""Plots of an evaluation, as PNG: quality against speed, quality against the dictionary's size.

Comes in: points with names. Goes out: a file. Holds one figure.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

from msense.errors import BadInput
from msense.text import clean

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B6914")  # Okabe and Ito 2008
MARKS = "osD^vPXh"
SIZE, DPI = (9.6, 5.0), 150
TITLE = 90  # signs that fit in a line


class Point(NamedTuple):
    """A model in a plot."""

    name: str
    x: float
    y: float
    deviation: float


class Line(NamedTuple):
    """A level to compare with."""

    name: str
    y: float


def draw_points(file: Path, title: str, axes: tuple[str, str], points: Sequence[Point]) -> None:
    """Draw a point a model, x in powers of ten; names stand in a legend in order of y.

    Args:
        file: where to.
        title: above it.
        axes: names of x and y.
        points: the models.

    Raises:
        BadInput: matplotlib is not installed.
    """
    figure, plot = _figure(title, axes)
    for number, point in enumerate(sorted(points, key=lambda p: -p.y)):
        bar = {"yerr": point.deviation} if point.deviation else {}
        plot.errorbar(
            point.x,
            point.y,
            **bar,
            fmt=MARKS[(number + number // len(COLOURS)) % len(MARKS)],  # no two points look alike
            color=COLOURS[number % len(COLOURS)],
            markersize=8,
            capsize=3,
            elinewidth=1,
            label=f"{_short(point.name)}  {point.y:.3f}",
        )
    plot.set_xscale("log")
    _finish(figure, plot, file, spread=any(point.deviation for point in points))


def draw_lines(file: Path, title: str, axes: tuple[str, str], points: Sequence[Point], level: Line | None) -> None:
    """Draw points joined by a line in order of x, in powers of ten, and a level to compare with.

    Args:
        file: where to.
        title: above it.
        axes: names of x and y.
        points: of one kind of model.
        level: a horizontal line.

    Raises:
        BadInput: matplotlib is not installed.
    """
    figure, plot = _figure(title, axes)
    row = sorted(points, key=lambda p: p.x)
    plot.plot([p.x for p in row], [p.y for p in row], color=COLOURS[0], linewidth=1, zorder=1)
    for number, point in enumerate(row):
        bar = {"yerr": point.deviation} if point.deviation else {}
        plot.errorbar(
            point.x,
            point.y,
            **bar,
            fmt=MARKS[number % len(MARKS)],
            color=COLOURS[number % len(COLOURS)],
            markersize=8,
            capsize=3,
            elinewidth=1,
            label=f"{_short(point.name)}  {point.y:.3f}",
        )
    if level is not None:
        plot.axhline(
            level.y, linestyle="--", color="#555555", linewidth=1, label=f"{_short(level.name)}  {level.y:.3f}"
        )
    plot.set_xscale("log")
    _finish(figure, plot, file, spread=any(point.deviation for point in points))


def check_matplotlib() -> None:
    """Refuse to begin what cannot be drawn.

    Raises:
        BadInput: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise BadInput("plots need matplotlib: pip install msense[evaluation]")


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


def _finish(figure: Any, plot: Any, file: Path, *, spread: bool) -> None:  # noqa: ANN401 - matplotlib's
    from matplotlib.ticker import FuncFormatter, NullFormatter

    plain = FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}")
    some = FuncFormatter(lambda x, _: plain(x) if f"{x:e}"[0] in "25" else "")  # all nine would run into each other
    plot.xaxis.set_major_formatter(plain)
    low, high = plot.get_xlim()
    few = some if high > 4 * low else plain
    plot.xaxis.set_minor_formatter(few if high < 100 * low else NullFormatter())
    if spread:
        plot.set_ylabel(f"{plot.get_ylabel()} (± standard deviation over draws)")
    for side in ("top", "right"):
        plot.spines[side].set_visible(False)
    # beside the plot and below its title, which may be as wide as both
    plot.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, frameon=False, fontsize=9)
    figure.savefig(file, format="png")


def _short(name: str) -> str:
    text = clean(name).replace("$", r"\$")
    return text if len(text) <= 44 else "…" + text[-43:]
