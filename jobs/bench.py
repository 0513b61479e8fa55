"""Measure what the README claims: `python jobs/bench.py NAME ... --corpus FILES`.

Every figure that matters is a ratio of two things measured side by side in this run. The last line of the output is one
JSON object. A library to compare with that is not installed is left out: `pip install "msense[bench]"` brings all.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable

from benches import clustering, reading, replacing, senses
from benches.shared import Bench, Figures

from msense.cli import run_job
from msense.config import DEMO_CORPUS

logger = logging.getLogger("msense.bench")

BENCHES: dict[str, Callable[[Bench], Figures]] = {
    f.__name__: f
    for f in (
        reading.gather,
        reading.plan,
        clustering.kmeans,
        clustering.stage,
        clustering.scaling,
        clustering.sizes,
        senses.senses,
        senses.mcl,
        replacing.replace,
        reading.driver,
    )
}


def main() -> None:
    """Run the measurements asked for and print one JSON object last."""
    told = "\n".join(f"  {name:8} {(f.__doc__ or '').splitlines()[0]}" for name, f in BENCHES.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{told}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=BENCHES, metavar="NAME", help="what to measure, see above")
    parser.add_argument("--corpus", nargs="+", default=[DEMO_CORPUS], metavar="URI", help="text of the shared run")
    parser.add_argument("--data", metavar="DIR", help="for senses: folder with banking77/ and coarsewsd/")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes of each side (default: one a core)",
    )
    parser.add_argument("--senses", type=int, default=20, metavar="K", help="senses a token (default: 20)")
    parser.add_argument("--max-occurrences", type=int, default=1000, metavar="N", help="cap a token (default: 1000)")
    parser.add_argument(
        "--output", default="runs/bench", help="run folder that the measurements share (default: runs/bench)"
    )
    given = parser.parse_args()
    bench = Bench(given)
    figures: Figures = {}
    for name in dict.fromkeys(given.names):
        found = BENCHES[name](bench)
        for key, value in found.items():
            logger.info("%s %.4g", key, value)
        figures |= found
    sys.stdout.write(json.dumps({key: float(f"{value:.4g}") for key, value in figures.items()}) + "\n")


if __name__ == "__main__":
    sys.exit(run_job(main))
