"""Settings of a new student, and its config.json."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from tokenizers import Tokenizer

from msense.constants import MAX_DIM, MAX_VOCABULARY
from msense.dictionary.layout import DictionaryConfig, TeacherName
from msense.errors import StudentError
from msense.io.untrusted import FrozenModel
from msense.teacher.pooling import Pooling, ProjectionConfig, sentence_dim
from msense.teacher.spec import TruncationSide
from msense.tokenizer import skipped_tokens

Heads = Literal["separate", "two", "one"]
StudentPooling = Literal["auto", "mean", "teacher"]
LONGEST = 1 << 20  # maximum length of a student that does not truncate


@dataclass(frozen=True)
class StudentSettings:
    """How to create a student; `init_student` validates the values."""

    kind: str = (
        "layers:2"  # n teacher layers, `layers:0,2,5` for these, `static`, `table`, or an encoder's name or folder
    )
    heads: Heads = "two"  # see `DistillConfig.heads`
    units: int = 512  # hidden units of a static student's MLP
    kernel_size: int = 9  # of a static student's convolution, in tokens; odd
    pooling: StudentPooling = "auto"  # see `DistillConfig.student_pooling`
    prior_count: float = 0.0  # a static student's token seen n times is trained with weight n / (n + prior_count)
    seed: int = 0  # of the random initialization


class StaticSizes(FrozenModel):
    """Sizes of a student without attention."""

    units: int = Field(gt=0, le=MAX_DIM)
    kernel_size: int = Field(alias="window", gt=0, lt=1000, description="odd")

    @model_validator(mode="after")
    def _odd(self) -> "StaticSizes":
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}, but must be odd")
        return self


class StudentConfig(FrozenModel):
    """A student's config.json: everything but the weights. A table has neither `body` nor `static`."""

    format_version: Literal[1] = 1
    kind: Annotated[str, Field(max_length=4096)] = Field(description="see StudentSettings")
    teacher: TeacherName
    tokenizer_fingerprint: Annotated[str, Field(max_length=4096)]
    dim: int = Field(gt=0, le=MAX_DIM, description="dimension D of the teacher's embeddings")
    vocab_size: int = Field(gt=0, le=MAX_VOCABULARY)
    pooling: Pooling = "mean"
    normalize: bool = Field(default=False, description="whether sentence vectors have unit length")
    max_length: int = Field(default=512, gt=0, le=LONGEST, description="maximum tokens per text, special ones included")
    prompt: Annotated[str, Field(max_length=1 << 16)] = Field(default="", description="prefix of every text")
    include_prompt: bool = Field(default=True, description="whether a prompt's tokens are pooled")
    skip: int = Field(default=0, ge=0, le=1 << 20, description="tokens of `prompt` that are not pooled")
    include_frame: bool = Field(default=True, description="whether the tokenizer's tokens before a text are pooled")
    projections: tuple[ProjectionConfig, ...] = Field(default=(), max_length=16, description="layers after pooling")
    truncate_dim: int | None = Field(default=None, gt=0, description="numbers of a sentence vector that are kept")
    truncation_side: TruncationSide = Field(default="right", description="where a long text loses tokens")
    heads: Heads = "two"
    body: dict[str, Any] | None = Field(default=None, description="the transformer's own config")
    static: StaticSizes | None = None

    @model_validator(mode="after")
    def _one_body(self) -> "StudentConfig":
        if self.body is not None and self.static is not None:
            raise ValueError("only one of body and static may be set")
        if (self.is_table and self.heads != "one") or (self.heads == "separate" and self.static is None):
            raise ValueError(f"heads {self.heads!r} do not exist for {self.kind!r}: use 'one' for a table, else 'two'")
        widths = [self.dim, *(projection.out_features for projection in self.projections)]
        if widths[:-1] != [projection.in_features for projection in self.projections]:
            raise ValueError("the projections do not fit each other")
        return self

    def skipped(self, tokenizer: Tokenizer, prompt: str) -> int:
        """Return how many tokens of a text with a prompt are not pooled."""
        return skipped_tokens(tokenizer, prompt, include_prompt=self.include_prompt, include_frame=self.include_frame)

    @property
    def is_table(self) -> bool:
        """Whether the student is a table of token embeddings, which reads texts whole and without special tokens."""
        return self.body is None and self.static is None

    @property
    def sentence_dim(self) -> int:
        """Size of the sentence vectors."""
        return sentence_dim(self.dim, self.projections, self.truncate_dim)


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


def check_dictionary(student: StudentConfig, dictionary: DictionaryConfig) -> None:
    """Raise StudentError unless tokenizer, teacher, dimension and vocabulary size are equal."""
    given = (student.tokenizer_fingerprint, student.teacher.fingerprint, student.dim, student.vocab_size)
    if mismatch := dictionary_mismatch(dictionary, *given):
        raise StudentError(
            f"the dictionary does not match the student and teacher {student.teacher.name!r}: it has {mismatch}; give the "
            f"dictionary used for training, or teacher {dictionary.teacher.name!r} as it was when that was built"
        )
