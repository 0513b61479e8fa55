"""Measure what the README claims: `python jobs/bench.py NAME... --corpus FILES`.

Every figure that matters is a ratio of two things measured side by side in this run. The last line of the output is one
flat JSON object. Other libraries come with `pip install msense[bench]`; figures against one that is missing are left out.
"""

import argparse
import importlib
import json
import logging
import os
import sys
from typing import NamedTuple

from benches.shared import Bench, Figures

from msense.cli import run_job
from msense.config import DEMO_CORPUS

logger = logging.getLogger("msense.bench")


class Subject(NamedTuple):
    """Where a benchmark is, and what it measures and needs."""

    module: str  # of jobs/benches; its function is called as the benchmark is
    what: str


BENCHES = {
    "gather": Subject(
        "occurrences", "occurrences stage over the bare forward pass; builds the shared run of --corpus anew"
    ),
    "plan": Subject("plan", "planning pass on a made-up stream of tokens; needs nothing"),
    "kmeans": Subject("clustering", "k-means against scikit-learn, FAISS and SuperKMeans, and its limit; shared run"),
    "scaling": Subject("clustering", "clustering stage with all workers over one, and its ceiling; shared run"),
    "sizes": Subject("sizes", "k-means against the same for many sizes of tokens, K and width; needs nothing"),
    "mcl": Subject("markov", "Markov clustering against the package markov-clustering; shared run"),
    "senses": Subject("senses", "senses by budget against 20 for every token; --data with banking77/ and coarsewsd/"),
    "distill": Subject("distilling", "students of Banking77 against their teacher; --data with banking77/"),
    "ood": Subject("distilling", "students of the text of --corpus, tested on Banking77; --data with banking77/"),
    "step": Subject("training", "a training step and its losses against other ways; --data with banking77/"),
    "encode": Subject("encoding", "texts per second of students, teacher and model2vec; --data with banking77/"),
    "replace": Subject("replacing", "replacing embeddings over one product with them; shared run"),
    "parts": Subject(
        "parts", "large tokens in parts: rounds, bytes, memory and time against their cost model; needs nothing"
    ),
    "nodes": Subject("nodes", "occurrences stage on two nodes over one, and its ceiling; builds in --output anew"),
    "overhead": Subject("nodes", "a build on Ray with one worker over the same without Ray; builds in --output anew"),
    "driver": Subject("occurrences", "driver's memory for a corpus ten times larger; needs nothing"),
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    listed = "\n".join(f"  {name:<9}{subject.what}" for name, subject in BENCHES.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"benchmarks (the shared run is of --corpus in --output, made by the first that needs it):\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="+", choices=BENCHES, metavar="NAME", help="what to measure, in this order")
    parser.add_argument("--corpus", nargs="+", default=[DEMO_CORPUS], metavar="URI", help="text of the shared run")
    parser.add_argument("--data", metavar="DIR", help="folder of labelled data, for senses")
    parser.add_argument("--peer-python", metavar="FILE", help="a Python that has model2vec, to compare with it")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes or threads of each side (default: one a core)",
    )
    parser.add_argument("--senses", type=int, default=20, metavar="K", help="senses a token (default: 20)")
    parser.add_argument("--max-occurrences", type=int, default=1000, metavar="N", help="cap a token (default: 1000)")
    parser.add_argument("--sample", type=float, metavar="F", help="share of --corpus for nodes and overhead")
    parser.add_argument("--turns", type=int, metavar="N", help="repeats of nodes and overhead (default: 3)")
    parser.add_argument("--output", default="runs/bench", help="folder of the shared run (default: runs/bench)")
    return parser.parse_args(argv)


def main() -> None:
    """Run the benchmarks asked for and print one JSON object last."""
    given = parse()
    bench = Bench(given)
    figures: Figures = {}
    for name in given.names:
        measure = getattr(importlib.import_module(f"benches.{BENCHES[name].module}"), name)
        found: Figures = measure(bench)
        for key, value in found.items():
            logger.info("%s %.4g", key, value)
        figures |= found
    sys.stdout.write(json.dumps({key: float(f"{value:.4g}") for key, value in figures.items()}) + "\n")


if __name__ == "__main__":
    sys.exit(run_job(main))
