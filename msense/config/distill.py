"""The settings of a distillation: one frozen, validated model, as `config.py` has it for a build.

Comes in: command line and YAML, by way of `flags.parse_flags`. Goes out: a `DistillConfig`; those of its settings that
the labels depend on, and those of the training, each as JSON values.
"""

import re
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, ValidationInfo, field_validator, model_validator

from msense.config.base import GpusPerActor, JobConfig
from msense.constants import MANY, Metric

OBJECTIVES = {
    "sense": "cross-entropy over the token's own senses, under the dictionary's metric",
    "pooled": "cosine of the sentence vector with the teacher's",
    "replaced": "the same of the sentence vector made of softly replaced tokens",
    "mse": "squared distance of hidden states to the teacher's, which then reads along in every step",
    "cosine": "cosine of hidden states with the teacher's, likewise",
}
_OF_SENSES = ("sense", "replaced")
_RATES = {"static": 3e-3, "": 1e-3}
MAX_SOFT_TARGETS = 256
_OF_LABELS = ("train_tokens", "held_out", "soft_targets", "metric", "pooled", "dtype")
_FREE = (
    "local",
    "dictionary",
    "teacher",
    "workers",
    "gpus_per_actor",
    "checkpoint_steps",
    "log_level",
    "output",
    "dry_run",
    "time_teacher",
    "corpus",
    "on_bad_document",
)
_OF_TEXT = ("text_column", "dedup")
_OF_THE_PAPER: dict[str, Any] = {
    "objective": {"sense": 1.0},
    "heads": "one",
    "metric": "dot",
    "soft_targets": 0,
    "pooled": False,
    "epochs": 5,
    "schedule": "cosine",
    "train_embeddings": True,
}


class DistillConfig(JobConfig):
    """Everything `jobs/distill.py` can be told; each field is a flag and a key of the YAML file."""

    dictionary: str = Field(description="folder of the dictionary, or of the run that made it, or its URI")
    corpus: tuple[str, ...] = Field(
        (), description="text to train on, as for build_dict.py; without it the text that the dictionary was made of"
    )
    text_column: str = Field("text", description="with --corpus: column of the text in jsonl, parquet and csv files")
    on_bad_document: Literal["skip", "fail"] = Field(
        "skip", description="skip and list bad documents, or stop at the first"
    )
    dedup: bool = Field(False, description="with --corpus: read passages of the same content once")
    teacher: str | None = Field(
        None, description="where the dictionary's teacher is, if it is not found under the name in its config.json"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="teacher's dtype")
    train_tokens: int | None = Field(
        None,
        ge=1,
        description="label the first passages by key, up to so many tokens; default: those that the plan needed",
    )
    held_out: float = Field(0.05, ge=0, le=0.5, description="share of the documents that are never trained on")
    soft_targets: int = Field(
        0, ge=0, le=MAX_SOFT_TARGETS, description="senses a token kept with their weights, 0 = only the nearest"
    )
    metric: Metric | None = Field(None, description="of labels, losses and student; default: the dictionary's")
    temperature: float = Field(
        1 / 3, gt=0, le=1e6, description="of weights and losses, in units of the dictionary's mean squared spread"
    )
    pooled: bool = Field(True, description="also keep the teacher's embedding of every passage")
    student: str = Field(
        "layers:2",
        description="layers:N (the teacher's first N), layers:0,2,5 (those, from 0), static (no attention), or a model's "
        "name or folder",
    )
    objective: dict[str, float] = Field(
        {"sense": 10.0, "pooled": 100.0, "replaced": 100.0},
        description="losses and their weights: " + "; ".join(f"{name}: {what}" for name, what in OBJECTIVES.items()),
    )
    heads: Literal["one", "two"] = Field(
        "two",
        description="two: senses are read by a head of their own; one: from the hidden state that the sentence vector is "
        "made of (the default where the objective asks for one of them only)",
    )
    train_embeddings: bool = Field(
        False,
        description="also move a transformer's table of tokens; left as it is, tokens that the text lacks stay comparable (a "
        "static student's always moves)",
    )
    epochs: int = Field(10, ge=1, le=10_000, description="times that each passage is trained on")
    batch_tokens: int = Field(1024, ge=1, le=MANY, description="tokens of a step on all workers, padding included")
    accumulate: int = Field(1, ge=1, le=1024, description="slices in which a worker takes its share of a step")
    lr: float | None = Field(
        None, gt=0, le=10, description="highest learning rate; default: 3e-3 for static, 1e-3 for other students"
    )
    schedule: Literal["cosine", "one-cycle", "linear", "constant"] = Field(
        "cosine", description="of the learning rate, after its warm-up; one-cycle is torch's with --warmup 0.3"
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.01, ge=0, le=1, description="of AdamW")
    clip: float = Field(1.0, ge=0, le=1e6, description="largest norm of the gradient, 0 = any")
    student_dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="in which the student computes")
    deepspeed_stage: int = Field(0, ge=0, le=3, description="DeepSpeed's ZeRO stage, 0 = plain data parallel")
    checkpoint_steps: int = Field(1000, ge=1, le=MANY, description="steps between checkpoints within an epoch")
    reference: bool = Field(
        False,
        description="the paper's choices wherever no other is given: sense loss alone on bare dot products, one head, hard "
        "labels, all weights trained, five epochs",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of everything random")
    workers: int | None = Field(
        None, ge=1, description="workers at a time; default: one a GPU (a CPU where there is none)"
    )
    gpus_per_actor: GpusPerActor = 1.0
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least log lines to show")
    ship_senses: Literal["float16", "int8", "none"] = Field(
        "float16", description="how the student's folder holds the dictionary; none: for sentence vectors only"
    )
    output: str = Field("runs/student", description="run folder (local or URI); the student is its subfolder student/")
    dry_run: bool = Field(False, description="stop before the teacher and print what the labels would take")
    time_teacher: bool = Field(False, description="with --dry-run: time a short forward pass of the teacher")

    @model_validator(mode="before")
    @classmethod
    def _follow(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Let what is not given follow from what is."""
        if _is(values.get("reference", False), True):
            values = {**_OF_THE_PAPER, **values}
        if _is(values.get("pooled", True), False):
            values = {"objective": {"sense": 1.0}, **values}
        asked = {str(word).partition("=")[0] in _OF_SENSES for word in _words(values.get("objective", "sense pooled"))}
        return {"heads": "one", **values} if len(asked) == 1 else values

    @field_validator("student")
    @classmethod
    def _known_student(cls, value: str) -> str:
        if value.startswith("layers:") and not re.fullmatch(
            r"layers:([1-9][0-9]{0,3}|[0-9]{1,4}(,[0-9]{1,4})+)", value
        ):
            raise ValueError("must be layers:N with a number from 1, such as layers:2, or a list such as layers:0,2,5")
        return value

    @field_validator("objective", mode="before")
    @classmethod
    def _weights(cls, value: object) -> object:
        """Take words `name` and `name=weight`; a name alone has the weight 1."""
        if isinstance(value, dict) or not (words := _words(value)):
            return value
        pairs = [str(word).partition("=") for word in words]
        return {name: text if mark else 1.0 for name, mark, text in pairs}

    @field_validator("text_column", "dedup")
    @classmethod
    def _of_another_text(cls, value: object, info: ValidationInfo) -> object:
        if not info.data.get("corpus", True):
            raise ValueError("says how another text is read: give it together with --corpus")
        return value

    @field_validator("objective")
    @classmethod
    def _known_objective(cls, value: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        unknown = [name for name in value if name not in OBJECTIVES]
        if unknown or not value:
            first = f"{unknown[0]} is no loss" if unknown else "names no loss"
            raise ValueError(f"{first}; these are: {', '.join(OBJECTIVES)}, each with a weight such as pooled=50")
        if wrong := [name for name, weight in value.items() if not 0 < weight <= 1e9]:
            raise ValueError(f"the weight of {wrong[0]} must be above 0 and at most 1e9")
        if wrong := [name for name in ("pooled", "replaced") if name in value and not info.data.get("pooled", True)]:
            raise ValueError(f"{wrong[0]} needs the teacher's embeddings of passages: leave --no-pooled out")
        return value

    @property
    def highest_rate(self) -> float:
        """The learning rate, as given or by the kind of student."""
        return self.lr or _RATES.get(self.student, _RATES[""])

    def of_labels(self) -> dict[str, Any]:
        """Return the settings on which the labels depend; changing one of them needs a new run folder."""
        more = {"temperature"} if self.soft_targets else set()
        return self.model_dump(mode="json", include={*_OF_LABELS, *more})

    def of_training(self) -> dict[str, Any]:
        """Return the settings on which the student depends beside the labels."""
        return self.model_dump(mode="json", exclude={*_OF_LABELS, *_FREE, *_OF_TEXT, "reference"})


def _words(objective: object) -> list[object]:
    """Return the words of an objective as it is given: one, some, or the keys of a YAML mapping."""
    if isinstance(objective, str):
        return list(objective.split())
    return list(objective) if isinstance(objective, list | tuple | dict) else []


def _is(given: object, wanted: bool) -> bool:
    """Tell whether a setting of YAML or flags stands for a truth value; a wrong one is told with all other errors."""
    try:
        return TypeAdapter(bool).validate_python(given) is wanted
    except ValidationError:
        return False
