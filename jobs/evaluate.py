"""Evaluate a teacher, its dictionaries and students against other models: `python jobs/evaluate.py --help`."""

import logging
import sys

from msense.cli.console import run_job
from msense.cli.flags import parse_flags
from msense.cli.reports import show
from msense.evaluation.config import EvaluateConfig
from msense.evaluation.run import evaluate

DESCRIPTION = """Evaluate every model on every task and print one table per task plus a cost table.

Rerun the same command after an interruption to resume."""


def main() -> None:
    """Evaluate and print the results."""
    config = parse_flags(EvaluateConfig, DESCRIPTION)
    logging.getLogger("msense").setLevel(config.log_level.upper())
    show(evaluate(config))


if __name__ == "__main__":
    sys.exit(run_job(main))
