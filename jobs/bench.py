"""Former name of `jobs/benchmark.py`."""

import sys

from benchmark import main

from msense.cli.console import run_job

if __name__ == "__main__":
    sys.exit(run_job(main))
