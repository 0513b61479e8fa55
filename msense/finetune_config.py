"""The settings of a fine-tuning: one frozen, validated model, as `config.py` has it for a build.

Comes in: command line and YAML, by way of `flags.parse_flags`. Goes out: a `FinetuneConfig`, its task read.
"""

from typing import Any, Literal

from pydantic import Field, field_validator

from msense.config import DEMO_TEACHER, JobConfig
from msense.errors import BadInput
from msense.glue import GLUE, GlueTask, task_of
from msense.labelled import Columns

_FREE = ("workers", "output", "log_level")


class FinetuneConfig(JobConfig):
    """Everything `jobs/finetune.py` can be told; each field is a flag and a key of the YAML file."""

    task: str = Field(
        description="NAME=DATA: a folder with train and, if there is one, dev or validation as csv, jsonl or parquet, or "
        f"hf://dataset[:config]; of GLUE's ({', '.join(GLUE)}) the name is enough"
    )
    teacher: str = Field(DEMO_TEACHER, description="Hugging Face name or folder of the teacher to fine-tune")
    revision: str | None = Field(None, description="branch, tag or commit of the teacher on the hub")
    regression: bool = Field(False, description="labels are numbers (GLUE's stsb knows)")
    text_column: str = Field("text", description="column of the text")
    label_column: str = Field("label", description="column of the label")
    pooling: Literal["mean", "cls", "lasttoken"] | None = Field(
        None, description="what the classifier reads; default: as the teacher pools"
    )
    max_length: int | None = Field(
        None, ge=4, description="longest text in tokens; default: the teacher's own, at most 512"
    )
    epochs: int = Field(3, ge=1, le=1000, description="times that each text is trained on")
    lr: float = Field(1e-4, gt=0, le=1, description="highest learning rate; it rises first, then falls to 0 in a line")
    batch_size: int = Field(32, ge=1, le=1 << 16, description="texts of a step on all workers")
    warmup: float = Field(0.06, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.01, ge=0, le=1, description="of AdamW")
    clip: float = Field(1.0, ge=0, le=1e6, description="largest norm of the gradient, 0 = any")
    dropout: float = Field(0.1, ge=0, lt=1, description="of the classifier")
    train_dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="in which the teacher computes")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of everything random")
    workers: int | None = Field(
        None, ge=1, description="workers at a time; default: one a GPU (a CPU where there is none)"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least log lines to show")
    output: str = Field(
        "runs/teacher",
        description="run folder, on a disk that all workers share; the teacher is its subfolder teacher/",
    )

    @field_validator("task")
    @classmethod
    def _named(cls, value: str) -> str:
        name, _, source = value.partition("=")
        if not name or (not source and name not in GLUE):
            raise ValueError(f"must be NAME=DATA, or one of {', '.join(GLUE)}")
        return value

    @field_validator("output")
    @classmethod
    def _local(cls, value: str) -> str:
        if "://" in value:
            raise ValueError("must be a local folder: a teacher is read from a folder or from the hub")
        return value

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.partition("=")[0]

    @property
    def data(self) -> GlueTask:
        """How the task is read.

        Raises:
            BadInput: a task of GLUE with labels is to be a regression.
        """
        found = task_of(self.name, Columns((self.text_column,), self.label_column), regression=self.regression)
        if self.regression and not found.regression:
            raise BadInput(f"task {self.name} has labels, no numbers: leave --regression out, or give it another name")
        return found

    @property
    def source(self) -> str:
        """Where the data are."""
        return self.task.partition("=")[2] or self.data.source

    def of_results(self) -> dict[str, Any]:
        """Return the settings on which the result depends."""
        return self.model_dump(mode="json", exclude={*_FREE, "task"}) | {"name": self.name}
