"""Read and write a student's config.json and model.safetensors; nothing in a folder is trusted or executed.

Shapes are compared with a student on the meta device first: memory is about twice the size of the file.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from msense.errors import InputError, StudentError
from msense.io.atomic import atomic_path
from msense.io.untrusted import Artefact, check_model_settings, printable
from msense.student.config import StudentConfig, StudentFiles
from msense.student.student import Student

STUDENT = Artefact("student", "copy or train it again", StudentError)
LARGEST_WEIGHT = 1e9  # far above trained weights, and small enough that sums of products stay finite in float32
_BUFFER_BYTES = 256 << 20
_DTYPES = ("F32", "F16", "BF16")


def save_student(folder: str | Path, student: Student, config: StudentConfig | None = None) -> None:
    """Write a student's weights and config (default: its own), replacing an existing one."""
    files = StudentFiles(Path(folder))
    files.folder.mkdir(parents=True, exist_ok=True)
    files.config.unlink(missing_ok=True)
    with atomic_path(files.weights) as scratch:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in student.weights().items()}, scratch)
    with atomic_path(files.config) as scratch:
        scratch.write_text((config or student.config).model_dump_json(indent=1, by_alias=True) + "\n", encoding="utf-8")


def load_student(folder: str | Path) -> Student:
    """Load a student in float32 on the CPU, in `eval` mode.

    Raises:
        StudentError: a file is missing, truncated, malformed, inconsistent, or links out of the folder.
    """
    files = StudentFiles(Path(folder))
    try:
        config = STUDENT.read_config(checked_path(files, files.config), StudentConfig)
        return _read_weights(checked_path(files, files.weights), config)
    except (OSError, UnicodeDecodeError) as error:
        raise StudentError(f"cannot read {files.folder} ({error}): check its files, or copy it again") from error


def checked_path(files: StudentFiles, path: Path) -> Path:
    """Return `path`; raise StudentError if it is missing, not a regular file, or a link out of the folder."""
    return STUDENT.inside(path, files.folder)


def _read_weights(path: Path, config: StudentConfig) -> Student:
    """Return a student of this config with the weights of a file."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            if problem := check_model_settings(config.body, len(slices)):
                raise StudentError(f"{path.parent}: in config.json, {problem}: copy or train it again")
            with torch.device("meta"):
                empty = _build(path, config)
            size = sum(buffer.numel() * buffer.element_size() for buffer in empty.buffers())  # not in the file
            if size > _BUFFER_BYTES + 2 * path.stat().st_size:
                raise StudentError(f"{path.parent}: config.json requires {size} bytes of buffers: train it again")
            _check_header(path, slices, {name: tuple(tensor.shape) for name, tensor in empty.weights().items()})
            weights = {name: file.get_tensor(name).float() for name in slices}
    except SafetensorError as error:
        raise StudentError(
            f"{path} is truncated or not a safetensors file ({printable(error)}): copy it again"
        ) from error
    for name, tensor in weights.items():
        if not (tensor.abs() <= LARGEST_WEIGHT).all():  # also false for NaN
            raise StudentError(
                f"{path}: {name} has values that are NaN, infinite or above {LARGEST_WEIGHT:g}: train the student again"
            )
    student = _build(path, config)
    student.load_weights(weights)
    return student.eval()


def _check_header(path: Path, slices: dict, expected: dict[str, tuple[int, ...]]) -> None:
    """Check names, shapes and dtypes of a safetensors file before its tensors are read."""
    actual = {name: tuple(part.get_shape()) for name, part in slices.items()}
    unequal = sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
    if unequal:
        first = unequal[0]
        raise StudentError(
            f"{path} does not match config.json: {printable(first)} has shape {actual.get(first)}, expected "
            f"{expected.get(first)} ({len(unequal)} tensors differ): copy or train it again"
        )
    if foreign := sorted({part.get_dtype() for part in slices.values()} - set(_DTYPES)):
        raise StudentError(f"{path} has tensors of dtype {printable(foreign[0])}, expected {_DTYPES}: train it again")


def _build(path: Path, config: StudentConfig) -> Student:
    try:
        return Student(config)
    except StudentError:
        raise
    except InputError as error:
        raise StudentError(
            f"{path.parent}: invalid model in config.json ({printable(error)}): train it again"
        ) from error
