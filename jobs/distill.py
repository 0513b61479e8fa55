"""Label a text with the senses that a dictionary's teacher sees in it, and train a small student on the labels.

Without --corpus, the text is that of the dictionary. Run the same command again after an interruption to resume.
"""

import sys

from msense.cli.console import run_job
from msense.cli.flags import parse_flags
from msense.cli.reports import show_distillation
from msense.config.distill import DistillConfig
from msense.pipelines.distill import distill_student


def main() -> None:
    """Distill a student and print a summary."""
    show_distillation(distill_student(parse_flags(DistillConfig, __doc__)))


if __name__ == "__main__":
    sys.exit(run_job(main))
