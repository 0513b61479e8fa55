"""Evaluate every model on every task, and print one table per task plus a table of costs.

Run the same command again after an interruption to resume.
"""

import sys

from msense.cli.console import run_job
from msense.cli.flags import parse_flags
from msense.cli.reports import show_evaluation
from msense.evaluation.config import EvaluateConfig
from msense.evaluation.run import evaluate


def main() -> None:
    """Evaluate models and print the results."""
    show_evaluation(evaluate(parse_flags(EvaluateConfig, __doc__)))


if __name__ == "__main__":
    sys.exit(run_job(main))
