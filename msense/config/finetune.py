"""Settings of a fine-tuning."""

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from msense.config.base import HelpGroups, JobConfig, TrainDtype
from msense.constants import DEMO_TEACHER
from msense.corpus.glue import GLUE, GlueTask, get_task
from msense.corpus.labelled import Columns
from msense.errors import InputError
from msense.teacher.spec import Attention

_FREE = {"local", "workers", "output", "log_level"}  # without influence on the result


class FinetuneConfig(JobConfig):
    """Settings of `msense finetune`; each field is a flag and a key of the YAML file.

    Example:
        >>> config = FinetuneConfig(task="sentiment=data/sentiment", epochs=2)
        >>> config.name, config.source
        ('sentiment', 'data/sentiment')
    """

    help_groups: ClassVar[HelpGroups] = {
        "Common options": ("task", "teacher", "epochs", "lr", "output", "workers", "local"),
        "Text": ("text_column", "label_column", "regression"),
        "Teacher": ("revision", "attention", "pooling", "max_length"),
        "Training": ("batch_size", "warmup", "weight_decay", "clip", "dropout", "train_dtype"),
        "Run": ("seed", "log_level"),
    }

    task: str = Field(
        description="NAME=DATA, where DATA is a folder with train and optionally dev or validation as csv, jsonl or "
        f"parquet, or hf://dataset[:config]; for a GLUE task ({', '.join(GLUE)}) the name suffices"
    )
    teacher: str = Field(DEMO_TEACHER, description="Hugging Face name or folder of the teacher to fine-tune")
    revision: str | None = Field(None, description="branch, tag or commit of the teacher on the hub")
    attention: Attention = Field(
        "auto", description="a decoder's attention: causal or bidirectional; auto: as config.json says"
    )
    regression: bool = Field(False, description="labels are numbers (the default for GLUE's stsb)")
    text_column: str = Field("text", description="name of the text column")
    label_column: str = Field("label", description="name of the label column")
    pooling: Literal["mean", "cls", "lasttoken"] | None = Field(None, description="default: the pooling of the teacher")
    max_length: int | None = Field(None, ge=4, description="tokens per text; default: the teacher's maximum, up to 512")
    epochs: int = Field(3, ge=1, le=1000, description="passes over the training texts")
    lr: float = Field(1e-4, gt=0, le=1, description="peak learning rate, after warmup; decays linearly to 0")
    batch_size: int = Field(32, ge=1, le=1 << 16, description="texts per step, over all workers")
    warmup: float = Field(0.06, ge=0, lt=1, description="fraction of the steps with increasing learning rate")
    weight_decay: float = Field(0.01, ge=0, le=1, description="weight decay of AdamW")
    clip: float = Field(1.0, ge=0, le=1e6, description="maximum gradient norm; 0: no clipping")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout of the classifier")
    train_dtype: TrainDtype = "auto"
    seed: int = Field(0, ge=0, lt=2**63, description="random seed")
    output: str = Field(
        "runs/teacher", description="run folder on a disk shared by all workers; the teacher is its subfolder teacher/"
    )

    @field_validator("task")
    @classmethod
    def _check_task(cls, value: str) -> str:
        name, _, source = value.partition("=")
        if not name or (not source and name not in GLUE):
            raise ValueError(f"must be NAME=DATA, or one of {', '.join(GLUE)}")
        return value

    @field_validator("output")
    @classmethod
    def _check_local_output(cls, value: str) -> str:
        if "://" in value:
            raise ValueError("must be a local folder: teachers are only read from folders and from the hub")
        return value

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.partition("=")[0]

    @property
    def data(self) -> GlueTask:
        """The task's columns and metrics; raises `InputError` for a regression on a GLUE classification task."""
        task = get_task(self.name, Columns((self.text_column,), self.label_column), regression=self.regression)
        if self.regression and not task.regression:
            raise InputError(f"task {self.name} is a classification: remove --regression, or use another task name")
        return task

    @property
    def source(self) -> str:
        """The data's folder or dataset."""
        return self.task.partition("=")[2] or self.data.source

    def of_results(self) -> dict[str, Any]:
        """Return the settings that the result depends on."""
        return self.model_dump(mode="json", exclude=_FREE | {"task"}) | {"name": self.name}
