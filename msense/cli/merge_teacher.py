"""`msense merge-teacher`."""

from typing import Any

from msense.cli.console import show_table
from msense.cli.flags import Job
from msense.config.merge import MergeConfig

EXAMPLES = """\
  msense merge-teacher --adapter McGill-NLP/LLM2Vec-Meta-Llama-3-8B-Instruct-mntp \\
      McGill-NLP/LLM2Vec-Meta-Llama-3-8B-Instruct-mntp-supervised --llm2vec llama3 --output teachers/llm2vec
  msense merge-teacher --teacher models/base --adapter adapters/mine --output teachers/mine
Next: msense build --teacher teachers/llm2vec --corpus texts/ --output runs/llm2vec"""


def run(config: MergeConfig) -> dict[str, Any]:
    """Merge a teacher."""
    from msense.pipelines.merge import merge_teacher

    return merge_teacher(config)


def show(made: dict[str, Any]) -> None:
    """Print what was merged."""
    names = ", ".join(own["name"] for own in made["adapters"])
    rows = [("base", made["base"]["name"]), ("adapters", f"{names}: {made['layers']:,} layers changed")]
    show_table("Teacher", [*rows, ("teacher", made["output"])])


app = Job(MergeConfig, run, show).app("merge-teacher", EXAMPLES)
