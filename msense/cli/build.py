"""`msense build`."""

from typing import Any

from msense.cli.flags import Job
from msense.cli.reports import show_build
from msense.config.build import BuildConfig

EXAMPLES = """\
  msense build --output runs/demo
  msense build --corpus texts/ --teacher BAAI/bge-base-en-v1.5 --output runs/mine --dry-run
  msense build --config cluster --corpus s3://BUCKET/texts --teacher NAME --output s3://BUCKET/runs/mine
Next: msense show runs/demo key; msense distill --dictionary runs/demo"""


def run(config: BuildConfig) -> dict[str, Any]:
    """Build a dictionary."""
    from msense.pipelines.build import build_dictionary

    return build_dictionary(config)


app = Job(BuildConfig, run, show_build).app("build", EXAMPLES)
