"""Folders that nobody vouches for: the checks that dictionaries, students, classifiers and labels share.

Comes in: a path. Goes out: the same path, a config, or what a safetensors header says; else the artefact's own error, in
one line. Holds one JSON file or header: nothing is read before its size is known, and pipes are never opened.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from msense.errors import BadInput

ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "I64": 8, "I32": 4, "U16": 2, "I8": 1, "U8": 1}  # safetensors' names
_JSON_BYTES = 4 << 20
_HEADER_BYTES = 1 << 20
_POSITIONS = 1 << 24  # of a model; some make a buffer of as many
_COUNTS = ("layer", "block", "expert", "depth", "stage")  # words in names of settings that say how many modules to make
_FETCHED = ("backbone", "use_timm_backbone", "use_pretrained_backbone")  # names of other models, to be had from the hub

_Size = Annotated[int, Field(ge=0, lt=1 << 62)]
TensorSpecs = dict[str, tuple[str, tuple[int, ...]]]  # name: (safetensors dtype, shape)


class FrozenModel(BaseModel):
    """What is read from disk: nothing unknown, nothing infinite, nothing changed later."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _Entry(FrozenModel):
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: Annotated[tuple[_Size, ...], Field(max_length=8)]
    data_offsets: tuple[_Size, _Size]


_HEADER = TypeAdapter(dict[str, _Entry])
ModelT = TypeVar("ModelT", bound=BaseModel)


@dataclass(frozen=True)
class Artefact:
    """A kind of folder, and how its faults are told.

    Attributes:
        name: such as dictionary.
        remedy: what to do about a damaged one.
        error: what is raised.
    """

    name: str
    remedy: str
    error: type[BadInput]

    def inside(self, path: Path, folder: Path) -> Path:
        """Return a path of a folder unless it is missing, no plain file, or a link leads out of the folder."""
        if not path.is_file():
            what = "is no plain file" if os.path.lexists(path) else "is missing"  # opening a pipe would wait for ever
            self.refuse(f"{path} {what}: the {self.name} is not whole; {self.remedy}")
        if leads_out(path, folder):
            self.refuse(f"{path} links to {path.resolve()}, outside the {self.name}: put the file itself there")
        return path

    def read_json(self, path: Path) -> bytes:
        """Return the bytes of a JSON file unless there are too many."""
        if (size := path.stat().st_size) > _JSON_BYTES:
            self.refuse(f"{path} has {size} bytes; no {self.name} has such a file of over {_JSON_BYTES}: {self.remedy}")
        return path.read_bytes()

    def read_config(self, path: Path, model: type[ModelT], version: int = 1) -> ModelT:
        """Read a config of a format version; a key may come once only, and no type is converted."""
        raw = self.read_json(path)
        given = self.parsed(path, lambda: json.loads(raw, object_pairs_hook=unique_keys))
        found = given.get("format_version") if isinstance(given, dict) else None
        if found is None:
            self.refuse(f"{path} is not the config of a {self.name}: it states no format_version; give another folder")
        if found != version or type(found) is not int:  # True and 1.0 equal 1
            self.refuse(f"{path} has format version {shown(repr(found))}, this msense reads {version}: update it")
        return self.valid(path, lambda: model.model_validate_json(raw, strict=True))

    def parsed(self, path: Path, parse: Callable[[], Any]) -> Any:  # noqa: ANN401 - JSON
        """Return what a JSON reader makes of a file."""
        try:
            return parse()
        except (ValueError, RecursionError) as error:
            raise self.error(f"{path} is not JSON ({shown(error)}): {self.remedy}") from error

    def valid(self, path: Path, validate: Callable[[], ModelT]) -> ModelT:
        """Return what pydantic makes of a file, or its first faults with their places."""
        try:
            return validate()
        except ValidationError as error:
            raise self.error(f"{path} is wrong: {all_errors(error)}; {self.remedy}") from error

    def header(self, path: Path) -> tuple[TensorSpecs, dict[str, int]]:
        """Return the tensors of a safetensors file, one after the other to its very end, and where each starts in it."""
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_BYTES):
                self.refuse(f"{path} ({size} bytes) is cut off or no safetensors file: {self.remedy}")
            raw = file.read(length)
        try:
            json.loads(raw, object_pairs_hook=unique_keys)
            header = _HEADER.validate_json(raw, strict=True)
        except ValidationError as error:
            raise self.error(f"{path} has a foreign header: {all_errors(error)}; {self.remedy}") from error
        except (ValueError, RecursionError) as error:
            raise self.error(f"{path} has a foreign header: {shown(error)}; {self.remedy}") from error
        end, starts = 0, {}
        for name, entry in sorted(header.items(), key=lambda item: item[1].data_offsets):
            needed = ITEM_BYTES.get(entry.dtype, 0)
            for count in entry.shape:
                needed *= count  # Python integers: nothing overflows
            if entry.dtype not in ITEM_BYTES or entry.data_offsets != (end, end + needed):
                self.refuse(
                    f"{path}: the bytes of {shown(name)} ({shown(entry.dtype)} {entry.shape}) are not where they should "
                    f"be: {self.remedy}"
                )
            starts[name] = 8 + len(raw) + end
            end += needed
        if 8 + len(raw) + end != size:
            self.refuse(
                f"{path} has {size} bytes, its header speaks of {8 + len(raw) + end}: it is cut off; {self.remedy}"
            )
        return {name: (entry.dtype, entry.shape) for name, entry in header.items()}, starts

    def refuse(self, message: str) -> NoReturn:
        """Raise the artefact's own error."""
        raise self.error(message)


def check_model_settings(settings: Any, tensors: int) -> str | None:  # noqa: ANN401 - JSON
    """Look for what would make a library build without end, or fetch code, on the word of a model's config.

    Args:
        settings: of a transformer, as JSON.
        tensors: of its weights: no model has more layers.

    Returns:
        What is wrong, in words for the middle of a sentence; None if nothing is.
    """
    waiting: list[tuple[str, Any]] = [("", settings)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(str(key), inner) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(name, inner) for inner in value]
        elif name.endswith("_implementation") and "/" in str(value):
            return f"{shown(name)} names code on the hub, {shown(value)!r}, which is never run"
        elif name in _FETCHED and value:
            return f"{shown(name)} names another model, which is never fetched"
        elif isinstance(value, int | float) and value > _POSITIONS and "position" in name:
            return f"{shown(name)} is {shown(value)}, more than any model reads"
        elif isinstance(value, int | float) and value > tensors and any(word in name for word in _COUNTS):
            return f"{shown(name)} is {shown(value)}, but its weights have {tensors} tensors"
    return None


def leads_out(path: Path, folder: Path) -> bool:
    """Tell whether a link leads out of a folder; those of the hub's cache lead from its snapshots to its own blobs."""
    target = path.resolve()
    for snapshot in (folder.absolute(), *folder.absolute().parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and repository.name.startswith("models--"):
            if target.is_relative_to((repository / "blobs").resolve()):
                return False
            break
    return not target.is_relative_to(folder.resolve())


def shown(value: object) -> str:
    """Return what a file says on one short line, without control characters, for an error."""
    try:
        whole = str(value)
    except ValueError:  # a number of more digits than Python writes
        whole = "a very long number"
    return "".join(c if c.isprintable() else "?" for c in whole[:200]) + ("..." if len(whole) > 200 else "")


def all_errors(error: ValidationError) -> str:
    """Return the first faults of a file, each with its place in it."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)[:5]
    return "; ".join(f"{shown('.'.join(map(str, e['loc']))) or 'all of it'}: {shown(e['msg'])}" for e in errors)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object; where a key comes twice, two readers may see two different files."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} comes twice")
        found[key] = value
    return found
