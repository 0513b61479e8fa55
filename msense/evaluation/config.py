"""The settings of an evaluation: one frozen, validated model, as `config.py` has it for a build.

Comes in: command line and YAML, by way of `flags.parse_flags`. Goes out: an `EvaluateConfig`, its models and tasks parsed.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from msense.config import MANY, JobConfig
from msense.evaluation.mteb_tasks import PAPER_TASKS
from msense.evaluation.spec import MODELS, TASKS, Spec, TaskSpec, check_names, parse_model, parse_task
from msense.labelled import Columns

ALL_OF_PAPER = "mteb:paper"


def _listed(known: dict[str, str]) -> str:
    return "; ".join(f"{how}: {what}" for how, what in known.items())


class EvaluateConfig(JobConfig):
    """Everything `jobs/evaluate.py` can be told; each field is a flag and a key of the YAML file."""

    model: tuple[str, ...] = Field(
        description=f"what is compared; the first is what others are held against. {_listed(MODELS)}. LABEL=MODEL names it",
    )
    task: tuple[str, ...] = Field(description=f"on what. {_listed(TASKS)}")
    teacher: str | None = Field(
        None,
        description="name or folder of the teacher; default: that of the first dictionary or student, else the demo's",
    )
    revision: str | None = Field(None, description="branch, tag or commit of the teacher on the hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="teacher's dtype")
    shots: tuple[str, ...] = Field(
        ("8",), description="training texts a class of classification: numbers, or `full` for all of them in one draw"
    )
    draws: int = Field(10, ge=2, le=1000, description="times that these texts are drawn")
    text_column: str = Field("text", description="column of the text")
    label_column: str = Field("label", description="column of the label")
    model2vec_python: str | None = Field(
        None, description='file of a Python with `pip install "model2vec[distill]"`, if it is not this one'
    )
    cost: bool = Field(True, description="also measure weights, disk, speed and memory, on the first task's texts")
    threads: int | None = Field(
        None, ge=1, le=4096, description="of all models that run at a time; default: one a core"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of draws and bootstraps")
    workers: int | None = Field(
        None, ge=1, le=MANY, description="models that are measured at a time; default: one a GPU or CPU"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least log lines to show")
    output: str = Field(
        "runs/evaluation.json",
        description="results; FILE.md and plots (FILE-*.png) are written beside them. Results of these models and tasks that "
        "it holds already are kept, if nothing they depend on has changed",
    )

    @field_validator("model", "task", "shots", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return (str(value),) if isinstance(value, str | int) else value

    @field_validator("shots", mode="before")
    @classmethod
    def _known_shots(cls, value: object) -> object:
        words = [str(word) for word in value] if isinstance(value, list | tuple) else [str(value)]
        for word in words:
            if word != "full" and not (word.isascii() and word.isdecimal() and 0 < int(word) < MANY):
                raise ValueError(f"{word!r} is no number of texts from 1 on, nor `full`")
        return words

    @field_validator("model", "task", "shots")
    @classmethod
    def _named(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if not value:
            raise ValueError(f"names nothing: give at least one --{info.field_name}")
        return value

    @field_validator("output")
    @classmethod
    def _usable_folder(cls, value: str) -> str:  # in place of that of other jobs, whose output is a folder
        if not value.endswith(".json") or Path(value).is_dir():
            raise ValueError("must be the name of a file that ends with .json")
        JobConfig._usable_folder(value.rpartition("/")[0] or ".")
        return value

    @property
    def columns(self) -> Columns:
        """Where texts and labels are."""
        return Columns((self.text_column,), self.label_column)

    @property
    def cores(self) -> int:
        """Threads of all models at once."""
        return self.threads or os.cpu_count() or 1

    def specs(self, teacher: str) -> list[Spec]:
        """Return the models to compare.

        Args:
            teacher: of all that need one.

        Raises:
            BadInput: one cannot be read, or two have one name.
        """
        more: dict[str, Any] = {"teacher": teacher, "revision": self.revision, "dtype": self.dtype}
        more["teacher"] = str(Path(teacher).absolute()) if Path(teacher).is_dir() else teacher
        more["python"] = str(Path(self.model2vec_python).absolute()) if self.model2vec_python else None
        found = [replace(parse_model(word), **more) for word in self.model]
        found = [replace(spec, revision=None) if spec.kind == "encoder" else spec for spec in found]
        check_names(self.model, [spec.name for spec in found], "--model")
        return found

    def tasks(self) -> list[TaskSpec]:
        """Return the tasks.

        Raises:
            BadInput: one cannot be read, or two have one name.
        """
        words = [
            own
            for word in self.task
            for own in ([f"mteb:{n}" for n in PAPER_TASKS] if word == ALL_OF_PAPER else [word])
        ]
        found = [parse_task(word) for word in words]
        check_names(words, [spec.title for spec in found], "--task")
        return found
