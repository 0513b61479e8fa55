"""Fine-tune a teacher with a classifier on a task: `python jobs/finetune.py --help`."""

import logging
import sys
from typing import Any

from msense.cli.console import run_job, show_table
from msense.cli.flags import parse_flags
from msense.config.finetune import FinetuneConfig
from msense.pipelines.finetune import finetune

DESCRIPTION = """Fine-tune a teacher with a classifier: the teacher of a dictionary and students for that one task.

Then: build_dict.py --teacher OUTPUT/teacher --corpus OUTPUT/corpus.jsonl, distill.py, and
evaluate.py --teacher OUTPUT/teacher --task classifier:NAME=DATA. Run the same command again after any interruption."""


def show_summary(summary: dict[str, Any]) -> None:
    """Print what was made."""
    last = summary["epochs"][-1]
    rows = [(name.replace("_", " "), f"{value:,.4g}") for name, value in last.items()]
    rows += [("seconds", f"{summary['seconds']:,.0f}"), ("teacher", summary["teacher"]), ("corpus", summary["corpus"])]
    show_table("Fine-tuned teacher", rows)


def main() -> None:
    """Fine-tune, and show what was made."""
    config = parse_flags(FinetuneConfig, DESCRIPTION)
    logging.getLogger("msense").setLevel(config.log_level.upper())
    show_summary(finetune(config))


if __name__ == "__main__":
    sys.exit(run_job(main))
