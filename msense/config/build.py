"""Settings of a dictionary build."""

from dataclasses import fields
from typing import Any, ClassVar, Literal, get_args

from pydantic import ByteSize, Field, TypeAdapter, ValidationError, ValidationInfo, field_validator, model_validator

from msense.clustering.budget import DEFAULT_BUDGET, SenseBudget
from msense.config.base import HelpGroups, TeacherJobConfig, parse_pairs
from msense.constants import DEMO_TEACHER, MAX_EXEMPLARS, MAX_INT32, MAX_SENSES, Metric
from msense.corpus.passages import PassageOptions
from msense.teacher.spec import TeacherOptions
from msense.text import plain

DEMO_CORPUS = "pydocs:pandas,sklearn,torch"
DEMO_SAMPLE = 0.18  # about 650,000 tokens, one minute of teacher inference on two cores
DEMO_SEED = 274  # with this seed the sample contains modules that use the demo's five words
SenseRule = Literal["auto", "mcl"]
Intermediate = Literal["passages", "embeddings", "occurrences", "centroids"]
_FREE = {  # without influence on the results
    *("local", "workers", "gpus_per_actor", "ranks", "offload"),
    *("task_memory", "log_level", "output", "keep", "dry_run", "time_teacher"),
    *("corpus", "on_bad_document", "max_points_per_part", "keep_embeddings", "embeddings_budget"),
}


class PlanOptions(PassageOptions):
    """Which passages of a text are read, and which of their occurrences are stored."""

    reference: bool = Field(
        False,
        strict=True,
        description="the paper's choices where none is given: 20 senses (mcl for a decoder), dot product, special tokens, no "
        "limit of occurrences per passage, 300 k-means rounds, tolerance 1e-4",
    )
    max_occurrences: int = Field(1000, ge=0, le=MAX_INT32, description="occurrences to cluster per token; 0: all")
    coverage: float = Field(1.0, gt=0, le=1, description="stop reading at this fraction of the wanted occurrences")

    @property
    def per_passage(self) -> int:
        """Maximum occurrences of a token per passage: 5 % of `max_occurrences`; 0: no limit."""
        return max(1, self.max_occurrences // 20) if self.max_occurrences and not self.reference else 0


class BuildConfig(PlanOptions, TeacherOptions, TeacherJobConfig):
    """Settings of `msense build`; each field is a flag and a key of the YAML file.

    Example:
        >>> BuildConfig(corpus=("texts.txt",), reference=True).metric
        'dot'
    """

    help_groups: ClassVar[HelpGroups] = {
        "Common options": ("corpus", "teacher", "senses", "output", "workers", "local", "dry_run"),
        "Text": ("text_column", "id_column", "prompt_column", "dedup", "stride", "sample", "on_bad_document"),
        "Teacher": (
            *("revision", "layer", "attention", "max_length", "prompt", "special_tokens", "dtype", "gpus_per_actor"),
            *("ranks", "offload", "time_teacher"),
        ),
        "Senses": (
            *("sense_budget", "mcl", "metric", "n_init", "max_occurrences", "coverage", "exemplars", "reference"),
        ),
        "Disk and memory": (
            *("store_dtype", "keep", "keep_embeddings", "embeddings_dtype", "embeddings_budget", "max_points_per_part"),
            "task_memory",
        ),
        "Run": ("seed", "log_level"),
    }

    corpus: tuple[str, ...] = Field(
        (),
        description="texts: files, folders or globs of *.txt, *.jsonl[.gz|.zst], *.parquet or *.csv (local, s3://, gs://), "
        f"hf://dataset[:config][:split], pydocs[:package,...]; default without --teacher: the demo corpus {DEMO_CORPUS}",
    )
    teacher: str | None = Field(None, description=f"teacher: Hugging Face name or folder; default: {DEMO_TEACHER}")
    store_dtype: Literal["float16", "bfloat16"] = Field("float16", description="dtype of embeddings and centroids")
    senses: int | SenseRule = Field(
        "auto",
        description="maximum per token; auto: allocates --sense-budget so that the distortion of the corpus is minimal; mcl: a "
        "fraction of the token's Markov clusters, the paper's rule for decoders",
    )
    sense_budget: str = Field(
        f"{DEFAULT_BUDGET.average:g}", description="for auto: average senses per token (5), or total bytes (60MB, 2GB)"
    )
    mcl: dict[str, float] = Field(
        {}, description="options of mcl: expansion, inflation, share, large_share, large, least; such as inflation=1.8"
    )
    n_init: int = Field(1, ge=1, le=1000, description="k-means runs per token, of which the best is kept")
    max_points_per_part: int = Field(131072, ge=1024, le=MAX_INT32, description="points per chunk of a large token")
    metric: Metric = Field("l2", description="metric of clustering, assignment and everything after them")
    exemplars: int = Field(3, ge=0, le=MAX_EXEMPLARS, description="example contexts per sense")
    task_memory: ByteSize | None = Field(None, ge=1, description="memory per clustering task (4GB); default: planned")
    output: str = Field("runs/dictionary", description="run folder or URI; the dictionary is its subfolder dictionary/")
    keep: tuple[Intermediate, ...] = Field(
        ("passages", "embeddings"),
        description="intermediate files to keep after the build; passages and embeddings spare `msense distill` reading again",
    )
    keep_embeddings: Literal["auto", "all", "sample"] = Field(
        "auto",
        description="embeddings to keep for labels: all tokens of the passages read, all while --embeddings-budget lasts (auto), "
        "or the sampled occurrences only, as long as the build needs them",
    )
    embeddings_dtype: Literal["store", "int8"] = Field(
        "store",
        description="dtype of kept embeddings, to which those of labels are rounded: --store-dtype, or int8 with a scale per "
        "token (half the size; another nearest sense for about 0.02 % of the tokens)",
    )
    embeddings_budget: ByteSize | None = Field(
        None,
        description="for auto: bytes of kept embeddings (40GB); default: a quarter of the disk's free space, 100GB on object "
        "storage",
    )
    dry_run: bool = Field(False, description="stop after the plan and print what the run would read, write and need")

    @model_validator(mode="before")
    @classmethod
    def _apply_reference(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {"metric": "dot", "special_tokens": "include", **values} if values.get("reference") is True else values

    @field_validator("senses", mode="plain")
    @classmethod
    def _check_senses(cls, value: object) -> object:
        if value in get_args(SenseRule):
            return value
        number = int(value) if isinstance(value, int | str) and str(value).strip().isdecimal() else 0
        if isinstance(value, bool) or not 1 <= number <= MAX_SENSES:
            raise ValueError(f"must be a number from 1 to {MAX_SENSES}, auto or mcl")
        return number

    @field_validator("sense_budget", mode="before")
    @classmethod
    def _check_budget(cls, value: object, info: ValidationInfo) -> object:
        SenseBudget.parse(str(value))
        rule = info.data.get("senses", "auto")
        if rule != "auto" and str(value) != cls.model_fields["sense_budget"].default:
            raise ValueError(f"requires --senses auto, not {rule}: omit one of the two")
        return str(value)

    @field_validator("mcl", mode="plain")
    @classmethod
    def _check_mcl(cls, value: object, info: ValidationInfo) -> dict[str, float]:
        from msense.clustering.mcl import MclConfig  # imports torch

        values, known = parse_pairs(value), [field.name for field in fields(MclConfig)]
        try:
            config = TypeAdapter(MclConfig).validate_python(values)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            message = first["msg"].removeprefix("Value error, ")
            raise ValueError(": ".join([*map(str, first["loc"]), message])) from error
        given = values if isinstance(values, dict) else {}
        if unknown := [str(name) for name in given if name not in known]:
            raise ValueError(f"unknown option {plain(unknown[0])}; the options are: {', '.join(known)}")
        rule = info.data.get("senses", "mcl")
        if given and rule != "mcl" and not (rule == "auto" and info.data.get("reference")):
            raise ValueError(f"requires --senses mcl, not {rule}: omit it, or give --senses mcl")
        return {name: getattr(config, name) for name in given}

    @property
    def keeps_embeddings(self) -> bool:
        """Whether embeddings of all tokens are written; without the passages they would be of no use."""
        return self.keep_embeddings != "sample" and {"passages", "embeddings"} <= set(self.keep)

    def of_results(self) -> dict[str, Any]:
        """Return the settings that the results depend on; changing one of them needs a new run folder."""
        return self.model_dump(mode="json", exclude=_FREE)
