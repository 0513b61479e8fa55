"""Evaluate every model on every task, and print one table per task plus a table of costs.

Run the same command again after an interruption to resume.
"""

from msense.cli.flags import parse_flags
from msense.cli.reports import show_evaluation
from msense.evaluation.config import EvaluateConfig
from msense.evaluation.run import evaluate


def main() -> None:
    """Evaluate models and print the results."""
    show_evaluation(evaluate(parse_flags(EvaluateConfig, __doc__)))
