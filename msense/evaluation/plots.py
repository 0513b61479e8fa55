"""Plots of an evaluation as PNG: quality against speed, quality against dictionary size."""

from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

from msense.text import clean

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B6914")  # Okabe and Ito 2008
MARKERS = "osD^vPXh"


def draw(
    file: Path,
    *,
    title: str,
    axes: tuple[str, str],
    points: Mapping[str, tuple[float, float, float]],
    baseline: tuple[str, float] | None = None,
) -> None:
    """Draw x (logarithmic), y and deviation of each model, and a line for name and y of the baseline, into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 5.0), dpi=150, layout="constrained")  # without pyplot: no window, no global state
    plot = figure.add_subplot()
    plot.set_title(fill(clean(title), 90).replace("$", r"\$"), loc="left")
    note = " (± standard deviation over draws)" if any(deviation for *_, deviation in points.values()) else ""
    plot.set(xscale="log", xlabel=axes[0], ylabel=axes[1] + note, axisbelow=True)
    plot.grid(True, which="major", color="#dddddd", linewidth=0.8)
    for number, (name, (x, y, deviation)) in enumerate(sorted(points.items(), key=lambda point: -point[1][1])):
        shown: dict[str, Any] = {"yerr": deviation or None, "capsize": 3, "elinewidth": 1, "label": _label(name, y)}
        marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]  # unique pairs of marker and colour
        plot.errorbar(x, y, fmt=marker, color=COLOURS[number % len(COLOURS)], markersize=8, **shown)
    if baseline is not None:
        plot.axhline(baseline[1], linestyle="--", color="#555555", linewidth=1, label=_label(*baseline))
    low, high = plot.get_xlim()
    digits = "25" if high > 4 * low else "23456789"  # all labels of a decade would overlap
    plot.xaxis.set_major_formatter("{x:,g}")
    plot.xaxis.set_minor_formatter(lambda x, _: f"{x:,g}" if f"{x:e}"[0] in digits else "")
    plot.spines[["top", "right"]].set_visible(False)
    # next to the plot and below its title, which may be as wide as both
    plot.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, frameon=False, fontsize=9)
    figure.savefig(file, format="png")


def _label(name: str, y: float) -> str:
    text = clean(name).replace("$", r"\$")
    return f"{text if len(text) <= 44 else '…' + text[-43:]}  {y:.3f}"
