"""Settings that all jobs share, the checks of their values, and errors that list everything wrong at once."""

import difflib
import os.path
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from msense.errors import InputError
from msense.text import is_utf8, redact

ConfigT = TypeVar("ConfigT", bound=BaseModel)
HelpGroups = dict[str, tuple[str, ...]]  # of flags, by title
TrainDtype = Annotated[
    Literal["auto", "float32", "bfloat16"],
    Field(description="dtype that training computes in; auto: bfloat16 where it is faster, otherwise float32"),
]
MAX_RANKS = 64  # of one node
_SHOWN_ERRORS = 20
_TEXTS = (
    *("corpus", "queries", "text_column", "id_column", "prompt_column", "teacher", "revision", "prompt"),
    *("output", "labels", "dictionary", "student", "adapter"),
)


def validate_config(model: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Return validated settings, or raise an InputError that lists all unknown, missing and invalid ones."""
    try:
        return model(**values)
    except ValidationError as error:
        known = model.flag_fields() if issubclass(model, CommandConfig) else model.model_fields
        errors = error.errors(include_url=False, include_context=False)
        lines = [f"  {error_line(entry, known)}" for entry in errors[:_SHOWN_ERRORS]]
        lines += [f"  and {len(errors) - _SHOWN_ERRORS} more"] if len(errors) > _SHOWN_ERRORS else []
        raise InputError("invalid settings (--help describes all settings):\n" + "\n".join(lines)) from error


def error_line(error: Any, known: Iterable[str]) -> str:
    """Return the setting, what is wrong with it, and its value."""
    name = redact(".".join(str(part) for part in error["loc"]))
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{name}: required; give it with --{name.replace('_', '-')}"
    if error["type"] == "extra_forbidden":
        flag = name.startswith("'--")  # flags.py quotes arguments that it does not know
        similar = difflib.get_close_matches(name.strip("'-").replace("-", "_"), known, n=1)
        spelled = [f"--{key.replace('_', '-')}" if flag else key for key in similar]
        kind = "flag" if flag else "argument" if name.startswith("'") else "setting"
        return f"{name}: unknown {kind}" + "".join(f"; did you mean {key}?" for key in spelled)
    short = reprlib.Repr()  # aliases let a small YAML file represent terabytes
    short.maxstring = short.maxother = 120
    return f"{name}: {message} (given: {redact(short.repr(error['input']))})"


def parse_pairs(value: object, default: object = "") -> object:
    """Return words `name=value` as a mapping, in which a name alone has the default; other values are returned as is."""
    if not isinstance(value, str | list | tuple):
        return value
    pairs = [str(word).partition("=") for word in (value.split() if isinstance(value, str) else value)]
    return {name: text if separator else default for name, separator, text in pairs}


class CommandConfig(BaseModel):
    """Settings of every command that has them."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    help_groups: ClassVar[HelpGroups] = {}  # every field in the order of the help, common ones first

    @classmethod
    def flag_fields(cls) -> dict[str, FieldInfo]:
        """Return the settings that have flags."""
        return dict(cls.model_fields)

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="minimum level of log lines")

    @field_validator("corpus", "queries", "keep", mode="before", check_fields=False)
    @classmethod
    def _as_list(cls, value: object, info: ValidationInfo) -> object:
        if value == [] and info.field_name != "keep":  # as with an unset variable
            raise ValueError("no value; give one, or omit the setting")
        return (value,) if isinstance(value, str) else value

    @field_validator(*_TEXTS, check_fields=False)
    @classmethod
    def _check_text(cls, value: Any, info: ValidationInfo) -> Any:
        for text in (value,) if isinstance(value, str) else value or ():
            if not text.strip() and info.field_name != "prompt":
                raise ValueError("is empty; give a value, or omit the setting")
            if "\0" in text or not is_utf8(text):
                raise ValueError("contains a NUL character or is not UTF-8; use other characters")
        return value

    @field_validator("output", check_fields=False)
    @classmethod
    def _check_output(cls, value: str) -> str:
        scheme, separator, rest = value.rpartition("://")
        if separator and "@" in rest.partition("/")[0]:
            raise ValueError("contains credentials; remove them and configure them in the storage client")
        if separator and not rest.strip("/"):
            raise ValueError("names no bucket or folder; give one, such as s3://bucket/run")
        if scheme in ("hf", "http", "https"):
            raise ValueError(f"{scheme}:// is read-only; give a local folder, s3:// or gs://")
        if scheme in ("", "file"):
            folder = Path(rest).absolute()
            existing = next((path for path in (folder, *folder.parents) if os.path.exists(path)), folder)
            if os.path.isfile(existing):
                raise ValueError(f"{existing} is a file; give a new or existing folder")
        return value


class JobConfig(CommandConfig):
    """Settings of the commands that run on Ray or in several processes."""

    workers: int | None = Field(None, ge=1, description="workers; default: one per GPU (or CPU), 1 with --local")
    local: bool = Field(False, description="run without Ray: in this process, or in N processes with --workers N")


class TeacherJobConfig(JobConfig):
    """Settings of the jobs that run a teacher over a text."""

    on_bad_document: Literal["skip", "fail"] = Field("skip", description="list bad documents, or fail at the first")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="teacher's dtype; auto: bfloat16 where it is fast, otherwise float16 on a GPU and float32 on a CPU",
    )
    gpus_per_actor: float = Field(
        1.0,
        gt=0,
        le=MAX_RANKS,
        description="GPUs per teacher actor; with 0.5, two actors share one; with 2, 4 or 8, the weights are split over them",
    )
    ranks: int | None = Field(
        None,
        ge=1,
        le=MAX_RANKS,
        description="processes per teacher actor, each with a part of the weights and a GPU (or CPU) of its own; default: "
        "--gpus-per-actor if above 1, else 1",
    )
    offload: bool = Field(
        False,
        strict=True,
        description="keep the teacher's weights in host memory and stream them through the GPU, if they do not fit into it",
    )
    time_teacher: bool = Field(
        False, description="with --dry-run: time the teacher briefly and estimate its total time"
    )

    @field_validator("gpus_per_actor")
    @classmethod
    def _check_gpus(cls, value: float) -> float:
        if value > 1 and not value.is_integer():
            raise ValueError(
                "GPUs are whole above 1, each with a part of the teacher: give 2, 4 or 8, or a share of one"
            )
        return value

    @field_validator("ranks")
    @classmethod
    def _check_ranks(cls, value: int | None, info: ValidationInfo) -> int | None:
        gpus = info.data.get("gpus_per_actor", 1.0)
        if value is not None and gpus not in (1.0, value) and (gpus > 1 or value > 1):
            raise ValueError(
                f"each rank has a GPU of its own, which contradicts --gpus-per-actor {gpus:g}: omit one of the two"
            )
        return value

    @field_validator("offload")
    @classmethod
    def _check_offload(cls, value: bool, info: ValidationInfo) -> bool:
        if value and (info.data.get("ranks") or info.data.get("gpus_per_actor", 1.0)) > 1:
            raise ValueError("weights in host memory are for one GPU: omit it, or use --ranks 1 and --gpus-per-actor 1")
        return value

    @property
    def teacher_ranks(self) -> int:
        """Number of processes that each hold a part of the teacher's weights."""
        return self.ranks or max(1, int(self.gpus_per_actor))
