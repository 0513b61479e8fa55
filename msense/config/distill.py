"""Settings of a distillation."""

import re
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from msense.config.base import HelpGroups, TeacherJobConfig, TrainDtype, parse_pairs
from msense.constants import MAX_INT32, Metric
from msense.corpus.spans import MIN_PASSAGE, SPANS

OBJECTIVES = {
    "sense": "cross-entropy over the senses of the token, under the dictionary's metric",
    "pooled": "cosine distance of the sentence vector to the teacher's",
    "replaced": "the same for the sentence vector of softly replaced tokens",
    "mse": "squared distance of the hidden states to the teacher's, which is then run in every step",
    "cosine": "cosine distance of the hidden states, likewise",
}
MAX_SOFT_TARGETS = 256
Schedule = Literal["cosine", "one-cycle", "linear", "constant"]
Senses = Literal["float16", "int8", "none"]
_LAYERS = r"layers:([1-9][0-9]{0,3}|[0-9]{1,4}(,[0-9]{1,4})+)"
_SENSE_OBJECTIVES = ("sense", "replaced")
_LABEL_SETTINGS = {"train_tokens", "held_out", "soft_targets", "metric", "pooled", "dtype", "spans"}
_FREE = {  # without influence on labels and student
    *("local", "workers", "gpus_per_actor", "ranks", "offload"),
    *("checkpoint_steps", "log_level", "output", "dry_run", "time_teacher"),
    *("dictionary", "teacher", "corpus", "on_bad_document", "queries", "labels"),
}
_CORPUS_SETTINGS = {"text_column", "id_column", "prompt_column", "dedup"}  # recorded with the text
_REFERENCE: dict[str, Any] = {"objective": {"sense": 1.0}, "heads": "one", "metric": "dot", "soft_targets": 0}
_REFERENCE |= {"pooled": False, "epochs": 5, "schedule": "cosine", "train_embeddings": True}
_REFERENCE_OPTIMIZER: dict[str, Any] = {"lr": 4.5e-5, "warmup": 300.0, "weight_decay": 1e-4, "clip": 0.0}


class DistillConfig(TeacherJobConfig):
    """Settings of `msense distill`; each field is a flag and a key of the YAML file.

    Example:
        >>> config = DistillConfig(dictionary="runs/demo", student="static", objective="sense pooled=10")
        >>> config.objective, config.highest_rate
        ({'sense': 1.0, 'pooled': 10.0}, 0.003)
    """

    help_groups: ClassVar[HelpGroups] = {
        "Common options": ("dictionary", "student", "corpus", "epochs", "output", "workers", "local", "dry_run"),
        "Text": (
            *("queries", "text_column", "id_column", "prompt_column", "dedup", "spans", "train_tokens", "held_out"),
            "on_bad_document",
        ),
        "Labels": (
            *("teacher", "dtype", "soft_targets", "pooled", "labels", "gpus_per_actor", "ranks", "offload"),
            "time_teacher",
        ),
        "Losses": ("objective", "heads", "student_pooling", "metric", "temperature", "reference"),
        "Training": (
            *("lr", "batch_tokens", "schedule", "warmup", "weight_decay", "clip", "accumulate", "train_embeddings"),
            *("student_dtype", "deepspeed_stage", "checkpoint_steps"),
        ),
        "Run": ("ship_senses", "ship_dtype", "seed", "log_level"),
    }

    dictionary: str = Field(description="folder or URI of the dictionary, or of the run that built it")
    corpus: tuple[str, ...] = Field((), description="texts, as for `msense build`; default: those of the dictionary")
    queries: tuple[str, ...] = Field((), description="short texts, such as real queries, to label as well; as --corpus")
    text_column: str = Field(
        "text", description="of --corpus and --queries: text column of jsonl, parquet and csv files"
    )
    id_column: str = Field(
        "id", description="of --corpus and --queries: column of document ids, used if present; none: no ids"
    )
    prompt_column: str | None = Field(
        None,
        description="of --corpus and --queries: column of the instruction before each text, as for `msense build`; default: the "
        "dictionary's prompt for all",
    )
    dedup: bool = Field(False, description="with --corpus: read identical passages once")
    teacher: str | None = Field(None, description="name or folder of the teacher; default: as recorded")
    train_tokens: int | None = Field(None, ge=1, description="tokens to label; default: those that the plan selected")
    held_out: float = Field(0.05, ge=0, le=0.5, description="fraction of the documents held out for validation")
    soft_targets: int = Field(0, ge=0, le=MAX_SOFT_TARGETS, description="stored senses per token; 0: nearest only")
    metric: Metric | None = Field(None, description="metric of labels, losses and student; default: the dictionary's")
    temperature: float = Field(
        1 / 3, gt=0, le=1e6, description="of losses, in units of the mean squared distance of embeddings to senses"
    )
    spans: dict[str, float] = Field(
        {"sentence": 1.0, "run": 0.5, "title": 1.0},
        description="share of the sentences, runs of two to four sentences, and first lines or titles that are labelled as texts "
        f"of their own, of passages of {MIN_PASSAGE} or more tokens; none: passages only",
    )
    pooled: bool = Field(True, strict=True, description="also store the teacher's embedding of each passage")
    student: str = Field(
        "layers:2",
        description="layers:N (the teacher's first N), layers:0,2,5 (these, from 0), static (no attention), table (a vector per "
        "token, without senses), or a model",
    )
    student_pooling: Literal["auto", "mean", "teacher"] = Field(
        "auto",
        description="how the student pools token embeddings: their mean, or as the teacher (its first or last token, for "
        "example); auto: the mean for static and table, else as the teacher",
    )
    objective: dict[str, float] = Field(
        {"sense": 3.0, "pooled": 100.0, "replaced": 10.0},
        description="losses with weights: "
        + "; ".join(f"{name}: {text}" for name, text in OBJECTIVES.items())
        + "; default of static: sense=10 pooled=100 replaced=100, of table: pooled=100",
    )
    heads: Literal["one", "two", "separate"] = Field(
        "two",
        description="what senses and sentence vectors share; one: the hidden state (default if only one of them is trained); "
        "two: all but a linear head; separate: only the token table, which the senses do not change (static only, its default)",
    )
    train_embeddings: bool = Field(False, description="train token embeddings (of a static student: always trained)")
    epochs: int = Field(10, ge=1, le=10_000, description="passes over the training texts")
    batch_tokens: int = Field(1024, ge=1, le=MAX_INT32, description="tokens per step over all workers, with padding")
    accumulate: int = Field(1, ge=1, le=1024, description="gradient accumulation: slices of a worker's share of a step")
    lr: float | None = Field(
        None, gt=0, le=10, description="peak learning rate; default: 3e-3 for static and table, else 1e-3"
    )
    schedule: Schedule = Field("cosine", description="learning rate after warmup; one-cycle: use --warmup 0.3")
    warmup: float = Field(
        0.05, ge=0, le=1e9, description="steps with increasing learning rate: a fraction below 1, or their number"
    )
    weight_decay: float = Field(0.01, ge=0, le=1, description="weight decay of AdamW")
    clip: float = Field(1.0, ge=0, le=1e6, description="maximum gradient norm; 0: no clipping")
    student_dtype: TrainDtype = "auto"
    deepspeed_stage: int = Field(0, ge=0, le=3, description="ZeRO stage of DeepSpeed; 0: plain data parallel training")
    checkpoint_steps: int = Field(1000, ge=1, le=MAX_INT32, description="steps between checkpoints within an epoch")
    reference: bool = Field(
        False,
        strict=True,
        description="the paper's choices where none is given: sense loss, bare dot product, one head, hard labels, 5 epochs, "
        "learning rate 4.5e-5, 300 warm-up steps, weight decay 1e-4, no clipping",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="random seed")
    ship_senses: Senses = Field("float16", description="dtype of the shipped senses; none: vectors only")
    ship_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="dtype of the shipped weights; two bytes each suit large students"
    )
    labels: str | None = Field(
        None,
        description="folder of labels, which students share; default: labels/ of the dictionary's run, else of --output",
    )
    output: str = Field("runs/student", description="run folder or URI; the student is its subfolder student/")
    dry_run: bool = Field(False, description="stop before labelling and print the size of the labels")

    @model_validator(mode="before")
    @classmethod
    def _derive_defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("reference") is True:
            attention = values.get("student") not in ("static", "table")  # the paper has no students without
            values = {**_REFERENCE, **(_REFERENCE_OPTIMIZER if attention else {}), **values}
        if values.get("pooled") is False:
            values = {"objective": {"sense": 1.0}, "spans": {}, **values}  # nothing is learnt from spans
        if values.get("student") == "static":  # its senses do not change its sentence vectors
            values = {"objective": {"sense": 10.0, "pooled": 100.0, "replaced": 100.0}, **values}
        if values.get("student") == "table":
            values = {"objective": {"pooled": 100.0}, "ship_senses": "none", **values}
        objective = parse_pairs(values.get("objective", "sense pooled"))
        kinds = {name in _SENSE_OBJECTIVES for name in objective} if isinstance(objective, dict) else ()
        heads = "one" if len(kinds) == 1 else "separate" if values.get("student") == "static" else "two"
        return {"heads": heads, **values}

    @field_validator("student")
    @classmethod
    def _check_student(cls, value: str) -> str:
        if value.startswith("layers:") and not re.fullmatch(_LAYERS, value):
            raise ValueError("must be layers:N with a number from 1, such as layers:2, or a list such as layers:0,2,5")
        return value

    @field_validator("ship_senses")
    @classmethod
    def _check_ship_senses(cls, value: str, info: ValidationInfo) -> str:
        if value != "none" and info.data.get("student") == "table":
            raise ValueError("a table knows no senses: omit it, or use none")
        return value

    @field_validator("student_pooling")
    @classmethod
    def _check_pooling(cls, value: str, info: ValidationInfo) -> str:
        if value == "teacher" and info.data.get("student") == "table":
            raise ValueError("the vectors of a table are means: omit it, or use mean")
        return value

    @field_validator("heads")
    @classmethod
    def _check_heads(cls, value: str, info: ValidationInfo) -> str:
        if value == "separate" and info.data.get("student") != "static":
            raise ValueError("separate exists for static only: omit it, or use two")
        return value

    @field_validator("text_column", "id_column", "prompt_column", "dedup")
    @classmethod
    def _check_corpus_setting(cls, value: object, info: ValidationInfo) -> object:
        if not info.data.get("corpus", True) and (info.field_name == "dedup" or not info.data.get("queries")):
            raise ValueError("only applies to another text: give it together with --corpus")
        return value

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, value: str | None) -> str | None:
        return value and cls._check_output(value)

    @field_validator("spans", mode="before")
    @classmethod
    def _parse_spans(cls, value: object) -> object:
        return {} if value in ("none", ["none"], ("none",)) else parse_pairs(value, 1.0)

    @field_validator("spans")
    @classmethod
    def _check_spans(cls, value: dict[str, float]) -> dict[str, float]:
        if unknown := [name for name in value if name not in SPANS]:
            raise ValueError(
                f"unknown kind {unknown[0]}; the kinds are {', '.join(SPANS)}, each with a share such as run=0.5"
            )
        if wrong := [name for name, share in value.items() if not 0 <= share <= 1]:
            raise ValueError(f"the share of {wrong[0]} must be from 0 to 1")
        return {name: share for name, share in value.items() if share}

    @field_validator("objective", mode="before")
    @classmethod
    def _parse_objective(cls, value: object) -> object:
        return parse_pairs(value, 1.0)

    @field_validator("objective")
    @classmethod
    def _check_objective(cls, value: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        unknown = [name for name in value if name not in OBJECTIVES]
        if unknown or not value:
            problem = f"unknown loss {unknown[0]}" if unknown else "names no loss"
            raise ValueError(f"{problem}; the losses are {', '.join(OBJECTIVES)}, each with a weight such as pooled=50")
        if wrong := [name for name, weight in value.items() if not 0 < weight <= 1e9]:
            raise ValueError(f"the weight of {wrong[0]} must be above 0 and at most 1e9")
        if info.data.get("student") == "table" and list(value) != ["pooled"]:
            raise ValueError("a table has no context and learns no senses: omit it, or use pooled")
        if wrong := [name for name in ("pooled", "replaced") if name in value and not info.data.get("pooled", True)]:
            raise ValueError(f"{wrong[0]} needs the teacher's embeddings of passages: omit --no-pooled")
        return value

    @property
    def highest_rate(self) -> float:
        """The peak learning rate; the default depends on the student."""
        return self.lr or (3e-3 if self.student in ("static", "table") else 1e-3)

    def of_labels(self) -> dict[str, Any]:
        """Return the settings that the labels depend on; changing one of them needs a new run folder."""
        return self.model_dump(mode="json", include=_LABEL_SETTINGS | ({"temperature"} if self.soft_targets else set()))

    def of_training(self) -> dict[str, Any]:
        """Return the settings that the student depends on in addition to the labels."""
        return self.model_dump(mode="json", exclude=_LABEL_SETTINGS | _FREE | _CORPUS_SETTINGS | {"reference"})
