"""Read and write a student's config.json and model.safetensors; nothing in a folder is trusted or executed.

Shapes are compared with a student on the meta device first: memory is about twice the size of the file.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from msense.errors import InputError, StudentError
from msense.io import storage
from msense.io.scratch import atomic_path
from msense.io.untrusted import Artefact, check_model_settings, printable
from msense.student.config import StudentConfig, StudentFiles
from msense.student.student import Student
from msense.teacher.files import local_or_hub_folder

STUDENT = Artefact("student", "copy or train it again", StudentError)
LARGEST_WEIGHT = 1e9  # far above trained weights, and small enough that sums of products stay finite in float32
_BUFFER_BYTES = 256 << 20
_DTYPES = ("F32", "F16", "BF16")
_INTEGERS = ("I64", "I32", "U8")  # of tables that a few models keep beside their weights
_HUB_FILES = ["*.json", "*.safetensors", "README.md", "dictionary/*"]


def student_folder(name: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """Return the local folder of a student or of the run that made it: an existing one, or one downloaded.

    `token` is for a private repository; default: the one stored on this machine. It is never stored or logged. Raises
    InputError if nothing exists at the URI, StudentError if there is no such folder or hub repository.
    """
    of_run = storage.join(str(name), "student")
    if storage.exists(storage.join(of_run, "config.json")):
        name = of_run
    if isinstance(name, str) and "://" in name:
        return storage.local_copy(name)
    text = str(name.absolute() if isinstance(name, Path) else name)
    return local_or_hub_folder("student", text, _HUB_FILES, revision, token, StudentError)


def save_student(folder: str | Path, student: Student, config: StudentConfig | None = None) -> None:
    """Write a student's weights and config (default: its own), replacing an existing one."""
    files = StudentFiles(Path(folder))
    files.folder.mkdir(parents=True, exist_ok=True)
    files.config.unlink(missing_ok=True)
    weights: dict[str, torch.Tensor] = {}
    places: set[int] = set()
    for name, tensor in student.weights().items():
        own = tensor.detach().cpu().contiguous()
        weights[name] = own.clone() if own.data_ptr() in places else own  # safetensors refuses shared weights
        places.add(own.data_ptr())
    with atomic_path(files.weights) as scratch:
        save_file(weights, scratch)
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
    except StudentError:
        raise
    except (InputError, OSError, UnicodeError) as error:  # InputError: transformers rejects the body's settings
        raise StudentError(
            f"{files.folder} is not a valid student ({printable(error)}): {STUDENT.remedy}, or check its permissions"
        ) from error


def checked_path(files: StudentFiles, path: Path) -> Path:
    """Return `path`; raise StudentError if it is missing, not a regular file, or a link out of the folder."""
    return STUDENT.inside(path, files.folder)


def _read_weights(path: Path, config: StudentConfig) -> Student:
    specs, _ = STUDENT.header(path)
    if problem := check_model_settings(config.body, len(specs)):
        STUDENT.refuse(f"{path.parent}: in config.json, {problem}: {STUDENT.remedy}")
    with torch.device("meta"):
        empty = Student(config)
    size = sum(buffer.numel() * buffer.element_size() for buffer in empty.buffers())  # not in the file
    if size > _BUFFER_BYTES + 2 * path.stat().st_size:
        STUDENT.refuse(f"{path.parent}: config.json requires {size} bytes of buffers: {STUDENT.remedy}")
    shapes = {name: tuple(tensor.shape) for name, tensor in empty.weights().items()}
    whole = {name for name, tensor in empty.weights().items() if not tensor.is_floating_point()}  # buffers
    for name in sorted(shapes.keys() | specs.keys()):
        dtype, shape = specs.get(name, ("F32", None))
        if shape != shapes.get(name) or dtype not in (_INTEGERS if name in whole else _DTYPES):
            difference = (
                f"{printable(name)} has shape {shape} and dtype {printable(dtype)}, expected {shapes.get(name)}"
            )
            STUDENT.refuse(f"{path} does not match config.json: {difference} and {_DTYPES}: {STUDENT.remedy}")
    weights = {name: tensor if name in whole else tensor.float() for name, tensor in load_file(path).items()}
    for name, tensor in weights.items():
        if not (tensor.abs() <= LARGEST_WEIGHT).all():  # also false for NaN
            problem = f"{name} has values that are NaN, infinite or above {LARGEST_WEIGHT:g}"
            STUDENT.refuse(f"{path}: {problem}: train the student again")
    student = Student(config).float()  # whatever torch's default dtype is
    student.load_weights(weights)
    return student.eval()
