"""Compare a teacher, its dictionary and its students with others: `python jobs/evaluate.py --help`."""

import logging
import sys

from msense.cli import run_job
from msense.evaluation.config import EvaluateConfig
from msense.evaluation.report import show
from msense.evaluation.run import evaluate
from msense.flags import parse_flags

DESCRIPTION = """Measure models on tasks, side by side: quality with its uncertainty, and cost.

Run the same command again after any interruption: it goes on with what is missing."""


def main() -> None:
    """Evaluate, and show what was found."""
    config = parse_flags(EvaluateConfig, DESCRIPTION)
    logging.getLogger("msense").setLevel(config.log_level.upper())
    show(evaluate(config))


if __name__ == "__main__":
    sys.exit(run_job(main))
