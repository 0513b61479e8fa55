"""Run the benchmarks behind the README's figures: `python jobs/benchmark.py NAME... --corpus FILES`.

Each figure that matters is a ratio of two things timed side by side in one run. The last line of the output is a flat
JSON object. Install the other libraries with `pip install msense[bench]`; without them their figures are omitted.
"""

import argparse
import importlib
import json
import logging
import os
import sys

from benchmarks.shared import Bench, Figures

from msense.cli.console import run_job
from msense.config.build import DEMO_CORPUS

logger = logging.getLogger("msense.benchmark")
BENCHMARKS = {  # name: module of jobs/benchmarks with a function of that name, and what it measures
    "gather": ("embedding", "embed stage over the bare forward pass; rebuilds the shared run"),
    "plan": ("plan", "planning pass over a synthetic token stream; no input"),
    "kmeans": ("clustering", "k-means against scikit-learn, FAISS and SuperKMeans, and its lower bound; shared run"),
    "senses": ("senses", "senses by budget against 20 per token; --data with banking77/ and coarsewsd/"),
    "distill": ("distilling", "students of Banking77 against their teacher; --data with banking77/"),
    "step": ("training", "a training step and its losses against alternatives; --data with banking77/"),
    "encode": ("encoding", "texts per second of students, teacher and model2vec; --data with banking77/"),
    "replace": ("replacing", "replacing embeddings over one matrix product with them; shared run"),
    "nodes": ("nodes", "embed stage on two nodes over one, and the hardware's limit; rebuilds --output"),
    "driver": ("embedding", "the driver's peak memory for a tenfold corpus; no input"),
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    listed = "\n".join(f"  {name:<9}{what}" for name, (_, what) in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"benchmarks (the shared run reads --corpus and is built in --output by the first that needs it):\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("names", nargs="+", choices=BENCHMARKS, metavar="NAME", help="benchmarks to run, in this order")
    add("--corpus", nargs="+", default=[DEMO_CORPUS], metavar="URI", help="text of the shared run")
    add("--data", metavar="DIR", help="folder of labelled data sets")
    add("--peer-python", metavar="FILE", help="Python interpreter with model2vec, to compare with it")
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes or threads (default: all cores)",
    )
    add("--senses", type=int, default=20, metavar="K", help="senses per token (default: 20)")
    add("--max-occurrences", type=int, default=1000, metavar="N", help="occurrences per token (default: 1000)")
    add("--sample", type=float, metavar="F", help="share of --corpus that nodes reads")
    add("--turns", type=int, default=3, metavar="N", help="repetitions of nodes (default: 3)")
    add("--output", default="runs/bench", help="folder of the shared run (default: runs/bench)")
    return parser.parse_args(argv)


def main() -> None:
    """Run the requested benchmarks and print their figures as one JSON object."""
    given = parse()
    bench = Bench(given)
    figures: Figures = {}
    for name in given.names:
        measured: Figures = getattr(importlib.import_module(f"benchmarks.{BENCHMARKS[name][0]}"), name)(bench)
        for key, value in measured.items():
            logger.info("%s %.4g", key, value)
        figures |= measured
    sys.stdout.write(json.dumps({key: float(f"{value:.4g}") for key, value in figures.items()}) + "\n")


if __name__ == "__main__":
    sys.exit(run_job(main))
