"""Fine-tune a teacher with a classifier on a task: `python jobs/finetune.py --help`."""

import sys

from msense.cli.console import run_job
from msense.cli.finetune import main

if __name__ == "__main__":
    sys.exit(run_job(main))
