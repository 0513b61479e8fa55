"""Settings of an evaluation, validated alike from the command line and YAML."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from msense.config.base import HelpGroups, JobConfig
from msense.constants import MAX_INT32
from msense.evaluation.spec import MODELS, PAPER_TASKS, TASKS, Spec, TaskSpec, check_names, parse_model, parse_task
from msense.teacher.spec import Attention

ALL_OF_PAPER = "mteb:paper"
_MODELS, _TASKS = ("; ".join(f"{word}: {meaning}" for word, meaning in known.items()) for known in (MODELS, TASKS))
Shots = Annotated[str, Field(pattern="^(full|[1-9][0-9]{0,8})$", coerce_numbers_to_str=True)]


class EvaluateConfig(JobConfig):
    """Settings of `msense evaluate`; each field is a flag and a YAML key.

    Example:
        >>> config = EvaluateConfig(model=("teacher", "truncated:2"), task=("banking77=data/banking77",))
        >>> [spec.name for spec in config.specs("all-MiniLM-L6-v2")]
        ['teacher', 'truncated:2']
    """

    help_groups: ClassVar[HelpGroups] = {
        "Common options": ("model", "task", "teacher", "output", "workers", "local"),
        "Text": ("shots", "draws", "text_column", "label_column", "pair_columns"),
        "Models": ("revision", "attention", "dtype", "model2vec_python", "cost", "threads"),
        "Run": ("seed", "log_level"),
    }

    model: tuple[str, ...] = Field(
        min_length=1,
        description=f"models to compare; the first is the baseline. {_MODELS}. LABEL=MODEL sets its name in tables",
    )
    task: tuple[str, ...] = Field(min_length=1, description=f"tasks. {_TASKS}")
    teacher: str | None = Field(
        None, description="teacher, by name or folder; default: that of the first dictionary or student, or the demo's"
    )
    revision: str | None = Field(None, description="branch, tag or commit of the teacher on the Hub")
    attention: Attention = Field(
        "auto",
        description="a decoder's attention: causal or bidirectional; auto: as its dictionary or config.json says",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="teacher's dtype")
    shots: tuple[Shots, ...] = Field(
        ("8",),
        min_length=1,
        description="training texts per class for classification: numbers, or `full` for all texts in one draw",
    )
    draws: int = Field(10, ge=2, le=1000, description="random draws of the training texts")
    text_column: str = Field("text", description="column of the text")
    label_column: str = Field("label", description="column of the label")
    pair_columns: tuple[str, ...] = Field(
        (),
        max_length=3,
        description="columns of pairs of texts: first, second, score or label; default: s1, sentence1 or text1, and so on, and "
        "score or label",
    )
    model2vec_python: str | None = Field(
        None, description='Python executable with `pip install "model2vec[distill,quantization]"`, if not this one'
    )
    cost: bool = Field(True, description="also measure weights, disk, speed and memory, on the first task's texts")
    threads: int | None = Field(
        None, ge=1, le=4096, description="threads of all concurrent models; default: one per core"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of draws and bootstrap")
    workers: int | None = Field(
        None, ge=1, le=MAX_INT32, description="models evaluated concurrently; default: one per GPU or CPU"
    )
    output: str = Field(
        "runs/evaluation.json",
        description="results file; FILE.md and plots (FILE-*.png) are written next to it. Existing results of the same models "
        "and tasks are kept if nothing they depend on has changed",
    )

    @field_validator("model", "task", "shots", mode="before")
    @classmethod
    def _as_tuple(cls, value: object) -> object:
        return (value,) if isinstance(value, str | int) else value

    @field_validator("pair_columns")
    @classmethod
    def _check_pair_columns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) not in (0, 3):
            raise ValueError("must be three different columns: FIRST SECOND LABEL")
        return value

    @field_validator("output")
    @classmethod
    def _check_output(cls, value: str) -> str:  # overrides the check of other jobs, whose output is a folder
        if not value.endswith(".json") or Path(value).is_dir():
            raise ValueError("must be a file name ending in .json")
        JobConfig._check_output(value.rpartition("/")[0] or ".")
        return value

    @property
    def cores(self) -> int:
        """Total threads of all concurrent models."""
        return self.threads or os.cpu_count() or 1

    def specs(self, teacher: str) -> list[Spec]:
        """Return the models to compare; InputError if one cannot be parsed or two have the same name."""
        python = str(Path(self.model2vec_python).absolute()) if self.model2vec_python else None
        teacher = str(Path(teacher).absolute()) if Path(teacher).is_dir() else teacher
        common: dict[str, Any] = {"teacher": teacher, "dtype": self.dtype, "python": python}
        common["attention"] = self.attention
        parsed = [parse_model(word) for word in self.model]
        specs = [replace(s, **common, revision=None if s.kind == "encoder" else self.revision) for s in parsed]
        check_names(self.model, [spec.name for spec in specs], "--model")
        return specs

    def tasks(self) -> list[TaskSpec]:
        """Return the tasks; InputError if one cannot be parsed or two have the same name."""
        paper = [f"mteb:{name}" for name in PAPER_TASKS]
        words = [own for word in self.task for own in (paper if word == ALL_OF_PAPER else [word])]
        tasks = [parse_task(word) for word in words]
        check_names(words, [task.title for task in tasks], "--task")
        return tasks
