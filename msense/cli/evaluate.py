"""`msense evaluate`."""

from typing import TYPE_CHECKING, Any

from msense.cli.flags import Job
from msense.cli.reports import show_evaluation
from msense.evaluation.config import EvaluateConfig

if TYPE_CHECKING:
    from msense.evaluation.report import Evaluation

EXAMPLES = """\
  msense evaluate --model teacher student:runs/static truncated:2 --task banking77=data/banking77
  msense evaluate --model teacher bm25 student:runs/static --task retrieval:docs=data/docs --output runs/docs.json
  msense evaluate --model teacher student:runs/static --task similarity:sts=data/sts,split=dev"""


def run(config: EvaluateConfig) -> "Evaluation":
    """Evaluate models."""
    from msense.evaluation.run import evaluate

    return evaluate(config)


def to_json(evaluation: "Evaluation") -> dict[str, Any]:
    """Return all results as JSON values."""
    from msense.evaluation.report import to_json as report_json

    return report_json(evaluation)


app = Job(EvaluateConfig, run, show_evaluation, to_json).app("evaluate", EXAMPLES)
