"""A student's folder: config.json and model.safetensors; nothing in it is trusted or run. `shipping` adds the rest.

Comes in: a student, or a folder. Goes out: a folder, or a student. Loading makes the student without memory first and
holds its shapes against the file's header: what is allocated then is what the file holds. Holds the weights twice.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from msense.artefact import Artefact, check_model_settings, shown
from msense.dictionary.format import atomic_path
from msense.errors import BadInput, StudentError
from msense.student.config import StudentConfig, StudentFiles
from msense.student.student import Student

STUDENT = Artefact("student", "copy or train it again", StudentError)
LARGEST_WEIGHT = 1e9  # far above what training gives; products of some do not leave float32
_BUFFER_BYTES = 256 << 20
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
        config = STUDENT.read_config(inside(files, files.config), StudentConfig)
        return _read_weights(inside(files, files.weights), config)
    except (OSError, UnicodeDecodeError) as error:
        raise StudentError(f"{files.folder} cannot be read ({error}): see to its files, or copy it again") from error


def inside(files: StudentFiles, path: Path) -> Path:
    """Return a path of the folder unless it is missing, no plain file, or a link leads out of the folder."""
    return STUDENT.inside(path, files.folder)


def _read_weights(path: Path, config: StudentConfig) -> Student:
    """Make a student of a config whose tensors are exactly those of a file."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            found = {name: tuple(part.get_shape()) for name, part in slices.items()}
            foreign = sorted({part.get_dtype() for part in slices.values()} - set(_DTYPES))
            if wrong := check_model_settings(config.body, len(found)):
                raise StudentError(f"{path.parent}: in config.json, {wrong}: copy or train it again")
            with torch.device("meta"):
                empty = _built(path, config)
            wanted = {name: tuple(tensor.shape) for name, tensor in empty.weights().items()}
            _check_buffers(path, empty)
            unequal = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            if unequal:
                here, there = (shapes.get(unequal[0], "nothing") for shapes in (found, wanted))
                raise StudentError(
                    f"{path} does not fit config.json: {shown(unequal[0])} is {here} there, but should be {there} "
                    f"({len(unequal)} tensors differ): copy or train it again"
                )
            if foreign:
                raise StudentError(f"{path} holds numbers of type {shown(foreign[0])}, not {_DTYPES}: train it again")
            weights = {name: file.get_tensor(name).float() for name in wanted}
    except SafetensorError as error:
        raise StudentError(f"{path} is cut off or no safetensors file ({shown(error)}): copy it again") from error
    for name, tensor in weights.items():
        if not (tensor.abs() <= LARGEST_WEIGHT).all():  # NaN is not, either
            raise StudentError(
                f"{path}: {name} holds NaN or infinite numbers, or some above {LARGEST_WEIGHT:g}: train the student again"
            )
    student = _built(path, config)
    student.load_weights(weights)
    return student.eval()


def _check_buffers(path: Path, student: Student) -> None:
    """Refuse a student that makes far more of its config than its file holds; it takes no memory yet."""
    size = sum(buffer.numel() * buffer.element_size() for buffer in student.buffers())
    if size > _BUFFER_BYTES + 2 * path.stat().st_size:
        raise StudentError(f"{path.parent}: config.json asks for {size} bytes beside the weights: train it again")


def _built(path: Path, config: StudentConfig) -> Student:
    try:
        return Student(config)
    except StudentError:
        raise
    except BadInput as error:
        raise StudentError(
            f"{path.parent}: config.json does not make a student ({shown(error)}): train it again"
        ) from error
