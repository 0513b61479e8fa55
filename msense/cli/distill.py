"""`msense distill`."""

from typing import Any

from msense.cli.flags import Job
from msense.cli.reports import show_distillation
from msense.config.distill import DistillConfig

EXAMPLES = """\
  msense distill --dictionary runs/demo --student static --output runs/static
  msense distill --dictionary runs/demo --student layers:2 --epochs 3 --output runs/layers2
  msense distill --config general-student --dictionary runs/general/dictionary --student table --output runs/table
Next: msense evaluate --model teacher student:runs/static --task NAME=DATA"""


def run(config: DistillConfig) -> dict[str, Any]:
    """Distill a student."""
    from msense.pipelines.distill import distill_student

    return distill_student(config)


app = Job(DistillConfig, run, show_distillation).app("distill", EXAMPLES)
