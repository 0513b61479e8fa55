"""A student's folder: config.json and model.safetensors; nothing in it is trusted or run. `shipping` adds the rest.

Comes in: a student, or a folder. Goes out: a folder, or a student. Loading makes the student without memory first and
holds its shapes against the file's header: what is allocated then is what the file holds. Holds the weights twice.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from msense.dictionary.checks import leads_out, shown
from msense.dictionary.format import atomic_path
from msense.errors import BadInput, StudentError
from msense.student.config import StudentConfig, StudentFiles
from msense.student.student import Student

_CONFIG_BYTES = 4 << 20
_DTYPES = ("F32", "F16", "BF16")


def save_student(folder: str | Path, student: Student, config: StudentConfig | None = None) -> None:
    """Write a student; one that is there is replaced.

    Args:
        folder: where to; made if missing.
        student: what.
        config: what is to be said of it; default: its own.
    """
    files = StudentFiles(Path(folder))
    files.folder.mkdir(parents=True, exist_ok=True)
    files.config.unlink(missing_ok=True)
    with atomic_path(files.weights) as scratch:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in student.weights().items()}, scratch)
    with atomic_path(files.config) as scratch:
        scratch.write_text((config or student.config).model_dump_json(indent=1) + "\n", encoding="utf-8")


def load_student(folder: str | Path) -> Student:
    """Read a student, in float32 on the CPU, set to inference (`eval`).

    Raises:
        StudentError: a file is missing, truncated, foreign, leads out of the folder or contradicts the other.
    """
    files = StudentFiles(Path(folder))
    try:
        config = _read_config(files)
        return _read_weights(inside(files, files.weights), config)
    except (OSError, UnicodeDecodeError) as error:
        raise StudentError(f"{files.folder} cannot be read ({error}): see to its files, or copy it again") from error


def inside(files: StudentFiles, path: Path) -> Path:
    """Return a path of the folder unless it is missing, no plain file, or a link leads out of the folder."""
    if not path.is_file():
        what = "is no plain file" if os.path.lexists(path) else "is missing"  # opening a pipe would wait for ever
        raise StudentError(f"{path} {what}: the student is not whole; copy or train it again")
    if leads_out(path, files.folder):
        raise StudentError(f"{path} links to {path.resolve()}, outside the student: put the file itself there")
    return path


def _read_config(files: StudentFiles) -> StudentConfig:
    path = inside(files, files.config)
    if (size := path.stat().st_size) > _CONFIG_BYTES:
        raise StudentError(f"{path} has {size} bytes, which is no student's config: copy or train it again")
    raw = path.read_bytes()
    try:
        version = json.loads(raw).get("format_version")
    except (ValueError, RecursionError, AttributeError) as error:
        raise StudentError(f"{path} is not a JSON object ({shown(error)}): copy or train it again") from error
    if version is None:
        raise StudentError(f"{path} is not the config of a student: it states no format_version; give another folder")
    if version != 1 or type(version) is not int:
        raise StudentError(f"{path} has format version {shown(repr(version))}, this msense reads 1: update it")
    try:
        return StudentConfig.model_validate_json(raw, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = shown(".".join(map(str, first["loc"]))) or "all of it"
        raise StudentError(f"{path} is wrong: {place}: {shown(first['msg'])}; copy or train it again") from error


def _read_weights(path: Path, config: StudentConfig) -> Student:
    """Make a student of a config whose tensors are exactly those of a file."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            found = {name: tuple(part.get_shape()) for name, part in slices.items()}
            foreign = sorted({part.get_dtype() for part in slices.values()} - set(_DTYPES))
            _check_sizes(path, config, len(found))
            with torch.device("meta"):
                wanted = {name: tuple(tensor.shape) for name, tensor in _built(path, config).weights().items()}
            wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            if wrong:
                here, there = (shapes.get(wrong[0], "nothing") for shapes in (found, wanted))
                raise StudentError(
                    f"{path} does not fit config.json: {shown(wrong[0])} is {here} there, but should be {there} "
                    f"({len(wrong)} tensors differ): copy or train it again"
                )
            if foreign:
                raise StudentError(f"{path} holds numbers of type {shown(foreign[0])}, not {_DTYPES}: train it again")
            weights = {name: file.get_tensor(name).float() for name in wanted}
    except SafetensorError as error:
        raise StudentError(f"{path} is cut off or no safetensors file ({shown(error)}): copy it again") from error
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise StudentError(f"{path}: {name} holds NaN or infinite numbers: train the student again")
    student = _built(path, config)
    student.load_weights(weights)
    return student.eval()


def _check_sizes(path: Path, config: StudentConfig, tensors: int) -> None:
    """Refuse a body of more layers than the file has tensors, before as many objects are made."""
    for name in ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_decoder_layers", "decoder_layers"):
        layers: Any = (config.body or {}).get(name, 0)
        if isinstance(layers, int) and layers > tensors:
            raise StudentError(
                f"{path} has {tensors} tensors, but config.json speaks of {layers} layers ({name}): they are not of one "
                "student; copy or train it again"
            )


def _built(path: Path, config: StudentConfig) -> Student:
    try:
        return Student(config)
    except StudentError:
        raise
    except BadInput as error:
        raise StudentError(
            f"{path.parent}: config.json does not make a student ({shown(error)}): train it again"
        ) from error
