"""What a student is made of, as settings and as config.json on disk."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from msense.artefact import FrozenModel
from msense.config import MAX_DIM, MAX_VOCABULARY
from msense.dictionary.format import DictionaryFiles, TeacherName
from msense.errors import StudentError

MAX_WINDOW = 1000

Heads = Literal["two", "one"]
Pooling = Literal["mean", "cls", "lasttoken"]


@dataclass(frozen=True)
class StudentSettings:
    """How to make a student.

    Attributes:
        kind: `layers:n` (the teacher's first n), `layers:0,2,5` (those, from 0), `static`, or an encoder's name or folder.
        heads: "two": senses are read by a linear head of their own, which begins as identity; "one": from the hidden state.
        units: of a static student's MLP.
        window: tokens that a static student looks at around each one; odd.
        stay: of a static student: a token seen n times moves n / (n + stay) of the way away from its mean embedding.
        seed: of what begins random.

    Raises:
        StudentError: a setting is out of range.
    """

    kind: str = "layers:2"
    heads: Heads = "two"
    units: int = 512
    window: int = 9
    stay: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.heads not in get_args(Heads):
            raise StudentError(f"heads is {self.heads!r}, but must be one of {get_args(Heads)}")
        if not 0 < self.units <= MAX_DIM or not (0 < self.window < MAX_WINDOW and self.window % 2):
            raise StudentError(
                f"a static student of {self.units} units and a window of {self.window} tokens cannot be: give units from 1 to "
                f"{MAX_DIM}, and an odd window below {MAX_WINDOW}, as many tokens on the left as on the right"
            )
        if not 0 <= self.stay < float("inf"):
            raise StudentError(f"stay is {self.stay}, but must be 0 or more: 0 lets every token leave its mean")


class StaticSizes(FrozenModel):
    """Sizes of a student without attention."""

    units: int = Field(gt=0, le=MAX_DIM)
    window: int = Field(gt=0, lt=MAX_WINDOW, description="odd")

    @model_validator(mode="after")
    def _odd(self) -> "StaticSizes":
        if self.window % 2 == 0:
            raise ValueError(f"window is {self.window}, but must be odd: as many tokens on the left as on the right")
        return self


class StudentConfig(FrozenModel):
    """Everything about a student that is not a weight; has a `body` or is `static`."""

    format_version: Literal[1] = 1
    kind: Annotated[str, Field(max_length=4096)] = Field(description="the setting it was made by")
    teacher: TeacherName
    tokenizer_fingerprint: Annotated[str, Field(max_length=4096)]
    dim: int = Field(gt=0, le=MAX_DIM, description="width D of the teacher's embeddings")
    vocab_size: int = Field(gt=0, le=MAX_VOCABULARY)
    pooling: Pooling = "mean"
    normalize: bool = Field(default=False, description="whether sentence vectors have unit length")
    max_length: int = Field(
        default=512, gt=0, le=1 << 20, description="tokens of a text that are read, special ones too"
    )
    prompt: Annotated[str, Field(max_length=1 << 16)] = Field(default="", description="put before every text")
    heads: Heads = "two"
    body: dict[str, Any] | None = Field(default=None, description="the transformer's own config")
    static: StaticSizes | None = None

    @model_validator(mode="after")
    def _one_body(self) -> "StudentConfig":
        if (self.body is None) == (self.static is None):
            raise ValueError("a student has either body or static")
        return self


@dataclass(frozen=True)
class StudentFiles:
    """Names of all files of a student folder."""

    folder: Path

    @property
    def config(self) -> Path:
        """Written last: a folder without it is no student."""
        return self.folder / "config.json"

    @property
    def weights(self) -> Path:
        """All tensors."""
        return self.folder / "model.safetensors"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer."""
        return self.folder / "tokenizer.json"

    @property
    def dictionary(self) -> Path:
        """Folder of the dictionary that the student speaks in; optional."""
        return self.folder / "dictionary"

    @property
    def card(self) -> Path:
        """The model card."""
        return self.folder / "README.md"

    @property
    def modules(self) -> Path:
        """For sentence-transformers: which class reads the folder."""
        return self.folder / "modules.json"

    @property
    def settings(self) -> Path:
        """For sentence-transformers: prompts."""
        return self.folder / "config_sentence_transformers.json"

    def present(self, *, exemplars: bool) -> list[Path]:
        """Return the files of a shipped student that are there, config.json last; the dictionary's exemplars if asked for."""
        own = [self.weights, self.tokenizer, self.card, self.modules, self.settings]
        there = DictionaryFiles(self.dictionary)
        dictionary = [path for path in there.present() if exemplars or path != there.exemplars]
        return [path for path in (*own, *dictionary, self.config) if path.is_file()]
