"""Run the benchmarks behind the figures of jobs/benchmarks/README.md: `python jobs/benchmark.py NAME... --corpus FILES`.

Each figure that matters is a ratio of two things timed side by side in one run. The last line of the output is a flat
JSON object. Without FAISS (extra `bench`) its figures are omitted.
"""

import argparse
import importlib
import json
import os
import sys

from benchmarks.sets import DEFAULT_SETS
from benchmarks.shared import Bench, Figures

from msense.cli.console import run_job
from msense.config.build import DEMO_CORPUS

BENCHMARKS = {  # each a function of that name in the module of that name in jobs/benchmarks
    "gather": "embed stage over the bare forward pass; rebuilds the shared run",
    "kmeans": "k-means against scikit-learn and FAISS, and its lower bound; shared run",
    "step": "a training step and its losses against alternatives; --data with banking77/",
    "encode": "texts per second of students, teacher and model2vec; --data with banking77/",
    "once": "how often the teacher reads a text on the way to two students",
    "explore": "pages, search and neighbours of the dictionary --general, beside a second one in --data",
    "tasks": "quality of students of the data sets in --sets, and of --general; --data with retrieval/, banking77/, sts/",
}


def parse(argv: list[str] | None = None) -> Bench:
    """Parse the command line."""
    listed = "\n".join(f"  {name:<9}{what}" for name, what in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"benchmarks (the shared run reads --corpus and is built in --output by the first that needs it):\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, cores = parser.add_argument, os.cpu_count() or 1
    add("names", nargs="+", choices=BENCHMARKS, metavar="NAME", help="benchmarks to run, in this order")
    add("--corpus", nargs="+", default=[DEMO_CORPUS], metavar="URI", help="text of the shared run")
    add("--data", metavar="DIR", help="folder of labelled data sets")
    add("--peer-python", metavar="FILE", help="Python with model2vec; without it its figures are omitted")
    add("--workers", type=int, default=cores, metavar="N", help="processes or threads (default: all cores)")
    add("--senses", type=int, default=20, metavar="K", help="senses per token (default: 20)")
    add("--max-occurrences", type=int, default=1000, metavar="N", help="occurrences per token (default: 1000)")
    add("--output", default="runs/bench", help="folder of the shared run (default: runs/bench)")
    add("--epochs", type=int, metavar="N", help="of the students of once and tasks (default: that of jobs/distill.py)")
    add("--sets", nargs="+", default=DEFAULT_SETS, metavar="NAME", help=f"of tasks (default: {' '.join(DEFAULT_SETS)})")
    add("--general", metavar="DIR", help="run folder of a student, which tasks evaluates on --sets and --sts")
    add("--sts", nargs="+", default=["stsb,split=dev"], metavar="NAME", help="sets in sts/ (default: stsb,split=dev)")
    return parser.parse_args(argv, Bench())


def main() -> None:
    """Run the requested benchmarks and print their figures as one JSON object."""
    bench, figures = parse(), Figures()
    for name in bench.names:
        figures |= getattr(importlib.import_module(f"benchmarks.{name}"), name)(bench)
    sys.stdout.write(json.dumps({key: float(f"{value:.4g}") for key, value in figures.items()}) + "\n")


if __name__ == "__main__":
    sys.exit(run_job(main))
