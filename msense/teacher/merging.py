"""Merge LoRA adapters into a base model: one plain teacher folder, which everything else reads like any other.

How the teacher reads a text is written into the folder: attention in config.json, what surrounds a text in the tokenizer's
template, pooling in sentence-transformers' files. Memory: one file of weights, the adapters, and one layer in float32.
"""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors

from msense.errors import InputError
from msense.io.scratch import atomic_path, is_scratch
from msense.io.untrusted import printable
from msense.teacher.adapters import LoraLayer, bare_name, read_adapter
from msense.teacher.files import (
    ADAPTER_CONFIG,
    INCLUDE_FRAME,
    POOLING_KEYS,
    bidirectional_setting,
    check_files,
    loading,
    read_object,
)
from msense.teacher.fingerprint import weights_fingerprint
from msense.teacher.spec import check_attention, is_decoder
from msense.tokenizer import special_tokens_around

logger = logging.getLogger(__name__)
HEADS = ("lm_head.", "score.", "classifier.")  # tensors that no hidden state depends on
MERGED = "merged.json"  # what a folder was made of; empty until that is done
_INDEX = "model.safetensors.index.json"
_TRANSPOSED = ("gpt2", "openai-gpt")  # model types whose layers store their weights as [in, out]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TEXTS = ("Which is it, 7?", "a", "the end of the second one.")  # to see what tokens surround any text
_CODE = ("auto_map", "_name_or_path", "custom_pipelines")


@dataclass(frozen=True)
class Reading:
    """How the merged teacher reads a text."""

    bidirectional: bool | None = None  # None: as the base's config says
    before: str = ""  # what the tokenizer puts around every text, after its own special tokens
    after: str = ""
    pooling: str = "mean"
    include_prompt: bool = True
    include_frame: bool = True  # whether `before` is pooled, and what the tokenizer itself puts there
    max_length: int | None = None
    normalize: bool = False
    prompt: str = ""  # before every text by default
    tokenizer: Mapping[str, Any] = field(default_factory=dict)  # settings of sentence-transformers' Transformer module


def merge_folders(base: Path, adapters: Sequence[Path], output: Path, reading: Reading) -> dict[str, Any]:
    """Write a base model with adapters, added in this order, into a new folder; its config.json last.

    Each merged weight is the sum in float32 of the base's and all adapters' parts, rounded once to the base's dtype.

    Returns what is written to merged.json: `base` and `adapters` with fingerprints, `layers` changed, and the reading.

    Raises:
        InputError: an adapter cannot be merged or does not fit, the base is damaged, quantised, or not in safetensors, or
            the output has other files than those of a merge that was interrupted.
    """
    settings, known = _read_base(base, reading)
    added = [_body_layers(folder, read_adapter(folder)) for folder in adapters]
    _clear(output)
    _write_tokenizer([*reversed(adapters), base], output, reading, int(getattr(known, "vocab_size", 0)))
    changed = _write_weights(base, added, output, transposed=known.model_type in _TRANSPOSED)
    for folder, layers in zip(adapters, added, strict=True):
        if lost := sorted(layers.keys() - changed):
            raise InputError(
                f"adapter {folder} changes {len(lost)} layers that {base} does not have, first {printable(lost[0])}: give the "
                "base model that it was trained for"
            )
    _write_pooling(output, settings, reading)
    made = {
        "base": _source(base) | {"fingerprint": weights_fingerprint(base)},
        "adapters": [_source(own) | {"fingerprint": weights_fingerprint(own, ADAPTER_CONFIG)} for own in adapters],
        "layers": len(changed),
        "reading": vars(reading),
    }
    _write_json(output / MERGED, made)
    _write_json(output / "config.json", _config(settings, reading.bidirectional))
    return made


def _source(folder: Path) -> dict[str, str]:
    """Return the name of a folder, or the repository and the commit of one in the cache of the Hub."""
    if folder.parent.name != "snapshots":
        return {"name": folder.name}
    return {"name": folder.parts[-3].removeprefix("models--").replace("--", "/", 1), "revision": folder.name}


def _read_base(base: Path, reading: Reading) -> tuple[dict[str, Any], Any]:
    """Return the base's config.json, and the config of its text model as transformers reads it."""
    from transformers import AutoConfig

    check_files(str(base), base)
    settings = read_object(base / "config.json")
    if settings.get("quantization_config"):
        raise InputError(f"{base} is quantised: give the base model in float32, bfloat16 or float16 (--teacher)")
    with loading(repr(str(base))):
        known = AutoConfig.from_pretrained(base, trust_remote_code=False).get_text_config()
    if reading.bidirectional is None and is_decoder(known.model_type):
        check_attention(str(base), settings)
    return settings, known


def _body_layers(folder: Path, layers: Mapping[str, LoraLayer]) -> dict[str, LoraLayer]:
    """Return an adapter's layers without those of heads, which no hidden state depends on."""
    body = {name: layer for name, layer in layers.items() if not f"{name}.".startswith(HEADS)}
    if not body:
        raise InputError(f"adapter {folder} changes nothing but the model's head: use another adapter")
    return body


def _clear(output: Path) -> None:
    """Create the output folder, or empty one of a merge that was interrupted."""
    output.mkdir(parents=True, exist_ok=True)
    if any(output.iterdir()) and not (output / MERGED).is_file():
        raise InputError(f"{output} has other files, which could be read as the teacher's: give another --output")
    _write_json(output / MERGED, {})
    for file in output.iterdir():
        if is_scratch(file) or (file.suffix in (".safetensors", ".json") and file.name != MERGED):
            file.unlink()


def _weight_files(base: Path) -> list[Path]:
    """Return the files that transformers loads: some folders have the same weights in another format too."""
    if (whole := base / "model.safetensors").is_file():
        return [whole]
    places = read_object(base / _INDEX).get("weight_map")
    files = {base / str(name) for name in places.values()} if isinstance(places, dict) else base.glob("*.safetensors")
    return sorted(files)


def _write_weights(
    base: Path, adapters: Sequence[Mapping[str, LoraLayer]], output: Path, *, transposed: bool
) -> set[str]:
    """Write the base's files one by one with the adapters added; return the bare names of the changed layers."""
    places: dict[str, str] = {}
    changed: set[str] = set()
    for number, file in enumerate(files := _weight_files(base), 1):
        logger.info("merging file %d of %d", number, len(files))
        tensors = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(HEADS)}
        for name, tensor in tensors.items():
            layer = bare_name(name.removesuffix(".weight"))
            own = [adapter[layer] for adapter in adapters if name.endswith(".weight") and layer in adapter]
            if own:
                tensors[name] = _sum(name, tensor, own, transposed=transposed)
                if layer in changed:
                    raise InputError(f"{base} has two weights of layer {printable(layer)}: give another base model")
                changed.add(layer)
        if tensors:
            with atomic_path(output / file.name) as scratch:
                save_file(tensors, scratch, metadata={"format": "pt"})
            places |= dict.fromkeys(tensors, file.name)
    if set(places.values()) != {"model.safetensors"}:
        _write_json(output / _INDEX, {"metadata": {}, "weight_map": places})
    return changed


def _sum(name: str, weight: torch.Tensor, layers: Sequence[LoraLayer], *, transposed: bool) -> torch.Tensor:
    """Return a weight with what adapters add, in its dtype; a transposed one is [in, out]."""
    if not weight.is_floating_point() or weight.element_size() == 1:
        raise InputError(f"weight {printable(name)} is {weight.dtype}: give the base model without quantisation")
    total = weight.float()
    for layer in layers:
        delta = layer.delta().T if transposed else layer.delta()
        if delta.shape != weight.shape:
            raise InputError(
                f"an adapter has a change of shape {tuple(delta.shape)} for weight {printable(name)} of shape "
                f"{tuple(weight.shape)}: give the base model that it was trained for"
            )
        total = total + delta
    return total.to(weight.dtype)


def _config(settings: Mapping[str, Any], bidirectional: bool | None) -> dict[str, Any]:
    """Return the config of the merged model: without code of its own, and with the requested attention."""
    config = {name: value for name, value in settings.items() if name not in _CODE}
    if bidirectional is None:
        return config
    inner = config.get("text_config")
    text = inner if isinstance(inner, dict) else config
    text = text | {"is_causal": not bidirectional}
    if "use_bidirectional_attention" in text:
        text["use_bidirectional_attention"] = bidirectional_setting(str(text.get("model_type")), bidirectional)
    return config | {"text_config": text} if isinstance(inner, dict) else text


def _write_tokenizer(folders: Sequence[Path], output: Path, reading: Reading, vocab_size: int) -> None:
    """Write the tokenizer of the first folder that has one, with the text around every text in its template."""
    source = next((folder for folder in folders if (folder / "tokenizer.json").is_file()), None)
    if source is None:
        raise InputError("neither the base nor an adapter has a tokenizer.json: put one into the base's folder")
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)
    with loading(f"{source.name!r} (tokenizer)"):
        tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
    if (highest := max(tokenizer.get_vocab().values(), default=0)) >= vocab_size:
        raise InputError(
            f"the tokenizer of {source} has token {highest}, but the base model only {vocab_size} embeddings: replace its "
            "tokenizer.json by the base's, or remove it if it is an adapter's"
        )
    if not reading.before and not reading.after:
        return
    with loading(f"{source.name!r} (tokenizer)"):
        first, last = special_tokens_around(tokenizer)
    before, after = _tokens_around(tokenizer, reading.before, reading.after)
    around = {"before": [*first, *before], "after": [*after, *last]}
    parts = {f"<{kind}>": ids for kind, ids in around.items() if ids}
    template = " ".join([*(p for p in parts if p == "<before>"), "$A", *(p for p in parts if p == "<after>")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template,
        special_tokens=[
            {"id": part, "ids": ids, "tokens": [tokenizer.id_to_token(number) for number in ids]}
            for part, ids in parts.items()
        ],
    )
    with atomic_path(output / "tokenizer.json") as scratch:
        scratch.write_text(tokenizer.to_str(), encoding="utf-8")


def _tokens_around(tokenizer: Tokenizer, before: str, after: str) -> tuple[list[int], list[int]]:
    """Return the tokens of what surrounds texts: as beside a text, if any text has the same beside it, else as alone.

    SentencePiece's tokenizers put a space before any text, of which those alone would have one too many.
    """
    found = [_beside(tokenizer, before, text, after) for text in _TEXTS]
    if found[0] is not None and all(tokens == found[0] for tokens in found):
        return found[0]
    alone = [tokenizer.encode(text, add_special_tokens=False).ids if text else [] for text in (before, after)]
    return alone[0], alone[1]


def _beside(tokenizer: Tokenizer, before: str, text: str, after: str) -> tuple[list[int], list[int]] | None:
    """Return the tokens before and after a text; None if the text has other tokens between them than alone."""
    own = tokenizer.encode(text, add_special_tokens=False).ids
    whole = tokenizer.encode(before + text + after, add_special_tokens=False)
    begin, end = len(before.rstrip()), len(before + text)
    for first in range(len(whole.ids) - len(own) + 1):
        last = first + len(own)
        within = whole.offsets[first][0] >= begin and whole.offsets[last - 1][1] <= end
        if within and whole.ids[first:last] == own:
            return whole.ids[:first], whole.ids[last:]
    return None


def _write_pooling(output: Path, settings: Mapping[str, Any], reading: Reading) -> None:
    """Write the files of sentence-transformers."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling"} | ({"2_Normalize": "Normalize"} if reading.normalize else {})
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds.items())
    ]
    for path in kinds:
        (output / path).mkdir(exist_ok=True)
    pooling: dict[str, Any] = {key: mode == reading.pooling for mode, key in POOLING_KEYS.items()}
    pooling |= {"word_embedding_dimension": settings.get("hidden_size"), "include_prompt": reading.include_prompt}
    _write_json(output / "1_Pooling" / "config.json", pooling)
    body = {"max_seq_length": reading.max_length, "do_lower_case": False, **reading.tokenizer}
    _write_json(output / "sentence_bert_config.json", body)
    own = {"prompts": {"own": reading.prompt}, "default_prompt_name": "own"} if reading.prompt else {"prompts": {}}
    if reading.prompt or not reading.include_frame:
        frame = {} if reading.include_frame else {INCLUDE_FRAME: False}
        _write_json(output / "config_sentence_transformers.json", own | frame)
    _write_json(output / "modules.json", modules)


def _write_json(path: Path, content: Any) -> None:
    with atomic_path(path) as scratch:
        scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
