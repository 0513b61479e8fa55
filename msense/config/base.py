"""What the settings of all jobs share: validation of texts and folders, and readable errors."""

import difflib
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from msense.errors import InputError
from msense.text import is_utf8, redact

_SHOWN_ERRORS = 20
ConfigT = TypeVar("ConfigT", bound=BaseModel)
GpusPerActor = Annotated[float, Field(gt=0, le=1, description="GPUs of a teacher actor: with 0.5 two actors share one")]
_TEXTS = ("corpus", "text_column", "teacher", "revision", "prompt", "output", "dictionary", "student")


def validate_config(model: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Check settings as a whole; InputError lists every error at once."""
    try:
        return model(**values)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_context=False)
        lines = [
            f"  {_told(e['loc'], e['type'], e['msg'], e['input'], model.model_fields)}" for e in wrong[:_SHOWN_ERRORS]
        ]
        lines += [f"  and {len(wrong) - _SHOWN_ERRORS} more"] if len(wrong) > _SHOWN_ERRORS else []
        raise InputError("these settings are wrong (--help tells all):\n" + "\n".join(lines)) from error


def _told(place: Sequence[int | str], kind: str, message: str, given: object, known: Iterable[str]) -> str:
    """Say what is wrong with one setting."""
    name = ".".join(str(part) for part in place)
    if kind == "missing":
        return f"{name}: must be given (--{name.replace('_', '-')})"
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(name, known, n=1)
        message = "there is no such setting" + (f"; is it {near[0]}?" if near else "")
    shown = reprlib.Repr()  # a YAML file of one line may stand for terabytes
    shown.maxstring = shown.maxother = 120
    return f"{name}: {message.removeprefix('Value error, ')} (given: {redact(shown.repr(given))})"


class JobConfig(BaseModel):
    """What the settings of every job are checked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    local: bool = Field(
        False, description="run without Ray: in this process, or in --workers processes of this machine"
    )

    @field_validator("corpus", "keep", mode="before", check_fields=False)
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator(*_TEXTS, check_fields=False)
    @classmethod
    def _usable_text(cls, value: Any, info: ValidationInfo) -> Any:
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


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long, or a folder that may not be looked into
        return False
