"""Distill a small student from a teacher and its sense dictionary: `python jobs/distill.py --help`."""

import sys

from msense.cli.console import run_job
from msense.cli.distill import main

if __name__ == "__main__":
    sys.exit(run_job(main))
