"""Plots of an evaluation as PNG: quality against speed, quality against dictionary size."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

from msense.errors import InputError
from msense.text import clean

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B6914")  # Okabe and Ito 2008
MARKERS = "osD^vPXh"
TITLE = 90  # characters per line of a title


class Point(NamedTuple):
    """A model in a plot."""

    name: str
    x: float
    y: float
    deviation: float


def draw(
    file: Path,
    *,
    title: str,
    axes: tuple[str, str],
    points: Sequence[Point],
    connected: bool = False,
    baseline: tuple[str, float] | None = None,
) -> None:
    """Draw one marker per model on a logarithmic x axis into a PNG.

    Args:
        file: the PNG.
        title: title of the plot.
        axes: labels of x and y.
        points: the models.
        connected: connect the points by a line, in the order of x; else the legend is sorted by y.
        baseline: name and y of a horizontal line.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 5.0), dpi=150, layout="constrained")  # without pyplot: no window, no global state
    plot = figure.add_subplot()
    plot.set_title(fill(clean(title), TITLE).replace("$", r"\$"), loc="left")
    deviation = " (± standard deviation over draws)" if any(point.deviation for point in points) else ""
    plot.set(xscale="log", xlabel=axes[0], ylabel=axes[1] + deviation, axisbelow=True)
    plot.grid(True, which="major", color="#dddddd", linewidth=0.8)
    points = sorted(points, key=lambda p: p.x if connected else -p.y)
    if connected:
        plot.plot([p.x for p in points], [p.y for p in points], color=COLOURS[0], linewidth=1, zorder=1)
    for number, point in enumerate(points):
        plot.errorbar(
            point.x,
            point.y,
            yerr=point.deviation or None,
            fmt=MARKERS[(number + number // len(COLOURS)) % len(MARKERS)],  # unique pairs of marker and colour
            color=COLOURS[number % len(COLOURS)],
            markersize=8,
            capsize=3,
            elinewidth=1,
            label=_label(point.name, point.y),
        )
    if baseline is not None:
        plot.axhline(baseline[1], linestyle="--", color="#555555", linewidth=1, label=_label(*baseline))
    low, high = plot.get_xlim()
    digits = "25" if high > 4 * low else "23456789"  # all labels of a decade would overlap
    plot.xaxis.set_major_formatter(lambda x, _: f"{x:,g}")
    plot.xaxis.set_minor_formatter(lambda x, _: f"{x:,g}" if f"{x:e}"[0] in digits else "")
    plot.spines[["top", "right"]].set_visible(False)
    # next to the plot and below its title, which may be as wide as both
    plot.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, frameon=False, fontsize=9)
    figure.savefig(file, format="png")


def check_matplotlib() -> None:
    """Raise InputError if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise InputError("plots need matplotlib, which is not installed: pip install msense[evaluation]")


def _label(name: str, y: float) -> str:
    text = clean(name).replace("$", r"\$")
    return f"{text if len(text) <= 44 else '…' + text[-43:]}  {y:.3f}"
