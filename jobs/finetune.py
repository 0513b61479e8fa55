"""Fine-tune a teacher with a classifier, as the teacher of a dictionary and of students for one task.

Next: build_dict.py --teacher OUTPUT/teacher --corpus OUTPUT/corpus.jsonl, distill.py, and evaluate.py --teacher
OUTPUT/teacher --task classifier:NAME=DATA. Run the same command again after an interruption to resume.
"""

import sys

from msense.cli.console import run_job
from msense.cli.flags import parse_flags
from msense.cli.reports import show_finetuning
from msense.config.finetune import FinetuneConfig
from msense.pipelines.finetune import finetune


def main() -> None:
    """Fine-tune a teacher and print a summary."""
    show_finetuning(finetune(parse_flags(FinetuneConfig, __doc__)))


if __name__ == "__main__":
    sys.exit(run_job(main))
