"""Evaluate a teacher, its dictionaries and students against other models: `python jobs/evaluate.py --help`."""

import sys

from msense.cli.console import run_job
from msense.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(run_job(main))
