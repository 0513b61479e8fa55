"""Read and write a student's config and tensors in either layout; nothing in a folder is trusted or executed.

Shapes are compared with a student on the meta device first: memory is about twice the size of the file.
"""

import json
import os
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

from msense.dictionary.layout import DictionaryFiles
from msense.errors import InputError, StudentError
from msense.io import storage
from msense.io.scratch import atomic_path
from msense.io.untrusted import Artefact, check_model_settings, printable, reject_duplicate_keys
from msense.student.config import StudentConfig
from msense.student.layout import StudentFiles
from msense.student.portable import UNUSED, tensor_files
from msense.student.student import Student
from msense.student.transformer import without_identity
from msense.teacher.files import local_or_hub_folder, module_kinds, read_settings

STUDENT = Artefact("student", "copy or train it again", StudentError)
LARGEST_WEIGHT = 1e9  # far above trained weights, and small enough that sums of products stay finite in float32
_BUFFER_BYTES = 256 << 20
_DTYPES = ("F32", "F16", "BF16")
WeightDtype = Literal["float32", "float16", "bfloat16"]
_INTEGERS = ("I64", "I32", "U8")  # of tables that a few models keep beside their weights
_HUB_FILES = ["*.json", "*.safetensors", "README.md", "dictionary/*", "senses/*"]


def student_folder(name: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """Return the local folder of a student or of the run that made it: an existing one, or one downloaded.

    `token` is for a private repository; default: the one stored on this machine. It is never stored or logged. Raises
    InputError if nothing exists at the URI, StudentError if there is no such folder or hub repository.
    """
    if not str(name):
        raise StudentError("no student is named: give a folder, a URI or a hub name")
    for inner in ("student", "student/student"):  # of the run that made it, and of the output of `msense make`
        own = storage.join(str(name), inner)
        if any(storage.exists(storage.join(own, file)) for file in ("modules.json", "config.json")):
            name = own
            break
    if isinstance(name, str) and "://" in name:
        return storage.local_copy(name)
    text = str(name.absolute() if isinstance(name, Path) else name)
    return local_or_hub_folder("student", text, _HUB_FILES, revision, token, StudentError)


def save_student(folder: str | Path, student: Student, config: StudentConfig | None = None) -> None:
    """Write a student's weights and config (default: its own) alone, as in a checkpoint, replacing an existing one."""
    StudentFiles(Path(folder), portable=True).config.unlink(missing_ok=True)
    files = StudentFiles(Path(folder), portable=False)
    files.folder.mkdir(parents=True, exist_ok=True)
    files.config.unlink(missing_ok=True)
    save_weights(files, student)
    save_config(files, config or student.config)


def save_weights(
    files: StudentFiles, student: Student, rows: int | None = None, dtype: WeightDtype = "float32"
) -> None:
    """Write a student's tensors in a dtype; of a portable table, the first `rows`.

    Raises:
        StudentError: a weight is too large for the dtype.
    """
    tensors = student.weights()
    for path, names in tensor_files(student, files).items():
        weights: dict[str, torch.Tensor] = {}
        places: set[int] = set()
        for name, stored in names.items():
            own = tensors[name].detach()
            if files.portable and name == "body.means":
                own = own[:rows]
            own = _rounded(name, own.cpu().contiguous(), dtype)
            weights[stored] = own.clone() if own.data_ptr() in places else own  # safetensors refuses shared weights
            places.add(own.data_ptr())
        path.parent.mkdir(exist_ok=True)
        with atomic_path(path) as scratch:
            save_file(weights, scratch, metadata={"format": "pt"})


def _rounded(name: str, tensor: torch.Tensor, dtype: WeightDtype) -> torch.Tensor:
    if dtype == "float32" or not tensor.is_floating_point():
        return tensor
    rounded = tensor.to(getattr(torch, dtype))
    if not rounded.isfinite().all():
        raise StudentError(f"weight {name} has values that {dtype} cannot hold: use bfloat16 or float32")
    return rounded


def save_config(files: StudentFiles, config: StudentConfig) -> None:
    """Write a student's config, without that of a portable student's body, which has its own file."""
    if files.portable and config.body is not None:
        config = config.model_copy(update={"body": {}})
    files.config.parent.mkdir(exist_ok=True)
    with atomic_path(files.config) as scratch:
        added = {"include_frame"} if config.include_frame else None  # which older versions refuse
        scratch.write_text(config.model_dump_json(indent=1, by_alias=True, exclude=added) + "\n", encoding="utf-8")


def load_student(folder: str | Path) -> Student:
    """Load a student in float32 on the CPU, in `eval` mode.

    Raises:
        StudentError: a file is missing, truncated, malformed, inconsistent, or links out of the folder.
    """
    files = StudentFiles(Path(folder))
    made = files.weights.exists() or files.config.exists()  # a student, if a damaged one
    places = [files.folder] if made else [files.folder, files.folder / "dictionary"]
    if any(path.exists() for place in places for path in (DictionaryFiles(place).arrays, DictionaryFiles(place).index)):
        raise StudentError(
            f"{files.folder} is a dictionary or the run that built it: give a student, made by msense distill"
        )
    try:
        return _read_student(files, _read_config(files))
    except StudentError:
        raise
    except (InputError, OSError, UnicodeError) as error:  # InputError: transformers rejects the body's settings
        raise StudentError(
            f"{files.folder} is not a valid student ({printable(error)}): {STUDENT.remedy}, or check its permissions"
        ) from error


def checked_path(files: StudentFiles, path: Path) -> Path:
    """Return `path`; raise StudentError if it is missing, not a regular file, or a link out of the folder."""
    return STUDENT.inside(path, files.folder)


def _read_config(files: StudentFiles) -> StudentConfig:
    """Return a student's config, with the settings of its body."""
    if files.portable and not os.path.lexists(files.config):
        STUDENT.refuse(
            f"{files.config} is missing: sentence-transformers copies only its own files when it saves a model, so copy "
            f"the folder {files.config.parent.name}/ of the student that was loaded into {files.folder}. Without it, and if "
            "msense did not train the model, use SentenceTransformer instead of SenseEncoder"
        )
    config = STUDENT.read_config(checked_path(files, files.config), StudentConfig)
    if not files.portable or config.body is None:
        return config
    path = checked_path(files, files.body_config)
    try:
        settings = json.loads(STUDENT.read_json(path), object_pairs_hook=reject_duplicate_keys)
    except (ValueError, RecursionError) as error:
        raise StudentError(f"{path} is not JSON ({printable(error)}): {STUDENT.remedy}") from error
    if not isinstance(settings, dict):
        STUDENT.refuse(f"{path} is not the config of a transformer: {STUDENT.remedy}")
    return config.model_copy(update={"body": without_identity(settings)})


def _read_student(files: StudentFiles, config: StudentConfig) -> Student:
    specs, _ = STUDENT.header(checked_path(files, files.weights), metadata=True)
    if problem := check_model_settings(config.body, len(specs)):
        STUDENT.refuse(f"{files.folder}: in config.json, {problem}: {STUDENT.remedy}")
    with torch.device("meta"):
        empty = Student(config)
    size = sum(buffer.numel() * buffer.element_size() for buffer in empty.buffers())  # not in the file
    if size > _BUFFER_BYTES + 2 * files.weights.stat().st_size:
        STUDENT.refuse(f"{files.folder}: config.json requires {size} bytes of buffers: {STUDENT.remedy}")
    if files.portable:
        _check_modules(files, empty)
    weights: dict[str, torch.Tensor] = {}
    for path, names in tensor_files(empty, files).items():
        weights |= _read_tensors(checked_path(files, path), names, empty, portable=files.portable)
    student = Student(config).float()  # whatever torch's default dtype is
    student.load_weights(weights)
    return student.eval()


def _check_modules(files: StudentFiles, student: Student) -> None:
    """Raise StudentError if sentence-transformers reads other settings than the student's config has."""
    config = student.config
    expected: dict[str, object] = {"layers after pooling": len(config.projections) + (student.adaptor is not None)}
    expected |= {"normalization": config.normalize}
    if config.is_table:
        kinds = [kind.rpartition(".")[2] for kind in module_kinds(checked_path(files, files.modules))]
        found: dict[str, object] = {"layers after pooling": kinds.count("Dense"), "normalization": "Normalize" in kinds}
    else:
        own = read_settings(files.folder)
        found = {"layers after pooling": len(own.projections), "normalization": own.normalize, "pooling": own.pooling}
        found |= {"include_prompt": own.include_prompt, "max_length": own.max_length or config.max_length}
        expected |= {name: getattr(config, name) for name in ("pooling", "include_prompt", "max_length")}
    for name, value in expected.items():
        if found[name] != value:
            STUDENT.refuse(
                f"{files.config} has {name} {value}, but the files of sentence-transformers beside it {found[name]}: make them "
                "equal, or copy the student again"
            )


def _read_tensors(path: Path, names: dict[str, str], empty: Student, *, portable: bool) -> dict[str, torch.Tensor]:
    """Return the tensors of a file, whose `names` there are given; a portable table may lack rows of unused tokens."""
    every = empty.weights()
    expected = {stored: every[name] for name, stored in names.items()}
    shapes = {stored: tuple(tensor.shape) for stored, tensor in expected.items()}
    whole = {stored for stored, tensor in expected.items() if not tensor.is_floating_point()}  # buffers
    found, _ = STUDENT.header(path, metadata=True)
    specs = {name: spec for name, spec in found.items() if not (portable and name.startswith(UNUSED))}
    table = portable and "body.means" in names
    for name in sorted(shapes.keys() | specs.keys()):
        dtype, shape = specs.get(name, ("F32", None))
        if table and shape and name in shapes and shape[0] <= shapes[name][0]:
            shapes[name] = (shape[0], *shapes[name][1:])
        if shape != shapes.get(name) or dtype not in (_INTEGERS if name in whole else _DTYPES):
            difference = (
                f"{printable(name)} has shape {shape} and dtype {printable(dtype)}, expected {shapes.get(name)}"
            )
            STUDENT.refuse(f"{path} does not match config.json: {difference} and {_DTYPES}: {STUDENT.remedy}")
    stored = load_file(path)
    weights = {name: stored[own] if own in whole else stored[own].float() for name, own in names.items()}
    for name, tensor in weights.items():
        if not (tensor.abs() <= LARGEST_WEIGHT).all():  # also false for NaN
            problem = f"{names[name]} has values that are NaN, infinite or above {LARGEST_WEIGHT:g}"
            STUDENT.refuse(f"{path}: {problem}: train the student again")
    if table:
        means = weights["body.means"]
        weights["body.means"] = torch.nn.functional.pad(means, (0, 0, 0, len(every["body.means"]) - len(means)))
    return weights
