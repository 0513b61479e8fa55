"""Build a sense dictionary from a corpus and a teacher: `python jobs/build_dict.py --help`."""

import sys

from msense.cli.build_dict import main
from msense.cli.console import run_job

if __name__ == "__main__":
    sys.exit(run_job(main))
