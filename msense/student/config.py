"""Settings of a new student, its config.json, and the file names of its folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from msense.constants import MAX_DIM, MAX_VOCABULARY
from msense.dictionary.layout import DictionaryConfig, DictionaryFiles, TeacherName
from msense.errors import StudentError
from msense.io.untrusted import FrozenModel
from msense.teacher.pooling import Pooling

MAX_KERNEL_SIZE = 1000
Heads = Literal["two", "one"]


@dataclass(frozen=True)
class StudentSettings:
    """How to create a student; raises StudentError for a setting out of range.

    Example:
        >>> StudentSettings(kind="layers:2").heads
        'two'
    """

    kind: str = "layers:2"  # n teacher layers, `layers:0,2,5` for these, `static`, or the name or folder of an encoder
    heads: Heads = "two"  # a linear head for senses, initialized to identity; "one": senses share the hidden state
    units: int = 512  # hidden units of a static student's MLP
    kernel_size: int = 9  # of a static student's convolution, in tokens; odd
    prior_count: float = 5.0  # a static student's token seen n times is trained with weight n / (n + prior_count)
    seed: int = 0  # of the random initialization

    def __post_init__(self) -> None:
        if self.heads not in get_args(Heads):
            raise StudentError(f"invalid heads {self.heads!r}: use one of {get_args(Heads)}")
        if not 0 < self.units <= MAX_DIM:
            raise StudentError(f"invalid units {self.units}: use 1 to {MAX_DIM}")
        if not (0 < self.kernel_size < MAX_KERNEL_SIZE and self.kernel_size % 2):
            raise StudentError(f"invalid kernel_size {self.kernel_size}: use an odd number below {MAX_KERNEL_SIZE}")
        if not 0 <= self.prior_count < float("inf"):
            raise StudentError(f"invalid prior_count {self.prior_count}: use a finite number from 0")


class StaticSizes(FrozenModel):
    """Sizes of a student without attention."""

    units: int = Field(gt=0, le=MAX_DIM)
    kernel_size: int = Field(alias="window", gt=0, lt=MAX_KERNEL_SIZE, description="odd")

    @model_validator(mode="after")
    def _odd(self) -> "StaticSizes":
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}, but must be odd")
        return self


class StudentConfig(FrozenModel):
    """A student's config.json: everything but the weights. Exactly one of `body` and `static` is set."""

    format_version: Literal[1] = 1
    kind: Annotated[str, Field(max_length=4096)] = Field(description="see StudentSettings")
    teacher: TeacherName
    tokenizer_fingerprint: Annotated[str, Field(max_length=4096)]
    dim: int = Field(gt=0, le=MAX_DIM, description="dimension D of the teacher's embeddings")
    vocab_size: int = Field(gt=0, le=MAX_VOCABULARY)
    pooling: Pooling = "mean"
    normalize: bool = Field(default=False, description="whether sentence vectors have unit length")
    max_length: int = Field(default=512, gt=0, le=1 << 20, description="maximum tokens per text, special ones included")
    prompt: Annotated[str, Field(max_length=1 << 16)] = Field(default="", description="prefix of every text")
    heads: Heads = "two"
    body: dict[str, Any] | None = Field(default=None, description="the transformer's own config")
    static: StaticSizes | None = None

    @model_validator(mode="after")
    def _one_body(self) -> "StudentConfig":
        if (self.body is None) == (self.static is None):
            raise ValueError("exactly one of body and static must be set")
        return self


def dictionary_mismatch(
    config: DictionaryConfig, tokenizer: str, teacher: str, dim: int, vocab_size: int
) -> str | None:
    """Return what of a dictionary differs from these values (fingerprints, D and V); None if nothing does.

    An empty fingerprint, as in dictionaries made in memory, matches all.
    """
    pairs = {
        "tokenizer": (config.tokenizer_fingerprint[:12], tokenizer[:12]),
        "teacher": (config.teacher.fingerprint[:12], teacher[:12]),
        "dimension": (config.dim, dim),
        "vocabulary size": (config.vocab_size, vocab_size),
    }
    for name, (own, given) in pairs.items():
        if "" not in (own, given) and own != given:
            return f"{name} {own}, not {given}"
    return None


class StudentFiles:
    """Paths of all files of a student folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.json"  # written last, so that an incomplete folder is never loaded
        self.weights = folder / "model.safetensors"
        self.tokenizer = folder / "tokenizer.json"
        self.dictionary = folder / "dictionary"  # optional
        self.card = folder / "README.md"
        self.modules = folder / "modules.json"  # for sentence-transformers: the class that loads the folder
        self.settings = folder / "config_sentence_transformers.json"  # for sentence-transformers: prompts

    def present(self, *, exemplars: bool) -> list[Path]:
        """Return the existing files of a saved student, config.json last."""
        own = [self.weights, self.tokenizer, self.card, self.modules, self.settings]
        dictionary = DictionaryFiles(self.dictionary)
        shared = [path for path in dictionary.present() if exemplars or path != dictionary.exemplars]
        return [path for path in (*own, *shared, self.config) if path.is_file()]
