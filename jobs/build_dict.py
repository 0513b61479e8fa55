"""Embed a corpus with a teacher and cluster the embeddings of every token into a sense dictionary.

Without --corpus and --teacher, the demo is built: docstrings of installed Python packages, read by all-MiniLM-L6-v2.
Run the same command again after an interruption to resume.
"""

import sys

from msense.cli.console import run_job
from msense.cli.flags import parse_flags
from msense.cli.reports import show_build
from msense.config.build import BuildConfig
from msense.pipelines.build import build_dictionary


def main() -> None:
    """Build a dictionary and print a summary."""
    show_build(build_dictionary(parse_flags(BuildConfig, __doc__)))


if __name__ == "__main__":
    sys.exit(run_job(main))
