"""`msense finetune`."""

from typing import Any

from msense.cli.flags import Job
from msense.cli.reports import show_finetuning
from msense.config.finetune import FinetuneConfig

EXAMPLES = """\
  msense finetune --task sst2=data/sst2 --output runs/sst2
  msense finetune --task sentiment=data/reviews --text-column review --teacher BAAI/bge-small-en-v1.5
Next: msense build --teacher runs/sst2/teacher --corpus runs/sst2/corpus.jsonl --output runs/sst2-dictionary
  msense evaluate --teacher runs/sst2/teacher --model teacher replaced:runs/sst2-dictionary --task classifier:sst2=data/sst2"""


def run(config: FinetuneConfig) -> dict[str, Any]:
    """Fine-tune a teacher."""
    from msense.pipelines.finetune import finetune

    return finetune(config)


app = Job(FinetuneConfig, run, show_finetuning).app("finetune", EXAMPLES)
