"""Checks of untrusted folders: dictionaries, students, classifiers and labels.

Sizes are checked before reading, pipes are never opened, and nothing is unpickled. Memory: one JSON file or safetensors
header.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from msense.errors import InputError

ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "I64": 8, "I32": 4, "U16": 2, "I8": 1, "U8": 1}  # safetensors dtypes
_JSON_BYTES = 4 << 20
_HEADER_BYTES = 1 << 20
_MAX_POSITIONS = 1 << 24  # of a model; some allocate a buffer of this size
_MODULES = frozenset((  # settings of all model types that are numbers of modules, each with tensors of its own
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "layers", "encoder_layers", "decoder_layers", "num_encoder_layers",
    "num_decoder_layers", "encoder_num_hidden_layers", "decoder_num_hidden_layers", "encoder_num_layers", "decoder_num_layers",
    "text_encoder_num_layers", "speech_encoder_layers", "t2u_encoder_layers", "t2u_decoder_layers", "vision_layers",
    "l_layers", "x_layers", "r_layers", "depth", "depths", "num_blocks", "num_encoder_blocks", "num_self_attends_per_block",
    "block_sizes", "num_hidden_groups", "inner_group_num", "num_feedforward_networks", "num_adapter_layers", "num_conv_layers",
    "num_mem_blocks", "num_stages", "mit_num_hidden_layers", "conf_num_hidden_layers",
))  # fmt: skip
_EXPERTS = frozenset((  # numbers of modules, or of rows of one tensor
    "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "n_shared_experts", "num_shared_experts",
    "moe_num_shared_experts", "zero_expert_num",
))  # fmt: skip
_MOST_EXPERTS = 1 << 12
_FETCHED = ("backbone", "use_timm_backbone", "use_pretrained_backbone")  # settings that name models to download
_Size = Annotated[int, Field(ge=0, lt=1 << 62)]
TensorSpecs = dict[str, tuple[str, tuple[int, ...]]]  # name: (safetensors dtype, shape)


class FrozenModel(BaseModel):
    """Base of the configs read from disk: immutable, without unknown keys or infinite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)


class _Entry(FrozenModel):
    """A tensor in a safetensors header."""

    dtype: str
    shape: Annotated[tuple[_Size, ...], Field(max_length=8)]
    data_offsets: tuple[_Size, _Size]


_HEADER = TypeAdapter(dict[str, _Entry])
ModelT = TypeVar("ModelT", bound=BaseModel)


@dataclass(frozen=True)
class Artefact:
    """A kind of folder, with the checks of its files and the errors that they raise.

    Attributes:
        name: such as "dictionary".
        remedy: what to do if a folder is corrupted.
        error: exception type.

    Example:
        >>> kind = Artefact("dictionary", "copy or build it again", DictionaryError)
        >>> specs, starts = kind.header(kind.inside(folder / "dictionary.safetensors", folder))
    """

    name: str
    remedy: str
    error: type[InputError]

    def inside(self, path: Path, folder: Path) -> Path:
        """Return a path, or raise if it is missing, not a regular file, or a link to outside the folder."""
        if not path.is_file():
            problem = "is not a regular file" if os.path.lexists(path) else "is missing"
            self.refuse(f"{path} {problem}: the {self.name} is incomplete; {self.remedy}")
        if links_outside(path, folder):
            self.refuse(f"{path} links to {path.resolve()}, outside the {self.name}: replace the link with the file")
        return path

    def read_json(self, path: Path) -> bytes:
        """Return the bytes of a JSON file, or raise if it is too large."""
        if (size := path.stat().st_size) > _JSON_BYTES:
            self.refuse(f"{path} has {size} bytes, more than the limit of {_JSON_BYTES}: {self.remedy}")
        return path.read_bytes()

    def read_config(self, path: Path, model: type[ModelT], version: int = 1) -> ModelT:
        """Read a config of a format version, strictly: no duplicate keys, no type conversion."""
        raw = self.read_json(path)
        try:
            config = json.loads(raw, object_pairs_hook=reject_duplicate_keys)
        except (ValueError, RecursionError) as error:
            raise self.error(f"{path} is not JSON ({printable(error)}): {self.remedy}") from error
        actual = config.get("format_version") if isinstance(config, dict) else None
        if actual is None:
            self.refuse(f"{path} is not the config of a {self.name}: it has no format_version; use another folder")
        if actual != version or type(actual) is not int:  # True and 1.0 equal 1
            shown = printable(repr(actual))
            self.refuse(f"{path} has format version {shown}, this msense reads {version}: update msense")
        return self.valid(path, model, raw)

    def valid(self, path: Path, model: type[ModelT], raw: bytes) -> ModelT:
        """Validate JSON strictly, or raise the artefact's error with its first errors."""
        try:
            return model.model_validate_json(raw, strict=True)
        except ValidationError as error:
            raise self.error(f"{path} is invalid: {format_errors(error)}; {self.remedy}") from error

    def header(self, path: Path, *, metadata: bool = False) -> tuple[TensorSpecs, dict[str, int]]:
        """Return the tensors of a safetensors file, which must fill it without gaps, and the byte offset of each.

        `metadata`: ignore texts beside them, such as transformers writes, in place of refusing them.
        """
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_BYTES):
                self.refuse(f"{path} ({size} bytes) is truncated or not a safetensors file: {self.remedy}")
            raw = file.read(length)
        try:
            parsed = json.loads(raw, object_pairs_hook=reject_duplicate_keys)
            if metadata and isinstance(parsed, dict) and isinstance(parsed.get("__metadata__"), dict):
                del parsed["__metadata__"]
            header = _HEADER.validate_json(json.dumps(parsed), strict=True)
        except (ValueError, RecursionError) as error:
            reason = format_errors(error) if isinstance(error, ValidationError) else printable(error)
            raise self.error(f"{path} has an invalid header: {reason}; {self.remedy}") from error
        end, starts = 0, {}
        for name, entry in sorted(header.items(), key=lambda item: item[1].data_offsets):
            starts[name], needed = 8 + length + end, ITEM_BYTES.get(entry.dtype, 0) * math.prod(entry.shape)
            if entry.dtype not in ITEM_BYTES or entry.data_offsets != (end, end + needed):
                tensor = f"{printable(name)} ({printable(entry.dtype)} {entry.shape})"
                self.refuse(f"{path}: tensor {tensor} has an invalid dtype or data offsets: {self.remedy}")
            end += needed
        if (expected := 8 + length + end) != size:
            self.refuse(f"{path} is truncated: it has {size} bytes, its header {expected}; {self.remedy}")
        return {name: (entry.dtype, entry.shape) for name, entry in header.items()}, starts

    def refuse(self, message: str) -> NoReturn:
        """Raise the artefact's error."""
        raise self.error(message)


def check_model_settings(settings: Any, tensors: int) -> str | None:
    """Look for settings of a model config that would make a library allocate without limit, or download code.

    Args:
        settings: a transformer's config, as JSON.
        tensors: number of tensors in its weights, an upper bound of its layers.

    Returns:
        The problem, as a phrase for the middle of a sentence, or None.
    """
    stack: list[tuple[str, Any]] = [("", settings)]
    while stack:
        name, value = stack.pop()
        if isinstance(value, dict):
            stack += [(str(key), inner) for key, inner in value.items()]
        elif isinstance(value, list):
            stack += [(name, inner) for inner in value]
        elif name.endswith("_implementation") and "/" in str(value):
            return f"{printable(name)} names code on the hub, {printable(value)!r}, which is never run"
        elif name in _FETCHED and value:
            return f"{printable(name)} names another model, which is never fetched"
        elif isinstance(value, int | float) and value > _MAX_POSITIONS and "position" in name:
            return f"{printable(name)} is {printable(value)}, more than any model reads"
        elif isinstance(value, int | float) and value > _most(name, tensors):
            return f"{printable(name)} is {printable(value)}, but its weights have {tensors} tensors"
    return None


def _most(name: str, tensors: int) -> float:
    """Return the largest valid value of a setting of a model with this many tensors."""
    if name in _EXPERTS:
        return max(tensors, _MOST_EXPERTS)
    return tensors if name in _MODULES else math.inf


def links_outside(path: Path, folder: Path) -> bool:
    """Return whether a link leads out of a folder; links from a Hub cache's snapshot to its own blobs do not."""
    allowed = [folder]
    for snapshots in folder.absolute().parents:
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
            allowed.append(snapshots.parent / "blobs")
            break
    return not any(path.resolve().is_relative_to(root.resolve()) for root in allowed)


def printable(value: object) -> str:
    """Return an untrusted value for an error message: one short line without control characters."""
    try:
        whole = str(value)
    except ValueError:  # an integer with more digits than Python converts
        whole = "a very long number"
    return "".join(c if c.isprintable() else "?" for c in whole[:200]) + ("..." if len(whole) > 200 else "")


def format_errors(error: ValidationError) -> str:
    """Return the first errors of a file, each with its location."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)[:5]
    return "; ".join(f"{printable('.'.join(map(str, e['loc']))) or 'the file'}: {printable(e['msg'])}" for e in errors)


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; raise ValueError for a duplicate key, which readers may resolve differently."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {key!r}")
        result[key] = value
    return result
